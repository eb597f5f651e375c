package nbd

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"platter/aio"
	"platter/export/nbd/nbdtest"
	"platter/integration/testenv"
)

// diskFile makes a file of zeroes on a disk's file system.
func diskFile(t testing.TB, size int) string {
	t.Helper()
	path := filepath.Join(testenv.DiskDir(t), "disk.raw")
	must(t, os.WriteFile(path, make([]byte, size), 0o644))
	return path
}

func readFull(c *nbdtest.Client, p []byte) error {
	_ = c.Conn.SetReadDeadline(time.Now().Add(nbdtest.Timeout))
	_, err := io.ReadFull(c.Conn, p)
	return err
}

// Garbage ends its connection, after the good requests before it were answered,
// and no other.
func TestGarbageEndsConnection(t *testing.T) {
	eachEngine(t, func(t *testing.T, engine aio.Engine) {
		image := newFake(t, mib)
		r := newRig(t, image, rigOptions{engine: engine})
		other := r.dial()
		for seed := range uint64(4) {
			c := r.dial()
			_, err := c.Conn.Write(append(wire(nbdtest.CmdWrite, 0, 7, 0, 4096, pattern(4096, seed)), pattern(5000, seed+1)...))
			must(t, err)
			if cookie, errno, _, err := c.Recv(); err != nil || errno != 0 || cookie != 7 {
				t.Errorf("the good write: %v, %v", errno, err)
			}
			wantClosed(t, c)
			got := make([]byte, 4096)
			must(t, other.Read(0, got))
			if !bytes.Equal(got, pattern(4096, seed)) {
				t.Error("the good write is lost")
			}
		}
	})
}

// Half a write is no write, whether its client waits, leaves or is sent away.
func TestHalfWrite(t *testing.T) {
	eachEngine(t, func(t *testing.T, engine aio.Engine) {
		image := newFake(t, 4*mib)
		r := newRig(t, image, rigOptions{engine: engine})
		half := func() *nbdtest.Client {
			c := r.dial()
			must(t, c.Write(0, []byte("whole")))
			_, err := c.Conn.Write(wire(nbdtest.CmdWrite, 0, 1, mib, mib, pattern(600*kib, 1)))
			must(t, err)
			return c
		}
		half().Close()
		header := r.dial()
		_, err := header.Conn.Write(wire(nbdtest.CmdWrite, 0, 1, mib, mib, nil)[:20])
		must(t, err)
		half()
		must(t, r.dial().Read(0, make([]byte, 512)))
		if err := r.shutdown(10 * time.Second); err != nil {
			t.Errorf("shutdown: %v", err)
		}
		if image.count(aio.OpWrite) != 2 || !image.holds(mib, make([]byte, mib)) {
			t.Errorf("%d writes reached the image", image.count(aio.OpWrite))
		}
	})
}

// A connection has no more than maxInFlight requests under way; the rest waits
// for its replies.
func TestMaxInFlight(t *testing.T) {
	var g gate
	image := newFake(t, mib)
	image.later = g.later
	r := newRig(t, image, rigOptions{})
	c := r.dial()
	const n = 3*maxInFlight + 5
	go func() {
		var stream []byte
		for i := range uint64(n) {
			stream = append(stream, wire(nbdtest.CmdFlush, 0, i, 0, 0, nil)...)
		}
		_, _ = c.Conn.Write(stream)
	}()
	eventually(t, "all that may be in flight", func() bool { return g.waiting() == maxInFlight })
	time.Sleep(20 * time.Millisecond)
	if w := g.waiting(); w != maxInFlight {
		t.Errorf("%d requests are in flight", w)
	}
	g.release()
	seen := map[uint64]bool{}
	for range n {
		cookie, errno, _, err := c.Recv()
		if err != nil || errno != 0 || seen[cookie] {
			t.Fatalf("request %d: %v, %v, again: %v", cookie, errno, err, seen[cookie])
		}
		seen[cookie] = true
	}
	must(t, c.Disc())
}

// What is in flight when the client says goodbye is carried out and answered.
func TestDiscFinishes(t *testing.T) {
	var g gate
	image := newFake(t, mib)
	image.later = g.later
	c := newRig(t, image, rigOptions{}).dial()
	for i := range uint64(10) {
		must(t, c.Send(nbdtest.CmdWrite, 0, i, i*1000, 1000, pattern(1000, i)))
	}
	must(t, c.Send(nbdtest.CmdDisc, 0, 99, 0, 0, nil))
	eventually(t, "the writes", func() bool { return g.waiting() > 0 })
	g.release()
	for range 10 {
		if _, errno, _, err := c.Recv(); err != nil || errno != 0 {
			t.Fatal(errno, err)
		}
	}
	wantClosed(t, c)
	for i := range uint64(10) {
		if !image.holds(int(i*1000), pattern(1000, i)) {
			t.Errorf("write %d is lost", i)
		}
	}
}

// Shutdown answers everything that the image has, then closes.
func TestShutdownWhileBusy(t *testing.T) {
	eachEngine(t, func(t *testing.T, engine aio.Engine) {
		var g gate
		image := newFake(t, mib)
		image.later = g.later
		r := newRig(t, image, rigOptions{engine: engine, loops: 2})
		clients := []*nbdtest.Client{r.dial(), r.dial(), r.dial()}
		idle := r.dial()
		for _, c := range clients {
			for i := range uint64(8) { // far apart: not merged
				must(t, c.Send(nbdtest.CmdRead, 0, i, i*10_000, 512, nil))
			}
		}
		eventually(t, "24 reads", func() bool { return g.waiting() == 24 })
		done := make(chan error, 1)
		go func() { done <- r.shutdown(20 * time.Second) }()
		wantClosed(t, idle)
		select {
		case err := <-done:
			t.Fatalf("shutdown returned %v with requests in flight", err)
		case <-time.After(20 * time.Millisecond):
		}
		g.release()
		for _, c := range clients {
			for range 8 {
				if _, errno, _, err := c.Recv(); err != nil || errno != 0 {
					t.Fatalf("%v, %v", errno, err)
				}
			}
			wantClosed(t, c)
		}
		if err := <-done; err != nil {
			t.Errorf("shutdown: %v", err)
		}
		if _, err := nbdtest.Dial("unix", r.path, ""); err == nil {
			t.Error("the server still listens")
		}
		l, err := net.Listen("tcp", "127.0.0.1:0")
		must(t, err)
		if err := r.server.Serve(l); !errors.Is(err, ErrServerClosed) {
			t.Errorf("Serve after Shutdown: %v", err)
		}
	})
}

// A client that asks and doesn't read has its share of memory and no more, is no
// hindrance to others, and can't keep the server from ending.
// TestLastRepliesArrive: requests that come while the server stops aren't taken,
// and don't cost the client the replies that it has yet to read: TCP throws
// those away when a socket is closed with data that nobody received.
func TestLastRepliesArrive(t *testing.T) {
	eachEngine(t, func(t *testing.T, engine aio.Engine) {
		var g gate
		image := newFake(t, mib)
		image.later = g.later
		r := newRig(t, image, rigOptions{engine: engine})
		l, err := net.Listen("tcp", "127.0.0.1:0")
		must(t, err)
		go func() { _ = r.server.Serve(l) }()
		c, err := nbdtest.Dial("tcp", l.Addr().String(), "")
		must(t, err)
		defer c.Close()
		for i := range uint64(8) {
			must(t, c.Send(nbdtest.CmdRead, 0, i, i*100_000, 65_536, nil))
		}
		eventually(t, "8 reads", func() bool { return g.waiting() == 8 })
		done := make(chan error, 1)
		go func() { done <- r.shutdown(20 * time.Second) }()
		eventually(t, "the end of listening", func() bool {
			x, err := net.Dial("tcp", l.Addr().String())
			if err == nil {
				x.Close()
			}
			return err != nil
		})
		r.server.mu.Lock() // until Shutdown waits
		closed := r.server.closed
		r.server.mu.Unlock()
		if !closed {
			t.Fatal("the listener is closed, the server isn't")
		}
		r.server.lanes.all[0].loop.Call(func() {}) // which then has been told to stop
		for i := range uint64(100) {
			must(t, c.Send(nbdtest.CmdRead, 0, 8+i, 0, 512, nil))
		}
		g.release()
		time.Sleep(50 * time.Millisecond) // for a reset to arrive, if there is one
		for range 8 {
			if _, errno, data, err := c.Recv(); err != nil || errno != 0 || len(data) != 65_536 {
				t.Fatalf("%d bytes, %v, %v", len(data), errno, err)
			}
		}
		wantClosed(t, c)
		if err := <-done; err != nil {
			t.Errorf("shutdown: %v", err)
		}
	})
}

func TestNeverReads(t *testing.T) {
	eachEngine(t, func(t *testing.T, engine aio.Engine) {
		r := newRig(t, newFake(t, 2*mib), rigOptions{engine: engine})
		deaf := r.dial()
		for i := range uint64(200) {
			must(t, deaf.Send(nbdtest.CmdRead, 0, i, 0, mib, nil))
		}
		lane := r.server.lanes.all[0]
		left := func() (n int64) {
			lane.loop.Call(func() { n = lane.budget.left })
			return n
		}
		eventually(t, "its share", func() bool { return left() <= loopBudget-maxHeld+2*mib })
		c := r.dial()
		for range 20 {
			must(t, c.Read(0, make([]byte, mib)))
			must(t, c.Write(0, make([]byte, 4096)))
		}
		if n := left(); n < loopBudget-maxHeld {
			t.Errorf("%d bytes are left", n)
		}
		if err := r.shutdown(200 * time.Millisecond); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("shutdown: %v", err)
		}
	})
}

// Clients that hold all the memory and do nothing with it are sent away when
// others need it: one that takes no replies, one that sends no more of a write.
func TestStalledClientsMakeRoom(t *testing.T) {
	eachEngine(t, func(t *testing.T, engine aio.Engine) {
		r := newRig(t, newFake(t, 8*mib), rigOptions{engine: engine, budget: 8 * mib, prepare: func(b *budget) { b.patience = 100 * time.Millisecond }})
		deaf, mute := r.dial(), r.dial()
		must(t, deaf.Send(nbdtest.CmdRead, 0, 1, 0, 4*mib, nil))
		must(t, mute.Send(nbdtest.CmdWrite, 0, 1, 0, 4*mib, []byte("some")))
		lane := r.server.lanes.all[0]
		eventually(t, "no memory", func() (none bool) {
			lane.loop.Call(func() { none = lane.budget.left == 0 })
			return none
		})
		idle := r.dial() // it holds nothing, so it may stay
		c := r.dial()
		must(t, c.Read(0, make([]byte, 6*mib)))
		wantClosed(t, mute)
		must(t, idle.Flush())
	})
}

// Many connections that want more memory than there is all get their turn.
func TestBudgetIsShared(t *testing.T) {
	eachEngine(t, func(t *testing.T, engine aio.Engine) {
		image := newFake(t, 4*mib)
		image.later = shuffle()
		r := newRig(t, image, rigOptions{engine: engine, budget: 4 * mib})
		var wg sync.WaitGroup
		for i := range 12 {
			c := r.dial()
			wg.Go(func() {
				const n = 12
				go func() {
					for j := range uint64(n) {
						length := uint32(1+(i+int(j))%4) * mib
						if j%2 == 0 {
							_ = c.Send(nbdtest.CmdRead, 0, j, 0, length, nil)
						} else {
							_ = c.Send(nbdtest.CmdWrite, 0, j, 0, length, make([]byte, length))
						}
					}
				}()
				for range n {
					if cookie, errno, _, err := c.Recv(); err != nil || errno != 0 {
						t.Errorf("connection %d, request %d: %v, %v", i, cookie, errno, err)
						return
					}
				}
				if err := c.Disc(); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		eventually(t, "the budget as it was", func() (ok bool) {
			b := &r.server.lanes.all[0].budget
			r.server.lanes.all[0].loop.Call(func() { ok = b.left == 4*mib && len(b.waiting) == 0 })
			return ok
		})
	})
}

// A connection that waits for memory and then ends lets the next one have it, at
// once.
func TestWaitingConnectionLeaves(t *testing.T) {
	var g gate
	image := newFake(t, 8*mib)
	image.later = g.later
	r := newRig(t, image, rigOptions{budget: 4 * mib})
	holder, waiter, next := r.dial(), r.dial(), r.dial()
	must(t, holder.Send(nbdtest.CmdRead, 0, 1, 0, 3*mib, nil))
	eventually(t, "the first read", func() bool { return g.waiting() == 1 })
	must(t, waiter.Send(nbdtest.CmdFlush, 0, 2, 0, 0, nil)) // so that it can't be gone at once
	must(t, waiter.Send(nbdtest.CmdRead, 0, 1, 0, 4*mib, nil))
	lane := r.server.lanes.all[0]
	queue := func() (n int) {
		lane.loop.Call(func() { n = len(lane.budget.waiting) })
		return n
	}
	eventually(t, "one that waits", func() bool { return queue() == 1 })
	must(t, next.Send(nbdtest.CmdRead, 0, 1, 0, mib, nil))
	eventually(t, "two that wait", func() bool { return queue() == 2 })
	r.server.mu.Lock()
	for c := range r.server.conns {
		lane.loop.Post(func() {
			if c.waiting && lane.budget.waiting[0] == c {
				c.stop()
			}
		})
	}
	r.server.mu.Unlock()
	eventually(t, "the third read", func() bool { return g.waiting() == 3 })
	g.release()
	wantClosed(t, waiter)
	for _, c := range []*nbdtest.Client{holder, next} {
		if _, errno, _, err := c.Recv(); err != nil || errno != 0 {
			t.Error(errno, err)
		}
	}
}

// Without memory to reply from a connection waits; it goes on when there is some.
func TestNoMemory(t *testing.T) {
	r := newRig(t, newFake(t, mib), rigOptions{})
	c := r.dial()
	must(t, c.Read(0, make([]byte, 512)))
	lane := r.server.lanes.all[0]
	var taken []*aio.Block
	lane.loop.Call(func() {
		for b := lane.loop.Arena().Get(); b != nil; b = lane.loop.Arena().Get() {
			taken = append(taken, b)
		}
	})
	must(t, c.Send(nbdtest.CmdRead, 0, 1, 0, 4096, nil))
	time.Sleep(3 * retryMemory)
	// One block: enough for a header, not for the data of the second read.
	lane.loop.Call(func() { taken[0].Release() })
	if _, errno, data, err := c.Recv(); err != nil || errno != 0 || len(data) != 4096 {
		t.Fatal(errno, err)
	}
	must(t, c.Send(nbdtest.CmdRead, 0, 2, 0, mib, nil))
	if _, errno, _, err := c.Recv(); err != nil || errno != nbdtest.ENOMEM {
		t.Errorf("a read without memory: %v, %v", errno, err)
	}
	lane.loop.Call(func() {
		for _, b := range taken[1:] {
			b.Release()
		}
	})
	must(t, c.Read(0, make([]byte, mib)))
	must(t, c.Disc())
}

func TestConnectionLimit(t *testing.T) {
	r := newRig(t, newFake(t, mib), rigOptions{change: func(o *Options) { o.MaxConnections = 2 }})
	a, b := r.dial(), r.dial()
	if _, err := nbdtest.Dial("unix", r.path, ""); err == nil {
		t.Error("a third connection was taken")
	}
	must(t, a.Disc())
	eventually(t, "room", func() bool {
		c, err := nbdtest.Dial("unix", r.path, "")
		if err == nil {
			c.Close()
		}
		return err == nil
	})
	must(t, b.Flush())
}

func TestHandshakeTimeout(t *testing.T) {
	r := newRig(t, newFake(t, mib), rigOptions{change: func(o *Options) { o.HandshakeTimeout = 50 * time.Millisecond }})
	c, err := nbdtest.DialRaw("unix", r.path)
	must(t, err)
	wantClosed(t, c)
	served := r.dial()
	time.Sleep(100 * time.Millisecond)
	must(t, served.Flush()) // the limit is the handshake's only
}

// Shutdown ends handshakes, wherever they are.
func TestShutdownDuringHandshakes(t *testing.T) {
	for range 10 {
		r := newRig(t, newFake(t, mib), rigOptions{loops: 2})
		var wg sync.WaitGroup
		for range 8 {
			wg.Go(func() {
				for {
					c, err := nbdtest.Dial("unix", r.path, "")
					if err != nil {
						return
					}
					_ = c.Flush()
					c.Close()
				}
			})
		}
		time.Sleep(5 * time.Millisecond)
		if err := r.shutdown(10 * time.Second); err != nil {
			t.Error(err)
		}
		wg.Wait()
	}
}
