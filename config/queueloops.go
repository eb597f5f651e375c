package config

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
)

// ErrQueueLoops is returned for what is no list of loops.
var ErrQueueLoops = errors.New("not a list of loops")

// MaxLoops is the most threads that serve, and MaxQueues the most queues that an
// export offers, and the longest list of their loops.
const (
	MaxLoops  = 256
	MaxQueues = 1024
)

// QueueLoops says which loops, counted from 0, serve the queues of an export: the
// list is gone through again and again, so that "0,1" has every other queue on
// loop 1.
type QueueLoops struct {
	Export string // its name; "" for every export that has no list of its own
	Loops  []int
}

// ParseQueueLoops reads LIST or NAME=LIST.
func ParseQueueLoops(s string) (QueueLoops, error) {
	q, list := QueueLoops{}, s
	if i := strings.LastIndexByte(s, '='); i >= 0 {
		q.Export, list = s[:i], s[i+1:]
	}
	for item := range strings.SplitSeq(list, ",") {
		n, err := strconv.Atoi(strings.TrimSpace(item))
		switch {
		case err != nil:
			return QueueLoops{}, fmt.Errorf("%w: %q (write the numbers of loops, counted from 0: 0,1,0,1)", ErrQueueLoops, s)
		case n < 0 || n >= MaxLoops:
			return QueueLoops{}, fmt.Errorf("%w: %q: there is no loop %d (they are counted from 0 to %d at most)", ErrQueueLoops, s, n, MaxLoops-1)
		case len(q.Loops) == MaxQueues:
			return QueueLoops{}, fmt.Errorf("%w: it is longer than %d", ErrQueueLoops, MaxQueues)
		}
		q.Loops = append(q.Loops, n)
	}
	return q, nil
}

// UnmarshalText reads a list from the command line or a file.
func (q *QueueLoops) UnmarshalText(text []byte) (err error) {
	*q, err = ParseQueueLoops(string(text))
	return err
}
