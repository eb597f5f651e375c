package aio

import (
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"platter/aio/native"
)

// nativeRoom is how many operations a loop has in flight on its context. What goes
// beyond it waits in the driver's queue. When a device's queue is full, often with
// 256, io_submit waits for places in it, RWF_NOWAIT or not: on such a disk 256
// random reads were submitted in 0.6 ms and 512 in 4 ms. Half of that leaves room
// for another loop, and the disk no less busy. And it is little of fs.aio-max-nr,
// as a rule 65,536.
const nativeRoom = 128

// nativeRetry is how long a loop waits before it asks again for room that none of
// its own operations can make.
const nativeRetry = time.Millisecond

// nativeDriver submits file operations by io_submit, all that a turn started at
// once. Their completions signal the eventfd that wakes the loop. Everything else
// is done as by the threads engine: sockets wait in epoll, and what io_submit
// can't do, or only by keeping the loop's thread waiting, is the pool's.
//
// That is every transfer without O_DIRECT: io_submit would perform it before it
// returns. On ext4, one io_submit of 64 reads that aren't in the page cache took
// 5 ms to 30 ms, of 64 direct ones 0.2 ms. And it is a direct transfer that has to
// wait for a lock, for the page cache to be written back or for space to be
// allocated: RWF_NOWAIT has the kernel give it back with EAGAIN, and then a thread
// of the pool waits in its place.
type nativeDriver struct {
	*epollDriver
	context  nativeContext
	queue    opList // to be submitted, in this order
	inFlight int
	noFdsync bool // the kernel has none; found out by trying
	iocbs    [nativeRoom]native.IOCB
	batch    [nativeRoom]*native.IOCB
	done     [64]native.Event
}

// nativeContext is the system calls of native.Context.
type nativeContext interface {
	Submit(batch []*native.IOCB) (int, unix.Errno)
	Events(into []native.Event) (int, unix.Errno)
	Close() error
}

func newNativeDriver(l *Loop) (*nativeDriver, error) {
	context, err := newNativeContext(nativeRoom)
	if err != nil {
		return nil, err
	}
	sockets, err := newEpollDriver(l)
	if err != nil {
		_ = context.Close()
		return nil, err
	}
	d := &nativeDriver{epollDriver: sockets, context: context}
	for i := range d.batch {
		d.batch[i] = &d.iocbs[i]
	}
	return d, nil
}

func (d *nativeDriver) start(o *op) {
	switch {
	case (o.kind == opReadv || o.kind == opWritev) && o.file.async,
		o.kind == opFdatasync && !d.noFdsync:
		d.queue.push(o)
	default:
		d.epollDriver.start(o)
	}
}

func (d *nativeDriver) turn(timeout time.Duration) {
	if !d.queue.empty() {
		if d.submit() {
			timeout = 0 // its callbacks may have left tasks and timers
		}
		if !d.queue.empty() && d.inFlight == 0 && (timeout < 0 || timeout > nativeRetry) {
			timeout = nativeRetry
		}
	}
	d.epollDriver.turn(timeout)
	if d.rung {
		d.rung = false
		d.reap()
	}
}

// submit hands the queue to the kernel as far as there is room, and reports
// whether an operation has ended by that.
func (d *nativeDriver) submit() (ended bool) {
	for n := d.prepare(); n > 0; n = d.prepare() {
		taken, errno := d.context.Submit(d.batch[:n])
		for range taken {
			d.queue.pop()
		}
		d.inFlight += taken
		switch {
		case errno == unix.EAGAIN || (taken == 0 && errno == 0):
			return ended // completions make room
		case errno != 0: // what is wrong with the first
			ended = true
			d.finish(d.queue.pop(), -int32(errno))
		}
	}
	return ended
}

// prepare encodes what stands first in the queue and returns how many there was
// room for.
func (d *nativeDriver) prepare() int {
	n := 0
	for o := d.queue.first; o != nil && d.inFlight+n < nativeRoom; o = o.next {
		d.encode(&d.iocbs[n], o)
		n++
	}
	return n
}

func (d *nativeDriver) encode(b *native.IOCB, o *op) {
	flags := o.flags | unix.RWF_NOWAIT
	segments := min(len(o.vec), maxSegments)
	switch {
	case o.kind == opFdatasync:
		b.Fdsync(o.fd)
	case o.kind == opReadv && segments == 1:
		b.Pread(o.fd, o.vec[0].Base, o.vec[0].Len, o.off, flags)
	case o.kind == opReadv:
		b.Preadv(o.fd, unsafe.Pointer(&o.vec[0]), segments, o.off, flags)
	case segments == 1:
		b.Pwrite(o.fd, o.vec[0].Base, o.vec[0].Len, o.off, flags)
	default:
		b.Pwritev(o.fd, unsafe.Pointer(&o.vec[0]), segments, o.off, flags)
	}
	b.Notify(int32(d.event), uint64(o.index))
}

// reap takes completions until the kernel has given all of them. What their
// callbacks start is for the next turn.
func (d *nativeDriver) reap() {
	for d.inFlight > 0 {
		n, errno := d.context.Events(d.done[:])
		if n == 0 && errno != unix.EINTR {
			return
		}
		d.inFlight -= n
		for i := range d.done[:n] {
			e := &d.done[i]
			d.finish(d.loop.ops[e.Data], int32(e.Res))
		}
	}
}

// finish ends an operation, or leaves it to the pool when the kernel would have
// had to wait for it, or couldn't do it here.
func (d *nativeDriver) finish(o *op, res int32) {
	e := unix.Errno(max(0, -res))
	switch {
	case o.kind == opFdatasync && e == unix.EINVAL:
		d.noFdsync = true // before Linux 4.18; or the file has none, which the pool finds too
	case e == unix.EAGAIN, o.kind != opFdatasync && e == unix.EOPNOTSUPP:
	default:
		o.res = res
		d.loop.finish(o)
		return
	}
	threads.run(o)
}

func (d *nativeDriver) close() {
	_ = d.context.Close()
	d.epollDriver.close()
}
