package qcow2

import (
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"platter/aio"
)

// lane is what an image keeps for one loop: requests under way, and clusters
// reserved for new data. Everything in it but the epochs belongs to the loop's
// thread.
type lane struct {
	im   *Image
	loop *aio.Loop

	// What this turn submits, to the data file and to the backing file.
	out, spare           []*aio.Request
	outBelow, spareBelow []*aio.Request
	fresh, sorted        []*part    // writes to new clusters, not joined yet
	copies               []*copying // not begun yet
	plugged              []*copying // that wait for the next turn
	plug                 struct {
		task aio.Task
		rest int // turns to come
	}
	nested int

	joints  *joint   // free
	copiers *copying // free
	memory  copyMemory

	ops   *op   // free
	parts *part // free

	reserved  run // clusters for new data
	next      run // and when they are used up
	chunk     int64
	refilling bool
	starved   []*op // wait for clusters
	parked    *parking

	inbox      sync.Mutex
	arrived    run // reserved, on its way to the loop
	arrivedErr error
	closed     bool

	epochs    [2]atomic.Int64 // requests under way by the epoch in which they began
	preloaded uint64          // the sum of what preload has loaded, which keeps it from being optimised away
	counts
}

// op is a guest's request under way.
type op struct {
	lane    *lane
	r       *aio.Request
	at      int64       // up to here it has been split into parts
	vec     []aio.Iovec // of r, from at on
	skip    uint64      // bytes of vec[0] that are behind at
	pending int         // parts under way, and one while it is being split
	errno   unix.Errno  // the first error
	epoch   uint32
	left    bool // the epoch
	commit  bool // what it wrote needs a commit to be durable
	next    *op
}

// parking is where the requests of a lane wait that need the same slice.
type parking struct {
	slice int64 // number of the slice on the guest's disk
	ops   *op
	next  *parking
}

// part is a piece of a request that is one operation of a file below.
type part struct {
	req   aio.Request
	op    *op
	alloc *allocation // of a write to a new cluster
	vec   []aio.Iovec // memory of req.Vec
	next  *part
}

// Runs of clusters that a lane reserves: the first one, and the longest.
const (
	firstChunk = 64
	lastChunk  = 1024
)

func newLane(im *Image, l *aio.Loop) *lane {
	ln := &lane{im: im, loop: l, chunk: firstChunk}
	ln.plug.task.Run = ln.unplug
	return ln
}

// begin starts a request.
func (ln *lane) begin(r *aio.Request) {
	o := ln.ops
	if o == nil {
		o = &op{lane: ln}
	} else {
		ln.ops = o.next
	}
	o.r, o.at, o.vec, o.skip, o.errno, o.commit, o.left = r, r.Offset, r.Vec, 0, 0, false, false
	for {
		o.epoch = ln.im.epoch.Load()
		ln.epochs[o.epoch&1].Add(1)
		if ln.im.epoch.Load() == o.epoch {
			break
		}
		ln.epochs[o.epoch&1].Add(-1) // a grace may have missed us
	}
	o.pending = 1
	ln.split(o)
}

// split makes parts of what is left of a request, as far as metadata is there,
// and is called again when more is.
func (ln *lane) split(o *op) {
	more := false
	switch o.r.Op {
	case aio.OpRead:
		more = ln.read(o)
	case aio.OpWrite:
		more = ln.write(o)
	case aio.OpFlush:
		ln.flush(o)
		return
	case aio.OpDiscard, aio.OpWriteZeroes:
		ln.zero(o)
		return
	case aio.OpCache:
		// Metadata is what a reader waits for; the files below look ahead by
		// themselves.
	}
	if !more {
		ln.release(o)
	}
}

// resume goes on with a request that had to wait, or fails it, from any thread.
func (ln *lane) resume(o *op, err error) {
	ln.loop.Post(func() {
		if err != nil {
			o.fail(errnoOf(err))
		}
		ln.split(o)
		ln.submit()
	})
}

// fail ends what is left of a request.
func (o *op) fail(errno unix.Errno) {
	if o.errno == 0 {
		o.errno = errno
	}
	o.at = o.r.End()
}

// release drops one hold on a request. The last one completes it.
func (ln *lane) release(o *op) {
	o.pending--
	if o.pending > 0 {
		return
	}
	if o.r.Flags&aio.FlagFUA != 0 && o.r.Op.Writes() && o.errno == 0 && !o.left && (o.commit || !ln.im.commits.done()) {
		// What was written in place is durable, but not the mapping that leads
		// there, if it is new.
		ln.leave(o)
		ln.im.commits.request(ln, o)
		return
	}
	ln.complete(o)
}

func (ln *lane) complete(o *op) {
	r, errno := o.r, o.errno
	ln.leave(o)
	o.r, o.vec = nil, nil
	o.next, ln.ops = ln.ops, o
	r.Complete(errno)
}

// leave tells that a request uses no mapping any more: a grace need not wait for
// it.
func (ln *lane) leave(o *op) {
	if !o.left {
		o.left = true
		ln.epochs[o.epoch&1].Add(-1)
	}
}

// drain waits until no request of an epoch is under way.
func (ln *lane) drain(epoch uint32) {
	for n := 0; ln.epochs[epoch].Load() != 0; n++ {
		if n < 100 {
			runtime.Gosched()
		} else {
			time.Sleep(50 * time.Microsecond)
		}
	}
}

// part makes a part for the next n bytes of a request that go to offset off of
// a file below.
func (ln *lane) part(o *op, n, off int64) *part {
	p := ln.parts
	if p == nil {
		p = &part{}
		p.req.Done = p.done
	} else {
		ln.parts = p.next
	}
	p.op = o
	o.pending++
	p.req.Op, p.req.Offset, p.req.Length = o.r.Op, off, n
	p.req.Flags = o.r.Flags &^ (aio.FlagNoUnmap | aio.FlagJoined)
	if n == o.r.Length {
		p.req.Vec = o.r.Vec
	} else {
		p.vec = o.cut(p.vec[:0], n)
		p.req.Vec = p.vec
	}
	o.at += n
	return p
}

// cut moves the next n bytes of a request's memory to vec.
func (o *op) cut(vec []aio.Iovec, n int64) []aio.Iovec {
	for n > 0 {
		v := o.vec[0]
		v.Base += uintptr(o.skip)
		v.Len -= o.skip
		if v.Len > uint64(n) {
			v.Len = uint64(n)
			o.skip += uint64(n)
		} else {
			o.vec, o.skip = o.vec[1:], 0
		}
		if v.Len > 0 {
			vec = append(vec, v)
		}
		n -= int64(v.Len)
	}
	return vec
}

// done is called when the file below is done with a part.
func (p *part) done(r *aio.Request) {
	ln := p.op.lane
	ln.ended(p, r.Errno)
	ln.submit() // what went on because of it
}

// ended ends a part.
func (ln *lane) ended(p *part, errno unix.Errno) {
	o, a := p.op, p.alloc
	p.op, p.alloc, p.req.Vec = nil, nil, nil
	p.next, ln.parts = ln.parts, p
	if errno != 0 && o.errno == 0 {
		o.errno = errno
	}
	if a != nil {
		ln.im.written(a, errno == 0)
	}
	ln.release(o)
}

// submit hands what has gathered to the files below. Requests may complete
// meanwhile, whose owners may submit others: those are handed on in turn.
func (ln *lane) submit() {
	if ln.nested > 0 {
		return // the one above us will
	}
	ln.nested++
	for len(ln.out)+len(ln.outBelow)+len(ln.fresh)+len(ln.copies) > 0 {
		if len(ln.copies)+len(ln.plugged) > 0 {
			ln.beginCopies()
		}
		if len(ln.fresh) > 0 {
			ln.joinFresh()
		}
		if batch := ln.out; len(batch) > 0 {
			ln.out, ln.spare = ln.spare[:0], nil
			ln.im.data.Submit(ln.loop, batch)
			clear(batch)
			ln.spare = batch[:0]
		}
		if batch := ln.outBelow; len(batch) > 0 {
			ln.outBelow, ln.spareBelow = ln.spareBelow[:0], nil
			ln.im.backing.Submit(ln.loop, batch)
			clear(batch)
			ln.spareBelow = batch[:0]
		}
	}
	ln.nested--
}

// apart has f called on a goroutine, where it may wait, and the part ended with
// what it returns.
func (ln *lane) apart(slots chan struct{}, p *part, f func() unix.Errno) {
	go func() {
		slots <- struct{}{}
		errno := f()
		<-slots
		ln.loop.Post(func() {
			ln.ended(p, errno)
			ln.submit()
		})
	}()
}
