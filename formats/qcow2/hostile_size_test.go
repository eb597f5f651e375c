package qcow2_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"

	"platter/formats"
	"platter/formats/qcow2"
	"platter/formats/qcow2/layout"
)

// TestDiskSizes opens images whose size isn't what programs make.
func TestDiskSizes(t *testing.T) {
	for _, c := range []struct {
		name   string
		change func(v *victim)
		size   int64
	}{
		{"no multiple of a sector", func(v *victim) { v.set(24, 512<<10-300) }, 512<<10 - 512},
		{"less than a sector", func(v *victim) { v.set(24, 300) }, 0},
		{"one sector", func(v *victim) { v.set(24, 512) }, 512},
		{"nothing", func(v *victim) { v.set(24, 0) }, 0},
		{"nothing, and no L1 table", func(v *victim) {
			v.set(24, 0)
			v.set32(36, 0)
			v.set(40, 1<<63-1) // means nothing then
		}, 0},
		{"an L1 table that is larger than needed", func(v *victim) { v.set32(36, 128) }, 512 << 10},
		{"an L1 table that is much larger than needed", func(v *victim) { v.set(24, 10<<10) }, 10 << 10},
	} {
		t.Run(c.name, func(t *testing.T) {
			v := newVictim(t, "cluster_size=1K", 512<<10)
			c.change(v)
			im, m := v.open(qcow2.Options{})
			if im.Size() != c.size {
				t.Fatalf("%d bytes, want %d", im.Size(), c.size)
			}
			want := bytes.Clone(v.disk[:c.size])
			sameBytes(t, "the disk", readAll(t, im), want)
			if _, err := im.ReadAt(make([]byte, 1), c.size); !errors.Is(err, io.EOF) {
				t.Errorf("read at the end: %v", err)
			}
			if _, err := im.WriteAt([]byte{1}, c.size); !errors.Is(err, unix.ENOSPC) {
				t.Errorf("write at the end: %v", err)
			}
			n := min(1500, c.size)
			for i := range want[c.size-n:] {
				want[c.size-n:][i] = 77
			}
			if _, err := im.WriteAt(want[c.size-n:], c.size-n); err != nil {
				t.Errorf("write: %v", err)
			}
			if c.size > 256<<10 {
				clear(want[c.size-200<<10 : c.size-4096])
				if err := im.Zero(c.size-200<<10, 200<<10-4096); err != nil {
					t.Errorf("zero: %v", err)
				}
			}
			if _, err := im.Extents(nil, 0, c.size, 0); err != nil {
				t.Errorf("map: %v", err)
			}
			sameBytes(t, "the disk after writing", readAll(t, im), want)
			if err := errors.Join(im.Flush(), im.Close()); err != nil {
				t.Error(err)
			}
			v.data = m.content(t)
			im, _ = v.open(qcow2.Options{ReadOnly: true})
			sameBytes(t, "the disk when opened again", readAll(t, im), want)
			if err := im.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestFileTooShort cuts images off.
func TestFileTooShort(t *testing.T) {
	make := func(t *testing.T) *victim { return newVictim(t, "cluster_size=4K", 4<<20) }
	for _, c := range []struct {
		name     string
		change   func(v *victim)
		readOnly bool // can be read all the same
		kind     error
		says     []string
	}{
		{"nothing", func(v *victim) { v.data = nil }, false, layout.ErrNotQcow2, []string{"not a qcow2 image"}},
		{"in the header", func(v *victim) { v.data = v.data[:71] }, false, layout.ErrNotQcow2, []string{"not a qcow2 image"}},
		{"in what version 3 added", func(v *victim) { v.data = v.data[:103] }, false, layout.ErrInvalid, []string{"file length is 103, must be at least 104"}},
		{"before the L1 table", func(v *victim) { v.data = v.data[:v.h.L1Offset] }, false, layout.ErrInvalid,
			[]string{"l1_table_offset is 0x3000, must lie within the file with all 2 entries"}},
		{"in the L1 table", func(v *victim) { v.data = v.data[:v.h.L1Offset+8] }, false, layout.ErrInvalid, []string{"l1_table_offset is 0x3000, must lie within the file"}},
		{"L1 table far behind", func(v *victim) { v.set(40, 1<<55) }, false, layout.ErrInvalid, []string{"l1_table_offset is 0x80000000000000, must lie within the file"}},
		{"refcount table far behind", func(v *victim) { v.set(48, 1<<55) }, true, layout.ErrInvalid,
			[]string{"refcount_table_offset is 0x80000000000000, must lie within the file with all 1 clusters"}},
		{"refcount table partly", func(v *victim) { v.set(48, uint64(v.end()-4096)); v.set32(56, 2) }, true, layout.ErrInvalid,
			[]string{"refcount_table_offset is", "must lie within the file with all 2 clusters"}},
		{"snapshot table", func(v *victim) { v.set32(60, 1); v.set(64, 1<<50) }, true, layout.ErrInvalid, []string{"snapshot 0: end of the entry", "must lie within the file"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			v := make(t)
			c.change(v)
			refusal(t, v.refused(qcow2.Options{}), c.kind, c.says...)
			if !c.readOnly {
				refusal(t, v.refused(qcow2.Options{ReadOnly: true}), c.kind, c.says...)
				return
			}
			im, m := v.open(qcow2.Options{ReadOnly: true})
			sameBytes(t, "read-only", readAll(t, im), v.disk)
			if err := im.Close(); err != nil {
				t.Error(err)
			}
			v.same(m, false)
		})
	}
}

// TestOverlappingTables: what is written at two places must not be one.
func TestOverlappingTables(t *testing.T) {
	for _, c := range []struct {
		name   string
		change func(v *victim)
		says   string
	}{
		{"refcount table in the L1 table", func(v *victim) { v.set(48, uint64(v.h.L1Offset)) }, "refcount_table_offset"},
		{"L1 table in the refcount table", func(v *victim) { v.set(40, uint64(v.h.RefcountTableOffset)) }, "l1_table_offset"},
		{"snapshot table in the L1 table", func(v *victim) { v.set(40, uint64(v.h.SnapshotsOffset)) }, "snapshots_offset"},
		{"L1 table that reaches into the refcount table", func(v *victim) {
			v.set(40, 1024)
			v.set(48, 2048)
			v.set32(36, 129)
		}, "refcount_table_offset is 0x800, must not lie within what is at l1_table_offset"},
		{"a snapshot's L1 table", func(v *victim) { v.set(40, uint64(v.snapshot().L1Offset)) }, "l1_table_offset of snapshot 0"},
	} {
		t.Run(c.name, func(t *testing.T) {
			v := small(t)
			c.change(v)
			refusal(t, v.refused(qcow2.Options{}), layout.ErrInvalid, c.says, "must not lie within", "platter check")
			im, m := v.open(qcow2.Options{ReadOnly: true})
			_, _ = im.ReadAt(make([]byte, im.Size()), 0) // whatever it is
			if err := im.Close(); err != nil {
				t.Error(err)
			}
			v.same(m, false)
		})
	}
}

// TestLastClusterCutOff: behind the end of the file are zeroes, and what is
// written there is read again.
func TestLastClusterCutOff(t *testing.T) {
	v := newVictim(t, "cluster_size=4K", 512<<10)
	last := v.end() - 4096
	off := int64(-1)
	for guest := int64(0); guest < 512<<10; guest += 4096 {
		if layout.EntryOffset(v.word(v.l2(guest))) == last {
			off = guest
		}
	}
	if off < 0 {
		t.Fatal("the file ends with no data")
	}
	v.data = v.data[:last+1000]
	clear(v.disk[off+1000 : off+4096])
	im, m := v.open(qcow2.Options{ReadOnly: true})
	sameBytes(t, "read-only", readAll(t, im), v.disk)
	if err := im.Close(); err != nil {
		t.Error(err)
	}
	v.same(m, false)

	im, _ = v.open(qcow2.Options{})
	copy(v.disk[off+2000:], "there again")
	if _, err := im.WriteAt([]byte("there again"), off+2000); err != nil {
		t.Error(err)
	}
	sameBytes(t, "after writing", readAll(t, im), v.disk)
	if err := im.Close(); err != nil {
		t.Error(err)
	}
}

// TestSnapshotBomb: a small file that claims to have large tables takes no more
// memory than its own length allows.
func TestSnapshotBomb(t *testing.T) {
	v := newVictim(t, "cluster_size=512", 64<<10)
	list := make([]layout.Snapshot, 2000)
	for i := range list {
		list[i] = layout.Snapshot{L1Offset: 1<<40 + int64(i)<<26, L1Entries: layout.MaxL1Bytes / 8, Size: 512, ID: fmt.Sprint(i)}
	}
	v.set32(60, uint32(len(list)))
	v.set(64, uint64(v.end()))
	v.data = layout.AppendSnapshots(v.data, list)
	allocated := allocates(func() {
		im, _ := v.open(qcow2.Options{})
		v.reads(t, im, 0)
		if err := im.Close(); err != nil {
			t.Error(err)
		}
	})
	if allocated > 64<<20 {
		t.Errorf("%d MiB for a file of %d KiB", allocated>>20, v.end()>>10)
	}
}

// allocates is how many bytes of Go's heap f takes, given back or not.
func allocates(f func()) uint64 {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	f()
	runtime.ReadMemStats(&after)
	return after.TotalAlloc - before.TotalAlloc
}

// TestLargestTables: the largest L1 and refcount tables that there can be, most of
// them holes of the file, take memory for their entries and little more.
func TestLargestTables(t *testing.T) {
	v := newVictim(t, "cluster_size=512", 64<<10)
	v.set32(36, layout.MaxL1Bytes/8)
	v.set(40, 16<<20)
	v.set(48, 64<<20)
	v.set32(56, layout.MaxRefcountTableBytes/512)
	path := filepath.Join(t.TempDir(), "image")
	writeFile(t, path, v.data)
	if err := os.Truncate(path, 128<<20); err != nil {
		t.Fatal(err)
	}
	for readOnly, most := range map[bool]uint64{true: 128 << 20, false: 256 << 20} {
		allocated := allocates(func() {
			im := open(t, path, formats.Options{ReadOnly: readOnly})
			if _, err := im.ReadAt(make([]byte, 512), 0); err != nil {
				t.Error(err)
			}
			if err := im.Close(); err != nil {
				t.Error(err)
			}
		})
		if allocated > most {
			t.Errorf("read-only %v: %d MiB, more than %d MiB", readOnly, allocated>>20, most>>20)
		}
	}
}
