package layout_test

import (
	"bytes"
	"math/big"
	"math/rand/v2"
	"testing"

	"platter/formats/qcow2/layout"
)

// bitsOf reads a refcount as the specification puts it: entries of less than a
// byte begin at the least significant bit, others are big-endian.
func bitsOf(block []byte, width, i int) uint64 {
	if width >= 8 {
		return new(big.Int).SetBytes(block[i*width/8 : (i+1)*width/8]).Uint64()
	}
	var v uint64
	for bit := range width {
		at := i*width + bit
		v |= uint64(block[at/8]>>(at%8)&1) << bit
	}
	return v
}

func TestRefcountsOfEveryWidth(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	for order := range uint(layout.MaxRefcountOrder + 1) {
		g := layout.Geometry{ClusterBits: 9, RefcountOrder: order}
		width, n := 1<<order, 1<<g.RefcountBlockBits()
		if n*width != 512*8 {
			t.Errorf("width %d: %d refcounts in a block", width, n)
		}
		if want := uint64(1)<<(width-1) + (uint64(1)<<(width-1) - 1); g.MaxRefcount() != want {
			t.Errorf("width %d: the largest is %d, want %d", width, g.MaxRefcount(), want)
		}
		block := make([]byte, 512)
		model := make([]uint64, n)
		for range 4 * n {
			i, v := rng.IntN(n), rng.Uint64()&g.MaxRefcount()
			if rng.IntN(4) == 0 {
				v = g.MaxRefcount()
			}
			g.SetRefcount(block, i, v)
			model[i] = v
		}
		for i, want := range model {
			if got, bits := g.Refcount(block, i), bitsOf(block, width, i); got != want || bits != want {
				t.Fatalf("width %d, index %d: got %d, in the block stands %d, want %d", width, i, got, bits, want)
			}
		}
		for i := range n {
			g.SetRefcount(block, i, 0)
		}
		if !bytes.Equal(block, make([]byte, 512)) {
			t.Errorf("width %d: zeroes left bits behind", width)
		}
	}
}

func TestRefcountTableEntries(t *testing.T) {
	g := newHeader(3).Geometry()
	for _, word := range []uint64{0, 1 << 16, 2 << 16, layout.MaxOffset - 1<<16} {
		if err := g.CheckRefcountTable(word); err != nil {
			t.Errorf("%#x: %v", word, err)
		}
	}
	for word, want := range map[uint64]wrong{
		1<<16 | 1:        {"refcount table entry", "0x10001", "reserved bits", nil},
		1<<16 | 0x100:    {"refcount table entry", "0x10100", "reserved bits", nil},
		0x1fe:            {"refcount table entry", "0x1fe", "reserved bits", nil},
		1<<16 + 1<<15:    {"refcount table entry", "0x18000", "multiple of the cluster size", nil},
		layout.MaxOffset: {"refcount table entry", "0x100000000000000", "below 64 PiB", nil},
		1 << 63:          {"refcount table entry", "0x8000000000000000", "below 64 PiB", nil},
	} {
		want.check(t, g.CheckRefcountTable(word))
	}
}
