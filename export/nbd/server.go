package nbd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"slices"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"platter/aio"
	"platter/export"
)

// Options shape a server.
type Options struct {
	Loops   []*aio.Loop      // for exports that have none yet: their connections are spread over them
	Exports []*export.Export // what clients may choose from
	Log     *slog.Logger     // slog.Default() when nil
	// HandshakeTimeout is how long a client may take to choose an export; 10 s
	// when 0.
	HandshakeTimeout time.Duration
	// MaxConnections bounds the connections, those that negotiate included; 1024
	// when 0. Further ones are closed at once.
	MaxConnections int
}

// ErrServerClosed is returned by Serve after Shutdown.
var ErrServerClosed = errors.New("server closed")

// sendBuffer is what sockets are asked to hold, in bytes: enough for a batch of
// replies, so that the loop can go on while the client reads.
const sendBuffer = 1 << 20

// Server serves exports to NBD clients. Its methods may be called from any
// goroutine.
type Server struct {
	opts    Options
	exports exportList
	lanes   lanes
	log     *slog.Logger

	mu        sync.Mutex
	listeners map[net.Listener]struct{}
	greeting  map[net.Conn]struct{} // connections that negotiate
	conns     map[*conn]struct{}
	closed    bool
	idle      *sync.Cond // signalled when a connection is gone
}

// NewServer makes a server; Serve gives it listeners.
func NewServer(o Options) (*Server, error) {
	if len(o.Loops) == 0 {
		return nil, &Error{Op: "make server", Err: errors.New("there is no loop")}
	}
	if o.HandshakeTimeout == 0 {
		o.HandshakeTimeout = 10 * time.Second
	}
	if o.MaxConnections == 0 {
		o.MaxConnections = 1024
	}
	if o.Log == nil {
		o.Log = slog.Default()
	}
	s := &Server{opts: o, exports: o.Exports, log: o.Log,
		listeners: map[net.Listener]struct{}{}, greeting: map[net.Conn]struct{}{}, conns: map[*conn]struct{}{}}
	s.idle = sync.NewCond(&s.mu)
	for _, l := range o.Loops {
		s.lanes.on(l).stays = true
	}
	for i, e := range o.Exports {
		if len(e.Name()) > maxString || !validName([]byte(e.Name())) {
			return nil, &Error{Op: "make server", Err: fmt.Errorf("export name %q is not UTF-8 of at most %d bytes", e.Name(), maxString)}
		}
		if s.exports.find(e.Name()) != o.Exports[i] {
			return nil, &Error{Op: "make server", Err: fmt.Errorf("two exports are named %q", e.Name())}
		}
		if len(e.Loops()) == 0 {
			// Each begins at another loop, as many clients have one connection.
			first := i % len(o.Loops)
			if err := e.Move(append(slices.Clone(o.Loops[first:]), o.Loops[:first]...)); err != nil {
				return nil, &Error{Op: "make server", Err: err}
			}
		}
	}
	return s, nil
}

// Serve takes connections from the listener until Shutdown, when it returns
// ErrServerClosed, or until accepting fails for good. It closes the listener.
func (s *Server) Serve(l net.Listener) error {
	if !s.track(l) {
		l.Close()
		return ErrServerClosed
	}
	defer l.Close()
	for {
		nc, err := l.Accept()
		if err == nil {
			if s.admit(nc) {
				go s.greet(nc)
			}
			continue
		}
		s.mu.Lock()
		closed := s.closed
		s.mu.Unlock()
		if closed {
			return ErrServerClosed
		}
		if !errors.Is(err, unix.EMFILE) && !errors.Is(err, unix.ENFILE) && !errors.Is(err, unix.ECONNABORTED) {
			return &Error{Op: "accept connection", Addr: l.Addr().String(), Err: err}
		}
		s.log.Warn("accept failed", "error", err)
		time.Sleep(100 * time.Millisecond)
	}
}

func (s *Server) track(l net.Listener) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.closed {
		s.listeners[l] = struct{}{}
	}
	return !s.closed
}

// admit counts a new connection, or closes it.
func (s *Server) admit(nc net.Conn) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed || len(s.greeting)+len(s.conns) >= s.opts.MaxConnections {
		if !s.closed {
			s.log.Warn("connection refused", "client", peer(nc), "cause", "too many connections", "limit", s.opts.MaxConnections)
		}
		nc.Close()
		return false
	}
	s.greeting[nc] = struct{}{}
	return true
}

// greet negotiates with a client and moves its connection to a loop.
func (s *Server) greet(nc net.Conn) {
	_ = nc.SetDeadline(time.Now().Add(s.opts.HandshakeTimeout))
	res, err := negotiate(nc, s.exports, defaultLimits)
	if err == nil {
		err = s.adopt(nc, res.offer.Name)
	}
	nc.Close()
	s.mu.Lock()
	delete(s.greeting, nc)
	s.idle.Broadcast()
	s.mu.Unlock()
	switch {
	case err == nil, errors.Is(err, errAborted), errors.Is(err, io.EOF), errors.Is(err, ErrServerClosed):
	case errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, unix.ECONNRESET), errors.Is(err, unix.EPIPE):
		s.log.Debug("client left", "error", err)
	case errors.Is(err, export.ErrTooManyQueues):
		s.log.Warn("connection refused", "client", peer(nc), "cause", err)
	default:
		s.log.Warn("negotiation failed", "error", err)
	}
}

// adopt gives the connection's descriptor to a loop.
func (s *Server) adopt(nc net.Conn, name string) error {
	fd, err := duplicate(nc)
	if err != nil {
		return &Error{Op: "serve client", Addr: peer(nc), Err: err}
	}
	e := s.exports.find(name)
	q, err := e.OpenQueue()
	if err != nil {
		unix.Close(fd)
		return err
	}
	log := s.log.With("export", name, "client", peer(nc))
	nc.Close() // before the loop changes the mode that both descriptors share
	started := make(chan struct{})
	q.Post(func() {
		defer close(started)
		var c *conn
		c = newConn(fd, q, &s.lanes, log, func() { s.gone(c) })
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.greeting, nc) // at once, lest the limit count it twice
		s.conns[c] = struct{}{}
		if s.closed {
			c.stop()
		}
	})
	<-started
	return nil
}

// duplicate gets hold of the connection's socket, with room for many replies.
func duplicate(nc net.Conn) (int, error) {
	sc, ok := nc.(syscall.Conn)
	if !ok {
		return -1, fmt.Errorf("%T has no descriptor", nc)
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return -1, err
	}
	fd := -1
	var dupErr error
	err = raw.Control(func(old uintptr) {
		if fd, dupErr = unix.FcntlInt(old, unix.F_DUPFD_CLOEXEC, 0); dupErr != nil {
			return
		}
		if unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, sendBuffer) != nil {
			_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, sendBuffer)
		}
	})
	return fd, errors.Join(err, dupErr)
}

func (s *Server) gone(c *conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.conns, c)
	s.idle.Broadcast()
}

// Shutdown stops accepting, lets every connection finish what it has begun, and
// returns when all are gone. When the context ends first, clients that don't
// take their replies are cut off. Writes are completed, not flushed: see
// export.Export.Flush.
func (s *Server) Shutdown(ctx context.Context) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	for l := range s.listeners {
		l.Close()
	}
	for nc := range s.greeting {
		nc.Close()
	}
	for c := range s.conns {
		c.queue.Post(c.stop)
	}
	stop := context.AfterFunc(ctx, s.cut)
	defer stop()
	for len(s.greeting)+len(s.conns) > 0 {
		s.idle.Wait()
	}
	return ctx.Err()
}

// cut ends what is left of the connections.
func (s *Server) cut() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := range s.conns {
		c.queue.Post(c.cut)
	}
}
