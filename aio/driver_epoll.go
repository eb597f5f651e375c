package aio

import (
	"fmt"
	"math"
	"time"

	"golang.org/x/sys/unix"
)

// epollDriver tries sockets without blocking and waits for them in epoll; file
// I/O goes to the pool.
type epollDriver struct {
	loop    *Loop
	epoll   int
	event   int    // eventfd
	runq    opList // socket operations to try
	sockets map[int32]*epollSocket
	events  [64]unix.EpollEvent
	found   int  // events that a look while spinning has found
	rung    bool // the eventfd has told something; for who has more than wakes come by it
	ready   func() bool
}

// epollSocket is a socket's operations that wait until it is ready.
type epollSocket struct {
	recv, send *op
}

func newEpollDriver(l *Loop) (*epollDriver, error) {
	epoll, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("make epoll: %w", err)
	}
	event, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		unix.Close(epoll)
		return nil, fmt.Errorf("make eventfd: %w", err)
	}
	d := &epollDriver{loop: l, epoll: epoll, event: event, sockets: map[int32]*epollSocket{}}
	if err := d.watch(int32(event), unix.EPOLLIN|unix.EPOLLET); err != nil {
		d.close()
		return nil, err
	}
	d.ready = func() bool { return l.pending.Load() || d.poll(0) }
	return d, nil
}

func (d *epollDriver) watch(fd int32, events uint32) error {
	if err := unix.EpollCtl(d.epoll, unix.EPOLL_CTL_ADD, int(fd), &unix.EpollEvent{Events: events, Fd: fd}); err != nil {
		return fmt.Errorf("watch descriptor: %w", err)
	}
	return nil
}

func (d *epollDriver) wake() { signal(d.event) }

// signal adds one to an eventfd.
func signal(eventfd int) { _, _ = unix.Write(eventfd, eventOne[:]) }

// eventOne is a 64-bit 1, on little-endian machines. On the stack it might escape.
var eventOne = [8]byte{1}

// attach watches sockets; files can't be watched, and needn't be.
func (d *epollDriver) attach(fd int32) int32 {
	if d.watch(fd, unix.EPOLLIN|unix.EPOLLOUT|unix.EPOLLRDHUP|unix.EPOLLET&0xffffffff) == nil {
		d.sockets[fd] = &epollSocket{}
	}
	return -1
}

func (d *epollDriver) detach(fd, _ int32) {
	if d.sockets[fd] != nil {
		delete(d.sockets, fd)
		_ = unix.EpollCtl(d.epoll, unix.EPOLL_CTL_DEL, int(fd), nil)
	}
}

func (d *epollDriver) start(o *op) {
	if o.kind == opRecv || o.kind == opSend {
		d.runq.push(o)
	} else {
		threads.run(o)
	}
}

// cancel tries a receive that waits once more, which ends it.
func (d *epollDriver) cancel(o *op) {
	if s := d.sockets[o.fd]; s != nil && s.recv == o {
		s.recv = nil
		d.runq.push(o)
	}
}

// poll looks for events for at most ms milliseconds (-1: for ever) and reports
// whether there are any that somebody waits for.
func (d *epollDriver) poll(ms int) bool {
	n, err := unix.EpollWait(d.epoll, d.events[:], ms)
	if err != nil {
		n = 0 // a signal
	}
	d.found = 0
	for _, e := range d.events[:n] {
		if d.awaited(e) {
			d.events[d.found] = e
			d.found++
		}
	}
	return d.found > 0
}

// awaited reports whether an event is work. That a client has taken what was sent
// makes an event for each reply, soon after it: a loop that took that for work
// would think that looking for it pays.
func (d *epollDriver) awaited(e unix.EpollEvent) bool {
	if e.Fd == int32(d.event) {
		return true
	}
	s := d.sockets[e.Fd]
	return s != nil && (s.recv != nil && e.Events&^unix.EPOLLOUT != 0 || s.send != nil && e.Events&^unix.EPOLLIN != 0)
}

func (d *epollDriver) turn(timeout time.Duration) {
	// What completes may have left tasks and timers, which the timeout doesn't
	// know of.
	completed := d.try()
	l := d.loop
	switch {
	case completed || timeout == 0 || !d.runq.empty() || l.pending.Load():
		d.poll(0)
	default:
		begin := time.Now()
		if !l.spin.until(begin, d.ready) {
			l.asleep.Store(true)
			if l.pending.Load() {
				timeout = 0
			}
			found := d.poll(milliseconds(timeout))
			l.asleep.Store(false)
			l.spin.waited(begin, found)
		}
	}
	for _, e := range d.events[:d.found] {
		if e.Fd == int32(d.event) {
			d.rung = true
			continue
		}
		s := d.sockets[e.Fd]
		if s == nil {
			continue
		}
		if s.recv != nil && e.Events&^unix.EPOLLOUT != 0 {
			d.runq.push(s.recv)
			s.recv = nil
		}
		if s.send != nil && e.Events&^unix.EPOLLIN != 0 {
			d.runq.push(s.send)
			s.send = nil
		}
	}
	d.found = 0
}

// milliseconds rounds up: a timer must not find that it is not due yet. What
// doesn't fit the system call's int is cut: the loop goes round once more.
func milliseconds(d time.Duration) int {
	if d < 0 {
		return -1
	}
	return int(min((d+time.Millisecond-1)/time.Millisecond, math.MaxInt32))
}

// try runs the socket operations that may succeed and reports whether any has
// completed. Those that their callbacks start are for the next turn.
func (d *epollDriver) try() (completed bool) {
	q := d.runq
	d.runq = opList{}
	for !q.empty() {
		o := q.pop()
		o.perform()
		s := d.sockets[o.fd]
		switch {
		case o.res != -int32(unix.EAGAIN) || s == nil || o.cancelled:
			completed = true
			d.loop.finish(o)
		case o.kind == opRecv:
			s.recv = o
		default:
			s.send = o
		}
	}
	return completed
}

func (d *epollDriver) close() {
	_ = unix.Close(d.event)
	_ = unix.Close(d.epoll)
}
