package layout_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"reflect"
	"strings"
	"testing"

	"platter/formats/qcow2/layout"
)

// Offsets of the fields of a snapshot table entry.
const (
	atSnapL1     = 0
	atSnapL1Size = 8
	atSnapID     = 12
	atSnapName   = 14
	atSnapExtra  = 36
	atSnapState  = 40
	atSnapSize   = 48
)

// withSnapshots is a header with n snapshots, and where their table stands.
func withSnapshots(n int) (h *layout.Header, off int64) {
	h = newHeader(3)
	h.Snapshots, h.SnapshotsOffset = uint32(n), 5<<16
	return h, h.SnapshotsOffset
}

// newSnapshot is a snapshot of the disk of newHeader.
func newSnapshot(id, name string) layout.Snapshot {
	return layout.Snapshot{
		ID: id, Name: name, L1Offset: 4 << 16, L1Entries: 2, Seconds: 1700000000, Nanoseconds: 999999999,
		VMClock: 12345678901, Size: 1 << 30, ICount: layout.NoICount,
	}
}

func TestSnapshotRoundTrip(t *testing.T) {
	list := []layout.Snapshot{newSnapshot("1", "first"), newSnapshot("", ""), newSnapshot("3", "third"), newSnapshot("4", "fourth")}
	list[1].Size, list[1].L1Entries, list[1].L1Offset = 0, 0, 0
	list[2].VMState, list[2].L1Entries, list[2].ICount = 1<<40, 4096, 0
	list[2].Extra = bytes.Repeat([]byte{9}, layout.MaxSnapshotExtra-24)
	list[3].VMState, list[3].ID, list[3].Name = 1<<32-1, strings.Repeat("i", 65535), strings.Repeat("n", 65535)
	h, off := withSnapshots(len(list))
	prefix := []byte("kept")
	b := layout.AppendSnapshots(prefix, list)
	if !bytes.HasPrefix(b, prefix) || (len(b)-len(prefix))%8 != 0 {
		t.Errorf("%d bytes, the first %q", len(b), b[:4])
	}
	table := b[len(prefix):]
	got, size, err := layout.ReadSnapshotTable(at{table, off}, h)
	if err != nil || !reflect.DeepEqual(got, list) {
		t.Errorf("got %.500v, %v", got, err)
	}
	if end := int64(len(table)); size > end || size <= end-8 {
		t.Errorf("the table takes %d bytes, want %d without padding", size, end)
	}
	same, err := layout.ReadSnapshots(at{table, off}, h)
	if err != nil || !reflect.DeepEqual(same, list) {
		t.Errorf("ReadSnapshots: %v", err)
	}
	if got, size, err := layout.ReadSnapshotTable(broken{}, newHeader(3)); got != nil || size != 0 || err != nil {
		t.Errorf("without snapshots: %v, %d, %v", got, size, err)
	}
}

// TestSnapshotTableEndsWithTheFile: QEMU doesn't pad the last entry, and the file
// ends with it.
func TestSnapshotTableEndsWithTheFile(t *testing.T) {
	h, off := withSnapshots(2)
	table := layout.AppendSnapshots(nil, []layout.Snapshot{newSnapshot("1", "one"), newSnapshot("2", "two")})
	end := 72 + 64 + 4
	list, size, err := layout.ReadSnapshotTable(at{table[:end], off}, h)
	if err != nil || size != int64(end) || list[1].Name != "two" {
		t.Errorf("got %v, %d, %v, want two snapshots in %d bytes", list, size, err, end)
	}
	for short, entry := range map[int]int{0: 0, 39: 0, 40: 0, 67: 0, 68: 1, 71: 1, 72: 1, 100: 1, end - 1: 1} {
		_, err := layout.ReadSnapshots(at{table[:short], off}, h)
		var field *layout.FieldError
		if !errors.As(err, &field) || !errors.Is(err, layout.ErrInvalid) || !strings.Contains(err.Error(), "must lie within the file") {
			t.Errorf("%d bytes of %d: %v", short, end, err)
		}
		if want := fmt.Sprintf("snapshot %d: ", entry); !strings.HasPrefix(err.Error(), want) {
			t.Errorf("%d bytes: %v, want %s", short, err, want)
		}
	}
}

// TestShortExtraData: version 2 may have none, QEMU before 5.2 wrote 16 bytes, and
// a size of VM state of 32 bits counts only without the one of 64.
func TestShortExtraData(t *testing.T) {
	for _, c := range []struct {
		extra  int
		want   layout.Snapshot
		entire int
	}{
		{0, layout.Snapshot{VMState: 7, Size: 1 << 30, ICount: layout.NoICount}, 46},
		{7, layout.Snapshot{VMState: 7, Size: 1 << 30, ICount: layout.NoICount}, 53},
		{8, layout.Snapshot{VMState: 1 << 33, Size: 1 << 30, ICount: layout.NoICount}, 54},
		{16, layout.Snapshot{VMState: 1 << 33, Size: 1 << 20, ICount: layout.NoICount}, 62},
		{23, layout.Snapshot{VMState: 1 << 33, Size: 1 << 20, ICount: layout.NoICount}, 69},
		{24, layout.Snapshot{VMState: 1 << 33, Size: 1 << 20, ICount: 5}, 70},
		{26, layout.Snapshot{VMState: 1 << 33, Size: 1 << 20, ICount: 5, Extra: []byte("xy")}, 72},
	} {
		data := bytes.Join([][]byte{be64(1 << 33), be64(1 << 20), be64(5), []byte("xy")}, nil)[:c.extra]
		entry := bytes.Join([][]byte{be64(4 << 16), be32(2), be16(2), be16(4), be32(1), be32(2), be64(3), be32(7), be32(uint32(c.extra)), data, []byte("idname")}, nil)
		c.want.ID, c.want.Name, c.want.L1Offset, c.want.L1Entries = "id", "name", 4<<16, 2
		c.want.Seconds, c.want.Nanoseconds, c.want.VMClock = 1, 2, 3
		h, off := withSnapshots(1)
		h.Version = 2
		list, size, err := layout.ReadSnapshotTable(at{entry, off}, h)
		if err != nil || size != int64(c.entire) || !reflect.DeepEqual(list, []layout.Snapshot{c.want}) {
			t.Errorf("%d bytes: got %+v, %d, %v, want %+v", c.extra, list, size, err, c.want)
		}
	}
}

// TestLargeVMStateIsHiddenFromOldPrograms, which would take it for a smaller one.
func TestLargeVMStateIsHiddenFromOldPrograms(t *testing.T) {
	for state, want := range map[int64]uint32{0: 0, 1<<32 - 1: 1<<32 - 1, 1 << 32: 0, 1<<63 - 1: 0} {
		s := newSnapshot("1", "n")
		s.VMState = state
		if b := layout.AppendSnapshots(nil, []layout.Snapshot{s}); !bytes.Equal(b[32:36], be32(want)) || !bytes.Equal(b[40:48], be64(uint64(state))) {
			t.Errorf("%d: got % x and % x", state, b[32:36], b[40:48])
		}
	}
}

func TestHostileSnapshotsAreRefused(t *testing.T) {
	table := layout.AppendSnapshots(nil, []layout.Snapshot{newSnapshot("1", "one"), newSnapshot("2", "two")})
	for _, c := range []struct {
		name    string
		patches []patch // of the second entry
		want    wrong
	}{
		{"extra data above 1024", []patch{{atSnapExtra, be32(1025)}}, wrong{"extra_data_size", "1025", "1024", nil}},
		{"extra data of 4 GiB", []patch{{atSnapExtra, be32(1<<32 - 1)}}, wrong{"extra_data_size", "4294967295", "1024", nil}},
		{"ID past the end", []patch{{atSnapID, be16(65535)}}, wrong{"end of the entry", "0x1008a", "within the file", nil}},
		{"name past the end", []patch{{atSnapName, be16(65535)}}, wrong{"end of the entry", "0x10088", "within the file", nil}},
		{"L1 table above 32 MiB", []patch{{atSnapL1Size, be32(4194305)}}, wrong{"l1_size", "4194305", "4194304 (32 MiB)", nil}},
		{"l1_size too small for the size", []patch{{atSnapL1Size, be32(1)}}, wrong{"l1_size", "1", "at least 2 for a disk of 1073741824 bytes", nil}},
		{"L1 table unaligned", []patch{{atSnapL1, be64(4<<16 + 8)}}, wrong{"l1_table_offset", "0x40008", "multiple of the cluster size 0x10000", nil}},
		{"L1 table over the header", []patch{{atSnapL1, be64(0)}}, wrong{"l1_table_offset", "0x0", "above 0", nil}},
		{"L1 table that overflows", []patch{{atSnapL1, be64(1<<64 - 1<<16)}}, wrong{"l1_table_offset", "0xffffffffffff0000", "below 64 PiB", nil}},
		{"size that no L1 table can map", []patch{{atSnapSize, be64(1<<51 + 1)}}, wrong{"disk size", "2251799813685249", "2251799813685248", nil}},
		{"size beyond 63 bits", []patch{{atSnapSize, be64(1 << 63)}}, wrong{"disk size", "9223372036854775808", "2251799813685248", nil}},
		{"VM state beyond 63 bits", []patch{{atSnapState, be64(1 << 63)}}, wrong{"VM state size", "9223372036854775808", "9223372036854775807", nil}},
	} {
		t.Run(c.name, func(t *testing.T) {
			h, off := withSnapshots(2)
			second := patched(table[72:], c.patches...)
			list, size, err := layout.ReadSnapshotTable(at{append(bytes.Clone(table[:72]), second...), off}, h)
			c.want.check(t, err)
			if list != nil || size != 0 || err != nil && !strings.HasPrefix(err.Error(), "snapshot 1: ") {
				t.Errorf("got %v, %d, %v", list, size, err)
			}
		})
	}
}

func TestSnapshotsThatCantBeWritten(t *testing.T) {
	for _, c := range []struct {
		name   string
		change func(s *layout.Snapshot)
		want   wrong
	}{
		{"long ID", func(s *layout.Snapshot) { s.ID = strings.Repeat("i", 65536) }, wrong{"length of the ID", "65536", "65535", nil}},
		{"long name", func(s *layout.Snapshot) { s.Name = strings.Repeat("n", 65536) }, wrong{"length of the name", "65536", "65535", nil}},
		{"much extra data", func(s *layout.Snapshot) { s.Extra = make([]byte, 1001) }, wrong{"extra_data_size", "1025", "1024", nil}},
	} {
		s := newSnapshot("1", "one")
		if err := s.Validate(v3); err != nil {
			t.Fatal(err)
		}
		c.change(&s)
		t.Run(c.name, func(t *testing.T) { c.want.check(t, s.Validate(v3)) })
	}
}

// TestSnapshotTableAbove64MiB reads a table of entries that are as large as they
// can be, of which a sparse file may have as many as it likes: it ends at 64 MiB,
// and the memory is bounded.
func TestSnapshotTableAbove64MiB(t *testing.T) {
	large := newSnapshot(strings.Repeat("i", 65535), strings.Repeat("n", 65535))
	large.Extra = make([]byte, layout.MaxSnapshotExtra-24)
	entry := layout.AppendSnapshots(nil, []layout.Snapshot{large})
	h, off := withSnapshots(layout.MaxSnapshots)
	var err error
	if n := allocated(func() { _, err = layout.ReadSnapshots(repeated{entry, off}, h) }); n > 128<<20 {
		t.Errorf("%d bytes were allocated", n)
	}
	fits := layout.MaxSnapshotTableBytes / len(entry)
	next := fmt.Sprintf("%#x", fits*len(entry)+40+1024+2*65535)
	wrong{"end of the entry", next, "64 MiB", nil}.check(t, err)
	if h.Snapshots = uint32(fits); second(layout.ReadSnapshots(repeated{entry, off}, h)) != nil {
		t.Errorf("%d entries don't fit", fits)
	}
}

// TestManySmallSnapshots reads as many as there may be.
func TestManySmallSnapshots(t *testing.T) {
	entry := layout.AppendSnapshots(nil, []layout.Snapshot{newSnapshot("1", "")})
	h, off := withSnapshots(layout.MaxSnapshots)
	var list []layout.Snapshot
	var err error
	n := allocated(func() { list, err = layout.ReadSnapshots(repeated{entry, off}, h) })
	if err != nil || len(list) != layout.MaxSnapshots || n > 128<<20 {
		t.Errorf("%d snapshots, %d bytes allocated, %v", len(list), n, err)
	}
}

func TestReadSnapshotsTellsWhyItCantRead(t *testing.T) {
	h, off := withSnapshots(100)
	entry := layout.AppendSnapshots(nil, []layout.Snapshot{newSnapshot("1", "one")})
	for _, from := range []int64{0, 4096} {
		_, err := layout.ReadSnapshots(broken{repeated{entry, off}, off + from}, h)
		if !errors.Is(err, errBroken) || errors.Is(err, layout.ErrInvalid) || !strings.Contains(err.Error(), "read snapshot table: ") {
			t.Errorf("unreadable from %d on: %v", from, err)
		}
	}
	if _, err := layout.ReadSnapshots(broken{from: 0, ReaderAt: io.NewSectionReader(nil, 0, 0)}, h); !errors.Is(err, errBroken) {
		t.Errorf("unreadable: %v", err)
	}
}
