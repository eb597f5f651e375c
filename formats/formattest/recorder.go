package formattest

import (
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"sync"

	"golang.org/x/sys/unix"

	"platter/aio"
)

// OpTruncate stands in a Record for a change of the file's length to Offset,
// which is no request of package aio.
const OpTruncate = aio.Op(aio.OpCount)

// Record is one operation of a recording.
type Record struct {
	Op             aio.Op
	Flags          aio.Flags
	Offset, Length int64  // bytes
	Data           []byte // what a write wrote or a read returned

	// Moments of the Clock. Completed is 0 while the operation is in flight.
	Submitted, Completed int
	// Failed operations are never durable, but may have been done all the same.
	Failed bool
}

// End is the first byte after the operation's range.
func (r *Record) End() int64 { return r.Offset + r.Length }

// changes reports whether the operation can change the file.
func (r *Record) changes() bool { return r.Op.Writes() || r.Op == OpTruncate }

// before reports whether the operation was over when o was submitted.
func (r *Record) before(o *Record) bool { return r.Completed != 0 && r.Completed < o.Submitted }

func (r *Record) overlaps(o *Record) bool { return r.Offset < o.End() && o.Offset < r.End() }

func (r *Record) String() string {
	op := r.Op.String()
	if r.Op == OpTruncate {
		op = "truncate"
	}
	if r.Flags&aio.FlagFUA != 0 {
		op += " with FUA"
	}
	over := fmt.Sprint(r.Completed)
	switch {
	case r.Completed == 0:
		over = "in flight"
	case r.Failed:
		over += ", failed"
	}
	return fmt.Sprintf("%s %d+%d at %d..%s", op, r.Offset, r.Length, r.Submitted, over)
}

// Recording is what happened to a file, or to an image.
type Recording struct {
	Initial []byte   // what the file held before
	Records []Record // in order of submission
	Moments int      // the last moment of the clock
}

// never is the moment that doesn't come.
const never = math.MaxInt

// durable is, for each record, the first moment from which a power cut can't
// undo it: when a write with FUA completed, or when the first flush completed
// that was submitted after the write had completed. For what changes nothing it
// is the moment of submission.
func (r *Recording) durable() []int {
	type flush struct{ submitted, covered int }
	var flushes []flush // in order of submission, each with the first completion of it and all later ones
	for i := range r.Records {
		if f := &r.Records[i]; f.Op == aio.OpFlush && f.Completed != 0 && !f.Failed {
			flushes = append(flushes, flush{f.Submitted, f.Completed})
		}
	}
	for i := len(flushes) - 2; i >= 0; i-- {
		flushes[i].covered = min(flushes[i].covered, flushes[i+1].covered)
	}
	list := make([]int, len(r.Records))
	for i := range r.Records {
		switch o := &r.Records[i]; {
		case !o.changes():
			list[i] = o.Submitted
		case o.Completed == 0 || o.Failed:
			list[i] = never
		case o.Flags&aio.FlagFUA != 0:
			list[i] = o.Completed
		default:
			list[i] = never
			next, _ := slices.BinarySearchFunc(flushes, o.Completed+1, func(f flush, moment int) int { return f.submitted - moment })
			if next < len(flushes) {
				list[i] = flushes[next].covered
			}
		}
	}
	return list
}

// Clock numbers what happens to any of the Recorders that share it. The first
// moment is 1.
type Clock struct {
	mu  sync.Mutex
	now int
}

// Recorder is a storage that passes requests on to another and records them:
// below an image it sees what reaches the disk, above it what the guest does.
// Its methods may be called as those of any storage.
type Recorder struct {
	aio.Storage
	clock   *Clock
	reads   bool
	lag     *rand.Rand
	initial []byte
	records []Record // guarded by the clock
}

var _ interface {
	aio.Storage
	aio.Truncater
	Fd() int
} = (*Recorder)(nil)

// NewRecorder records what is done to a file that holds initial, which it keeps.
func NewRecorder(below aio.Storage, clock *Clock, initial []byte) *Recorder {
	return &Recorder{Storage: below, clock: clock, initial: initial}
}

// Reopen goes on with another storage below: the same file, opened again. The
// one before must be closed.
func (r *Recorder) Reopen(below aio.Storage) { r.Storage = below }

// Reads has reads recorded too, with what they returned.
func (r *Recorder) Reads() { r.reads = true }

// Lag holds many completions back for some turns of the loop, so that operations
// of other loops come in between also where the file system is done at once.
func (r *Recorder) Lag(rng *rand.Rand) { r.lag = rng }

// Fd is the descriptor of the file below, or -1 when it has none. With it an
// image has the limits and extents that it has without a Recorder. It is for
// looking at the file: what an image did to the file by it would be missing from
// the recording, and so be lost in every power cut.
func (r *Recorder) Fd() int {
	if file, ok := r.Storage.(interface{ Fd() int }); ok {
		return file.Fd()
	}
	return -1
}

// Recording is what was recorded so far. Its bytes are the Recorder's and not to
// be changed.
func (r *Recorder) Recording() *Recording {
	r.clock.mu.Lock()
	defer r.clock.mu.Unlock()
	return &Recording{Initial: r.initial, Records: slices.Clone(r.records), Moments: r.clock.now}
}

// Submit records the batch and passes it on.
func (r *Recorder) Submit(l *aio.Loop, batch []*aio.Request) {
	for _, req := range batch {
		if req.Op.Writes() || req.Op == aio.OpFlush || req.Op == aio.OpRead && r.reads {
			r.follow(l, req)
		}
	}
	r.Storage.Submit(l, batch)
}

// Truncate sets the length of the file below, if that has one to set.
func (r *Recorder) Truncate(size int64) error {
	below, ok := r.Storage.(aio.Truncater)
	if !ok {
		return fmt.Errorf("truncate to %d bytes: %w", size, unix.EOPNOTSUPP)
	}
	i := r.submitted(Record{Op: OpTruncate, Offset: size})
	err := below.Truncate(size)
	r.completed(i, nil, err != nil)
	return err
}

func (r *Recorder) follow(l *aio.Loop, req *aio.Request) {
	record := Record{Op: req.Op, Flags: req.Flags, Offset: req.Offset, Length: req.Length}
	if req.Op == aio.OpWrite {
		record.Data = make([]byte, req.Length)
		aio.CopyOut(record.Data, req.Vec)
	}
	i, done := r.submitted(record), req.Done
	var finish func(turns int)
	finish = func(turns int) {
		if turns > 0 {
			l.Post(func() { finish(turns - 1) })
			return
		}
		var data []byte
		if req.Op == aio.OpRead && req.Errno == 0 {
			data = make([]byte, req.Length)
			aio.CopyOut(data, req.Vec)
		}
		r.completed(i, data, req.Errno != 0)
		req.Done = done
		done(req)
	}
	req.Done = func(*aio.Request) { finish(r.turns()) }
}

// turns is for how many turns of its loop a completion is held back.
func (r *Recorder) turns() int {
	if r.lag == nil {
		return 0
	}
	r.clock.mu.Lock()
	defer r.clock.mu.Unlock()
	if r.lag.IntN(2) == 0 {
		return 0
	}
	return 1 << r.lag.IntN(8)
}

func (r *Recorder) submitted(record Record) int {
	r.clock.mu.Lock()
	defer r.clock.mu.Unlock()
	r.clock.now++
	record.Submitted = r.clock.now
	r.records = append(r.records, record)
	return len(r.records) - 1
}

func (r *Recorder) completed(i int, data []byte, failed bool) {
	r.clock.mu.Lock()
	defer r.clock.mu.Unlock()
	r.clock.now++
	record := &r.records[i]
	record.Completed, record.Failed = r.clock.now, failed
	if data != nil {
		record.Data = data
	}
}
