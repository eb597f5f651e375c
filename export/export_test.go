package export_test

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"platter/aio"
	"platter/export"
	"platter/formats"
)

// image keeps account of what it is asked for. A request that begins at failing
// fails.
type image struct {
	block    uint32
	readOnly bool
	failing  int64
	batches  [][]aio.Request
}

func (m *image) Size() int64    { return 1 << 20 }
func (m *image) Close() error   { return nil }
func (m *image) ReadOnly() bool { return m.readOnly }
func (m *image) Format() string { return "fake" }
func (m *image) Limits() formats.Limits {
	return formats.Limits{BlockSize: m.block, PreferredSize: 4096, MaxTransfer: 32 << 20, MaxSegments: 1024}
}

func (m *image) Submit(_ *aio.Loop, batch []*aio.Request) {
	var copies []aio.Request
	for _, r := range batch {
		copies = append(copies, *r)
	}
	m.batches = append(m.batches, copies)
	for _, r := range batch {
		if m.failing >= r.Offset && m.failing < r.End() || m.failing == 0 && r.Op == aio.OpFlush {
			r.Complete(unix.EIO)
		} else {
			r.Complete(0)
		}
	}
}

func newImage() *image { return &image{block: 1, failing: -1} }

// submit hands requests to a queue and waits for them.
func submit(q *export.Queue, requests ...*aio.Request) {
	left := len(requests)
	for _, r := range requests {
		r.Errno = unix.ENOANO
		r.Done = func(*aio.Request) { left-- }
	}
	q.Submit(slices.Clone(requests))
	if left != 0 {
		panic("a request was not completed")
	}
}

func read(off, length int64) *aio.Request {
	return &aio.Request{Op: aio.OpRead, Offset: off, Length: length, Vec: []aio.Iovec{{Base: uintptr(1<<40 + off), Len: uint64(length)}}}
}

func TestCheck(t *testing.T) {
	const size = 1 << 20
	for _, c := range []struct {
		op          aio.Op
		off, length int64
		readOnly    bool
		block       uint32
		want        unix.Errno
	}{
		{aio.OpRead, 0, size, false, 1, 0},
		{aio.OpRead, size, 0, false, 1, 0},
		{aio.OpRead, size, 1, false, 1, unix.EINVAL},
		{aio.OpRead, -1, 1, false, 1, unix.EINVAL},
		{aio.OpRead, 1<<63 - 1, 1<<63 - 1, false, 1, unix.EINVAL},
		{aio.OpWrite, size - 1, 2, false, 1, unix.ENOSPC},
		{aio.OpWrite, -5, 2, false, 1, unix.ENOSPC},
		{aio.OpWriteZeroes, 1, size, false, 1, unix.ENOSPC},
		{aio.OpDiscard, 1, size, false, 1, unix.EINVAL},
		{aio.OpCache, size + 1, 0, false, 1, unix.EINVAL},
		{aio.OpFlush, 0, 0, false, 512, 0},
		{aio.OpWrite, 0, 1, true, 1, unix.EPERM},
		{aio.OpWrite, size, 1, true, 1, unix.EPERM},
		{aio.OpDiscard, 0, 1, true, 1, unix.EPERM},
		{aio.OpWriteZeroes, 0, 1, true, 1, unix.EPERM},
		{aio.OpRead, 0, 1, true, 1, 0},
		{aio.OpFlush, 0, 0, true, 1, 0},
		{aio.OpWrite, 512, 1024, false, 512, 0},
		{aio.OpWrite, 511, 512, false, 512, unix.EINVAL},
		{aio.OpRead, 512, 100, false, 512, unix.EINVAL},
		{aio.OpRead, 0, 512, false, 0, 0},
	} {
		m := newImage()
		m.block = c.block
		e := export.New(m, export.Options{ReadOnly: c.readOnly})
		q := e.NewQueue(nil)
		r := &aio.Request{Op: c.op, Offset: c.off, Length: c.length}
		submit(q, r)
		if r.Errno != c.want || (len(m.batches) == 1) != (c.want == 0) {
			t.Errorf("%+v: errno %d, the image got %v", c, r.Errno, m.batches)
		}
		if refused := e.Stats().Refused; (refused == 1) != (c.want != 0) {
			t.Errorf("%+v: %d refused", c, refused)
		}
	}
}

func TestMerging(t *testing.T) {
	for _, off := range []bool{false, true} {
		m := newImage()
		q := export.New(m, export.Options{NoMerge: off}).NewQueue(nil)
		submit(q, read(4096, 4096), read(0, 4096), read(1<<19, 4096), read(1<<20, 4096))
		want := 2
		if off {
			want = 3
		}
		if len(m.batches) != 1 || len(m.batches[0]) != want {
			t.Errorf("without merging: %v: the image got %v", off, m.batches)
		}
		if s := q.Stats(); s.Requests[aio.OpRead] != 3 || s.Bytes[aio.OpRead] != 3*4096 || s.Merged != uint64(3-want) || s.Refused != 1 || s.Batches != 1 {
			t.Errorf("%+v", s)
		}
	}
}

// Of a merged request that fails, the members fail that fail by themselves.
func TestMergedFailure(t *testing.T) {
	m := newImage()
	m.failing = 5000
	q := export.New(m, export.Options{}).NewQueue(nil)
	requests := []*aio.Request{read(0, 4096), read(4096, 4096), read(8192, 4096)}
	submit(q, requests...)
	if requests[0].Errno != 0 || requests[1].Errno != unix.EIO || requests[2].Errno != 0 {
		t.Errorf("%v, %v, %v", requests[0].Errno, requests[1].Errno, requests[2].Errno)
	}
}

func TestFlush(t *testing.T) {
	l, err := aio.NewLoop(aio.LoopOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	m := newImage()
	e := export.New(m, export.Options{Name: "disk"})
	if err := e.Flush(l); err != nil || len(m.batches) != 1 || m.batches[0][0].Op != aio.OpFlush {
		t.Errorf("%v, %v", err, m.batches)
	}
	m.failing = 0
	var typed *export.Error
	if err := e.Flush(l); !errors.Is(err, unix.EIO) || !errors.As(err, &typed) || !strings.Contains(err.Error(), "flush export disk") {
		t.Error(err)
	}
	if err := export.New(m, export.Options{}).Flush(l); !strings.HasPrefix(err.Error(), "flush export: ") {
		t.Error(err)
	}
}

// Nothing is allocated for a batch.
func TestNoAllocations(t *testing.T) {
	q := export.New(silent{newImage()}, export.Options{}).NewQueue(nil)
	requests := []*aio.Request{read(0, 4096), read(4096, 4096), read(1<<19, 4096), read(1<<20, 1)}
	for _, r := range requests {
		r.Done = func(*aio.Request) {}
	}
	batch := make([]*aio.Request, len(requests))
	if n := testing.AllocsPerRun(1000, func() {
		copy(batch, requests)
		q.Submit(batch)
		q.Completed(requests)
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// silent is an image that keeps no account.
type silent struct{ *image }

func (silent) Submit(_ *aio.Loop, batch []*aio.Request) {
	for _, r := range batch {
		r.Complete(0)
	}
}
