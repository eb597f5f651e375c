package check

import (
	"bytes"
	"errors"
	"io"
	"slices"
	"sync"
)

// memory is an image file in memory. It can note what is done to it, and fail.
type memory struct {
	mu    sync.RWMutex
	data  []byte
	limit int64 // how long the file may get; 0 for as long as it likes
	fixed bool  // it is a block device, whose length doesn't change
	fail  int   // which of the calls from now on fails, counted from 1; 0 for none

	record bool
	log    []step
}

// step is a write, or a sync where it has no data, or a truncation.
type step struct {
	off      int64
	data     []byte
	truncate bool
}

func (s step) isSync() bool { return s.data == nil && !s.truncate }

var (
	errFault   = errors.New("injected fault")
	errNoSpace = errors.New("no space left")
	errFixed   = errors.New("a block device has a fixed length")
)

func newMemory(data []byte) *memory { return &memory{data: data} }

// fault reports whether this call is the one that fails.
func (f *memory) fault() bool {
	if f.fail == 0 {
		return false
	}
	f.fail--
	return f.fail == 0
}

func (f *memory) ReadAt(p []byte, off int64) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.fault() {
		return 0, errFault
	}
	if off >= int64(len(f.data)) {
		return 0, io.EOF
	}
	n := copy(p, f.data[off:])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (f *memory) WriteAt(p []byte, off int64) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.fault() {
		return 0, errFault
	}
	if end := off + int64(len(p)); f.limit > 0 && end > f.limit || f.fixed && end > int64(len(f.data)) {
		return 0, errNoSpace
	}
	f.data = applied(f.data, step{off: off, data: p})
	if f.record {
		f.log = append(f.log, step{off: off, data: bytes.Clone(p)})
	}
	return len(p), nil
}

func (f *memory) Size() (int64, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.fault() {
		return 0, errFault
	}
	return int64(len(f.data)), nil
}

func (f *memory) Sync() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.fault() {
		return errFault
	}
	if f.record {
		f.log = append(f.log, step{})
	}
	return nil
}

func (f *memory) Truncate(size int64) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.fault() {
		return errFault
	}
	if f.fixed {
		return errFixed
	}
	if f.limit > 0 && size > f.limit {
		return errNoSpace
	}
	f.data = applied(f.data, step{off: size, truncate: true})
	if f.record {
		f.log = append(f.log, step{off: size, truncate: true})
	}
	return nil
}

// applied is the file after a step. It may be the same memory.
func applied(data []byte, s step) []byte {
	end := s.off + int64(len(s.data))
	if grow := end - int64(len(data)); grow > 0 && !s.isSync() {
		data = slices.Grow(data, int(grow))
		old := len(data)
		data = data[:end]
		clear(data[old:])
	}
	if s.truncate {
		return data[:s.off]
	}
	copy(data[s.off:], s.data)
	return data
}
