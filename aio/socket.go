package aio

import (
	"golang.org/x/sys/unix"
)

// Socket is a connected stream socket on a loop: at most one receive and one
// send at a time, each reported to its callback from a later turn. All methods
// are called on the loop's thread.
type Socket struct {
	loop       *Loop
	recv, send *op
	recvVec    [1]Iovec
	onRecv     func(n int, errno unix.Errno)
	onSend     func(errno unix.Errno)
}

// NewSocket takes over the descriptor. onRecv is told how many bytes came (0
// when the peer has closed); onSend, that everything was sent or why not.
func (l *Loop) NewSocket(fd int, onRecv func(int, unix.Errno), onSend func(unix.Errno)) *Socket {
	// A ring fails operations on descriptors in non-blocking mode instead of
	// waiting; epoll asks for non-blocking calls one by one.
	_ = unix.SetNonblock(fd, false)
	s := &Socket{loop: l, recv: l.newOp(), send: l.newOp(), onRecv: onRecv, onSend: onSend}
	s.recv.kind, s.recv.done = opRecv, s.received
	s.send.kind, s.send.done = opSend, s.sent
	s.recv.fd, s.send.fd = int32(fd), int32(fd)
	s.recv.slot = l.driver.attach(int32(fd))
	s.send.slot = s.recv.slot
	l.sockets++
	return s
}

// Recv receives at least one byte into the memory that v names, which belongs to
// the socket until onRecv is called.
func (s *Socket) Recv(v Iovec) {
	s.recvVec[0] = v
	s.recv.vec, s.recv.cancelled = s.recvVec[:], false
	s.loop.start(s.recv)
}

// CancelRecv ends the receive that is in flight: onRecv is called soon, from a
// later turn, with what has come or, if that is nothing, with ECANCELED. What the
// peer sends later stays in the socket.
func (s *Socket) CancelRecv() {
	if !s.recv.cancelled {
		s.recv.cancelled = true
		s.loop.driver.cancel(s.recv)
	}
}

func (s *Socket) received(o *op) {
	switch e := o.errno(); {
	case e != unix.EAGAIN && e != unix.EINTR:
		s.onRecv(int(max(o.res, 0)), e)
	case o.cancelled:
		s.onRecv(0, unix.ECANCELED)
	default:
		s.loop.start(o)
	}
}

// Send sends all that vec names, which is at least one piece. Vec and its memory
// belong to the socket until onSend is called, and the elements of vec are
// changed. When the peer is gone it fails with EPIPE; there is no SIGPIPE.
func (s *Socket) Send(vec []Iovec) {
	s.send.vec = vec
	s.loop.start(s.send)
}

func (s *Socket) sent(o *op) {
	switch e := o.errno(); e {
	case 0:
		if o.vec = Advance(o.vec, uint64(o.res)); len(o.vec) == 0 {
			s.onSend(0)
			return
		}
		fallthrough
	case unix.EAGAIN, unix.EINTR:
		s.loop.start(o)
	default:
		s.onSend(e)
	}
}

// StopSending tells the peer that nothing more comes. Receiving goes on, so that
// the peer can read what was sent before: a socket that is closed with data that
// nobody received makes the kernel throw that away.
func (s *Socket) StopSending() { _ = unix.Shutdown(int(s.recv.fd), unix.SHUT_WR) }

// Shutdown ends the connection both ways: what is in flight completes soon.
func (s *Socket) Shutdown() { _ = unix.Shutdown(int(s.recv.fd), unix.SHUT_RDWR) }

// Close closes the descriptor. Nothing may be in flight.
func (s *Socket) Close() { _ = unix.Close(s.Detach()) }

// Detach ends the socket, but leaves its descriptor open, for a socket on another
// loop. Nothing may be in flight.
func (s *Socket) Detach() (fd int) {
	fd = int(s.recv.fd)
	s.loop.sockets--
	s.loop.driver.detach(s.recv.fd, s.recv.slot)
	s.loop.freeOp(s.recv)
	s.loop.freeOp(s.send)
	return fd
}
