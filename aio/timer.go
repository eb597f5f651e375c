package aio

import (
	"slices"
	"time"
)

// Timer is a function that a loop calls later.
type Timer struct {
	at  time.Time
	run func()
}

// timers are a loop's timers, the soonest last. There are few: time-outs of
// connections, not of requests.
type timers []*Timer

// AfterFunc has f called on the loop's thread when d has passed.
func (l *Loop) AfterFunc(d time.Duration, f func()) *Timer {
	t := &Timer{at: time.Now().Add(d), run: f}
	i, _ := slices.BinarySearchFunc(l.timers, t, func(a, b *Timer) int { return b.at.Compare(a.at) })
	l.timers = slices.Insert(l.timers, i, t)
	return t
}

// Stop forgets a timer. It is no error if it has run already.
func (l *Loop) Stop(t *Timer) {
	if i := slices.Index(l.timers, t); i >= 0 {
		l.timers = slices.Delete(l.timers, i, i+1)
	}
}

// next is how long a turn may wait; negative without timers.
func (t *timers) next() time.Duration {
	if len(*t) == 0 {
		return -1
	}
	return max(time.Until((*t)[len(*t)-1].at), 0)
}

func (t *timers) run() {
	for n := len(*t); n > 0 && !(*t)[n-1].at.After(time.Now()); n = len(*t) {
		due := (*t)[n-1]
		*t = (*t)[:n-1]
		due.run()
	}
}
