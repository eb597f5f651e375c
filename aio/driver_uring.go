package aio

import (
	"fmt"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"platter/aio/uring"
)

// wakeTag marks the completions of the poll on the eventfd; ops have small tags.
const wakeTag = 1 << 63

// registeredFiles is how many files and sockets a ring keeps registered; more
// are used by descriptor.
const registeredFiles = 1024

// ringDriver puts everything on one io_uring.
type ringDriver struct {
	loop    *Loop
	ring    *uring.Ring
	event   int  // eventfd
	armed   bool // the poll on it is in flight
	backlog opList
	slots   []int32 // free registered slots
	ready   func() bool

	// held is a receive that the ring doesn't know of: while the loop spins for
	// its only socket, it looks for data itself. That spares the kernel, and the
	// client's sends, the arming and firing of a poll for every request.
	held *op
	got  bool // held has its result

	faults ringFaults // in tests only
}

// ringFaults stands between the ring and the kernel in tests: it changes entries
// before the kernel sees them, and results that the kernel gave.
type ringFaults interface {
	submitting(o *op, e *uring.SQE)
	completed(o *op)
}

func newRingDriver(l *Loop) (*ringDriver, error) {
	ring, err := uring.New(uring.Options{})
	if err != nil {
		return nil, err
	}
	event, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		ring.Close()
		return nil, fmt.Errorf("make eventfd: %w", err)
	}
	d := &ringDriver{loop: l, ring: ring, event: event}
	d.ready = d.happened
	if ring.RegisterFiles(registeredFiles) == nil {
		for i := range int32(registeredFiles) {
			d.slots = append(d.slots, registeredFiles-1-i)
		}
	}
	d.armWake()
	return d, nil
}

// armWake polls the eventfd for good. Nobody reads it: every write to it is an
// event of its own.
func (d *ringDriver) armWake() {
	e := d.sqe()
	if e == nil {
		return // tried again by the next turn
	}
	e.PollMultishot(int32(d.event), unix.POLLIN)
	e.UserData = wakeTag
	d.armed = true
}

func (d *ringDriver) wake() { signal(d.event) }

func (d *ringDriver) attach(fd int32) int32 {
	n := len(d.slots)
	if n == 0 || d.ring.UpdateFile(uint32(d.slots[n-1]), fd) != nil {
		return -1
	}
	slot := d.slots[n-1]
	d.slots = d.slots[:n-1]
	return slot
}

func (d *ringDriver) detach(_, slot int32) {
	if slot >= 0 && d.ring.UpdateFile(uint32(slot), -1) == nil {
		d.slots = append(d.slots, slot)
	}
}

// sqe is a free entry, made by submitting if need be, or nil when the kernel
// takes no more for now.
func (d *ringDriver) sqe() *uring.SQE {
	e := d.ring.SQE()
	if e == nil {
		d.enter(d.ring.Enter())
		e = d.ring.SQE()
	}
	return e
}

// enter looks at what entering the kernel said. There is no way on from an error
// that uring doesn't handle: the ring is broken.
func (d *ringDriver) enter(err error) {
	if err != nil {
		panic(fmt.Sprintf("aio: %v", err))
	}
}

func (d *ringDriver) start(o *op) {
	if o.kind == opRecv && d.mayHold() {
		d.held = o
		return
	}
	d.queue(o)
}

func (d *ringDriver) cancel(o *op) {
	if d.held == o {
		if !d.look() {
			o.res, d.got = -int32(unix.ECANCELED), true
		}
		return
	}
	c := d.loop.newOp()
	c.kind, c.n, c.done = opCancel, int64(o.index), d.loop.freeOp
	d.loop.active++
	d.queue(c)
}

// mayHold reports whether the loop would look for data itself.
func (d *ringDriver) mayHold() bool {
	return d.loop.sockets == 1 && d.loop.spin.window > 0
}

// look tries the held receive and reports whether it has a result.
func (d *ringDriver) look() bool {
	if d.held != nil && !d.got {
		d.held.perform()
		d.got = d.held.res != -int32(unix.EAGAIN)
	}
	return d.got
}

// letGo leaves the held receive to the ring.
func (d *ringDriver) letGo() {
	if d.held != nil && !d.got {
		d.queue(d.held)
		d.held = nil
	}
}

func (d *ringDriver) queue(o *op) {
	if d.backlog.empty() && d.submit(o) {
		return
	}
	d.backlog.push(o)
}

func (d *ringDriver) submit(o *op) bool {
	e := d.sqe()
	if e == nil {
		return false
	}
	fd, flags := o.fd, uint8(0)
	if o.slot >= 0 {
		fd, flags = o.slot, uring.SQEFixedFile
	}
	segments := uint32(min(len(o.vec), maxSegments))
	switch o.kind {
	case opReadv:
		if segments == 1 {
			e.Read(fd, o.vec[0].Base, uint32(o.vec[0].Len), uint64(o.off))
		} else {
			e.Readv(fd, unsafe.Pointer(&o.vec[0]), segments, uint64(o.off))
		}
	case opWritev:
		if segments == 1 {
			e.Write(fd, o.vec[0].Base, uint32(o.vec[0].Len), uint64(o.off), o.flags)
		} else {
			e.Writev(fd, unsafe.Pointer(&o.vec[0]), segments, uint64(o.off), o.flags)
		}
	case opFdatasync:
		e.Fdatasync(fd)
	case opFallocate:
		e.Fallocate(fd, o.flags, uint64(o.off), uint64(o.n))
	case opFadvise:
		e.Fadvise(fd, uint64(o.off), uint32(min(o.n, 1<<30)), o.flags)
	case opRecv:
		e.Recv(fd, o.vec[0].Base, uint32(o.vec[0].Len))
	case opSend:
		if segments == 1 {
			e.Send(fd, o.vec[0].Base, uint32(o.vec[0].Len), unix.MSG_NOSIGNAL|unix.MSG_WAITALL)
		} else {
			e.Sendmsg(fd, unsafe.Pointer(o.header()), unix.MSG_NOSIGNAL|unix.MSG_WAITALL)
		}
	case opCancel:
		e.Cancel(uint64(o.n))
	}
	e.Flags |= flags
	e.UserData = uint64(o.index)
	if d.faults != nil {
		d.faults.submitting(o, e)
	}
	return true
}

func (d *ringDriver) turn(timeout time.Duration) {
	if !d.armed {
		d.armWake()
	}
	for !d.backlog.empty() && d.submit(d.backlog.first) {
		d.backlog.pop()
	}
	l := d.loop
	if !d.mayHold() {
		d.letGo()
	}
	wait := timeout != 0 && !d.got && d.ring.Completed() == 0
	if wait && l.spin.window == 0 {
		// Submit and sleep in one kernel entry.
		begin := time.Now()
		d.sleep(timeout)
		l.spin.waited(begin, d.ring.Completed() > 0)
	} else {
		if d.ring.Pending() > 0 || d.ring.NeedsEnter() {
			d.enter(d.ring.Enter())
		}
		if !d.look() && wait && d.ring.Completed() == 0 {
			d.spinOrSleep(timeout)
		}
	}
	// Only what is there now: a handler may start what completes at once.
	for range d.ring.Completed() {
		c, ok := d.ring.CQE()
		if !ok {
			break
		}
		if c.UserData == wakeTag {
			d.armed = c.Flags&uring.CQEMore != 0
			continue
		}
		o := l.ops[c.UserData]
		o.res = c.Res
		if d.faults != nil {
			d.faults.completed(o)
		}
		l.finish(o)
	}
	if d.got {
		o := d.held
		d.held, d.got = nil, false
		l.finish(o)
	}
}

// happened reports whether there is something to do, and lets the kernel run what
// may give something. That the kernel asks to be entered is no reason to go on by
// itself: a client's thread can set the flag just after what it was set for has
// been run, and then it stays set.
func (d *ringDriver) happened() bool {
	if d.ring.Completed() > 0 || d.loop.pending.Load() || d.look() {
		return true
	}
	if !d.ring.NeedsEnter() {
		return false
	}
	d.enter(d.ring.Enter())
	return d.ring.Completed() > 0
}

func (d *ringDriver) spinOrSleep(timeout time.Duration) {
	begin := time.Now()
	if d.loop.spin.until(begin, d.ready) {
		return
	}
	d.letGo()
	d.sleep(timeout)
	d.loop.spin.waited(begin, d.ring.Completed() > 0)
}

func (d *ringDriver) sleep(timeout time.Duration) {
	l := d.loop
	l.asleep.Store(true)
	if l.pending.Load() { // posted before it could see that the thread sleeps
		d.enter(d.ring.Enter())
	} else {
		d.enter(d.ring.Wait(timeout))
	}
	l.asleep.Store(false)
}

func (d *ringDriver) close() {
	_ = d.ring.Close()
	_ = unix.Close(d.event)
}
