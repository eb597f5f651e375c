package layout_test

import (
	"bytes"
	"errors"
	"reflect"
	"testing"

	"platter/formats/qcow2/layout"
)

// bounded runs f, which may not allocate more than limit bytes. What the fuzzing
// engine allocates meanwhile counts as well, but is little.
func bounded(t *testing.T, limit uint64, f func()) {
	t.Helper()
	if n := allocated(f); n > limit {
		t.Errorf("%d bytes were allocated, the bound is %d", n, limit)
	}
}

// FuzzHeader parses hostile first clusters. What is accepted can be encoded and is
// then the same header.
func FuzzHeader(f *testing.F) {
	small := newHeader(3)
	small.ClusterBits, small.Size, small.L1Entries, small.BackingFile = 9, 1<<20, 32, "base.img"
	small.SetExtension(layout.ExtensionBackingFormat, []byte("qcow2"))
	f.Add(encode(f, small))
	small.Version = 2
	f.Add(encode(f, small))
	full := newHeader(3)
	full.Incompatible = layout.Dirty | layout.Corrupt | layout.Compression | layout.ExtendedL2
	full.ClusterBits, full.CompressionType, full.L1Entries, full.Encryption = 14, layout.Zstd, 64, layout.LUKS
	full.Snapshots, full.SnapshotsOffset = 3, 7<<16
	full.SetExtension(layout.ExtensionFeatureNames, layout.FeatureNames())
	full.SetExtension(layout.ExtensionEncryption, append(be64(5<<16), be64(592)...))
	full.SetExtension(layout.ExtensionBitmaps, (&layout.BitmapsExtension{Count: 1, DirectorySize: 32, DirectoryOffset: 8 << 16}).Encode())
	f.Add(encode(f, full)[:1024])
	raw := newHeader(3)
	raw.Incompatible, raw.Autoclear = layout.ExternalData, layout.RawExternal
	raw.SetExtension(layout.ExtensionDataFile, []byte("data.raw"))
	f.Add(encode(f, raw)[:512])
	f.Add(patched(encode(f, newHeader(3))[:512], patch{atLength, be32(104)}))

	f.Fuzz(func(t *testing.T, b []byte) {
		var h *layout.Header
		var err error
		bounded(t, 64<<20, func() { h, err = layout.ReadHeader(bytes.NewReader(b), int64(len(b))) })
		if err != nil {
			var field *layout.FieldError
			if h != nil || !errors.Is(err, layout.ErrNotQcow2) && !errors.As(err, &field) {
				t.Fatalf("header %+v, error %v", h, err)
			}
			return
		}
		g := h.Geometry()
		if need, ok := g.L1EntriesFor(h.Size); !ok || need > int64(h.L1Entries) || h.L1Entries > layout.MaxL1Bytes/8 {
			t.Fatalf("accepted an L1 table of %d entries for %d bytes", h.L1Entries, h.Size)
		}
		if _, err := h.Bitmaps(); err != nil && !errors.Is(err, layout.ErrInvalid) {
			t.Fatal(err)
		}
		cluster := make([]byte, g.ClusterSize())
		if err := h.Encode(cluster); err != nil {
			// An image may do without an end mark and the last padding.
			if used := len(b); errors.Is(err, layout.ErrInvalid) && used > len(cluster)-16 {
				return
			}
			t.Fatalf("%+v can't be encoded: %v", h, err)
		}
		again, err := layout.ParseHeader(cluster)
		if err != nil || !reflect.DeepEqual(h, again) {
			t.Fatalf("%+v became %+v, %v", h, again, err)
		}
	})
}

// FuzzSnapshots parses hostile snapshot tables.
func FuzzSnapshots(f *testing.F) {
	one, two := newSnapshot("1", "one"), newSnapshot("2", "two")
	two.VMState, two.Extra = 1<<33, []byte("extra")
	table := layout.AppendSnapshots(nil, []layout.Snapshot{one, two})
	f.Add(table, uint32(2), int64(1<<30), uint8(16))
	f.Add(table[:72+24+21], uint32(2), int64(1<<30), uint8(21))
	f.Add(make([]byte, 4096), uint32(layout.MaxSnapshots), int64(0), uint8(9))

	f.Fuzz(func(t *testing.T, table []byte, count uint32, size int64, bits uint8) {
		h := newHeader(3)
		h.ClusterBits, h.Size = 9+uint32(bits)%13, size
		h.Snapshots, h.SnapshotsOffset = count%(layout.MaxSnapshots+1), 1<<h.ClusterBits
		var list []layout.Snapshot
		var n int64
		var err error
		bounded(t, 128<<20, func() { list, n, err = layout.ReadSnapshotTable(at{table, h.SnapshotsOffset}, h) })
		if err != nil {
			if list != nil || n != 0 || !errors.Is(err, layout.ErrInvalid) {
				t.Fatalf("%v, %d, error %v", list, n, err)
			}
			return
		}
		if len(list) != int(h.Snapshots) || n > int64(len(table)) {
			t.Fatalf("%d snapshots in %d bytes, want %d in %d", len(list), n, h.Snapshots, len(table))
		}
		again := layout.AppendSnapshots(nil, list)
		if n > int64(len(again)) {
			t.Fatalf("%d bytes became %d", n, len(again))
		}
		same, _, err := layout.ReadSnapshotTable(at{again, h.SnapshotsOffset}, h)
		if err != nil || !reflect.DeepEqual(list, same) {
			t.Fatalf("%+v became %+v, %v", list, same, err)
		}
	})
}

// FuzzBitmaps parses hostile bitmaps extensions and directories.
func FuzzBitmaps(f *testing.F) {
	one, two := newBitmap("one"), newBitmap("two")
	two.Extra, two.Flags = []byte("extra"), layout.BitmapInUse|layout.BitmapExtraCompatible
	directory := layout.AppendBitmaps(nil, []layout.Bitmap{one, two})
	x := layout.BitmapsExtension{Count: 2, DirectorySize: int64(len(directory)), DirectoryOffset: 5 << 16}
	f.Add(x.Encode(), directory, int64(1<<30))
	x.Count = layout.MaxBitmaps
	f.Add(x.Encode(), make([]byte, 4096), int64(0))
	x.DirectorySize = layout.MaxBitmapDirectory
	f.Add(x.Encode(), directory, int64(1<<50))

	f.Fuzz(func(t *testing.T, extension, directory []byte, size int64) {
		h := newHeader(3)
		h.Size = size
		h.SetExtension(layout.ExtensionBitmaps, extension)
		x, err := h.Bitmaps()
		if x == nil || err != nil {
			if extension != nil && !errors.Is(err, layout.ErrInvalid) {
				t.Fatalf("%v, error %v", x, err)
			}
			return
		}
		if !bytes.Equal(x.Encode(), extension) {
			t.Fatalf("% x became % x", extension, x.Encode())
		}
		var list []layout.Bitmap
		bounded(t, 128<<20, func() { list, err = layout.ReadBitmaps(at{directory, x.DirectoryOffset}, h) })
		if err != nil {
			if list != nil || !errors.Is(err, layout.ErrInvalid) {
				t.Fatalf("%v, error %v", list, err)
			}
			return
		}
		again := layout.AppendBitmaps(nil, list)
		if len(list) != int(x.Count) || int64(len(again)) != x.DirectorySize {
			t.Fatalf("%d bitmaps in %d bytes, want %d in %d", len(list), len(again), x.Count, x.DirectorySize)
		}
		same, err := layout.ParseBitmaps(again, h, len(list))
		if err != nil || !reflect.DeepEqual(list, same) {
			t.Fatalf("%+v became %+v, %v", list, same, err)
		}
	})
}

// FuzzL2Entry checks and decodes hostile L2, L1 and table entries. What passes is
// within what an image can have.
func FuzzL2Entry(f *testing.F) {
	for _, word := range []uint64{0, 1, 5 << 16, 5<<16 | layout.Copied, 5<<16 | 1, layout.CompressedL2 | 5<<54 | 12345, 1<<64 - 1} {
		for shape := range uint8(16) {
			f.Add(word, uint64(0xff00<<32|0xff), int64(5<<16), shape)
		}
	}
	f.Fuzz(func(t *testing.T, word, bitmap uint64, guest int64, shape uint8) {
		g := layout.Geometry{
			ClusterBits: 9 + uint(shape>>4)%13, RefcountOrder: 4, Version: 2 + uint32(shape&1),
			Extended: shape&2 != 0, External: shape&4 != 0,
		}
		for _, check := range []func(uint64) error{g.CheckL1, g.CheckRefcountTable, g.CheckBitmapTable} {
			if err := check(word); err != nil && !errors.Is(err, layout.ErrInvalid) {
				t.Fatal(err)
			}
		}
		if err := g.CheckL2(word, bitmap, guest); err != nil {
			if !errors.Is(err, layout.ErrInvalid) {
				t.Fatal(err)
			}
			_ = g.Kind(word).String()
			return
		}
		off := layout.EntryOffset(word)
		switch kind := g.Kind(word); kind {
		case layout.Compressed:
			off, length := g.CompressedRange(word)
			if off < 0 || off >= layout.MaxOffset || length <= 0 || length > 2*g.ClusterSize() || (off+length)%512 != 0 {
				t.Fatalf("%#x: %d bytes at %#x", word, length, off)
			}
			if again, ok := g.CompressedEntry(off, length); !ok || again != word {
				t.Fatalf("%#x became %#x, %v", word, again, ok)
			}
		case layout.Data, layout.ZeroAllocated:
			if off%g.ClusterSize() != 0 || off >= layout.MaxOffset || off == 0 && !g.External || g.External && off != guest {
				t.Fatalf("%v at %#x", kind, off)
			}
		case layout.Unallocated, layout.ZeroPlain:
			if off != 0 || g.Extended && uint32(bitmap) != 0 {
				t.Fatalf("%v at %#x, subclusters %#x", kind, off, bitmap)
			}
		}
		if kind := g.Kind(word); (kind == layout.ZeroPlain || kind == layout.ZeroAllocated) && (g.Version < 3 || g.Extended) {
			t.Fatalf("%v in %+v", kind, g)
		}
	})
}
