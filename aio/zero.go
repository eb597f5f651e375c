package aio

import (
	"golang.org/x/sys/unix"
)

// zeroStep is how a discard or write-zeroes is being tried.
type zeroStep uint8

const (
	stepPunch     zeroStep = iota // deallocate; reads as zeroes
	stepZeroRange                 // zero, keep or make the space allocated
	stepFill                      // write zeroes
)

// inlineZero is the longest range, in bytes, that a memory file system punches
// on the loop's thread.
const inlineZero = 1 << 20

// startZero begins a discard or write-zeroes. Each way that the file turns out
// not to have is remembered, so that it is tried once.
func (o *op) startZero() {
	f, r := o.file, o.req
	if f.align > 1 && !f.locks.acquire(o, false, (*op).startZero) {
		return
	}
	if f.device && r.Op == OpDiscard {
		o.discardDevice()
		return
	}
	o.step = stepPunch
	if r.Op == OpWriteZeroes && r.Flags&FlagNoUnmap != 0 {
		o.step = stepZeroRange
	}
	o.tryZero()
}

func (o *op) tryZero() {
	f, discard := o.file, o.req.Op == OpDiscard
	unaligned := (o.off|o.left)%f.sector != 0
	if o.step == stepPunch && (f.noPunch.Load() || unaligned) {
		if discard {
			o.zeroed() // it may do nothing
			return
		}
		o.step = stepZeroRange
	}
	if o.step == stepZeroRange && (f.noZeroRange.Load() || unaligned) {
		o.step = stepFill
	}
	mode := uint32(unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE)
	switch o.step {
	case stepZeroRange:
		mode = unix.FALLOC_FL_ZERO_RANGE | unix.FALLOC_FL_KEEP_SIZE
	case stepFill:
		o.fill()
		return
	}
	o.kind, o.flags, o.n, o.done = opFallocate, mode, o.left, zeroTried
	if f.inline && o.left <= inlineZero {
		o.perform()
		zeroTried(o)
	} else {
		o.loop.start(o)
	}
}

func zeroTried(o *op) {
	switch e := o.errno(); e {
	case 0:
		o.zeroed()
	case unix.EINTR, unix.EAGAIN:
		o.tryZero()
	case unix.EOPNOTSUPP, unix.ENODEV, unix.ENOSYS:
		if o.step == stepPunch {
			o.file.noPunch.Store(true)
		} else {
			o.file.noZeroRange.Store(true)
		}
		o.tryZero()
	default:
		o.end(e)
	}
}

// fill writes zeroes over what is left.
func (o *op) fill() {
	o.scratch = o.scratch[:0]
	for n := o.left; n > 0 && len(o.scratch) < maxSegments; n -= BlockSize {
		o.scratch = append(o.scratch, Zeroes(n))
	}
	o.kind, o.flags = opWritev, 0
	if f := o.file; f.align > 1 && (o.off|o.left)%f.align != 0 {
		o.bounceFill()
		return
	}
	o.vec, o.done = o.scratch, filled
	o.loop.start(o)
}

func filled(o *op) {
	switch e := o.errno(); {
	case e == unix.EINTR || e == unix.EAGAIN:
		o.fill()
	case e != 0:
		o.writeFailed(e)
		o.end(e)
	case o.res == 0:
		o.end(unix.EIO)
	default:
		o.off += int64(o.res)
		if o.left -= int64(o.res); o.left > 0 {
			o.fill()
		} else {
			o.zeroed()
		}
	}
}

// zeroed ends a discard or write-zeroes that has been carried out. O_DSYNC says
// nothing of what fallocate did.
func (o *op) zeroed() {
	f, r := o.file, o.req
	durable := r.Flags&FlagFUA != 0 || (f.opts.Sync && r.Op == OpWriteZeroes)
	if durable && !f.opts.NoFlush {
		o.sync()
		return
	}
	o.end(0)
}

// discardDevice discards the whole sectors of the range. There is no system
// call for it that a ring knows on every kernel, so it is the pool's work.
func (o *op) discardDevice() {
	f, errno := o.file, unix.Errno(0)
	start := (o.off + f.sector - 1) / f.sector * f.sector
	span := [2]uint64{uint64(start), uint64(max(0, o.req.End()/f.sector*f.sector-start))}
	if span[1] == 0 {
		o.zeroed()
		return
	}
	o.loop.Go(func() { errno = ioctlDiscard(f.Fd(), &span) }, func() {
		if errno != 0 && errno != unix.EOPNOTSUPP {
			o.end(errno)
		} else {
			o.zeroed()
		}
	})
}
