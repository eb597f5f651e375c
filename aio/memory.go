package aio

import (
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Memory is a mapping outside the Go heap, zeroed and page aligned. The kernel
// reads and writes it by address while requests are in flight, so it is given
// back by Close and not by the garbage collector.
type Memory struct {
	b []byte
}

// NewMemory maps size bytes. Pages take up memory when they are first touched.
func NewMemory(size int) (*Memory, error) {
	b, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
	if err != nil {
		return nil, fmt.Errorf("map %d bytes: %w", size, err)
	}
	return &Memory{b}, nil
}

// Bytes is the whole mapping.
func (m *Memory) Bytes() []byte { return m.b }

// Iovec names n bytes from off on.
func (m *Memory) Iovec(off, n int) Iovec { return iovecOf(m.b[off : off+n]) }

// Close unmaps the memory. No request may use it any more.
func (m *Memory) Close() error {
	b := m.b
	m.b = nil
	if err := unix.Munmap(b); err != nil {
		return fmt.Errorf("unmap memory: %w", err)
	}
	return nil
}

func iovecOf(b []byte) Iovec {
	return Iovec{Base: uintptr(unsafe.Pointer(unsafe.SliceData(b))), Len: uint64(len(b))}
}

// bytes views the memory that v names. The view must not outlive the mapping.
func (v *Iovec) bytes() []byte {
	return unsafe.Slice(*(**byte)(unsafe.Pointer(&v.Base)), v.Len)
}

// CopyOut copies the bytes that src names into dst, as far as both reach, and
// returns how many it copied.
func CopyOut(dst []byte, src []Iovec) int {
	n := 0
	for i := range src {
		if n == len(dst) {
			break
		}
		n += copy(dst[n:], src[i].bytes())
	}
	return n
}

// CopyIn copies src into the memory that dst names, as far as both reach, and
// returns how many bytes it copied.
func CopyIn(dst []Iovec, src []byte) int {
	n := 0
	for i := range dst {
		if n == len(src) {
			break
		}
		n += copy(dst[i].bytes(), src[n:])
	}
	return n
}

// Zero fills the memory that vec names with zeroes.
func Zero(vec []Iovec) {
	for i := range vec {
		clear(vec[i].bytes())
	}
}

// Advance drops the first n bytes of vec, in place, and returns what is left.
func Advance(vec []Iovec, n uint64) []Iovec {
	for len(vec) > 0 && n >= vec[0].Len {
		n -= vec[0].Len
		vec = vec[1:]
	}
	if n > 0 {
		vec[0].Base += uintptr(n)
		vec[0].Len -= n
	}
	return vec
}
