package qcow2

import (
	"fmt"
	"io"
	"sync"

	"golang.org/x/sys/unix"

	"platter/aio"
)

// waiter does I/O for goroutines that wait for it, on a loop of its own: the
// same requests that loops make, so that whatever stands below an image sees
// all of its I/O. An image and its chain share one.
type waiter struct {
	loop *aio.Loop

	mu   sync.Mutex
	free []*aio.Memory // of transferSize bytes each
}

// transferSize is the longest read or write of metadata in bytes: as long as
// the largest cluster.
const transferSize = 2 << 20

func newWaiter() (*waiter, error) {
	l, err := aio.NewLoop(aio.LoopOptions{})
	if err != nil {
		return nil, fmt.Errorf("start a loop for metadata: %w", err)
	}
	return &waiter{loop: l}, nil
}

// close ends the loop. Nothing may be in flight.
func (w *waiter) close() error {
	err := w.loop.Close()
	for _, m := range w.free {
		if e := m.Close(); err == nil {
			err = e
		}
	}
	w.free = nil
	return err
}

// memory hands out a buffer that the kernel may use, for give to take back.
func (w *waiter) memory() (*aio.Memory, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if n := len(w.free); n > 0 {
		m := w.free[n-1]
		w.free = w.free[:n-1]
		return m, nil
	}
	return aio.NewMemory(transferSize)
}

func (w *waiter) give(m *aio.Memory) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.free = append(w.free, m)
}

// submitter is what takes requests: a storage or an image.
type submitter interface {
	Submit(l *aio.Loop, batch []*aio.Request)
}

// do carries out one request and waits for it. It must not be called on a loop.
func (w *waiter) do(s submitter, r aio.Request) error {
	done := make(chan unix.Errno, 1)
	r.Done = func(r *aio.Request) { done <- r.Errno }
	w.loop.Post(func() { s.Submit(w.loop, []*aio.Request{&r}) })
	if errno := <-done; errno != 0 {
		return errno
	}
	return nil
}

// readAt fills p, which may be any memory.
func (w *waiter) readAt(s submitter, p []byte, off int64) error {
	m, err := w.memory()
	if err != nil {
		return err
	}
	defer w.give(m)
	for len(p) > 0 {
		n := min(len(p), transferSize)
		vec := []aio.Iovec{m.Iovec(0, n)}
		if err := w.do(s, aio.Request{Op: aio.OpRead, Offset: off, Length: int64(n), Vec: vec}); err != nil {
			return fmt.Errorf("read %d bytes at %#x: %w", n, off, err)
		}
		copy(p, m.Bytes()[:n])
		p, off = p[n:], off+int64(n)
	}
	return nil
}

// writeAt writes p, which may be any memory.
func (w *waiter) writeAt(s submitter, p []byte, off int64) error {
	m, err := w.memory()
	if err != nil {
		return err
	}
	defer w.give(m)
	for len(p) > 0 {
		n := copy(m.Bytes(), p)
		vec := []aio.Iovec{m.Iovec(0, n)}
		if err := w.do(s, aio.Request{Op: aio.OpWrite, Offset: off, Length: int64(n), Vec: vec}); err != nil {
			return fmt.Errorf("write %d bytes at %#x: %w", n, off, err)
		}
		p, off = p[n:], off+int64(n)
	}
	return nil
}

func (w *waiter) flush(s submitter) error {
	if err := w.do(s, aio.Request{Op: aio.OpFlush}); err != nil {
		return fmt.Errorf("flush: %w", err)
	}
	return nil
}

// zero makes a range read as zeroes and frees its space where that can be done.
func (w *waiter) zero(s submitter, off, length int64) error {
	if err := w.do(s, aio.Request{Op: aio.OpWriteZeroes, Offset: off, Length: length}); err != nil {
		return fmt.Errorf("zero %d bytes at %#x: %w", length, off, err)
	}
	return nil
}

// readerAt reads a storage as a file: what is beyond its end is io.EOF.
type readerAt struct {
	w       *waiter
	storage aio.Storage
	size    func() int64
}

func (r readerAt) ReadAt(p []byte, off int64) (int, error) {
	n := int64(len(p))
	size := r.size()
	if off < 0 || off >= size {
		return 0, io.EOF
	}
	n = min(n, size-off)
	if err := r.w.readAt(r.storage, p[:n], off); err != nil {
		return 0, err
	}
	if n < int64(len(p)) {
		return int(n), io.EOF
	}
	return int(n), nil
}
