//go:build !race

package codec_test

import (
	"testing"

	"platter/formats/qcow2/codec"
)

// TestWarmPoolsAllocateNothing doesn't run under the race detector, which has
// pools forget things on purpose. The benchmarks, which run without it, report
// the same.
func TestWarmPoolsAllocateNothing(t *testing.T) {
	rng := seeded(t)
	for _, kind := range types {
		for _, f := range fillers {
			for _, bits := range []uint{9, 16} {
				src := cluster(f, bits, rng)
				dst := make([]byte, len(src))
				packing := func() {
					if _, _, err := codec.Pack(kind, dst, src); err != nil {
						t.Fatal(err)
					}
				}
				if n := testing.AllocsPerRun(100, packing); n != 0 {
					t.Errorf("packing %d bytes of %s with %s: %v allocations", len(src), f.name, kind, n)
				}
				if !f.pack {
					continue
				}
				packed := pack(t, kind, src)
				unpacking := func() {
					if err := codec.Unpack(kind, dst, packed); err != nil {
						t.Fatal(err)
					}
				}
				if n := testing.AllocsPerRun(100, unpacking); n != 0 {
					t.Errorf("unpacking %d bytes of %s with %s: %v allocations", len(src), f.name, kind, n)
				}
			}
		}
	}
}
