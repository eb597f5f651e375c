package aio

import (
	"sync"

	"golang.org/x/sys/unix"
)

// flushQueue lets one fdatasync of a file run at a time. The kernel tells only
// one of several that a write-back failed, and the others would claim success.
// Those that wait share the next one: all of them were submitted before it began.
type flushQueue struct {
	mu      sync.Mutex
	busy    bool
	waiting []*op
	group   []*op // whom the one that runs speaks for
	failed  bool  // see synced
}

// startFlush makes completed writes durable.
func (o *op) startFlush() {
	if o.file.opts.NoFlush || o.file.opts.ReadOnly {
		o.end(0)
		return
	}
	o.sync()
}

// sync ends the request by an fdatasync.
func (o *op) sync() {
	q := &o.file.flushes
	o.kind, o.done = opFdatasync, synced
	q.mu.Lock()
	wait := q.busy
	q.busy = true
	if wait {
		o.loop.active++ // until it is handed back
		q.waiting = append(q.waiting, o)
	}
	q.mu.Unlock()
	if !wait {
		o.loop.start(o)
	}
}

func synced(o *op) {
	e := o.errno()
	if e == unix.EINTR || e == unix.EAGAIN {
		o.loop.start(o)
		return
	}
	q := &o.file.flushes
	q.mu.Lock()
	// The kernel reports a failed write-back once and then forgets the pages:
	// what was lost stays lost, so no later flush may claim success.
	if e != 0 {
		q.failed = true
	} else if q.failed {
		e = unix.EIO
	}
	for i, w := range q.group {
		w.res, w.done = -int32(e), flushed
		w.loop.complete(w)
		q.group[i] = nil
	}
	q.group = q.group[:0]
	if q.busy = len(q.waiting) > 0; q.busy {
		first := q.waiting[0]
		q.group = append(q.group, q.waiting[1:]...)
		clear(q.waiting)
		q.waiting = q.waiting[:0]
		first.done = syncNext
		first.loop.complete(first)
	}
	q.mu.Unlock()
	o.end(e)
}

// syncNext runs the next fdatasync.
func syncNext(o *op) {
	o.done = synced
	o.loop.start(o)
}

// flushed ends a request that another's fdatasync has spoken for.
func flushed(o *op) { o.end(o.errno()) }

// lost tells that a write that had to be durable at once failed with e. It may
// have taken the report of an earlier write's failure, which no flush gets then.
func (q *flushQueue) lost(e unix.Errno) {
	if e == unix.EIO {
		q.mu.Lock()
		q.failed = true
		q.mu.Unlock()
	}
}
