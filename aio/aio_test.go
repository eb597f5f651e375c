package aio

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"platter/integration/testenv"
)

// patience is how long a test waits for what must happen.
const patience = 60 * time.Second

// newLoop starts a loop, which ends with the test.
func newLoop(t testing.TB, o LoopOptions) *Loop {
	t.Helper()
	l, err := NewLoop(o)
	if errors.Is(err, ErrNoURing) || errors.Is(err, ErrNoNative) {
		testenv.Skip(t, err.Error())
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// eachEngine runs the test on a loop of every engine.
func eachEngine(t *testing.T, test func(t *testing.T, l *Loop)) {
	for _, e := range []Engine{EngineIOUring, EngineNative, EngineThreads} {
		t.Run(e.String(), func(t *testing.T) {
			test(t, newLoop(t, LoopOptions{Engine: e, Poll: DefaultPoll}))
		})
	}
}

// A kind is one of the ways in which a file's I/O is carried out.
type kind struct {
	name   string
	dir    func(testing.TB) string
	opts   FileOptions
	engine bool // nothing is read on the loop's thread, though it is in the cache
}

var kinds = []kind{
	{"tmpfs", testenv.TmpfsDir, FileOptions{}, false},
	{"tmpfs direct", testenv.TmpfsDir, FileOptions{Direct: true}, false},
	{"cached", testenv.DiskDir, FileOptions{}, false},
	{"buffered", testenv.DiskDir, FileOptions{}, true},
	{"direct", testenv.DiskDir, FileOptions{Direct: true}, false},
	{"dsync", testenv.DiskDir, FileOptions{Sync: true}, true},
}

// eachKind runs the test for every engine and kind of file, on one of the given
// size that holds pattern.
func eachKind(t *testing.T, size int, test func(t *testing.T, l *Loop, f *File)) {
	eachEngine(t, func(t *testing.T, l *Loop) {
		for _, k := range kinds {
			t.Run(k.name, func(t *testing.T) {
				f := openFile(t, newFile(t, k.dir(t), size), k.opts)
				f.nowait = f.nowait && !k.engine
				test(t, l, f)
			})
		}
	})
}

// pattern is what test files hold at first: no two neighbouring sectors, pages
// or blocks are the same, and nothing is zero.
func pattern(size int) []byte { return bytes.Clone(wholePattern()[:size]) }

var wholePattern = sync.OnceValue(func() []byte {
	b := make([]byte, 8<<20)
	for i := range b {
		b[i] = byte(i%251) + 1 + byte(i>>16&3)
	}
	return b
})

// newFile makes a file of the given size that holds pattern.
func newFile(t testing.TB, dir string, size int) string {
	t.Helper()
	path := filepath.Join(dir, "image")
	if err := os.WriteFile(path, pattern(size), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func openFile(t testing.TB, path string, o FileOptions) *File {
	t.Helper()
	f, err := OpenFile(path, o)
	if o.Direct && errors.Is(err, unix.EINVAL) {
		testenv.Skip(t, "the file system has no O_DIRECT (tmpfs: since Linux 6.6): "+err.Error())
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// content is what the file holds, as everybody else sees it.
func content(t testing.TB, f *File) []byte {
	t.Helper()
	b, err := os.ReadFile(f.f.Name())
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func newMemory(t testing.TB, size int) *Memory {
	t.Helper()
	m, err := NewMemory(size)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	})
	return m
}

// split names the memory from off on in n pieces of different lengths.
func split(m *Memory, off, size, n int, rng *rand.Rand) []Iovec {
	vec := make([]Iovec, 0, n)
	for ; n > 1; n-- {
		k := 0
		if size > 0 {
			k = rng.IntN(2*size/n + 1)
		}
		k = min(k, size)
		vec = append(vec, m.Iovec(off, k))
		off, size = off+k, size-k
	}
	return append(vec, m.Iovec(off, size))
}

// do submits the requests as one batch and waits until all are over.
func do(t testing.TB, l *Loop, s Storage, batch ...*Request) {
	t.Helper()
	waitFor(t, begin(l, s, batch...), "requests")
}

// begin submits the requests as one batch. The channel is closed when all are
// over.
func begin(l *Loop, s Storage, batch ...*Request) <-chan struct{} {
	over := make(chan struct{})
	left := len(batch)
	for _, r := range batch {
		r.Errno = unix.EINPROGRESS
		r.Done = func(*Request) {
			if left--; left == 0 {
				close(over)
			}
		}
	}
	l.Post(func() { s.Submit(l, batch) })
	return over
}

func waitFor(t testing.TB, c <-chan struct{}, what string) {
	t.Helper()
	select {
	case <-c:
	case <-time.After(patience):
		t.Fatalf("%s: still waiting", what)
	}
}

// one carries out a single request and returns its outcome.
func one(t testing.TB, l *Loop, s Storage, r Request) unix.Errno {
	t.Helper()
	do(t, l, s, &r)
	return r.Errno
}

// must carries out a single request, which must succeed.
func must(t testing.TB, l *Loop, s Storage, r Request) {
	t.Helper()
	if e := one(t, l, s, r); e != 0 {
		t.Fatalf("%v of %d bytes at %d: %v", r.Op, r.Length, r.Offset, e)
	}
}

// filter stands between a loop and its driver and sees every operation first.
type filter struct {
	driver
	start1 func(o *op) bool // reports whether it has dealt with the operation
	turn1  func()
	wake1  func()
}

func (f *filter) start(o *op) {
	if f.start1 == nil || !f.start1(o) {
		f.driver.start(o)
	}
}

func (f *filter) turn(timeout time.Duration) {
	if f.turn1 != nil {
		f.turn1()
	}
	f.driver.turn(timeout)
}

func (f *filter) wake() {
	if f.wake1 != nil {
		f.wake1()
	}
	f.driver.wake()
}

// intercept has start see the loop's operations until the test ends.
func intercept(t testing.TB, l *Loop, start func(o *op) bool) {
	t.Helper()
	l.Call(func() { l.driver = &filter{driver: l.driver, start1: start} })
	t.Cleanup(func() { l.Call(func() { l.driver = l.driver.(*filter).driver }) })
}

// answer ends an operation with a result of its own, in a later turn.
func answer(o *op, res int32) bool {
	o.res = res
	o.loop.complete(o)
	return true
}
