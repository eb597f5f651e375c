package loadgen

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// stamped returns n bytes in which every 8-byte word holds its own offset.
func stamped(n int) []byte {
	p := make([]byte, n)
	for i := 0; i+8 <= n; i += 8 {
		binary.BigEndian.PutUint64(p[i:], uint64(i))
	}
	return p
}

func isStamped(offset uint64, data []byte) bool {
	for i := 0; i+8 <= len(data); i += 8 {
		if binary.BigEndian.Uint64(data[i:]) != offset+uint64(i) {
			return false
		}
	}
	return true
}

// TestCounts checks that exactly the requests asked for reach the server, in
// the right shape, whatever the order of replies, and that the data that comes
// back is matched to the right request.
func TestCounts(t *testing.T) {
	const size = 1 << 20
	for _, c := range []struct {
		name    string
		cfg     Config
		reverse int
	}{
		{"one by one", Config{Requests: 100}, 1},
		{"random reads", Config{Random: true, Requests: 2000, Depth: 64}, 1},
		{"random reads out of order", Config{Random: true, Requests: 2048, Depth: 64}, 32},
		{"sequential reads out of order", Config{Requests: 512, Depth: 16, Batch: 4}, 8},
		{"batch of no divisor", Config{Requests: 601, Depth: 48, Batch: 32}, 1},
		{"large reads", Config{Random: true, BlockSize: 300 << 10, Requests: 20, Depth: 4}, 2},
		{"odd block size", Config{BlockSize: 1000, Requests: 3000, Depth: 7, Batch: 3}, 1},
		{"connections", Config{Random: true, Requests: 1001, Depth: 32, Conns: 4}, 1},
		{"random writes", Config{Write: true, Random: true, Requests: 1024, Depth: 64}, 16},
		{"sequential writes", Config{Write: true, Requests: 300, Depth: 8, Conns: 2}, 1},
	} {
		for _, verify := range []bool{false, true} {
			var reads, writes, misplaced int
			s := &fakeServer{data: stamped(size), reverse: c.reverse}
			cfg := c.cfg
			bs := uint64(cfg.BlockSize)
			if bs == 0 {
				bs = 4096
			}
			s.saw = func(_ int, cmd uint16, off uint64, n int) {
				if cmd == cmdWrite {
					writes++
				} else {
					reads++
				}
				if uint64(n) != bs || off%bs != 0 || off+bs > size {
					misplaced++
				}
			}
			cfg.Address = s.start(t)
			if verify && bs%8 == 0 && !cfg.Write {
				cfg.Verify = isStamped
			}
			r, err := Run(cfg)
			if err != nil {
				t.Fatalf("%s: %v", c.name, err)
			}
			s.mu.Lock()
			got, other := reads, writes
			if cfg.Write {
				got, other = writes, reads
			}
			if int64(got) != cfg.Requests || other != 0 || misplaced != 0 {
				t.Errorf("%s: server saw %d requests, %d of the other kind, %d misplaced; want %d, 0, 0", c.name, got, other, misplaced, cfg.Requests)
			}
			s.mu.Unlock()
			if r.Requests != cfg.Requests || r.Errors != 0 || r.Size != size || r.Elapsed <= 0 {
				t.Errorf("%s: result %d requests, %d errors, size %d, %v", c.name, r.Requests, r.Errors, r.Size, r.Elapsed)
			}
		}
	}
}

func TestSequentialConnectionsWalkTheirOwnStretchAndWrap(t *testing.T) {
	const size, conns = 64 << 10, 2
	next := map[int]uint64{}
	first := map[uint64]bool{}
	bad := 0
	s := &fakeServer{data: stamped(size), reverse: 1}
	s.saw = func(conn int, _ uint16, off uint64, _ int) {
		want, known := next[conn]
		if !known {
			first[off] = true
			want = off
		}
		if off != want {
			bad++
		}
		half := off / (size / conns) * (size / conns)
		next[conn] = half + (off-half+4096)%(size/conns)
	}
	if _, err := Run(Config{Address: s.start(t), Requests: 100, Depth: 4, Conns: conns}); err != nil {
		t.Fatal(err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if bad != 0 || !first[0] || !first[size/2] || len(first) != conns {
		t.Errorf("%d requests out of sequence, connections began at %v", bad, first)
	}
}

func TestWritesCarryThePayload(t *testing.T) {
	s := &fakeServer{data: make([]byte, 64<<10), reverse: 1}
	fill := func(p []byte) { copy(p, bytes.Repeat([]byte("platter!"), len(p)/8)) }
	if _, err := Run(Config{Address: s.start(t), Write: true, Requests: 16, Depth: 8, Fill: fill}); err != nil {
		t.Fatal(err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if want := bytes.Repeat([]byte("platter!"), len(s.data)/8); !bytes.Equal(s.data, want) {
		t.Error("image does not hold what Fill prepared")
	}
}

func TestServerErrorsAreCounted(t *testing.T) {
	s := &fakeServer{data: stamped(1 << 20), reverse: 4}
	s.errno = func(_ uint16, off uint64) uint32 {
		if off%8192 == 0 {
			return uint32(unix.ENOSPC)
		}
		return 0
	}
	r, err := Run(Config{Address: s.start(t), Requests: 256, Depth: 16, Verify: isStamped})
	if err != nil {
		t.Fatal(err)
	}
	if r.Requests != 256 || r.Errors != 128 || r.FirstErr != uint32(unix.ENOSPC) {
		t.Errorf("got %d requests, %d errors, first %d", r.Requests, r.Errors, r.FirstErr)
	}
	if all := float64(r.Requests) / r.Elapsed.Seconds(); r.IOPS() > 0.6*all {
		t.Errorf("IOPS %.0f counts failed requests (all: %.0f)", r.IOPS(), all)
	}
}

func TestDurationEndsTheRun(t *testing.T) {
	s := &fakeServer{data: stamped(1 << 20), reverse: 1}
	r, err := Run(Config{Address: s.start(t), Random: true, Depth: 8, Conns: 2, Duration: 50 * time.Millisecond, Latency: true})
	if err != nil {
		t.Fatal(err)
	}
	if r.Requests == 0 || r.Elapsed < 50*time.Millisecond || r.Elapsed > 5*time.Second {
		t.Errorf("%d requests in %v", r.Requests, r.Elapsed)
	}
	if p50, p99 := r.Latency.Quantile(0.5), r.Latency.Quantile(0.99); r.Latency.Count() != uint64(r.Requests) || p50 <= 0 || p99 < p50 {
		t.Errorf("%d latencies of %d requests, median %v, p99 %v", r.Latency.Count(), r.Requests, p50, p99)
	}
	for range 100 { // the server reads the goodbyes a moment later
		s.mu.Lock()
		n := s.goodbyes
		s.mu.Unlock()
		if n == 2 {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Error("connections did not end with NBD_CMD_DISC")
}

func TestFailures(t *testing.T) {
	say := func(text string) func(net.Conn) error {
		return func(c net.Conn) error { _, err := io.WriteString(c, text); return err }
	}
	set := func(at int, v byte) func([]byte) { return func(reply []byte) { reply[at] = v } }
	image := stamped(1 << 20)
	for _, c := range []struct {
		name   string
		server *fakeServer
		cfg    Config
		want   error
	}{
		{"garbage greeting", &fakeServer{hello: say("HTTP/1.1 400 Bad Request\r\n\r\n")}, Config{}, ErrProtocol},
		{"closed at once", &fakeServer{hello: say("")}, Config{}, io.ErrUnexpectedEOF},
		{"silent server", &fakeServer{hello: func(c net.Conn) error { _, err := c.Read(make([]byte, 1)); return err }}, Config{Timeout: 20 * time.Millisecond}, unix.ETIMEDOUT},
		{"unknown export", &fakeServer{data: image}, Config{Export: "x"}, ErrRefused},
		{"read-only export", &fakeServer{data: image, flags: flagReadOnly}, Config{Write: true}, ErrReadOnly},
		{"bad reply magic", &fakeServer{data: image, mangle: set(0, 1)}, Config{}, ErrProtocol},
		{"unknown generation", &fakeServer{data: image, mangle: set(8, 1)}, Config{}, ErrProtocol},
		{"unknown slot", &fakeServer{data: image, mangle: set(12, 1)}, Config{}, ErrProtocol},
		{"same reply twice", &fakeServer{data: image, mangle: set(15, 0)}, Config{Depth: 2}, ErrProtocol},
		{"wrong data", &fakeServer{data: image, mangle: set(20, 0xff)}, Config{Verify: isStamped}, ErrPayload},
	} {
		t.Run(c.name, func(t *testing.T) {
			c.cfg.Address, c.cfg.Requests = c.server.start(t), 10
			_, err := Run(c.cfg)
			var typed *Error
			if !errors.Is(err, c.want) || !errors.As(err, &typed) || typed.Address != c.cfg.Address {
				t.Errorf("got %v, want %v", err, c.want)
			}
		})
	}
	if _, err := Run(Config{Address: "/nonexistent/socket", Requests: 1}); !errors.Is(err, unix.ENOENT) {
		t.Errorf("missing socket: %v", err)
	}
	for want, cfg := range map[string]Config{
		"duration":    {},
		"batch":       {Requests: 1, Depth: 4, Batch: 5},
		"block size":  {Requests: 1, BlockSize: 1 << 30},
		"depth":       {Requests: 1, Depth: -1, Batch: 1},
		"connections": {Requests: 1, Conns: -1},
	} {
		if _, err := Run(cfg); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("bad %s: %v", want, err)
		}
	}
}

func TestTCP(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	s := &fakeServer{data: stamped(1 << 20), reverse: 1}
	go func() {
		if c, err := l.Accept(); err == nil {
			defer c.Close()
			_ = s.serve(c, 0)
		}
	}()
	r, err := Run(Config{Network: "tcp", Address: l.Addr().String(), Random: true, Depth: 8, Requests: 100, Verify: isStamped})
	if err != nil || r.Requests != 100 {
		t.Errorf("%d requests, %v", r.Requests, err)
	}
}

func TestNoAllocationPerRequest(t *testing.T) {
	s := &fakeServer{data: stamped(1 << 20), reverse: 1}
	for _, write := range []bool{false, true} {
		cfg := Config{Address: s.start(t), Write: write, Random: true, Depth: 64, Requests: 1 << 40, Latency: true}
		if err := cfg.complete(); err != nil {
			t.Fatal(err)
		}
		c, err := dial(&cfg, 0)
		if err != nil {
			t.Fatal(err)
		}
		c.begin = time.Now()
		allocs := testing.AllocsPerRun(20, func() {
			for len(c.free) > 0 {
				if err := c.send(time.Since(c.begin)); err != nil {
					t.Fatal(err)
				}
			}
			for len(c.free) < cfg.Depth {
				if err := c.receive(); err != nil {
					t.Fatal(err)
				}
			}
		})
		c.sock.close()
		if allocs != 0 {
			t.Errorf("write %v: %v allocations per 64 requests", write, allocs)
		}
	}
}

func TestHistogramKeepsQuantiles(t *testing.T) {
	var h, other Histogram
	if h.Quantile(0.5) != 0 {
		t.Error("empty histogram has a median")
	}
	for i := 1; i <= 1000; i++ {
		h.record(time.Duration(i) * time.Microsecond)
	}
	other.record(time.Second)
	h.add(&other)
	for q, want := range map[float64]time.Duration{0.5: 500 * time.Microsecond, 0.99: 990 * time.Microsecond, 1: time.Second} {
		if got := h.Quantile(q); got < want || float64(got) > 1.07*float64(want) {
			t.Errorf("quantile %v is %v, want %v or up to 7%% more", q, got, want)
		}
	}
	for _, v := range []uint64{0, 1, 15, 16, 31, 32, 33, 1000, 1 << 40, 1<<63 - 1} {
		i := bucketOf(v)
		if bucketEnd(i) < v || (i > 0 && bucketEnd(i-1) >= v) {
			t.Errorf("%d landed in bucket %d that ends at %d", v, i, bucketEnd(i))
		}
	}
}
