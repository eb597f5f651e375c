package layout_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"reflect"
	"strings"
	"testing"

	"platter/formats/qcow2/layout"
)

// Offsets of the fields of the header.
const (
	atVersion       = 4
	atBackingOffset = 8
	atBackingSize   = 16
	atClusterBits   = 20
	atSize          = 24
	atCrypt         = 32
	atL1Size        = 36
	atL1Offset      = 40
	atRefTable      = 48
	atRefClusters   = 56
	atSnapshots     = 60
	atSnapOffset    = 64
	atIncompatible  = 72
	atAutoclear     = 88
	atRefOrder      = 96
	atLength        = 100
	atCompression   = 104
	atExtensions    = 112
)

func TestHeaderRoundTrip(t *testing.T) {
	long := strings.Repeat("x", layout.MaxBackingName)
	for name, change := range map[string]func(h *layout.Header){
		"plain":        func(*layout.Header) {},
		"512 bytes":    func(h *layout.Header) { h.ClusterBits, h.Size, h.L1Entries, h.L1Offset = 9, 1<<20, 32, 1<<9 },
		"2 MiB":        func(h *layout.Header) { h.ClusterBits, h.L1Offset, h.RefcountTableOffset = 21, 1<<21, 2<<21 },
		"size 0":       func(h *layout.Header) { h.Size, h.L1Entries, h.L1Offset = 0, 0, 0 },
		"largest":      func(h *layout.Header) { h.Size, h.L1Entries = h.Geometry().MaxSize(), layout.MaxL1Bytes/8 },
		"more L1":      func(h *layout.Header) { h.L1Entries = 100 },
		"backing file": func(h *layout.Header) { h.BackingFile = "base.img" },
		"long name":    func(h *layout.Header) { h.BackingFile = long },
		"snapshots":    func(h *layout.Header) { h.Snapshots, h.SnapshotsOffset = layout.MaxSnapshots, 5<<16 },
		"refcount table of 8 MiB": func(h *layout.Header) {
			h.RefcountTableClusters = layout.MaxRefcountTableBytes >> h.ClusterBits
		},
		"last cluster": func(h *layout.Header) { h.L1Offset = layout.MaxOffset - 1<<16 },
		"AES":          func(h *layout.Header) { h.Encryption = layout.AES },
		"LUKS":         func(h *layout.Header) { h.Encryption = layout.LUKS },
	} {
		for _, version := range []uint32{2, 3} {
			h := newHeader(version)
			change(h)
			roundTrip(t, name, h)
		}
	}
	for name, change := range map[string]func(h *layout.Header){
		"dirty":      func(h *layout.Header) { h.Incompatible, h.Compatible = layout.Dirty, layout.LazyRefcounts },
		"corrupt":    func(h *layout.Header) { h.Incompatible = layout.Corrupt },
		"1 bit":      func(h *layout.Header) { h.RefcountOrder = 0 },
		"64 bits":    func(h *layout.Header) { h.RefcountOrder = 6 },
		"zstd":       func(h *layout.Header) { h.Incompatible, h.CompressionType = layout.Compression, layout.Zstd },
		"extended":   func(h *layout.Header) { h.Incompatible, h.L1Entries = layout.ExtendedL2, 4 },
		"external":   func(h *layout.Header) { h.Incompatible = layout.ExternalData },
		"raw":        func(h *layout.Header) { h.Incompatible, h.Autoclear = layout.ExternalData, layout.RawExternal },
		"compatible": func(h *layout.Header) { h.Compatible = 1<<63 | 2 },
		"autoclear":  func(h *layout.Header) { h.Autoclear = 1<<63 | layout.BitmapsValid },
		"longer":     func(h *layout.Header) { h.Extra = append(make([]byte, 7), "new field"[:8]...) },
	} {
		h := newHeader(3)
		change(h)
		roundTrip(t, name, h)
	}
}

// roundTrip encodes the header, parses that, and encodes it again.
func roundTrip(t *testing.T, name string, h *layout.Header) {
	t.Helper()
	cluster := encode(t, h)
	again := parse(t, cluster)
	if h.Version == 3 && h.Extra == nil {
		h.Extra = make([]byte, 7) // the padding of a header of 112 bytes
	}
	if !reflect.DeepEqual(h, again) {
		t.Errorf("%s, version %d: %+v became %+v", name, h.Version, h, again)
	}
	if !bytes.Equal(cluster, encode(t, again)) {
		t.Errorf("%s, version %d: was encoded differently when encoded again", name, h.Version)
	}
	read, err := layout.ReadHeader(bytes.NewReader(cluster), int64(len(cluster)))
	if err != nil || !reflect.DeepEqual(read, again) {
		t.Errorf("%s, version %d: read %+v, %v; parsed %+v", name, h.Version, read, err, again)
	}
}

// hostileHeaders are headers that no one may accept, made from that of newHeader
// in version 3, or 2.
var hostileHeaders = []struct {
	name    string
	version uint32 // 0 for 3
	patches []patch
	want    wrong
	qemuToo bool // qemu-img info refuses it, too
}{
	{"version 1", 0, []patch{{atVersion, be32(1)}},
		wrong{"version", "1", "2 and 3", layout.ErrUnsupported}, true},
	{"version 1 with nothing where version 2 has cluster_bits", 0, []patch{{atVersion, be32(1)}, {atClusterBits, be32(0)}},
		wrong{"version", "1", "2 and 3", layout.ErrUnsupported}, true},
	{"version 4", 0, []patch{{atVersion, be32(4)}},
		wrong{"version", "4", "2 and 3", layout.ErrUnsupported}, true},
	{"cluster_bits of 0", 0, []patch{{atClusterBits, be32(0)}},
		wrong{"cluster_bits", "0", "9 to 21", nil}, true},
	{"cluster_bits below 9", 0, []patch{{atClusterBits, be32(8)}},
		wrong{"cluster_bits", "8", "9 to 21", nil}, true},
	{"cluster_bits above 21", 0, []patch{{atClusterBits, be32(22)}},
		wrong{"cluster_bits", "22", "9 to 21", nil}, true},
	{"cluster_bits that shift by 32", 0, []patch{{atClusterBits, be32(1<<32 - 1)}},
		wrong{"cluster_bits", "4294967295", "9 to 21", nil}, true},
	{"cluster_bits below 14 with extended L2", 0, []patch{{atClusterBits, be32(13)}, {atIncompatible, be64(layout.ExtendedL2)}},
		wrong{"cluster_bits", "13", "14 to 21", nil}, true},
	{"refcount_order above 6", 0, []patch{{atRefOrder, be32(7)}},
		wrong{"refcount_order", "7", "6", nil}, true},
	{"header_length below 104", 0, []patch{{atLength, be32(96)}},
		wrong{"header_length", "96", "104", nil}, true},
	{"header_length unaligned", 0, []patch{{atLength, be32(108)}, {108, make([]byte, 16)}},
		wrong{"header_length", "108", "multiple of 8", nil}, false},
	{"header_length above the cluster size", 0, []patch{{atLength, be32(1<<16 + 8)}},
		wrong{"header_length", "65544", "65536", nil}, true},
	{"header_length of 4 GiB", 0, []patch{{atLength, be32(1<<32 - 8)}},
		wrong{"header_length", "4294967288", "65536", nil}, true},
	{"unknown incompatible bit", 0, []patch{{atIncompatible, be64(1<<5 | 1<<63)}},
		wrong{"incompatible_features", "0x8000000000000020", "bit 5, bit 63", layout.ErrUnsupported}, true},
	{"crypt_method above 2", 0, []patch{{atCrypt, be32(3)}},
		wrong{"crypt_method", "3", "0 (none), 1 (AES) and 2 (LUKS)", layout.ErrUnsupported}, true},
	{"compression bit without a type", 0, []patch{{atIncompatible, be64(layout.Compression)}},
		wrong{"compression_type", "0", "not be 0", nil}, true},
	{"compression bit without the field", 0, []patch{{atIncompatible, be64(layout.Compression)}, {atLength, be32(104)}, {atCompression, be64(0)}},
		wrong{"compression_type", "0", "not be 0", nil}, true},
	{"compression type without the bit", 0, []patch{{atCompression, []byte{1}}},
		wrong{"compression_type", "1", "must be 0", nil}, true},
	{"unknown compression type", 0, []patch{{atIncompatible, be64(layout.Compression)}, {atCompression, []byte{2}}},
		wrong{"compression_type", "2", "0 (zlib) and 1 (zstd)", layout.ErrUnsupported}, true},
	{"L1 table above 32 MiB", 0, []patch{{atL1Size, be32(layout.MaxL1Bytes/8 + 1)}},
		wrong{"l1_size", "4194305", "4194304 (32 MiB)", nil}, true},
	{"l1_size of 32 GiB", 0, []patch{{atL1Size, be32(1<<32 - 1)}},
		wrong{"l1_size", "4294967295", "4194304 (32 MiB)", nil}, true},
	{"l1_size too small for the size", 0, []patch{{atL1Size, be32(1)}},
		wrong{"l1_size", "1", "at least 2 for a disk of 1073741824 bytes", nil}, true},
	{"l1_size of 0", 2, []patch{{atL1Size, be32(0)}},
		wrong{"l1_size", "0", "at least 2", nil}, true},
	{"size that needs one more L1 entry", 0, []patch{{atSize, be64(1<<30 + 1)}},
		wrong{"l1_size", "2", "at least 3 for a disk of 1073741825 bytes", nil}, true},
	{"size that no L1 table can map", 0, []patch{{atSize, be64(1<<51 + 1)}, {atL1Size, be32(layout.MaxL1Bytes / 8)}},
		wrong{"size", "2251799813685249", "2251799813685248", nil}, true},
	{"size beyond 63 bits", 0, []patch{{atSize, be64(1<<64 - 512)}},
		wrong{"size", "18446744073709551104", "2251799813685248", nil}, true},
	{"L1 table unaligned", 0, []patch{{atL1Offset, be64(3<<16 + 512)}},
		wrong{"l1_table_offset", "0x30200", "multiple of the cluster size 0x10000", nil}, true},
	{"L1 table over the header", 0, []patch{{atL1Offset, be64(0)}},
		wrong{"l1_table_offset", "0x0", "above 0", nil}, false},
	{"L1 table beyond 64 PiB", 0, []patch{{atL1Offset, be64(1 << 56)}},
		wrong{"l1_table_offset", "0x100000000000000", "below 64 PiB", nil}, false},
	{"L1 table that overflows", 0, []patch{{atL1Offset, be64(1<<64 - 1<<16)}},
		wrong{"l1_table_offset", "0xffffffffffff0000", "below 64 PiB", nil}, true},
	{"refcount table empty", 0, []patch{{atRefClusters, be32(0)}},
		wrong{"refcount_table_clusters", "0", "1 to 128", nil}, true},
	{"refcount table above 8 MiB", 0, []patch{{atRefClusters, be32(129)}},
		wrong{"refcount_table_clusters", "129", "1 to 128 (8 MiB)", nil}, true},
	{"refcount table of 256 TiB", 0, []patch{{atRefClusters, be32(1<<32 - 1)}},
		wrong{"refcount_table_clusters", "4294967295", "1 to 128 (8 MiB)", nil}, true},
	{"refcount table unaligned", 0, []patch{{atRefTable, be64(1<<16 + 8)}},
		wrong{"refcount_table_offset", "0x10008", "multiple of the cluster size 0x10000", nil}, true},
	{"refcount table over the header", 0, []patch{{atRefTable, be64(0)}},
		wrong{"refcount_table_offset", "0x0", "above 0", nil}, false},
	{"refcount table that overflows", 0, []patch{{atRefTable, be64(1<<63 - 1<<16)}},
		wrong{"refcount_table_offset", "0x7fffffffffff0000", "below 64 PiB", nil}, true},
	{"snapshots above 65536", 0, []patch{{atSnapshots, be32(65537)}},
		wrong{"nb_snapshots", "65537", "65536", nil}, true},
	{"snapshot table unaligned", 0, []patch{{atSnapshots, be32(1)}, {atSnapOffset, be64(0x50001)}},
		wrong{"snapshots_offset", "0x50001", "multiple of the cluster size 0x10000", nil}, true},
	{"snapshot table that overflows", 0, []patch{{atSnapshots, be32(1)}, {atSnapOffset, be64(1<<64 - 1<<16)}},
		wrong{"snapshots_offset", "0xffffffffffff0000", "below 64 PiB", nil}, true},
	{"snapshot table over the header", 0, []patch{{atSnapshots, be32(1)}, {atSnapOffset, be64(0)}},
		wrong{"snapshots_offset", "0x0", "above 0", nil}, false},
	{"snapshots with an external data file", 0, []patch{{atSnapshots, be32(1)}, {atSnapOffset, be64(5 << 16)}, {atIncompatible, be64(layout.ExternalData)}},
		wrong{"nb_snapshots", "1", "0 with an external data file", nil}, false}, // qemu-img check finds it corrupt
	{"raw external data without a data file", 0, []patch{{atAutoclear, be64(layout.RawExternal)}},
		wrong{"autoclear_features", "0x2", "without an external data file", nil}, false}, // but to read from it
	{"raw external data with a backing file", 0, []patch{{atIncompatible, be64(layout.ExternalData)}, {atAutoclear, be64(layout.RawExternal)},
		{atBackingOffset, be64(0x1000)}, {atBackingSize, be32(4)}, {0x1000, []byte("base")}},
		wrong{"backing_file", `"base"`, "raw external data file", nil}, false}, // the specification forbids it
	{"backing name above 1023 bytes", 0, []patch{{atBackingOffset, be64(0x1000)}, {atBackingSize, be32(1024)}},
		wrong{"backing_file_size", "1024", "1023", nil}, true},
	{"backing name of 4 GiB", 2, []patch{{atBackingOffset, be64(0x1000)}, {atBackingSize, be32(1<<32 - 1)}},
		wrong{"backing_file_size", "4294967295", "1023", nil}, true},
	{"backing name outside the first cluster", 0, []patch{{atBackingOffset, be64(1<<16 + 1)}, {atBackingSize, be32(4)}},
		wrong{"backing_file_offset", "0x10001", "0x70 to 0x10000", nil}, true},
	{"backing name that reaches out of the first cluster", 0, []patch{{atBackingOffset, be64(1<<16 - 3)}, {atBackingSize, be32(4)}},
		wrong{"backing_file_size", "4", "at most the 3 bytes", nil}, true},
	{"backing name at an offset that overflows", 0, []patch{{atBackingOffset, be64(1<<64 - 2)}, {atBackingSize, be32(4)}},
		wrong{"backing_file_offset", "0xfffffffffffffffe", "0x70 to 0x10000", nil}, true},
	{"backing name inside the header", 0, []patch{{atBackingOffset, be64(24)}, {atBackingSize, be32(4)}},
		wrong{"backing_file_offset", "0x18", "0x70 to 0x10000", nil}, false},
	{"backing name with a zero byte", 0, []patch{{atBackingOffset, be64(0x1000)}, {atBackingSize, be32(9)}, {0x1000, []byte("base\x00.img")}},
		wrong{"backing_file", `"base\x00.img"`, "zero byte", nil}, false},
}

func TestHostileHeadersAreRefused(t *testing.T) {
	for _, c := range hostileHeaders {
		t.Run(c.name, func(t *testing.T) {
			h := newHeader(3)
			if c.version != 0 {
				h.Version = c.version
			}
			cluster := patched(encode(t, h), c.patches...)
			_, err := layout.ReadHeader(bytes.NewReader(cluster), int64(len(cluster)))
			c.want.check(t, err)
			parsed, err := layout.ParseHeader(cluster)
			c.want.check(t, err)
			if parsed != nil {
				t.Errorf("a header came with the error: %+v", parsed)
			}
		})
	}
}

func TestNoQcow2Header(t *testing.T) {
	whole := encode(t, newHeader(3))
	for name, b := range map[string][]byte{
		"empty file":             {},
		"magic alone":            whole[:4],
		"version 2 but one byte": whole[:71],
		"another magic":          patched(whole, patch{0, []byte("QFI\xfc")}),
		"zeroes":                 make([]byte, 4096),
	} {
		for how, read := range map[string]func() (*layout.Header, error){
			"read":  func() (*layout.Header, error) { return layout.ReadHeader(bytes.NewReader(b), int64(len(b))) },
			"parse": func() (*layout.Header, error) { return layout.ParseHeader(b) },
		} {
			if h, err := read(); !errors.Is(err, layout.ErrNotQcow2) || h != nil {
				t.Errorf("%s, %s: got %v, %v, want %v", how, name, h, err, layout.ErrNotQcow2)
			}
		}
	}
}

// TestHeaderOfAShortFile: what is beyond the end of the file reads as zeroes in
// QEMU, so that a file may end within its first cluster.
func TestHeaderOfAShortFile(t *testing.T) {
	h := newHeader(3)
	h.BackingFile = "base.img"
	h.SetExtension(layout.ExtensionBackingFormat, []byte("raw"))
	whole := encode(t, h)
	at := int(binary.BigEndian.Uint64(whole[atBackingOffset:]))
	end := at + len(h.BackingFile)
	if got := parse(t, whole[:end]); got.BackingFile != "base.img" || got.BackingFormat() != "raw" {
		t.Errorf("file that ends with the name: %+v", got)
	}
	wrong{"backing_file_size", "8", "at most the 7 bytes", nil}.check(t, second(layout.ParseHeader(whole[:end-1])))
	wrong{"backing_file_offset", "0x88", "0x70 to 0x80", nil}.check(t, second(layout.ParseHeader(whole[:at-8])))
	wrong{"file length", "103", "104", nil}.check(t, second(layout.ParseHeader(whole[:103])))
	wrong{"header_length", "112", "104", nil}.check(t, second(layout.ParseHeader(whole[:104])))
	v2 := encode(t, newHeader(2))
	if got := parse(t, v2[:layout.HeaderSizeV2]); got.Size != 1<<30 {
		t.Errorf("version 2 of 72 bytes: %+v", got)
	}
	// A file longer than it was said to be isn't read beyond that.
	if _, err := layout.ReadHeader(bytes.NewReader(whole), 100); !errors.Is(err, layout.ErrInvalid) {
		t.Errorf("100 bytes of a header: %v", err)
	}
}

func second[T any](_ T, err error) error { return err }

func TestReadHeaderTellsWhyItCantRead(t *testing.T) {
	whole := encode(t, newHeader(3))
	for _, from := range []int64{0, 4096} {
		_, err := layout.ReadHeader(broken{bytes.NewReader(whole), from}, int64(len(whole)))
		if !errors.Is(err, errBroken) || !strings.HasPrefix(err.Error(), "read header: ") {
			t.Errorf("unreadable from %d on: %v", from, err)
		}
	}
}

// TestUnknownFeaturesComeBeforeOtherErrors: they may be why the rest looks wrong.
func TestUnknownFeaturesComeBeforeOtherErrors(t *testing.T) {
	h := newHeader(3)
	names := layout.FeatureNames()
	copy(names[3*48:], append([]byte{0, 7}, "quantum clusters"...))
	h.SetExtension(layout.ExtensionFeatureNames, names)
	b := patched(encode(t, h),
		patch{atIncompatible, be64(1<<7 | 1<<9)},
		patch{atL1Offset, be64(1)},
		patch{atExtensions + 8 + len(names), append(be32(0x12345678), be32(1<<31)...)})
	_, err := layout.ParseHeader(b)
	wrong{"incompatible_features", "0x280", `"quantum clusters", bit 9`, layout.ErrUnsupported}.check(t, err)
	b = patched(b, patch{atIncompatible, be64(0)})
	wrong{"length of the 0x12345678 extension", "2147483648", "65024", nil}.check(t, second(layout.ParseHeader(b)))
}

// TestShortHeaderStaysShort: an old image whose header and name fill its first
// cluster can still be marked as dirty.
func TestShortHeaderStaysShort(t *testing.T) {
	h := newHeader(3)
	h.ClusterBits, h.Size, h.L1Entries = 9, 1<<20, 32
	cluster := encode(t, h)
	name := strings.Repeat("n", 512-104-8)
	cluster = patched(cluster, patch{atLength, be32(104)}, patch{atBackingOffset, be64(112)}, patch{atBackingSize, be32(400)}, patch{112, []byte(name)})
	got := parse(t, cluster)
	if got.BackingFile != name || got.Extra != nil {
		t.Fatalf("got %+v", got)
	}
	got.Incompatible |= layout.Dirty
	if again := encode(t, got); !bytes.Equal(again, patched(cluster, patch{atIncompatible, be64(layout.Dirty)})) {
		t.Error("more than the dirty bit changed")
	}
	got.BackingFile, got.Incompatible, got.CompressionType = "", layout.Compression, layout.Zstd
	if again := parse(t, encode(t, got)); again.CompressionType != layout.Zstd {
		t.Error("the compression type was lost")
	}
}

func TestEncodeRefusesWhatDoesntFit(t *testing.T) {
	h := newHeader(3)
	h.ClusterBits, h.Size, h.L1Entries = 9, 1<<20, 32
	h.BackingFile = strings.Repeat("n", 512-112-8)
	encode(t, h) // just fits
	h.BackingFile += "n"
	cluster := bytes.Repeat([]byte{7}, 512)
	want := wrong{"length of header, extensions and backing file name", "513", "512", nil}
	want.check(t, h.Encode(cluster))
	want.check(t, h.Encode(make([]byte, 4096))) // more than a cluster is of no use
	h.BackingFile = ""
	wrong{want.field, "120", "100", nil}.check(t, h.Encode(cluster[:100]))
	if !bytes.Equal(cluster, bytes.Repeat([]byte{7}, 512)) {
		t.Error("the cluster was written to")
	}
}

// TestEncodeRefusesInvalidHeaders: what can't be read isn't written.
func TestEncodeRefusesInvalidHeaders(t *testing.T) {
	for _, c := range []struct {
		name    string
		version uint32
		change  func(h *layout.Header)
		want    wrong
	}{
		{"version 0", 0, func(*layout.Header) {}, wrong{"version", "0", "2 and 3", layout.ErrUnsupported}},
		{"a long backing name", 3, func(h *layout.Header) { h.BackingFile = strings.Repeat("n", 1024) },
			wrong{"length of the backing_file", "1024", "1023", nil}},
		{"a size below 0", 3, func(h *layout.Header) { h.Size = -1 },
			wrong{"size", "18446744073709551615", "2251799813685248", nil}},
		{"cluster_bits of 99", 3, func(h *layout.Header) { h.ClusterBits = 99 },
			wrong{"cluster_bits", "99", "9 to 21", nil}},
		{"an incompatible feature", 2, func(h *layout.Header) { h.Incompatible = layout.Dirty },
			wrong{"incompatible_features", "1", "0 in version 2", nil}},
		{"a compatible feature", 2, func(h *layout.Header) { h.Compatible = layout.LazyRefcounts },
			wrong{"compatible_features", "1", "0 in version 2", nil}},
		{"an autoclear feature", 2, func(h *layout.Header) { h.Autoclear = layout.BitmapsValid },
			wrong{"autoclear_features", "1", "0 in version 2", nil}},
		{"another refcount width", 2, func(h *layout.Header) { h.RefcountOrder = 3 },
			wrong{"refcount_order", "3", "4 in version 2", nil}},
		{"a compression type", 2, func(h *layout.Header) { h.CompressionType = layout.Zstd },
			wrong{"compression_type", "1", "0 in version 2", nil}},
		{"fields that are unknown", 2, func(h *layout.Header) { h.Extra = make([]byte, 8) },
			wrong{"header_length", "80", "72 in version 2", nil}},
	} {
		h := newHeader(c.version)
		c.change(h)
		t.Run(c.name, func(t *testing.T) { c.want.check(t, h.Encode(make([]byte, 1<<16))) })
	}
}

func TestClearUnknownKeepsWhatIsKnown(t *testing.T) {
	h := newHeader(3)
	h.Autoclear = layout.BitmapsValid | layout.RawExternal
	if h.ClearUnknown() || h.Autoclear != 3 {
		t.Errorf("known features were cleared: %#x", h.Autoclear)
	}
	h.Autoclear |= 1<<2 | 1<<63
	if !h.ClearUnknown() || h.Autoclear != 3 {
		t.Errorf("unknown features were kept: %#x", h.Autoclear)
	}
}

func TestHasAsksForAllFeatures(t *testing.T) {
	h := newHeader(3)
	h.Incompatible = layout.Dirty | layout.Corrupt
	if !h.Has(layout.Dirty) || !h.Has(layout.Dirty|layout.Corrupt) || h.Has(layout.Dirty|layout.ExtendedL2) {
		t.Error("Has is wrong")
	}
}

func TestNamesOfEncryptionAndCompression(t *testing.T) {
	for got, want := range map[string]string{
		layout.Plain.String(): "none", layout.AES.String(): "aes", layout.LUKS.String(): "luks", layout.Encryption(9).String(): "method 9",
		layout.Zlib.String(): "zlib", layout.Zstd.String(): "zstd", layout.CompressionType(9).String(): "type 9",
	} {
		if got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}

// TestHeaderMemoryIsBounded fills the largest cluster with the most extensions.
func TestHeaderMemoryIsBounded(t *testing.T) {
	h := newHeader(3)
	h.ClusterBits, h.L1Offset, h.RefcountTableOffset = 21, 1<<21, 2<<21
	cluster := encode(t, h)
	for at := atExtensions; at < len(cluster); at += 8 {
		binary.BigEndian.PutUint32(cluster[at:], 0x12345678)
	}
	var err error
	if n := allocated(func() { h, err = layout.ReadHeader(bytes.NewReader(cluster), int64(len(cluster))) }); n > 64<<20 {
		t.Errorf("%d bytes were allocated", n)
	}
	if want := (1<<21 - atExtensions) / 8; err != nil || len(h.Extensions) != want {
		t.Errorf("got %v, want %d extensions", err, want)
	}
}
