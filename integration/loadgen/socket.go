package loadgen

import (
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	"golang.org/x/sys/unix"
)

// socket is a connected stream socket, used without Go's poller: the thread
// looks for data for as long as spin says and then sleeps in a system call.
type socket struct {
	fd      int
	spin    time.Duration
	timeout time.Duration
}

// sendBuffer is large enough that a batch of small writes leaves in one go.
const sendBuffer = 1 << 20

func connect(network, address string, timeout time.Duration) (socket, error) {
	var (
		family int
		peer   unix.Sockaddr
	)
	switch network {
	case "unix":
		family, peer = unix.AF_UNIX, &unix.SockaddrUnix{Name: address}
	case "tcp":
		a, err := net.ResolveTCPAddr("tcp", address)
		if err != nil {
			return socket{}, err
		}
		if ip := a.IP.To4(); ip != nil {
			family, peer = unix.AF_INET, &unix.SockaddrInet4{Port: a.Port, Addr: [4]byte(ip)}
		} else {
			family, peer = unix.AF_INET6, &unix.SockaddrInet6{Port: a.Port, Addr: [16]byte(a.IP.To16())}
		}
	default:
		return socket{}, fmt.Errorf("network %q: need unix or tcp", network)
	}
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return socket{}, fmt.Errorf("create socket: %w", err)
	}
	limit := unix.NsecToTimeval(timeout.Nanoseconds())
	err = errors.Join(
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &limit),
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &limit),
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, sendBuffer),
	)
	if network == "tcp" {
		err = errors.Join(err, unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1))
	}
	if err == nil {
		err = unix.Connect(fd, peer)
	}
	if err != nil {
		unix.Close(fd)
		return socket{}, err
	}
	return socket{fd: fd, timeout: timeout}, nil
}

func (s socket) close() { unix.Close(s.fd) }

// spinFor makes reads look for data for that long before they sleep.
func (s *socket) spinFor(d time.Duration) error {
	s.spin = d
	if err := unix.SetNonblock(s.fd, d > 0); err != nil {
		return fmt.Errorf("set blocking mode: %w", err)
	}
	return nil
}

// await sleeps until the socket is ready for events.
func (s socket) await(events int16) error {
	fds := []unix.PollFd{{Fd: int32(s.fd), Events: events}}
	if n, err := unix.Poll(fds, int(s.timeout.Milliseconds())); n == 0 && err == nil {
		return unix.ETIMEDOUT
	}
	return nil
}

// Read returns what has arrived, waiting for the first byte.
func (s socket) Read(p []byte) (int, error) {
	var begin time.Time
	for {
		n, err := unix.Read(s.fd, p)
		switch {
		case err == unix.EINTR:
		case err == unix.EAGAIN && s.spin > 0:
			if begin.IsZero() {
				begin = time.Now()
			} else if time.Since(begin) > s.spin {
				if err := s.await(unix.POLLIN); err != nil {
					return 0, fmt.Errorf("receive: no answer in time: %w", err)
				}
			}
		case err == unix.EAGAIN:
			return 0, fmt.Errorf("receive: no answer in time: %w", unix.ETIMEDOUT)
		case err != nil:
			return 0, fmt.Errorf("receive: %w", err)
		case n == 0:
			return 0, fmt.Errorf("receive: server closed the connection: %w", io.ErrUnexpectedEOF)
		default:
			return n, nil
		}
	}
}

// Write sends all of p.
func (s socket) Write(p []byte) (int, error) {
	sent := 0
	for sent < len(p) {
		n, err := unix.Write(s.fd, p[sent:])
		switch {
		case err == unix.EINTR:
		case err == unix.EAGAIN && s.spin > 0:
			if err := s.await(unix.POLLOUT); err != nil {
				return sent, fmt.Errorf("send: server takes no data: %w", err)
			}
		case err == unix.EAGAIN:
			return sent, fmt.Errorf("send: server takes no data: %w", unix.ETIMEDOUT)
		case err != nil:
			return sent, fmt.Errorf("send: %w", err)
		default:
			sent += n
		}
	}
	return sent, nil
}
