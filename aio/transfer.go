package aio

import (
	"golang.org/x/sys/unix"
)

// transferInline carries a read or write out at once, on the loop's thread.
func (f *File) transferInline(l *Loop, r *Request) {
	write, flags := r.Op == OpWrite, uint32(0)
	if write {
		flags = f.writeFlags(r)
	}
	fd, off := int32(f.fd), r.Offset
	n, errno := l.transfer(write, fd, r.Vec, off, flags, false)
	if errno == 0 && int64(n) == r.Length {
		r.Complete(0)
		return
	}
	// Short or interrupted: go on with a vector that can be cut.
	left := r.Length
	rest := append([]Iovec(nil), r.Vec...)
	for {
		switch {
		case errno == unix.EINTR || errno == unix.EAGAIN:
		case errno != 0:
			r.Complete(errno)
			return
		case n == 0:
			r.Complete(unix.EIO) // the end of the file
			return
		default:
			if left -= int64(n); left == 0 {
				r.Complete(0)
				return
			}
			off += int64(n)
			rest = Advance(rest, uint64(n))
		}
		n, errno = l.transfer(write, fd, rest, off, flags, true)
	}
}

// coldReads is how many reads go straight to the engine after one that the page
// cache could not serve: where one is cold, the next ones are likely to be.
const coldReads = 32

// readCached reads at once what is in the page cache, and reports whether that
// was everything: on the loop's thread that is cheaper than by way of the
// engine.
func (f *File) readCached(l *Loop, r *Request) bool {
	if l.cold > 0 {
		l.cold--
		return false
	}
	n, errno := l.transfer(false, int32(f.fd), r.Vec, r.Offset, unix.RWF_NOWAIT, false)
	if errno != 0 || int64(n) != r.Length {
		l.cold = coldReads
		return false
	}
	r.Complete(0)
	return true
}

// writeFlags are the RWF_* flags of a write.
func (f *File) writeFlags(r *Request) uint32 {
	if r.Flags&FlagFUA != 0 && !f.opts.NoFlush && !f.opts.Sync {
		return unix.RWF_DSYNC
	}
	return 0
}

// startTransfer begins a read or write of the whole request.
func (o *op) startTransfer() {
	f, r := o.file, o.req
	o.kind, o.flags = opReadv, 0
	if r.Op == OpWrite {
		o.kind, o.flags = opWritev, f.writeFlags(r)
	}
	if f.align > 1 {
		o.startDirect()
		return
	}
	o.vec, o.done = r.Vec, transferred
	o.loop.start(o)
}

// transferred looks at what a read or write has done and goes on until it has
// done everything.
func transferred(o *op) {
	if o.res <= 0 {
		switch e := o.errno(); e {
		case unix.EINTR, unix.EAGAIN:
			o.loop.start(o)
		case 0:
			o.end(unix.EIO) // the end of the file
		default:
			o.writeFailed(e)
			o.end(e)
		}
		return
	}
	n := int64(o.res)
	if o.left -= n; o.left <= 0 {
		o.end(0)
		return
	}
	if o.off += n; o.off%o.file.align != 0 {
		o.end(unix.EIO) // the end of the file, and O_DIRECT can't go on from there
		return
	}
	// The request's vector is the front end's: cut a copy of it.
	o.scratch = append(o.scratch[:0], o.vec...)
	o.vec = Advance(o.scratch, uint64(n))
	o.loop.start(o)
}

// writeFailed takes note of a failure that is the last word on earlier writes.
func (o *op) writeFailed(e unix.Errno) {
	if o.kind == opWritev && (o.flags&unix.RWF_DSYNC != 0 || o.file.opts.Sync) {
		o.file.flushes.lost(e)
	}
}

// end completes the request and frees the op.
func (o *op) end(errno unix.Errno) {
	l, r := o.loop, o.req
	if o.locked {
		o.file.locks.release(o)
	}
	l.freeOp(o)
	r.Complete(errno)
}

// startCache asks the kernel to read ahead. It is a hint, so it always succeeds.
func (o *op) startCache() {
	if o.file.inline || o.file.align > 1 {
		o.end(0)
		return
	}
	o.kind, o.flags, o.n = opFadvise, unix.FADV_WILLNEED, o.left
	o.done = func(o *op) { o.end(0) }
	o.loop.start(o)
}
