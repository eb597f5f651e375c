package nbd

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"platter/aio"
	"platter/export"
	"platter/export/nbd/nbdtest"
	"platter/formats"
	"platter/formats/raw"
	"platter/integration/testenv"
)

const (
	kib = 1 << 10
	mib = 1 << 20
)

// fakeImage is an image in memory that does what a test wants of it.
type fakeImage struct {
	t        testing.TB
	readOnly bool
	block    uint32
	fail     func(r *aio.Request) unix.Errno         // nil: nothing fails
	later    func(l *aio.Loop, carryOut func()) bool // takes a request to be carried out later

	mu   sync.Mutex
	data []byte
	seen [aio.OpCount]int
}

func newFake(t testing.TB, size int) *fakeImage {
	return &fakeImage{t: t, data: make([]byte, size), block: 1}
}

func (m *fakeImage) Size() int64    { return int64(len(m.data)) }
func (m *fakeImage) Close() error   { return nil }
func (m *fakeImage) ReadOnly() bool { return m.readOnly }
func (m *fakeImage) Format() string { return "fake" }
func (m *fakeImage) Limits() formats.Limits {
	return formats.Limits{BlockSize: m.block, PreferredSize: 4096, MaxTransfer: 64 * mib, MaxSegments: 1024, DiscardGranularity: 4096, MultiConn: true}
}

func (m *fakeImage) Submit(l *aio.Loop, batch []*aio.Request) {
	for _, r := range batch {
		if m.later == nil || !m.later(l, func() { m.carryOut(r) }) {
			m.carryOut(r)
		}
	}
}

func (m *fakeImage) carryOut(r *aio.Request) {
	m.mu.Lock()
	var errno unix.Errno
	if m.fail != nil {
		errno = m.fail(r)
	}
	m.seen[r.Op]++
	switch {
	case r.Offset < 0 || r.Length < 0 || r.End() > m.Size() || r.Offset > r.End():
		m.t.Errorf("the image was asked for %v %d+%d", r.Op, r.Offset, r.Length)
		errno = unix.EIO
	case errno != 0:
	case r.Op == aio.OpRead:
		aio.CopyIn(r.Vec, m.data[r.Offset:r.End()])
	case r.Op == aio.OpWrite:
		aio.CopyOut(m.data[r.Offset:r.End()], r.Vec)
	case r.Op == aio.OpWriteZeroes:
		clear(m.data[r.Offset:r.End()])
	}
	m.mu.Unlock()
	r.Complete(errno)
}

// count is how many requests of a kind the image has carried out.
func (m *fakeImage) count(op aio.Op) int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.seen[op]
}

// holds reports whether the image has these bytes at off.
func (m *fakeImage) holds(off int, want []byte) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return bytes.Equal(m.data[off:off+len(want)], want)
}

// gate holds requests back until it is opened.
type gate struct {
	mu   sync.Mutex
	open bool
	held []func()
}

func (g *gate) later(l *aio.Loop, carryOut func()) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.open {
		return false
	}
	g.held = append(g.held, func() { l.Post(carryOut) })
	return true
}

func (g *gate) waiting() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return len(g.held)
}

// release carries out what is held, in random order, and what comes from now on.
func (g *gate) release() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.open = true
	for _, i := range rand.Perm(len(g.held)) {
		g.held[i]()
	}
	g.held = nil
}

// shuffle carries requests out a little later, in another order.
func shuffle() func(*aio.Loop, func()) bool {
	var mu sync.Mutex
	held := map[*aio.Loop][]func(){}
	return func(l *aio.Loop, carryOut func()) bool {
		mu.Lock()
		defer mu.Unlock()
		held[l] = append(held[l], carryOut)
		if len(held[l]) == 1 {
			l.AfterFunc(200*time.Microsecond, func() {
				mu.Lock()
				all := held[l]
				held[l] = nil
				mu.Unlock()
				for _, i := range rand.Perm(len(all)) {
					all[i]()
				}
			})
		}
		return true
	}
}

// rig is a server with one image on a Unix socket. When the test ends it checks
// that nothing is left of any connection.
type rig struct {
	t      testing.TB
	server *Server
	export *export.Export
	path   string
	budget int64
}

// rigOptions shape a rig; the zero value is one loop of engine auto.
type rigOptions struct {
	engine  aio.Engine
	loops   int
	exports []*export.Export // instead of the image
	name    string
	budget  int64 // of each loop; loopBudget when 0
	change  func(*Options)
	prepare func(*budget)
}

func newRig(t testing.TB, image formats.Image, o rigOptions) *rig {
	t.Helper()
	var loops []*aio.Loop
	for range max(o.loops, 1) {
		l, err := aio.NewLoop(aio.LoopOptions{Engine: o.engine})
		if err != nil {
			t.Fatal(err)
		}
		loops = append(loops, l)
	}
	if o.exports == nil {
		o.exports = []*export.Export{export.New(image, export.Options{Name: o.name})}
	}
	opts := Options{Loops: loops, Exports: o.exports, Log: slog.New(slog.NewTextHandler(io.Discard, nil))}
	if o.change != nil {
		o.change(&opts)
	}
	s, err := NewServer(opts)
	if err != nil {
		t.Fatal(err)
	}
	r := &rig{t: t, server: s, export: o.exports[0], path: filepath.Join(testenv.ShortDir(t), "nbd.sock"), budget: loopBudget}
	for _, lane := range s.lanes.all {
		if o.budget > 0 {
			lane.budget.left, r.budget = o.budget, o.budget
		}
		if o.prepare != nil {
			o.prepare(&lane.budget)
		}
	}
	l, err := net.Listen("unix", r.path)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- s.Serve(l) }()
	t.Cleanup(func() {
		_ = r.shutdown(20 * time.Second) // late clients are cut off
		if err := <-done; !errors.Is(err, ErrServerClosed) {
			t.Errorf("Serve returned %v", err)
		}
		r.wantClean()
		for _, l := range loops {
			l.Close()
		}
	})
	return r
}

// shutdown ends the server within the time.
func (r *rig) shutdown(d time.Duration) error {
	ctx, cancel := context.WithTimeout(context.Background(), d)
	defer cancel()
	over := make(chan error, 1)
	go func() { over <- r.server.Shutdown(ctx) }()
	select {
	case err := <-over:
		return err
	case <-time.After(d + 20*time.Second):
		panic("the server doesn't end")
	}
}

// wantClean fails the test unless every byte and every connection was given
// back.
func (r *rig) wantClean() {
	r.t.Helper()
	for _, lane := range r.server.lanes.all {
		lane.loop.Call(func() {
			b := &lane.budget
			if b.left != r.budget || len(b.waiting) != 0 || len(b.conns) != 0 {
				r.t.Errorf("budget: %d bytes left of %d, %d waiting, %d connections", b.left, r.budget, len(b.waiting), len(b.conns))
			}
		})
	}
}

func (r *rig) dial() *nbdtest.Client {
	r.t.Helper()
	c, err := nbdtest.Dial("unix", r.path, "")
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { c.Close() })
	return c
}

// eachEngine runs a test on every engine.
func eachEngine(t *testing.T, test func(t *testing.T, engine aio.Engine)) {
	for _, engine := range []aio.Engine{aio.EngineAuto, aio.EngineNative, aio.EngineThreads} {
		t.Run(engine.String(), func(t *testing.T) { test(t, engine) })
	}
}

// rawImage makes and opens a raw image in the directory.
func rawImage(t testing.TB, dir string, size int64) formats.Image {
	t.Helper()
	path := filepath.Join(dir, "disk.raw")
	if err := raw.Create(path, size, raw.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	image, err := formats.Open(path, formats.Options{Format: "raw"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { image.Close() })
	return image
}

// wire is a request as it stands on the wire.
func wire(cmd, flags uint16, cookie, off uint64, length uint32, payload []byte) []byte {
	b := binary.BigEndian.AppendUint32(nil, nbdtest.MagicRequest)
	b = binary.BigEndian.AppendUint16(b, flags)
	b = binary.BigEndian.AppendUint16(b, cmd)
	b = binary.BigEndian.AppendUint64(b, cookie)
	b = binary.BigEndian.AppendUint64(b, off)
	b = binary.BigEndian.AppendUint32(b, length)
	return append(b, payload...)
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// eventually waits until ok.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s does not come true", what)
		}
	}
}

// pattern makes n bytes that depend on the seed.
func pattern(n int, seed uint64) []byte { return testenv.Pattern(n, seed) }

// wantClosed fails the test unless the server closes the connection, after
// nothing but replies.
func wantClosed(t testing.TB, c *nbdtest.Client) {
	t.Helper()
	_ = c.Conn.SetReadDeadline(time.Now().Add(10 * time.Second))
	_, err := io.Copy(io.Discard, c.Conn)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatal("the connection is still open")
	}
}
