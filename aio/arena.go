package aio

import (
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// BlockSize is the size of an arena's blocks, in bytes: large enough that a
// batch of small requests shares one, small enough to stay in a core's cache.
const BlockSize = 256 << 10

const (
	chunkBlocks = 16 // blocks mapped at a time
	keepBlocks  = 32 // free blocks that keep their pages, per arena
)

// Block is BlockSize bytes of an Arena, page aligned, with the number of its
// users.
type Block struct {
	arena *Arena
	next  *Block
	b     []byte
	refs  int32
}

// Bytes is the block's memory.
func (b *Block) Bytes() []byte { return b.b }

// Iovec names n bytes of the block from off on.
func (b *Block) Iovec(off, n int) Iovec { return iovecOf(b.b[off : off+n]) }

// Unshared reports whether the block has but one user.
func (b *Block) Unshared() bool { return b.refs == 1 }

// Hold adds a user.
func (b *Block) Hold() { b.refs++ }

// Release drops a user; the last one gives the block back to its arena, after
// which its memory must not be touched.
func (b *Block) Release() {
	if b.refs--; b.refs == 0 {
		b.arena.put(b)
	}
}

// Arena hands out blocks of memory outside the Go heap to the users of one loop,
// on whose thread all of its methods and those of its blocks are called. The
// block that was given back last is handed out first: its lines are still in the
// cache. It grows when it has to, never beyond its limit, and gives pages of
// blocks that aren't in use back to the kernel when there are many.
type Arena struct {
	warm   *Block // free blocks that keep their pages
	nwarm  int
	cold   *Block // free blocks without pages
	blocks int    // mapped
	limit  int    // blocks
	maps   [][]byte
}

// NewArena makes an arena that never maps more than limit bytes.
func NewArena(limit int64) *Arena {
	return &Arena{limit: int(limit / BlockSize)}
}

// Get hands out a block with one user, or nil when the arena is at its limit.
// What the block holds is not defined.
func (a *Arena) Get() *Block {
	b := a.warm
	if b != nil {
		a.warm = b.next
		a.nwarm--
	} else {
		if a.cold == nil && a.grow() != nil {
			return nil
		}
		b = a.cold
		a.cold = b.next
	}
	b.next, b.refs = nil, 1
	return b
}

func (a *Arena) put(b *Block) {
	if a.nwarm < keepBlocks {
		b.next, a.warm = a.warm, b
		a.nwarm++
		return
	}
	// Nobody refers to the block, so nobody misses what it held.
	_ = unix.Madvise(b.b, unix.MADV_DONTNEED)
	b.next, a.cold = a.cold, b
}

func (a *Arena) grow() error {
	n := min(chunkBlocks, a.limit-a.blocks)
	if n <= 0 {
		return unix.ENOMEM
	}
	m, err := unix.Mmap(-1, 0, n*BlockSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
	if err != nil {
		return fmt.Errorf("map arena: %w", err)
	}
	a.maps = append(a.maps, m)
	a.blocks += n
	for i := n - 1; i >= 0; i-- {
		a.cold = &Block{arena: a, next: a.cold, b: m[i*BlockSize : (i+1)*BlockSize : (i+1)*BlockSize]}
	}
	return nil
}

// close unmaps everything. No block may be in use.
func (a *Arena) close() {
	for _, m := range a.maps {
		_ = unix.Munmap(m)
	}
	*a = Arena{}
}

// zeroes is a read-only region that zero fills are written from, mapped once
// for the process: its pages are the kernel's shared zero page.
var zeroes = func() []byte {
	m, err := unix.Mmap(-1, 0, BlockSize, unix.PROT_READ, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		panic(fmt.Sprintf("map zeroes: %v", err)) // 256 KiB at start-up
	}
	return m
}()

// Zeroes names n bytes that are zero, at most BlockSize, to be written from.
func Zeroes(n int64) Iovec {
	return Iovec{Base: uintptr(unsafe.Pointer(&zeroes[0])), Len: uint64(min(n, BlockSize))}
}
