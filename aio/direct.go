package aio

import (
	"slices"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
)

// bounce is an op's way through aligned memory: what O_DIRECT wants and the
// request's own memory or range doesn't give. It goes piece by piece, a block at
// a time.
type bounce struct {
	block  *Block
	vec    [1]Iovec
	rest   []Iovec // of the request's memory, from o.off on
	start  int64   // the piece, in aligned bytes of the file
	end    int64
	after  func(*op)
	filled bool // the piece's old bytes have been read
}

// startDirect begins a read or write on a file opened with O_DIRECT.
func (o *op) startDirect() {
	f, r := o.file, o.req
	inner := (r.Offset|r.Length)%f.align != 0
	if r.Op == OpWrite && !f.locks.acquire(o, inner, (*op).startTransfer) {
		return
	}
	if !inner && aligned(r.Vec, f.align) {
		o.vec, o.done = r.Vec, transferred
		o.loop.start(o)
		return
	}
	o.scratch = append(o.scratch[:0], r.Vec...)
	o.bounceAll(func(o *op) { o.end(0) })
}

// bounceFill writes o.left zeroes by way of aligned memory.
func (o *op) bounceFill() {
	f := o.file
	if !o.exclusive {
		f.locks.release(o)
		if !f.locks.acquire(o, true, (*op).bounceFill) {
			return
		}
	}
	o.bounceAll((*op).moreFill)
}

// moreFill goes on when the zeroes were more than one vector holds.
func (o *op) moreFill() {
	if o.left > 0 {
		o.fill()
	} else {
		o.zeroed()
	}
}

func aligned(vec []Iovec, align int64) bool {
	for _, v := range vec {
		if (int64(v.Base)|int64(v.Len))%align != 0 {
			return false
		}
	}
	return true
}

// bounceAll transfers what o.scratch names by way of a block, then calls after.
func (o *op) bounceAll(after func(*op)) {
	b := &o.bounce
	if b.block = o.loop.arena.Get(); b.block == nil {
		o.end(unix.ENOMEM)
		return
	}
	b.rest, b.after = o.scratch, after
	o.bounceNext()
}

func (o *op) bounceNext() {
	b, align := &o.bounce, o.file.align
	if o.left == 0 || len(b.rest) == 0 {
		b.block.Release()
		b.block, b.rest = nil, nil
		b.after(o)
		return
	}
	b.start = o.off / align * align
	b.end = min((o.off+o.left+align-1)/align*align, b.start+BlockSize)
	b.filled = false
	if o.kind == opReadv {
		o.bounceIO(opReadv)
		return
	}
	if o.off > b.start || o.off+o.left < b.end {
		o.bounceIO(opReadv) // the bytes around the write stay what they are
		return
	}
	o.bounceWrite()
}

func (o *op) bounceIO(kind opKind) {
	b := &o.bounce
	b.vec[0] = b.block.Iovec(0, int(b.end-b.start))
	step := bounced{b.start, kind}
	o.vec, o.n = b.vec[:], 0
	o.startBounced(step)
}

// bounced is one kernel operation on the block.
type bounced struct {
	off  int64
	kind opKind
}

func (o *op) startBounced(s bounced) {
	request, off := o.kind, o.off
	o.kind, o.off = s.kind, s.off
	flags := o.flags
	if s.kind == opReadv {
		o.flags = 0
	}
	o.done = func(o *op) {
		o.kind, o.off, o.flags = request, off, flags
		o.bounceDone(s)
	}
	o.loop.start(o)
}

// bounceDone looks at what a kernel operation on the block has done.
func (o *op) bounceDone(s bounced) {
	b := &o.bounce
	e := o.errno()
	switch {
	case e == unix.EINTR || e == unix.EAGAIN:
		o.startBounced(s)
		return
	case e != 0:
		if s.kind == opWritev {
			o.writeFailed(e)
		}
		o.bounceFailed(e)
		return
	}
	got := s.off + int64(o.res)
	need := b.end // of a write, and of the bytes around it
	if o.kind == opReadv {
		need = min(b.end, o.req.End())
	}
	if got < need {
		if o.res == 0 || (got-b.start)%o.file.align != 0 {
			o.bounceFailed(unix.EIO) // the end of the file
			return
		}
		b.vec[0] = b.block.Iovec(int(got-b.start), int(b.end-got))
		o.vec = b.vec[:]
		o.startBounced(bounced{got, s.kind})
		return
	}
	if o.kind == opWritev && s.kind == opReadv {
		o.bounceWrite()
		return
	}
	n := min(b.end, o.off+o.left) - o.off
	if o.kind == opReadv {
		from := int(o.off - b.start)
		CopyIn(b.rest, b.block.Bytes()[from:from+int(n)])
	}
	b.rest = Advance(b.rest, uint64(n))
	o.off += n
	o.left -= n
	o.bounceNext()
}

func (o *op) bounceFailed(errno unix.Errno) {
	o.bounce.block.Release()
	o.bounce.block, o.bounce.rest = nil, nil
	o.end(errno)
}

// bounceWrite puts the request's bytes into the block and writes it.
func (o *op) bounceWrite() {
	b := &o.bounce
	from, to := o.off-b.start, min(b.end, o.off+o.left)-b.start
	CopyOut(b.block.Bytes()[from:to], b.rest)
	o.bounceIO(opWritev)
}

// rangeLocks order the writes of an O_DIRECT file that share a block: one that
// covers a block in part reads it, changes it and writes it back, so no other
// write to that block may come between. Loops share them.
type rangeLocks struct {
	mu      sync.Mutex
	held    []*op
	waiting []*op
}

// acquire locks the op's range, widened to whole blocks: alone when exclusive is
// set, else beside others that aren't. It reports whether the lock was got; if
// not, again is called on the op's loop when it was.
func (k *rangeLocks) acquire(o *op, exclusive bool, again func(*op)) bool {
	if o.locked {
		return true
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	o.exclusive = exclusive
	if !k.conflict(o, k.waiting) {
		k.held = append(k.held, o)
		o.locked = true
		return true
	}
	o.done = again
	o.loop.active++ // until it is called again
	k.waiting = append(k.waiting, o)
	return false
}

// conflict reports whether o overlaps an op that holds a lock or waits before it.
func (k *rangeLocks) conflict(o *op, waiting []*op) bool {
	align := o.file.align
	start, end := o.req.Offset/align, (o.req.End()+align-1)/align
	clash := func(x *op) bool {
		return (o.exclusive || x.exclusive) && x.req.Offset/align < end && start < (x.req.End()+align-1)/align
	}
	return slices.ContainsFunc(k.held, clash) || slices.ContainsFunc(waiting, clash)
}

func (k *rangeLocks) release(o *op) {
	k.mu.Lock()
	defer k.mu.Unlock()
	o.locked = false
	i := slices.Index(k.held, o)
	k.held = slices.Delete(k.held, i, i+1)
	for i := 0; i < len(k.waiting); {
		w := k.waiting[i]
		if k.conflict(w, k.waiting[:i]) {
			i++
			continue
		}
		k.waiting = slices.Delete(k.waiting, i, i+1)
		k.held = append(k.held, w)
		w.locked = true
		w.loop.complete(w)
	}
}

// ioctlDiscard is BLKDISCARD of linux/fs.h: span is start and length in bytes.
func ioctlDiscard(fd int, span *[2]uint64) unix.Errno {
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.BLKDISCARD, uintptr(unsafe.Pointer(span)))
	return errno
}
