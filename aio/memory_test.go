package aio

import (
	"bytes"
	"testing"
	"unsafe"
)

// TestArena: the last block given back comes first; the arena grows up to its
// limit and not beyond; few free blocks keep their pages.
func TestArena(t *testing.T) {
	const limit = 100
	a := NewArena(limit*BlockSize + BlockSize/2)
	defer a.close()
	blocks := map[*Block]bool{}
	var last *Block
	for range limit {
		b := a.Get()
		if b == nil || blocks[b] {
			t.Fatalf("%d blocks, then %p", len(blocks), b)
		}
		if len(b.Bytes()) != BlockSize || cap(b.Bytes()) != BlockSize || uintptr(unsafe.Pointer(&b.Bytes()[0]))%4096 != 0 {
			t.Fatalf("a block of %d bytes at %p", len(b.Bytes()), &b.Bytes()[0])
		}
		b.Bytes()[0], b.Bytes()[BlockSize-1] = 1, byte(len(blocks))
		blocks[b] = true
		last = b
	}
	if a.Get() != nil || a.blocks != limit {
		t.Errorf("%d blocks beyond a limit of %d", a.blocks, limit)
	}
	for b := range blocks {
		if b != last {
			b.Release()
		}
	}
	if a.nwarm != keepBlocks {
		t.Errorf("%d free blocks keep their pages", a.nwarm)
	}
	cold := 0
	for b := a.cold; b != nil; b = b.next {
		if b.Bytes()[0] != 0 {
			t.Error("a cold block has pages")
		}
		cold++
	}
	if a.nwarm+cold != limit-1 {
		t.Errorf("%d warm and %d cold blocks", a.nwarm, cold)
	}

	last.Hold()
	if last.Unshared() {
		t.Error("a block with two users is unshared")
	}
	last.Release()
	if !last.Unshared() || last.Bytes()[0] != 1 {
		t.Error("the block of the user that is left")
	}
	for range keepBlocks {
		blocks[a.Get()] = true // makes room among the warm ones
	}
	if a.nwarm != 0 || len(blocks) != limit {
		t.Errorf("%d warm blocks, %d in all", a.nwarm, len(blocks))
	}
	last.Release()
	if a.Get() != last {
		t.Error("the block that was given back last does not come first")
	}
}

func TestMemory(t *testing.T) {
	m, err := NewMemory(10000)
	if err != nil {
		t.Fatal(err)
	}
	b := m.Bytes()
	if len(b) != 10000 || !bytes.Equal(b, make([]byte, 10000)) || uintptr(unsafe.Pointer(&b[0]))%4096 != 0 {
		t.Errorf("%d bytes at %p", len(b), &b[0])
	}
	if v := m.Iovec(100, 50); v.Base != uintptr(unsafe.Pointer(&b[100])) || v.Len != 50 {
		t.Errorf("%+v", v)
	}
	if err := m.Close(); err != nil {
		t.Error(err)
	}
	if m.Bytes() != nil || m.Close() == nil {
		t.Error("closed twice")
	}
	if _, err := NewMemory(-1); err == nil {
		t.Error("memory of a negative size")
	}
}

func TestCopy(t *testing.T) {
	m := newMemory(t, 4096)
	copy(m.Bytes(), "hello, world")
	vec := []Iovec{m.Iovec(7, 5), {}, m.Iovec(0, 5), m.Iovec(5, 2)}
	for n := range 14 {
		dst := make([]byte, n)
		if got, want := CopyOut(dst, vec), min(n, 12); got != want || string(dst[:want]) != "worldhello, "[:want] {
			t.Errorf("CopyOut of %d bytes: %d, %q", n, got, dst)
		}
	}
	vec = []Iovec{m.Iovec(100, 3), m.Iovec(200, 0), m.Iovec(300, 4)}
	for n := range 9 {
		clear(m.Bytes()[100:])
		if got, want := CopyIn(vec, []byte("abcdefgh")[:n]), min(n, 7); got != want {
			t.Errorf("CopyIn of %d bytes: %d", n, got)
		}
		got := string(bytes.TrimRight(append(append([]byte(nil), m.Bytes()[100:103]...), m.Bytes()[300:304]...), "\x00"))
		if got != "abcdefg"[:min(n, 7)] {
			t.Errorf("CopyIn of %d bytes: %q", n, got)
		}
	}
	if CopyIn(nil, []byte("x")) != 0 || CopyOut(make([]byte, 1), nil) != 0 {
		t.Error("something was copied without a vector")
	}
}

func TestAdvance(t *testing.T) {
	whole := func() []Iovec { return []Iovec{{1000, 10}, {0, 0}, {2000, 5}, {3000, 1}} }
	for n := range uint64(17) {
		got := Advance(whole(), n)
		left := uint64(0)
		for i, v := range got {
			left += v.Len
			if i > 0 && v != whole()[4-len(got)+i] {
				t.Errorf("after %d bytes: %v", n, got)
			}
		}
		if left != 16-n {
			t.Errorf("after %d bytes %d are left", n, left)
		}
		if left > 0 {
			end := map[bool]uintptr{true: 1010, false: 2005}[n < 10]
			if n == 15 {
				end = 3001
			}
			if got[0].Base+uintptr(got[0].Len) != end || got[0].Len == 0 {
				t.Errorf("after %d bytes: %v", n, got)
			}
		}
	}
	if len(Advance(nil, 0)) != 0 {
		t.Error("something of nothing")
	}
}
