package qcow2_test

import (
	"bytes"
	"fmt"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"platter/aio"
	"platter/formats/qcow2"
)

// memory is an image file in memory. It behaves as a file does, grows to a limit
// only, and remembers requests that no engine may make.
type memory struct {
	limit    int64
	readOnly bool

	mu     sync.Mutex
	data   []byte
	opened int64 // length when it was opened
	closed bool
	bad    []string
}

// newMemory makes a file with the given content, which it takes over.
func newMemory(data []byte) *memory {
	return &memory{data: data, opened: int64(len(data)), limit: int64(len(data)) + 64<<20}
}

func (m *memory) Submit(_ *aio.Loop, batch []*aio.Request) {
	for _, r := range batch {
		r.Complete(m.carryOut(r))
	}
}

func (m *memory) carryOut(r *aio.Request) unix.Errno {
	m.mu.Lock()
	defer m.mu.Unlock()
	var vec int64
	for _, v := range r.Vec {
		vec += int64(v.Len)
	}
	transfers := r.Op == aio.OpRead || r.Op == aio.OpWrite
	if m.closed || m.readOnly && r.Op.Writes() || r.Offset < 0 || r.Length < 0 || r.End() < 0 || transfers && vec != r.Length {
		m.bad = append(m.bad, fmt.Sprintf("%v %d+%d with %d bytes of memory, closed %v", r.Op, r.Offset, r.Length, vec, m.closed))
		return unix.EINVAL
	}
	size := int64(len(m.data))
	switch r.Op {
	case aio.OpRead:
		if r.End() > size {
			return unix.EIO
		}
		aio.CopyIn(r.Vec, m.data[r.Offset:r.End()])
	case aio.OpWrite:
		if r.End() > m.limit {
			return unix.ENOSPC
		}
		if r.End() > size {
			m.resize(r.End())
		}
		aio.CopyOut(m.data[r.Offset:r.End()], r.Vec)
	case aio.OpWriteZeroes, aio.OpDiscard:
		if r.Offset < size {
			clear(m.data[r.Offset:min(r.End(), size)])
		}
	}
	return 0
}

func (m *memory) resize(size int64) {
	m.data = append(m.data[:min(size, int64(len(m.data)))], make([]byte, max(0, size-int64(len(m.data))))...)
}

// Truncate sets the length.
func (m *memory) Truncate(size int64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case size < 0 || m.closed || m.readOnly:
		m.bad = append(m.bad, fmt.Sprintf("truncate to %d", size))
		return unix.EINVAL
	case size > m.limit:
		return unix.ENOSPC
	}
	m.resize(size)
	return nil
}

func (m *memory) Size() int64 { return m.opened }

func (m *memory) Close() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.closed = true
	return nil
}

// content is a copy of what the file holds now.
func (m *memory) content(t testing.TB) []byte {
	t.Helper()
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, what := range m.bad {
		t.Errorf("the file got a bad request: %s", what)
	}
	return bytes.Clone(m.data)
}

// openMemory opens an image that is held in memory, which becomes its own.
func openMemory(t testing.TB, data []byte, o qcow2.Options) (*qcow2.Image, *memory) {
	t.Helper()
	m := newMemory(data)
	m.readOnly = o.ReadOnly
	if o.Path == "" {
		o.Path = "image"
	}
	im, err := qcow2.New(m, o)
	if err != nil {
		t.Fatal(err)
	}
	return im, m
}
