package qcow2_test

import (
	"fmt"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"platter/aio"
	"platter/formats"
	"platter/formats/qcow2"
	"platter/integration/testenv"
)

// tap is a storage that notes what loops read and write, and can hold it back or
// fail it. What goroutines do, as writing metadata, is counted only.
type tap struct {
	aio.Storage
	mu     sync.Mutex
	loops  map[*aio.Loop]bool
	writes []span // by loops
	reads  []span
	bytes  int64 // written by anyone
	hold   func(r *aio.Request) bool
	fail   func(r *aio.Request) unix.Errno
	held   []heldRequest
}

type span struct{ off, length int64 }

type heldRequest struct {
	loop *aio.Loop
	r    *aio.Request
}

func (p *tap) Fd() int { return -1 }

func (p *tap) Truncate(size int64) error { return p.Storage.(aio.Truncater).Truncate(size) }

func (p *tap) Submit(l *aio.Loop, batch []*aio.Request) {
	var pass []*aio.Request
	for _, r := range batch {
		switch errno, held := p.look(l, r); {
		case errno != 0:
			r.Complete(errno)
		case !held:
			pass = append(pass, r)
		}
	}
	if len(pass) > 0 {
		p.Storage.Submit(l, pass)
	}
}

func (p *tap) look(l *aio.Loop, r *aio.Request) (errno unix.Errno, held bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if r.Op == aio.OpWrite {
		p.bytes += r.Length
	}
	if !p.loops[l] {
		return 0, false
	}
	switch r.Op {
	case aio.OpWrite:
		p.writes = append(p.writes, span{r.Offset, r.Length})
	case aio.OpRead:
		p.reads = append(p.reads, span{r.Offset, r.Length})
	}
	if p.fail != nil {
		if errno := p.fail(r); errno != 0 {
			return errno, false
		}
	}
	if p.hold != nil && p.hold(r) {
		p.held = append(p.held, heldRequest{l, r})
		return 0, true
	}
	return 0, false
}

// wait waits until n requests are held.
func (p *tap) wait(t *testing.T, n int) {
	t.Helper()
	until(t, fmt.Sprintf("%d requests are held", n), func() bool {
		p.mu.Lock()
		defer p.mu.Unlock()
		return len(p.held) == n
	})
}

func until(t *testing.T, what string, f func() bool) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); !f(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("never: " + what)
		}
	}
}

// release lets go what is held, and holds nothing more.
func (p *tap) release() {
	p.mu.Lock()
	held := p.held
	p.held, p.hold = nil, nil
	p.mu.Unlock()
	for _, h := range held {
		h.loop.Post(func() { p.Storage.Submit(h.loop, []*aio.Request{h.r}) })
	}
}

// took returns what was noted, and begins anew.
func (p *tap) took() (writes, reads []span) {
	p.mu.Lock()
	defer p.mu.Unlock()
	writes, reads = p.writes, p.reads
	p.writes, p.reads = nil, nil
	return writes, reads
}

// tapped is an image with taps on its file and on its backing file, two loops,
// and a model.
type tapped struct {
	t           *testing.T
	im          *qcow2.Image
	image       formats.Image // im, or what stands before it
	path        string
	file, below *tap
	loops       [2]*aio.Loop
	model       []byte
	memory      *aio.Memory
	used        int
}

const tappedSize = 16 << 20

// openTapped makes an image, over a backing file that is full of bytes if it is
// to have one.
func openTapped(t *testing.T, options string, backing bool, o qcow2.Options) *tapped {
	t.Helper()
	x := &tapped{t: t, path: filepath.Join(testenv.TmpfsDir(t), "image"), model: make([]byte, tappedSize)}
	var more []string
	if backing {
		for i := range x.model {
			x.model[i] = byte(i>>9 + 1)
		}
		writeFile(t, x.path+".base", x.model)
		more = []string{"-b", x.path + ".base", "-F", "raw"}
	}
	qemuCreate(t, x.path, tappedSize, options, more...)
	loops := map[*aio.Loop]bool{}
	for i := range x.loops {
		l, err := aio.NewLoop(aio.LoopOptions{})
		if err != nil {
			testenv.Skip(t, err.Error())
		}
		t.Cleanup(func() { l.Close() })
		x.loops[i], loops[l] = l, true
	}
	tapOn := func(path string, readOnly bool) *tap {
		f, err := aio.OpenFile(path, aio.FileOptions{ReadOnly: readOnly})
		if err != nil {
			t.Fatal(err)
		}
		return &tap{Storage: f, loops: loops}
	}
	x.file = tapOn(x.path, false)
	o.Path = x.path
	if backing {
		o.OpenBacking = func(name, format string) (formats.Image, error) {
			x.below = tapOn(name, true)
			return newRaw(x.below)
		}
	}
	var err error
	if x.im, err = qcow2.New(x.file, o); err != nil {
		t.Fatal(err)
	}
	x.image = x.im
	if x.memory, err = aio.NewMemory(64 << 20); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { x.memory.Close() })
	return x
}

// compress fills the disk with compressed clusters.
func (x *tapped) compress() {
	x.t.Helper()
	for i := range x.model {
		x.model[i] = byte(i >> 10)
	}
	cluster := int(x.im.Limits().DiscardGranularity)
	for off := 0; off < tappedSize; off += cluster {
		if err := x.im.WriteCompressed(x.model[off:off+cluster], int64(off)); err != nil {
			x.t.Fatal(err)
		}
	}
}

// request makes a request, and for a write brings the model up to date.
func (x *tapped) request(op aio.Op, off, length int64, fill byte) *aio.Request {
	r := &aio.Request{Op: op, Offset: off, Length: length}
	if op == aio.OpWrite || op == aio.OpRead {
		r.Vec = []aio.Iovec{x.memory.Iovec(x.used, int(length))}
		b := x.memory.Bytes()[x.used : x.used+int(length)]
		x.used += int(length)
		for i := range b {
			b[i] = fill
		}
	}
	switch op {
	case aio.OpWrite:
		copy(x.model[off:], x.memory.Bytes()[x.used-int(length):x.used])
	case aio.OpWriteZeroes:
		clear(x.model[off : off+length])
	}
	return r
}

// start submits a batch on a loop; the result tells how each request ended.
func (x *tapped) start(loop int, batch ...*aio.Request) func() []unix.Errno {
	x.t.Helper()
	errnos := make([]unix.Errno, len(batch))
	var pending sync.WaitGroup
	pending.Add(len(batch))
	for i, r := range batch {
		r.Done = func(r *aio.Request) {
			errnos[i] = r.Errno
			pending.Done()
		}
	}
	submitted := make(chan struct{})
	l := x.loops[loop]
	l.Post(func() {
		x.image.Submit(l, slices.Clone(batch))
		close(submitted)
	})
	<-submitted
	return func() []unix.Errno {
		pending.Wait()
		return errnos
	}
}

// do is start for those that must succeed.
func (x *tapped) do(loop int, batch ...*aio.Request) {
	x.t.Helper()
	for i, errno := range x.start(loop, batch...)() {
		if errno != 0 {
			x.t.Fatalf("%v %d+%d: %v", batch[i].Op, batch[i].Offset, batch[i].Length, errno)
		}
	}
}

// prepare has L2 tables and clusters at hand, so that what follows waits for
// nothing but what it is about.
func (x *tapped) prepare() {
	x.t.Helper()
	for i := range x.loops {
		x.do(i, x.request(aio.OpWrite, tappedSize-int64(i+1)*1<<20, 4096, 1))
	}
	for range 20 { // reservations arrive
		for i := range x.loops {
			x.do(i, x.request(aio.OpRead, 0, 4096, 0))
		}
	}
	x.file.took()
	if x.below != nil {
		x.below.took()
	}
}

// finish compares the image with the model, closes it and has it checked.
func (x *tapped) finish() {
	x.t.Helper()
	sameBytes(x.t, "in the end", readAll(x.t, x.im), x.model)
	if err := x.im.Close(); err != nil {
		x.t.Fatal(err)
	}
	qemuCheck(x.t, x.path)
	sameBytes(x.t, "as QEMU reads it", rawOf(x.t, x.path), x.model)
}
