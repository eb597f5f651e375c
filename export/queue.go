package export

import (
	"golang.org/x/sys/unix"

	"platter/aio"
	"platter/merge"
)

// Queue is one stream of requests to an export, on one loop, on whose thread
// Submit and Close are called. Stats may be called from anywhere.
type Queue struct {
	export   *Export
	loop     *aio.Loop     // changed on its thread only, and under export.mu
	merger   *merge.Merger // nil: merging is off
	out      []*aio.Request
	counters counters

	// Waiting for the export's throttle, see wait.go. The last three are guarded
	// by the turns' mu.
	waiter waiter
	going  []*aio.Request // what takeTurn has returned
	timer  aio.Timer      // set while the queue is the keeper
	home   *aio.Loop      // where it waits; nil when it is closed
	wakeUp func()         // resume there
	roused bool           // wakeUp is on its way

	// Of a queue that a front end serves; on the loop's thread but for index and gone.
	index   int // among those that OpenQueue has opened, or -1
	mover   Mover
	fixed   bool // nobody can move it
	drained bool
	gone    chan struct{} // closed with the queue

	// Copies of what doesn't change, near at hand.
	size     int64
	mask     int64 // of offsets and lengths: the bits that must be 0
	readOnly bool
}

// NewQueue opens a queue on the loop, whatever the mapping, and beside those that
// Options.Queues counts. Until it gets a Mover the export can't be drained or
// moved. It may be called from any goroutine.
func (e *Export) NewQueue(l *aio.Loop) *Queue {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.newQueue(l)
}

// newQueue makes a queue. The caller holds mu.
func (e *Export) newQueue(l *aio.Loop) *Queue {
	limits := e.image.Limits()
	q := &Queue{export: e, loop: l, size: e.Size(), mask: int64(max(limits.BlockSize, 1)) - 1, readOnly: e.ReadOnly(),
		index: -1, fixed: true, gone: make(chan struct{})}
	q.waiter.queue = q
	q.settle(l)
	if !e.opts.NoMerge {
		q.merger = merge.New(merge.Limits{
			Bytes:    min(limits.MaxTransfer, mergeBytes),
			Segments: limits.MaxSegments,
		}, func(members []*aio.Request) { e.image.Submit(q.loop, members) })
	}
	e.queues[q] = struct{}{}
	return q
}

// mergeBytes is the longest request that merging makes, in bytes: long enough
// that the cost of a request doesn't matter any more, short enough that its
// first member doesn't wait long for the last.
const mergeBytes = 1 << 20

// Submit takes everything that a front end found ready. Each request completes
// once, on this thread, perhaps before Submit returns, and in any order: one
// that is refused at once with EPERM (a write to a read-only export), ENOSPC (a
// write beyond the end) or EINVAL (any other range that isn't the export's, or
// one that isn't aligned to the image's block size).
// The slice is the caller's again on return; its order may have changed. Submit
// isn't called from within a request's Done.
//
// What the export's throttle (SetThrottle) doesn't let go yet waits in the queue,
// reads and writes each in the order in which they came. Flushes pass.
//
// The front end reports completions to Completed.
func (q *Queue) Submit(batch []*aio.Request) {
	good := batch[:0]
	for _, r := range batch {
		if errno := q.check(r); errno != 0 {
			q.counters.refused.add(1)
			r.Complete(errno)
		} else {
			good = append(good, r)
		}
	}
	if len(good) == 0 {
		return
	}
	now := clock()
	q.counters.submitted(good, now)
	if q.export.turns.active.Load() {
		good = q.admit(good, now)
	}
	q.forward(good)
}

// forward hands requests to the image, merged.
func (q *Queue) forward(batch []*aio.Request) {
	switch {
	case len(batch) == 0:
	case q.merger == nil || len(batch) == 1:
		q.export.image.Submit(q.loop, batch)
	default:
		q.out = q.merger.Merge(q.out[:0], batch)
		q.counters.merged.add(uint64(len(batch) - len(q.out)))
		q.export.image.Submit(q.loop, q.out)
	}
}

// Completed counts requests that are over, all as of this moment: a front end
// calls it once for every batch of completions, on the queue's thread, before it
// uses the requests again. Those that Submit refused may be among them, or never
// submitted ones: they don't count.
func (q *Queue) Completed(batch []*aio.Request) {
	if len(batch) > 0 {
		q.counters.completed(batch, clock())
	}
}

// check says with what error a request is refused; 0 lets it pass.
func (q *Queue) check(r *aio.Request) unix.Errno {
	if q.readOnly && r.Op.Writes() {
		return unix.EPERM
	}
	if (r.Offset|r.Length)&q.mask != 0 {
		return unix.EINVAL
	}
	if r.Offset >= 0 && r.Length >= 0 && r.Offset <= q.size && r.Length <= q.size-r.Offset {
		return 0
	}
	if r.Op == aio.OpWrite || r.Op == aio.OpWriteZeroes {
		return unix.ENOSPC
	}
	return unix.EINVAL
}

// Close ends the queue. Nothing may be in flight.
func (q *Queue) Close() {
	q.settle(nil)
	e := q.export
	e.mu.Lock()
	_, open := e.queues[q]
	if open {
		delete(e.queues, q)
		e.past.add(q.stats())
		e.past.InFlight = 0 // what was not reported is over all the same
		close(q.gone)
	}
	e.mu.Unlock()
	if open {
		e.leave(q.loop)
	}
}

// Stats is what the queue has done so far.
func (q *Queue) Stats() Stats { return *q.stats() }

func (q *Queue) stats() *Stats {
	s := q.counters.read()
	s.Waiting = uint64(q.Waiting())
	return s
}
