package layout_test

import (
	"testing"

	"pgregory.net/rapid"

	"platter/formats/qcow2/layout"
)

// Geometries of images with clusters of 64 KiB.
var (
	v2       = layout.Geometry{ClusterBits: 16, RefcountOrder: 4, Version: 2}
	v3       = layout.Geometry{ClusterBits: 16, RefcountOrder: 4, Version: 3}
	extended = layout.Geometry{ClusterBits: 16, RefcountOrder: 4, Version: 3, Extended: true}
	external = layout.Geometry{ClusterBits: 16, RefcountOrder: 4, Version: 3, External: true}
)

func TestGeometryOfTheHeader(t *testing.T) {
	h := newHeader(3)
	h.ClusterBits, h.RefcountOrder, h.Incompatible = 14, 6, layout.ExtendedL2|layout.ExternalData
	want := layout.Geometry{ClusterBits: 14, RefcountOrder: 6, Version: 3, Extended: true, External: true}
	if got := h.Geometry(); got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
	if got := newHeader(2).Geometry(); got != v2 {
		t.Errorf("got %+v, want %+v", got, v2)
	}
}

// TestGeometry compares with the figures of the specification.
func TestGeometry(t *testing.T) {
	type numbers struct {
		cluster, maxSize       int64
		entry, subclusters     int
		l2Bits, subclusterBits uint
	}
	for _, c := range []struct {
		g    layout.Geometry
		want numbers
	}{
		{layout.Geometry{ClusterBits: 9}, numbers{512, 128 << 30, 8, 1, 6, 9}},      // "larger than 128 GB"
		{layout.Geometry{ClusterBits: 21}, numbers{2 << 20, 2 << 60, 8, 1, 18, 21}}, // "beyond 2 EB"
		{layout.Geometry{ClusterBits: 16}, numbers{64 << 10, 2 << 50, 8, 1, 13, 16}},
		{layout.Geometry{ClusterBits: 14, Extended: true}, numbers{16 << 10, 64 << 40, 16, 32, 10, 9}},
		{layout.Geometry{ClusterBits: 21, Extended: true}, numbers{2 << 20, 1 << 60, 16, 32, 17, 16}},
	} {
		g := c.g
		got := numbers{g.ClusterSize(), g.MaxSize(), g.L2EntrySize(), g.Subclusters(), g.L2Bits(), g.SubclusterBits()}
		if got != c.want {
			t.Errorf("%+v: got %+v, want %+v", g, got, c.want)
		}
		if n := int64(g.L2EntrySize()) << g.L2Bits(); n != g.ClusterSize() {
			t.Errorf("%+v: an L2 table takes %d bytes", g, n)
		}
	}
}

func TestSizesThatTablesCover(t *testing.T) {
	per := int64(512 << 20) // bytes that an L1 entry maps
	for size, want := range map[int64]int64{0: 0, 1: 1, per: 1, per + 1: 2, v3.MaxSize(): layout.MaxL1Bytes / 8} {
		if n, ok := v3.L1EntriesFor(size); n != want || !ok {
			t.Errorf("%d bytes: got %d, %v, want %d L1 entries", size, n, ok, want)
		}
	}
	for _, size := range []int64{-1, v3.MaxSize() + 1, 1<<63 - 1, -1 << 63} {
		if n, ok := v3.L1EntriesFor(size); ok || n != 0 {
			t.Errorf("%d bytes: got %d L1 entries", size, n)
		}
	}
	for n, want := range map[int64]int64{0: 0, 1: 1, 1 << 16: 1, 1<<16 + 1: 2} {
		if got := v3.Clusters(n); got != want {
			t.Errorf("%d bytes: got %d clusters, want %d", n, got, want)
		}
	}
}

func TestL1Entries(t *testing.T) {
	for _, word := range []uint64{0, layout.Copied, 1 << 16, layout.Copied | 5<<16, layout.MaxOffset - 1<<16} {
		if err := v3.CheckL1(word); err != nil {
			t.Errorf("%#x: %v", word, err)
		}
	}
	for word, want := range map[uint64]wrong{
		1<<16 | 1:     {"L1 entry", "0x10001", "reserved bits", nil},
		1<<16 | 1<<8:  {"L1 entry", "0x10100", "reserved bits", nil},
		1<<16 | 1<<56: {"L1 entry", "0x100000000010000", "reserved bits", nil},
		1<<16 | 1<<62: {"L1 entry", "0x4000000000010000", "reserved bits", nil},
		1<<16 | 1<<9:  {"L1 entry", "0x10200", "multiple of the cluster size", nil},
		1<<15 | 1<<63: {"L1 entry", "0x8000000000008000", "multiple of the cluster size", nil},
	} {
		want.check(t, v3.CheckL1(word))
	}
}

func TestL2Entries(t *testing.T) {
	const guest = 7 << 16
	for _, c := range []struct {
		name         string
		g            layout.Geometry
		word, bitmap uint64
		want         layout.Kind
	}{
		{"nothing", v2, 0, 0, layout.Unallocated},
		{"nothing, extended", extended, 0, 0, layout.Unallocated},
		{"nothing, data file", external, 0, 0, layout.Unallocated},
		{"copied without an offset", v3, layout.Copied, 0, layout.Unallocated},
		{"data", v2, 5 << 16, 0, layout.Data},
		{"data, copied", v3, 5<<16 | layout.Copied, 0, layout.Data},
		{"data at the end", v3, layout.MaxOffset - 1<<16, 0, layout.Data},
		{"data file", external, guest | layout.Copied, 0, layout.Data},
		{"data file, first cluster", external, layout.Copied, 0, layout.Data},
		{"zero", v3, 1, 0, layout.ZeroPlain},
		{"zero, data file", external, 1, 0, layout.ZeroPlain},
		{"zero, kept cluster", v3, 5<<16 | layout.Copied | 1, 0, layout.ZeroAllocated},
		{"zero, kept first cluster of a data file", external, layout.Copied | 1, 0, layout.ZeroAllocated},
		{"compressed", v2, layout.CompressedL2 | 12345, 0, layout.Compressed},
		{"compressed, extended", extended, layout.CompressedL2 | 12345, 0, layout.Compressed},
		{"subclusters", extended, 5<<16 | layout.Copied, 0xffff0000_0000ffff, layout.Data},
		{"a host cluster without subclusters", extended, 5 << 16, 0, layout.Data},
		{"zero subclusters", extended, 0, 0xffffffff_00000000, layout.Unallocated},
	} {
		offset := int64(guest)
		if c.g.External && c.word&layout.OffsetMask == 0 {
			offset = 0
		}
		if err := c.g.CheckL2(c.word, c.bitmap, offset); err != nil {
			t.Errorf("%s: %v", c.name, err)
		}
		if got := c.g.Kind(c.word); got != c.want {
			t.Errorf("%s: got %v, want %v", c.name, got, c.want)
		}
	}
}

func TestHostileL2EntriesAreRefused(t *testing.T) {
	const guest = 7 << 16
	small := layout.Geometry{ClusterBits: 9, RefcountOrder: 4, Version: 3}
	for _, c := range []struct {
		name         string
		g            layout.Geometry
		word, bitmap uint64
		want         wrong
	}{
		{"reserved bit 1", v3, 5<<16 | 2, 0, wrong{"L2 entry", "0x50002", "reserved bits", nil}},
		{"reserved bit 8", v3, 5<<16 | 1<<8, 0, wrong{"L2 entry", "0x50100", "reserved bits", nil}},
		{"reserved bit 56", v3, 5<<16 | 1<<56, 0, wrong{"L2 entry", "0x100000000050000", "reserved bits", nil}},
		{"reserved bit 61", v3, 5<<16 | 1<<61, 0, wrong{"L2 entry", "0x2000000000050000", "reserved bits", nil}},
		{"zero flag in version 2", v2, 1, 0, wrong{"L2 entry", "0x1", "zero flag in version 2", nil}},
		{"zero flag with extended entries", extended, 5<<16 | 1, 0, wrong{"L2 entry", "0x50001", "reserved bits", nil}},
		{"unaligned", v3, 5<<16 + 512, 0, wrong{"L2 entry", "0x50200", "multiple of the cluster size", nil}},
		{"unaligned zero cluster", v3, 1<<15 | 1, 0, wrong{"L2 entry", "0x8001", "multiple of the cluster size", nil}},
		{"elsewhere in the data file", external, 5<<16 | layout.Copied, 0, wrong{"L2 entry", "0x8000000000050000", "guest offset 0x70000", nil}},
		{"start of the data file", external, layout.Copied, 0, wrong{"L2 entry", "0x8000000000000000", "guest offset 0x70000", nil}},
		{"zero cluster elsewhere in the data file", external, 5<<16 | layout.Copied | 1, 0, wrong{"L2 entry", "0x8000000000050001", "guest offset 0x70000", nil}},
		{"compressed in a data file", external, layout.CompressedL2 | 5<<16, 0, wrong{"L2 entry", "0x4000000000050000", "data file", nil}},
		{"compressed and copied", v3, layout.CompressedL2 | layout.Copied | 5<<16, 0, wrong{"L2 entry", "0xc000000000050000", "compressed and copied", nil}},
		{"compressed beyond 64 PiB", small, layout.CompressedL2 | 1<<56, 0, wrong{"L2 entry", "0x4100000000000000", "below 64 PiB", nil}},
		{"compressed with subclusters", extended, layout.CompressedL2 | 5<<16, 1, wrong{"subcluster bitmap", "0x1", "0 with a compressed cluster", nil}},
		{"subcluster both allocated and zero", extended, 5 << 16, 1<<40 | 1<<8, wrong{"subcluster bitmap", "0x10000000100", "both allocated and zero", nil}},
		{"subclusters without a host cluster", extended, 0, 1, wrong{"subcluster bitmap", "0x1", "without a host cluster", nil}},
	} {
		t.Run(c.name, func(t *testing.T) { c.want.check(t, c.g.CheckL2(c.word, c.bitmap, guest)) })
	}
}

func TestKindsHaveNames(t *testing.T) {
	for k, want := range map[layout.Kind]string{
		layout.Unallocated: "unallocated", layout.ZeroPlain: "zero", layout.ZeroAllocated: "preallocated zero",
		layout.Data: "data", layout.Compressed: "compressed",
	} {
		if k.String() != want {
			t.Errorf("got %q, want %q", k, want)
		}
	}
}

// TestCompressedRange computes by hand, for clusters of 64 KiB: the offset takes
// bits 0 to 53, and the number of further sectors bits 54 to 61.
func TestCompressedRange(t *testing.T) {
	for _, c := range []struct {
		word        uint64
		off, length int64
	}{
		{layout.CompressedL2, 0, 512},
		{layout.CompressedL2 | 0x12345, 0x12345, 512 - 0x145},
		{layout.CompressedL2 | 0x121ff | 1<<54, 0x121ff, 513},
		{layout.CompressedL2 | 0xff<<54, 0, 128 << 10}, // two clusters at most
		{layout.CompressedL2 | 1<<54 - 1 | 0x80<<54, 1<<54 - 1, 1 + 0x80*512},
	} {
		if off, length := v3.CompressedRange(c.word); off != c.off || length != c.length {
			t.Errorf("%#x: got %#x, %d, want %#x, %d", c.word, off, length, c.off, c.length)
		}
	}
}

func TestCompressedEntryRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		g := layout.Geometry{ClusterBits: rapid.UintRange(9, 21).Draw(t, "cluster bits"), Version: 3}
		limit := min(int64(1)<<(70-g.ClusterBits), layout.MaxOffset)
		off := rapid.Int64Range(0, limit-1).Draw(t, "offset")
		length := rapid.Int64Range(1, g.ClusterSize()).Draw(t, "length")
		word, ok := g.CompressedEntry(off, length)
		if !ok {
			t.Fatal("doesn't fit")
		}
		if err := g.CheckL2(word, 0, 0); err != nil || g.Kind(word) != layout.Compressed {
			t.Fatalf("%#x: %v, %v", word, g.Kind(word), err)
		}
		gotOff, got := g.CompressedRange(word)
		if gotOff != off || got < length || got >= length+512 || (gotOff+got)%512 != 0 {
			t.Fatalf("%#x: got %d bytes at %#x", word, got, gotOff)
		}
	})
}

func TestCompressedEntryThatDoesntFit(t *testing.T) {
	for _, c := range []struct {
		name        string
		bits        uint
		off, length int64
		ok          bool
	}{
		{"nothing", 16, 0, 0, false},
		{"less than nothing", 16, 0, -1, false},
		{"before the file", 16, -1, 512, false},
		{"last offset, 64 KiB", 16, 1<<54 - 1, 1, true},
		{"beyond it", 16, 1 << 54, 1, false},
		{"last offset, 512 bytes", 9, 1<<56 - 1, 1, true},
		{"beyond it", 9, 1 << 56, 1, false},
		{"last offset, 2 MiB", 21, 1<<49 - 1, 1, true}, // "512 TB (49 bits)"
		{"beyond it", 21, 1 << 49, 1, false},
		{"two clusters", 16, 0, 128 << 10, true},
		{"more than two clusters", 16, 0, 128<<10 + 1, false},
		{"two clusters, not from the start of a sector", 16, 1, 128 << 10, false},
		{"two clusters of 512 bytes", 9, 0, 1024, true},
		{"three of them", 9, 512, 1025, false},
	} {
		g := layout.Geometry{ClusterBits: c.bits}
		if _, ok := g.CompressedEntry(c.off, c.length); ok != c.ok {
			t.Errorf("%s: %v", c.name, ok)
		}
	}
}

func TestEntryOffset(t *testing.T) {
	if got := layout.EntryOffset(1<<64 - 1); got != 1<<56-512 {
		t.Errorf("got %#x", got)
	}
}
