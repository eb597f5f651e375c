package layout_test

import (
	"bytes"
	"errors"
	"fmt"
	"reflect"
	"strings"
	"testing"

	"platter/formats/qcow2/layout"
)

// Offsets of the fields of the bitmaps extension and of a directory entry.
const (
	atCount     = 0
	atReserved  = 4
	atDirSize   = 8
	atDirOffset = 16

	atTable       = 0
	atTableSize   = 8
	atFlags       = 12
	atType        = 16
	atGranularity = 17
	atNameSize    = 18
	atExtraSize   = 20
)

// withBitmaps is a header whose bitmap directory stands at off.
func withBitmaps(count uint32, size int64) (h *layout.Header, off int64) {
	h = newHeader(3)
	x := layout.BitmapsExtension{Count: count, DirectorySize: size, DirectoryOffset: 5 << 16}
	h.Autoclear = layout.BitmapsValid
	h.SetExtension(layout.ExtensionBitmaps, x.Encode())
	return h, x.DirectoryOffset
}

// newBitmap is a bitmap of the disk of newHeader.
func newBitmap(name string) layout.Bitmap {
	return layout.Bitmap{
		Name: name, TableOffset: 6 << 16, TableEntries: 1, Flags: layout.BitmapAuto,
		Type: layout.DirtyTracking, GranularityBits: 16,
	}
}

func TestBitmapRoundTrip(t *testing.T) {
	list := []layout.Bitmap{newBitmap("b"), newBitmap(strings.Repeat("n", layout.MaxBitmapName)), newBitmap("in use"), newBitmap("8 letter")}
	list[1].GranularityBits, list[1].TableEntries = 9, 4 // 2 Mi bits
	list[1].Extra, list[1].Flags = bytes.Repeat([]byte{7}, layout.MaxBitmapExtra), layout.BitmapExtraCompatible
	list[2].Flags, list[2].TableEntries = layout.BitmapInUse, 8192 // of a larger disk
	list[3].GranularityBits = 31
	prefix := []byte("kept")
	b := layout.AppendBitmaps(prefix, list)
	directory := b[len(prefix):]
	if !bytes.HasPrefix(b, prefix) || len(directory)%8 != 0 {
		t.Errorf("%d bytes, the first %q", len(b), b[:4])
	}
	h, off := withBitmaps(uint32(len(list)), int64(len(directory)))
	x, err := h.Bitmaps()
	if want := (layout.BitmapsExtension{Count: 4, DirectorySize: int64(len(directory)), DirectoryOffset: off}); err != nil || *x != want {
		t.Errorf("got %+v, %v, want %+v", x, err, want)
	}
	got, err := layout.ReadBitmaps(at{directory, off}, h)
	if err != nil || !reflect.DeepEqual(got, list) {
		t.Errorf("got %.500v, %v", got, err)
	}
	got, err = layout.ParseBitmaps(directory, h, len(list))
	if err != nil || !reflect.DeepEqual(got, list) {
		t.Errorf("parsed %.500v, %v", got, err)
	}
	none := newHeader(3)
	if x, err := none.Bitmaps(); x != nil || err != nil {
		t.Errorf("without bitmaps: %v, %v", x, err)
	}
	if got, err := layout.ReadBitmaps(broken{}, none); got != nil || err != nil {
		t.Errorf("without bitmaps: %v, %v", got, err)
	}
}

func TestHostileBitmapsExtensionsAreRefused(t *testing.T) {
	valid := (&layout.BitmapsExtension{Count: 1, DirectorySize: 32, DirectoryOffset: 5 << 16}).Encode()
	for _, c := range []struct {
		name string
		data []byte
		want wrong
	}{
		{"too short", valid[:23], wrong{"length of the bitmaps extension", "23", "24", nil}},
		{"too long", append(valid[:24:24], 0), wrong{"length of the bitmaps extension", "25", "24", nil}},
		{"reserved field", patched(valid, patch{atReserved, be32(1)}), wrong{"reserved field of the bitmaps extension", "1", "0", nil}},
		{"no bitmap", patched(valid, patch{atCount, be32(0)}), wrong{"nb_bitmaps", "0", "1 to 65535", nil}},
		{"bitmaps above 65535", patched(valid, patch{atCount, be32(65536)}), wrong{"nb_bitmaps", "65536", "1 to 65535", nil}},
		{"empty directory", patched(valid, patch{atDirSize, be64(0)}), wrong{"bitmap_directory_size", "0", "1 to 67107840", nil}},
		{"directory above 64 MiB", patched(valid, patch{atDirSize, be64(67107841)}), wrong{"bitmap_directory_size", "67107841", "67107840", nil}},
		{"directory beyond 63 bits", patched(valid, patch{atDirSize, be64(1<<64 - 8)}), wrong{"bitmap_directory_size", "18446744073709551608", "67107840", nil}},
		{"directory unaligned", patched(valid, patch{atDirOffset, be64(5<<16 + 8)}), wrong{"bitmap_directory_offset", "0x50008", "multiple of the cluster size 0x10000", nil}},
		{"directory over the header", patched(valid, patch{atDirOffset, be64(0)}), wrong{"bitmap_directory_offset", "0x0", "above 0", nil}},
		{"directory that overflows", patched(valid, patch{atDirOffset, be64(1<<64 - 1<<16)}), wrong{"bitmap_directory_offset", "0xffffffffffff0000", "below 64 PiB", nil}},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := newHeader(3)
			h.SetExtension(layout.ExtensionBitmaps, c.data)
			x, err := h.Bitmaps()
			c.want.check(t, err)
			if x != nil {
				t.Errorf("got %+v with the error", x)
			}
			list, err := layout.ReadBitmaps(broken{}, h)
			c.want.check(t, err)
			if list != nil {
				t.Errorf("got %+v with the error", list)
			}
			if err := h.Validate(); err != nil {
				t.Errorf("the image can't be opened: %v", err) // without the bitmaps, it can
			}
		})
	}
}

func TestHostileBitmapsAreRefused(t *testing.T) {
	directory := layout.AppendBitmaps(nil, []layout.Bitmap{newBitmap("one"), newBitmap("two")})
	for _, c := range []struct {
		name    string
		patches []patch // of the second entry
		want    wrong
	}{
		{"no name", []patch{{atNameSize, be16(0)}}, wrong{"name_size", "0", "1 to 1023", nil}},
		{"name above 1023 bytes", []patch{{atNameSize, be16(1024)}}, wrong{"name_size", "1024", "1 to 1023", nil}},
		{"name past the end", []patch{{atNameSize, be16(9)}}, wrong{"bitmap_directory_size", "64", "at least 72", nil}},
		{"extra data above 1024 bytes", []patch{{atExtraSize, be32(1025)}}, wrong{"extra_data_size", "1025", "1024", nil}},
		{"extra data of 4 GiB", []patch{{atExtraSize, be32(1<<32 - 1)}}, wrong{"extra_data_size", "4294967295", "1024", nil}},
		{"extra data past the end", []patch{{atExtraSize, be32(6)}}, wrong{"bitmap_directory_size", "64", "at least 72", nil}},
		{"reserved flag", []patch{{atFlags, be32(8)}}, wrong{"flags", "0x8", "reserved bits", nil}},
		{"type 0", []patch{{atType, []byte{0}}}, wrong{"type", "0", "1 (dirty tracking)", nil}},
		{"type 2", []patch{{atType, []byte{2}}}, wrong{"type", "2", "1 (dirty tracking)", nil}},
		{"granularity below 512 bytes", []patch{{atGranularity, []byte{8}}}, wrong{"granularity_bits", "8", "9 to 31", nil}},
		{"granularity above 2 GiB", []patch{{atGranularity, []byte{32}}}, wrong{"granularity_bits", "32", "9 to 31", nil}},
		{"granularity that shifts everything out", []patch{{atGranularity, []byte{255}}}, wrong{"granularity_bits", "255", "9 to 31", nil}},
		{"no table", []patch{{atTableSize, be32(0)}}, wrong{"bitmap_table_size", "0", "1 to 8192 (512 MiB)", nil}},
		{"bitmap above 512 MiB", []patch{{atTableSize, be32(8193)}, {atFlags, be32(1)}}, wrong{"bitmap_table_size", "8193", "1 to 8192 (512 MiB)", nil}},
		{"table of 32 GiB", []patch{{atTableSize, be32(1<<32 - 1)}}, wrong{"bitmap_table_size", "4294967295", "1 to 8192 (512 MiB)", nil}},
		{"table too large for the size", []patch{{atTableSize, be32(2)}}, wrong{"bitmap_table_size", "2", "1 for a disk of 1073741824 bytes", nil}},
		{"table too small for the size", []patch{{atGranularity, []byte{9}}}, wrong{"bitmap_table_size", "1", "4 for a disk of 1073741824 bytes", nil}},
		{"table unaligned", []patch{{atTable, be64(6<<16 + 512)}}, wrong{"bitmap_table_offset", "0x60200", "multiple of the cluster size 0x10000", nil}},
		{"table over the header", []patch{{atTable, be64(0)}}, wrong{"bitmap_table_offset", "0x0", "above 0", nil}},
		{"table that overflows", []patch{{atTable, be64(1<<64 - 1<<16)}}, wrong{"bitmap_table_offset", "0xffffffffffff0000", "below 64 PiB", nil}},
		{"two of one name", []patch{{24, []byte("one")}}, wrong{"name", `"one"`, "another bitmap's", nil}},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := append(bytes.Clone(directory[:32]), patched(directory[32:], c.patches...)...)
			h, off := withBitmaps(2, int64(len(b)))
			list, err := layout.ReadBitmaps(at{b, off}, h)
			c.want.check(t, err)
			if list != nil || err != nil && !strings.HasPrefix(err.Error(), "bitmap 1: ") {
				t.Errorf("got %v, %v", list, err)
			}
			c.want.check(t, second(layout.ParseBitmaps(b, h, 2)))
		})
	}
}

func TestBitmapDirectoryOfTheWrongSize(t *testing.T) {
	directory := layout.AppendBitmaps(nil, []layout.Bitmap{newBitmap("one"), newBitmap("two")})
	for _, c := range []struct {
		name  string
		count uint32
		size  int64 // as the extension has it
		file  int   // bytes of the directory that are in the file
		want  wrong
	}{
		{"more than the bitmaps", 1, 64, 64, wrong{"bitmap_directory_size", "64", "32, where the last of 1 bitmaps ends", nil}},
		{"less than the bitmaps", 3, 64, 64, wrong{"bitmap_directory_size", "64", "at least 88", nil}},
		{"cut off in an entry", 2, 60, 64, wrong{"bitmap_directory_size", "60", "at least 64", nil}},
		{"beyond the end of the file", 2, 64, 63, wrong{"bitmap_directory_size", "64", "within the file", nil}},
		{"second entry beyond the end of the file", 2, 64, 32, wrong{"bitmap_directory_size", "64", "within the file", nil}},
		{"all beyond the end of the file", 2, 64, 0, wrong{"bitmap_directory_size", "64", "within the file", nil}},
	} {
		t.Run(c.name, func(t *testing.T) {
			h, off := withBitmaps(c.count, c.size)
			c.want.check(t, second(layout.ReadBitmaps(at{directory[:c.file], off}, h)))
		})
	}
}

// distinct is a directory in which every entry has another name.
type distinct struct{ off int64 }

const distinctSize = 24 + 1024 // bytes of an entry

func (d distinct) ReadAt(p []byte, off int64) (n int, err error) {
	for n < len(p) {
		i := off + int64(n) - d.off
		m := newBitmap(fmt.Sprintf("%01000d", i/distinctSize))
		m.Extra = make([]byte, distinctSize-24-1000)
		n += copy(p[n:], layout.AppendBitmaps(nil, []layout.Bitmap{m})[i%distinctSize:])
	}
	return n, nil
}

// TestBitmapMemoryIsBounded reads the largest directory, and one that is a hole.
func TestBitmapMemoryIsBounded(t *testing.T) {
	const count = layout.MaxBitmapDirectory / distinctSize
	h, off := withBitmaps(count, count*distinctSize)
	b := make([]byte, count*distinctSize)
	if _, err := (distinct{0}).ReadAt(b, 0); err != nil {
		t.Fatal(err)
	}
	file := bytes.NewReader(b)
	var list []layout.Bitmap
	var err error
	n := allocated(func() { list, err = layout.ReadBitmaps(shifted{file, off}, h) })
	if err != nil || len(list) != count || n > 128<<20 {
		t.Errorf("%d bitmaps, %d bytes allocated, %v", len(list), n, err)
	}
	h, off = withBitmaps(1, layout.MaxBitmapDirectory)
	n = allocated(func() { _, err = layout.ReadBitmaps(repeated{make([]byte, 8), off}, h) })
	if wrong := (wrong{"name_size", "0", "1 to 1023", nil}); n > 64<<10 {
		t.Errorf("a hole took %d bytes of memory", n)
	} else {
		wrong.check(t, err)
	}
}

// shifted is a file that begins at an offset.
type shifted struct {
	r   *bytes.Reader
	off int64
}

func (s shifted) ReadAt(p []byte, off int64) (int, error) { return s.r.ReadAt(p, off-s.off) }

func TestReadBitmapsTellsWhyItCantRead(t *testing.T) {
	directory := layout.AppendBitmaps(nil, []layout.Bitmap{newBitmap("one")})
	h, off := withBitmaps(1, int64(len(directory)))
	_, err := layout.ReadBitmaps(broken{at{directory, off}, off}, h)
	if !errors.Is(err, errBroken) || errors.Is(err, layout.ErrInvalid) || !strings.Contains(err.Error(), "read bitmap directory: ") {
		t.Errorf("got %v", err)
	}
}

// TestBitmapsOfADiskOfSizeZero: they would have tables without entries, which
// QEMU doesn't take.
func TestBitmapsOfADiskOfSizeZero(t *testing.T) {
	h := newHeader(3)
	h.Size = 0
	m := newBitmap("b")
	wrong{"bitmap_table_size", "1", "0 for a disk of 0 bytes", nil}.check(t, m.Validate(h))
	m.TableEntries = 0
	wrong{"bitmap_table_size", "0", "1 to 8192", nil}.check(t, m.Validate(h))
}

func TestBitmapTableEntries(t *testing.T) {
	for _, c := range []struct {
		size        int64
		granularity uint8
		want        int64
	}{
		{0, 16, 0}, {1, 16, 1}, {1 << 35, 16, 1}, {1<<35 + 1, 16, 2}, {1 << 28, 9, 1}, {1<<28 + 1, 9, 2}, {1 << 51, 31, 2},
	} {
		if got := v3.BitmapTableEntries(c.size, c.granularity); got != c.want {
			t.Errorf("%d bytes, %d bits: got %d, want %d", c.size, c.granularity, got, c.want)
		}
	}
	for _, word := range []uint64{0, 1, 5 << 16, layout.MaxOffset - 1<<16} {
		if err := v3.CheckBitmapTable(word); err != nil {
			t.Errorf("%#x: %v", word, err)
		}
	}
	for word, want := range map[uint64]wrong{
		2:             {"bitmap table entry", "0x2", "reserved bits", nil},
		5<<16 | 1<<8:  {"bitmap table entry", "0x50100", "reserved bits", nil},
		5<<16 | 1:     {"bitmap table entry", "0x50001", "reserved bits", nil},
		5<<16 | 1<<56: {"bitmap table entry", "0x100000000050000", "reserved bits", nil},
		5<<16 | 1<<63: {"bitmap table entry", "0x8000000000050000", "reserved bits", nil},
		5<<16 | 1<<15: {"bitmap table entry", "0x58000", "multiple of the cluster size", nil},
	} {
		want.check(t, v3.CheckBitmapTable(word))
	}
}
