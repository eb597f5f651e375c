package aio

import (
	"bytes"
	"io"
	"math/rand/v2"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// end is one end of a connection on a loop.
type end struct {
	*Socket
	memory *Memory
	got    bytes.Buffer
	eof    chan struct{}
	sent   chan unix.Errno
	errno  unix.Errno // of the receive that ended it
}

// connect makes a connection of which one end is on the loop. It receives until
// it can't any more; what comes is handed to onData as well.
func connect(t *testing.T, l *Loop, onData func(*end, []byte)) (*end, *os.File) {
	t.Helper()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	peer := os.NewFile(uintptr(pair[1]), "peer")
	s := &end{memory: newMemory(t, 1<<16), eof: make(chan struct{}), sent: make(chan unix.Errno, 100)}
	again := false // a callback has run
	receive := func() {
		again = false
		s.Recv(s.memory.Iovec(0, 1<<16))
		if again {
			t.Error("a callback ran within Recv")
		}
	}
	l.Call(func() {
		s.Socket = l.NewSocket(pair[0], func(n int, errno unix.Errno) {
			again = true
			if n == 0 {
				s.errno = errno
				close(s.eof)
				return
			}
			s.got.Write(s.memory.Bytes()[:n])
			if onData != nil {
				onData(s, s.memory.Bytes()[:n])
			}
			receive()
		}, func(errno unix.Errno) { s.sent <- errno })
		receive()
	})
	t.Cleanup(func() {
		l.Call(s.Shutdown)
		waitFor(t, s.eof, "end of the connection")
		l.Call(s.Close)
		peer.Close()
	})
	return s, peer
}

func TestEcho(t *testing.T) {
	eachEngine(t, func(t *testing.T, l *Loop) {
		reply := newMemory(t, 1<<16)
		s, peer := connect(t, l, func(s *end, b []byte) {
			if e := <-s.sent; e != 0 {
				t.Errorf("send: %v", e)
			}
			copy(reply.Bytes(), b)
			k := len(b) / 3
			s.Send([]Iovec{reply.Iovec(0, k), reply.Iovec(k, len(b)-k)})
		})
		s.sent <- 0
		rng := rand.New(rand.NewPCG(5, 5))
		for range 300 {
			out := make([]byte, 1+rng.IntN(5000))
			for i := range out {
				out[i] = byte(rng.Uint32())
			}
			if _, err := peer.Write(out); err != nil {
				t.Fatal(err)
			}
			in := make([]byte, len(out))
			if _, err := io.ReadFull(peer, in); err != nil || !bytes.Equal(in, out) {
				t.Fatalf("%d bytes came back as something else: %v", len(out), err)
			}
			// The reply may come in several pieces, each sent when the one
			// before was: the last one's note is still to come.
		}
	})
}

// TestLargeSend: a vector of more pieces than one message takes, and of more
// bytes than the connection holds, reaches a slow reader whole.
func TestLargeSend(t *testing.T) {
	eachEngine(t, func(t *testing.T, l *Loop) {
		const size = 8 << 20
		s, peer := connect(t, l, nil)
		m := newMemory(t, size)
		copy(m.Bytes(), pattern(size))
		for _, pieces := range []int{1, 3000} {
			vec := split(m, 0, size, pieces, rand.New(rand.NewPCG(6, 6)))
			l.Post(func() { s.Send(vec) })
			got := make([]byte, size)
			for i := 0; i < size; {
				n, err := peer.Read(got[i:min(size, i+30_000)])
				if err != nil {
					t.Fatal(err)
				}
				i += n
			}
			if e := <-s.sent; e != 0 {
				t.Errorf("send: %v", e)
			}
			if !bytes.Equal(got, m.Bytes()) {
				t.Errorf("%d pieces: something else was received", pieces)
			}
		}
	})
}

// TestInterruptedSocket: calls that a signal ends, or that do less than they were
// asked for, are made again.
func TestInterruptedSocket(t *testing.T) {
	eachEngine(t, func(t *testing.T, l *Loop) {
		s, peer := connect(t, l, nil)
		step := 0
		intercept(t, l, func(o *op) bool {
			if o.kind != opSend {
				return false
			}
			switch step++; step {
			case 1:
				return answer(o, -int32(unix.EINTR))
			case 2:
				return answer(o, -int32(unix.EAGAIN))
			case 3:
				n, err := peer2(s).Write([]byte("hel"))
				if err != nil {
					t.Error(err)
				}
				return answer(o, int32(n))
			}
			return false
		})
		m := newMemory(t, 100)
		copy(m.Bytes(), "hello, world")
		l.Post(func() { s.Send([]Iovec{m.Iovec(0, 1), m.Iovec(1, 4), m.Iovec(5, 7)}) })
		got := make([]byte, 12)
		if _, err := io.ReadFull(peer, got); err != nil || string(got) != "hello, world" {
			t.Errorf("%q, %v", got, err)
		}
		if e := <-s.sent; e != 0 || step != 4 {
			t.Errorf("send: %v, after %d tries", e, step)
		}
	})
}

// peer2 writes to a socket by its descriptor.
func peer2(s *end) io.Writer { return writer(s.recv.fd) }

type writer int

func (w writer) Write(b []byte) (int, error) { return unix.Write(int(w), b) }

func TestPeerCloses(t *testing.T) {
	eachEngine(t, func(t *testing.T, l *Loop) {
		s, peer := connect(t, l, nil)
		if _, err := peer.WriteString("last words"); err != nil {
			t.Fatal(err)
		}
		peer.Close()
		waitFor(t, s.eof, "end of the connection")
		if s.got.String() != "last words" || s.errno != 0 {
			t.Errorf("received %q, %v", &s.got, s.errno)
		}
		// SIGPIPE would be an error too: only where os/signal was told to
		// would it be survived.
		m := newMemory(t, 100)
		for _, vec := range [][]Iovec{{m.Iovec(0, 5)}, {m.Iovec(0, 5), m.Iovec(50, 5)}} {
			l.Post(func() { s.Send(vec) })
			if e := <-s.sent; e != unix.EPIPE {
				t.Errorf("send to a peer that is gone: %v", e)
			}
		}
	})
}

// TestStopSending: the peer reads what was sent and then the end, and what it
// still sends is received.
func TestStopSending(t *testing.T) {
	eachEngine(t, func(t *testing.T, l *Loop) {
		s, peer := connect(t, l, nil)
		m := newMemory(t, 100)
		copy(m.Bytes(), "farewell")
		l.Post(func() { s.Send([]Iovec{m.Iovec(0, 8)}) })
		if e := <-s.sent; e != 0 {
			t.Error(e)
		}
		l.Call(s.StopSending)
		if got, err := io.ReadAll(peer); err != nil || string(got) != "farewell" {
			t.Errorf("%q, %v", got, err)
		}
		if _, err := peer.WriteString("thanks"); err != nil {
			t.Error(err)
		}
		peer.Close()
		waitFor(t, s.eof, "receive")
		if s.errno != 0 || s.got.String() != "thanks" {
			t.Errorf("received %q, then %v", s.got.String(), s.errno)
		}
	})
}

// TestShutdownWhileSending: what is in flight both ways ends.
func TestShutdownWhileSending(t *testing.T) {
	eachEngine(t, func(t *testing.T, l *Loop) {
		s, _ := connect(t, l, nil)
		m := newMemory(t, 8<<20)
		l.Call(func() { s.Send([]Iovec{m.Iovec(0, 4<<20), m.Iovec(4<<20, 4<<20)}) })
		for range 10 {
			l.Call(func() {})
		}
		l.Call(s.Shutdown)
		waitFor(t, s.eof, "receive")
		if e := <-s.sent; e != unix.EPIPE {
			t.Errorf("send: %v", e)
		}
	})
}

// TestCancelRecv: a receive that is cancelled ends with what has come or with
// ECANCELED, and the bytes that its peer sends all arrive, whenever it is
// cancelled, also when the descriptor goes to another loop and back each time.
func TestCancelRecv(t *testing.T) {
	eachEngine(t, func(t *testing.T, l *Loop) {
		loops := []*Loop{l, newLoop(t, LoopOptions{Engine: l.Engine(), Poll: DefaultPoll})}
		pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		peer := os.NewFile(uintptr(pair[1]), "peer")
		want := bytes.Repeat(pattern(8<<20), 2)
		go func() {
			rng := rand.New(rand.NewPCG(7, 7))
			for out := want; len(out) > 0; {
				n := min(len(out), 1+rng.IntN(100_000))
				if _, err := peer.Write(out[:n]); err != nil {
					t.Error(err)
				}
				if out = out[n:]; rng.IntN(4) == 0 {
					time.Sleep(time.Millisecond)
				}
			}
			peer.Close()
		}()
		memory := newMemory(t, 1<<16)
		var got bytes.Buffer
		fd, cancelled, eof := pair[0], 0, false
		for hop := 0; !eof; hop++ {
			over := make(chan struct{})
			loop, receives := loops[hop%2], hop%4
			var s *Socket
			onRecv := func(n int, errno unix.Errno) {
				got.Write(memory.Bytes()[:n])
				eof = n == 0 && errno == 0
				if errno == unix.ECANCELED {
					cancelled++
				} else if errno != 0 {
					t.Errorf("receive: %v", errno)
				}
				if receives--; receives > 0 && n > 0 {
					s.Recv(memory.Iovec(0, 1<<16))
					return
				}
				if receives > -2 && n > 0 {
					s.Recv(memory.Iovec(0, 1<<16))
					s.CancelRecv()
					s.CancelRecv() // once is enough
					return
				}
				fd = s.Detach()
				close(over)
			}
			loop.Call(func() {
				s = loop.NewSocket(fd, onRecv, nil)
				s.Recv(memory.Iovec(0, 1<<16))
				switch hop % 3 {
				case 0:
					s.CancelRecv()
				case 1:
					loop.AfterFunc(100*time.Microsecond, func() {
						select {
						case <-over:
						default:
							s.CancelRecv()
						}
					})
				}
			})
			waitFor(t, over, "receive")
		}
		unix.Close(fd)
		if !bytes.Equal(got.Bytes(), want) || cancelled == 0 {
			t.Errorf("%d bytes of %d arrived, or others; %d receives were cancelled", got.Len(), len(want), cancelled)
		}
		for _, l := range loops {
			l.Call(func() {
				if l.sockets != 0 || l.active != 0 {
					t.Errorf("%d sockets and %d operations are left", l.sockets, l.active)
				}
			})
		}
	})
}

// TestSocketSlots: what a socket had registered is given back, and its peer sees
// the end, when it is closed; more sockets come and go than there are slots.
func TestSocketSlots(t *testing.T) {
	eachEngine(t, func(t *testing.T, l *Loop) {
		held := func() (n int) {
			l.Call(func() {
				switch d := l.driver.(type) {
				case *ringDriver:
					n = registeredFiles - len(d.slots)
				case *nativeDriver:
					n = len(d.sockets)
				case *epollDriver:
					n = len(d.sockets)
				}
			})
			return n
		}
		before := held()
		for range registeredFiles + 10 {
			pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				t.Fatal(err)
			}
			var s *Socket
			l.Call(func() { s = l.NewSocket(pair[0], nil, nil) })
			if n := held(); n != before+1 {
				t.Fatalf("%d are registered", n)
			}
			l.Call(s.Close)
			if n, err := unix.Read(pair[1], make([]byte, 1)); n != 0 || err != nil {
				t.Fatalf("the peer sees %d, %v", n, err)
			}
			unix.Close(pair[1])
		}
		if n := held(); n != before {
			t.Errorf("%d are registered", n)
		}
		l.Call(func() {
			if len(l.ops) > 10 {
				t.Errorf("%d ops for one socket at a time", len(l.ops))
			}
		})
	})
}
