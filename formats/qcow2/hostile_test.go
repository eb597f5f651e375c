package qcow2_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"platter/formats/qcow2"
	"platter/formats/qcow2/layout"
)

// wrongEntry is an image of which one entry of a table can't be right.
type wrongEntry struct {
	name   string
	make   func(t *testing.T) *victim
	damage func(v *victim) (at int64) // changes a word and tells where it stands
	says   string                     // what it must be
}

// unseen is said of entries that are fine but for where they point to. An image
// that is opened for reading only follows them: nothing can be overwritten.
const unseen = "must not point to"

func small(t *testing.T) *victim    { return newVictim(t, "cluster_size=1K", 512<<10, "snapshot") }
func version2(t *testing.T) *victim { return newVictim(t, "compat=0.10,cluster_size=1K", 512<<10) }
func extended(t *testing.T) *victim {
	return newVictim(t, "extended_l2=on,cluster_size=16K", 1<<20, "snapshot")
}
func packed(t *testing.T) *victim {
	return newVictim(t, "cluster_size=4K", 512<<10, "compressed")
}
func withDataFile(t *testing.T) *victim {
	return newVictim(t, "cluster_size=4K", 512<<10, "data file")
}

// bad is the guest offset that the wrong entry maps. Others are right, whatever
// the cluster size.
const bad = 32 << 10

// entry makes a damage of the L2 entry for bad.
func entry(change func(v *victim, word uint64) uint64) func(v *victim) int64 {
	return func(v *victim) int64 {
		at := v.l2(bad)
		v.set(at, change(v, v.word(at)))
		return at
	}
}

// to makes a damage that has the L2 entry for bad name another host offset.
func to(host func(v *victim) int64) func(v *victim) int64 {
	return entry(func(v *victim, word uint64) uint64 { return word&^layout.OffsetMask | uint64(host(v)) })
}

// bits makes a damage that sets bits of the L2 entry for bad.
func bits(set uint64) func(v *victim) int64 {
	return entry(func(_ *victim, word uint64) uint64 { return word | set })
}

// bitmap makes a damage of an extended entry.
func bitmap(word func(uint64) uint64, bitmap uint64) func(v *victim) int64 {
	return func(v *victim) int64 {
		at := v.l2(bad)
		v.set(at, word(v.word(at)))
		v.set(at+8, bitmap)
		return at + 8
	}
}

func itself(word uint64) uint64 { return word }
func none(uint64) uint64        { return 0 }

// tables are all the kinds of clusters that hold metadata.
var tables = []struct {
	name string
	at   func(v *victim) int64
}{
	{"the L1 table", func(v *victim) int64 { return v.h.L1Offset }},
	{"an L2 table", func(v *victim) int64 { return v.table(0) }},
	{"the refcount table", func(v *victim) int64 { return v.h.RefcountTableOffset }},
	{"a refcount block", func(v *victim) int64 { return v.refcounts(0) }},
	{"the snapshot table", func(v *victim) int64 { return v.h.SnapshotsOffset }},
	{"a snapshot's L1 table", func(v *victim) int64 { return v.snapshot().L1Offset }},
}

func wrongL2Entries() []wrongEntry {
	list := []wrongEntry{
		{"low reserved bit", small, bits(1 << 3), "must not have reserved bits set"},
		{"high reserved bit", small, bits(1 << 57), "must not have reserved bits set"},
		{"unaligned", small, entry(func(_ *victim, w uint64) uint64 { return w + 512 }), "must name a multiple of the cluster size"},
		{"end of the file", small, to((*victim).end), "must name an offset below the end of the file"},
		{"far beyond the end of the file", small, to(func(*victim) int64 { return 1 << 50 }), "must name an offset below the end of the file"},
		{"far beyond the end of the file, shared", small, entry(func(*victim, uint64) uint64 { return 1 << 50 }), "must name an offset below the end of the file"},
		{"zero cluster in the L1 table", small, entry(func(v *victim, _ uint64) uint64 {
			return uint64(v.h.L1Offset) | layout.Copied | layout.ZeroFlag
		}), "must not point to metadata"},
		{"its own L2 table, shared", small, entry(func(v *victim, _ uint64) uint64 { return uint64(v.table(0)) }), "must not point to metadata"},
		{"zero flag in version 2", version2, bits(layout.ZeroFlag), "must not have the zero flag in version 2"},
		{"extended: zero flag", extended, bits(layout.ZeroFlag), "must not have reserved bits set"},
		{"extended: allocated and zero", extended, bitmap(itself, 1<<7|1<<39), "must not have a subcluster both allocated and zero"},
		{"extended: allocated without a host cluster", extended, bitmap(none, 1<<31), "must not have allocated subclusters without a host cluster"},
		{"extended: in the L1 table", extended, to(func(v *victim) int64 { return v.h.L1Offset }), "must not point to metadata"},
		{"extended: beyond the end of the file", extended, to((*victim).end), "must name an offset below the end of the file"},
		{"extended: compressed with a bitmap", extended, bitmap(func(uint64) uint64 { return layout.CompressedL2 | 0x10000 }, 1), "must be 0 with a compressed cluster"},
		{"compressed and copied", packed, bits(layout.Copied), "must not be both compressed and copied"},
		{"compressed, beyond the end of the file", packed, entry(func(v *victim, w uint64) uint64 {
			return w&^(1<<58-1) | uint64(v.end())
		}), "must name an offset below the end of the file"},
		{"compressed, beyond 64 PiB", packed, bits(1 << 57), "must name an offset below 64 PiB"},
		{"compressed, in a refcount block", packed, entry(func(v *victim, w uint64) uint64 {
			return w&^(1<<58-1) | uint64(v.refcounts(0)+100)
		}), "must not point to metadata"},
		{"compressed, up to the header's end", packed, entry(func(_ *victim, w uint64) uint64 {
			return w&^(1<<58-1) | 4095
		}), "must not point to metadata"},
		{"data file: elsewhere", withDataFile, to(func(*victim) int64 { return bad + 4096 }), fmt.Sprintf("must name the guest offset %#x", bad)},
		{"data file: at its start", withDataFile, to(func(*victim) int64 { return 0 }), fmt.Sprintf("must name the guest offset %#x", bad)},
		{"data file: compressed", withDataFile, entry(func(*victim, uint64) uint64 { return layout.CompressedL2 | 512 }), "must not be compressed"},
	}
	for _, table := range tables {
		list = append(list, wrongEntry{table.name, small, to(table.at), "must not point to metadata"})
	}
	return list
}

func TestWrongL2Entry(t *testing.T) {
	for _, c := range wrongL2Entries() {
		t.Run(c.name, func(t *testing.T) { c.run(t, "L2 entry", 0, bad+32<<10, 480<<10) })
	}
}

// wrongL1 makes a damage of the L1 entry for bad. With clusters of 1 KiB it maps
// the first 128 KiB.
func wrongL1(change func(v *victim, word uint64) uint64) func(v *victim) int64 {
	return func(v *victim) int64 {
		v.set(v.l1(0), change(v, v.word(v.l1(0))))
		return v.l1(0)
	}
}

func TestWrongL1Entry(t *testing.T) {
	set := func(bits uint64) func(v *victim) int64 {
		return wrongL1(func(_ *victim, w uint64) uint64 { return w | bits })
	}
	name := func(host func(v *victim) int64) func(v *victim) int64 {
		return wrongL1(func(v *victim, w uint64) uint64 { return w&^layout.OffsetMask | uint64(host(v)) })
	}
	list := []wrongEntry{
		{"low reserved bit", small, set(1 << 8), "must not have reserved bits set"},
		{"high reserved bit", small, set(1 << 61), "must not have reserved bits set"},
		{"unaligned", small, wrongL1(func(_ *victim, w uint64) uint64 { return w + 512 }), "must name a multiple of the cluster size"},
		{"end of the file", small, name((*victim).end), "must name an offset below the end of the file"},
		{"far beyond the end of the file", small, name(func(*victim) int64 { return 1 << 50 }), "must name an offset below the end of the file"},
		{"far beyond the end of the file, shared", small, wrongL1(func(*victim, uint64) uint64 { return 1 << 50 }), "must name an offset below the end of the file"},
		{"the header", small, name(func(*victim) int64 { return 0 }), "must name an L2 table"},
		{"reserved bit alone", small, wrongL1(func(*victim, uint64) uint64 { return 2 }), "must not have reserved bits set"},
	}
	for _, table := range tables {
		if table.name != "an L2 table" {
			list = append(list, wrongEntry{table.name, small, name(table.at), "must not point to other metadata"})
			list = append(list, wrongEntry{table.name + ", shared", small, wrongL1(func(v *victim, _ uint64) uint64 { return uint64(table.at(v)) }),
				"must not point to other metadata"})
		}
	}
	for _, c := range list {
		t.Run(c.name, func(t *testing.T) {
			v := c.make(t)
			if v.g.L2Bits()+v.g.ClusterBits != 17 {
				t.Fatal("an L1 entry maps another size")
			}
			c.run(t, "L1 entry", 200<<10, 480<<10)
		})
	}
}

// TestSharedL2Table: two entries that name one table would each keep it as they
// see it. The second of them is wrong.
func TestSharedL2Table(t *testing.T) {
	for name, damage := range map[string]func(v *victim){
		"both may write it": func(v *victim) { v.set(v.l1(3), v.word(v.l1(0))) },
		"neither may":       func(v *victim) { v.set(v.l1(3), uint64(v.table(0))); v.set(v.l1(0), uint64(v.table(0))) },
	} {
		t.Run(name, func(t *testing.T) {
			v := small(t)
			damage(v)
			log := captureLog(t)
			im, m := v.open(qcow2.Options{})
			if _, err := im.ReadAt(make([]byte, 10), 480<<10); !errors.Is(err, unix.EIO) {
				t.Errorf("%v, want EIO", err)
			}
			log.says(t, fmt.Sprintf("L1 entry is %#x, must not name the L2 table of entry 0", v.word(v.l1(3))))
			v.reads(t, im, 0, bad, 200<<10)
			if err := im.Close(); err != nil {
				t.Error(err)
			}
			v.same(m, true)
		})
	}
}

// TestWrongEntryIsKept: what can't be right stays on the disk as it is, for who
// repairs the image, when its neighbours change.
func TestWrongEntryIsKept(t *testing.T) {
	for name, word := range map[string]uint64{"reserved bit": 1 << 58, "metadata": 0x400 | layout.Copied} {
		t.Run(name, func(t *testing.T) {
			v := small(t)
			at := entry(func(*victim, uint64) uint64 { return word })(v)
			im, m := v.open(qcow2.Options{})
			if err := im.Zero(bad-4096, 8192); !errors.Is(err, unix.EIO) {
				t.Errorf("%v, want EIO", err)
			}
			if err := im.Close(); err != nil {
				t.Error(err)
			}
			before, after := v.word(at), m.content(t)
			v.data = after
			if v.word(at) != before || v.word(at-8) != layout.ZeroFlag {
				t.Errorf("the entry is %#x now, was %#x, behind %#x", v.word(at), before, v.word(at-8))
			}
		})
	}
}

// run wants every request that needs the entry to fail, and those that don't to
// go on; and the image, if it was opened for writing, to be marked as corrupt and
// otherwise not to be changed.
func (c *wrongEntry) run(t *testing.T, field string, others ...int64) {
	for _, op := range []struct {
		name string
		do   func(im *qcow2.Image) error
	}{
		{"read", func(im *qcow2.Image) error {
			_, err := im.ReadAt(make([]byte, 100), bad+10)
			return err
		}},
		{"write", func(im *qcow2.Image) error {
			_, err := im.WriteAt(make([]byte, 100), bad+10)
			return err
		}},
		{"write of a cluster", func(im *qcow2.Image) error {
			_, err := im.WriteAt(make([]byte, 16<<10), bad)
			return err
		}},
		{"zero", func(im *qcow2.Image) error { return im.Zero(bad, 16<<10) }},
		{"zero a part", func(im *qcow2.Image) error { return im.Zero(bad+10, 100) }},
		{"discard", func(im *qcow2.Image) error { return discard(t, im, bad, 16<<10) }},
		{"compressed write", func(im *qcow2.Image) error {
			info, err := im.Info()
			if err != nil {
				return err
			}
			err = im.WriteCompressed(make([]byte, 1<<info.Header.ClusterBits), bad)
			if errors.Is(err, qcow2.ErrNoCompression) {
				return unix.EIO // neither is it written
			}
			return err
		}},
		{"map", func(im *qcow2.Image) error {
			_, err := im.Extents(nil, 0, im.Size(), 0)
			return err
		}},
	} {
		t.Run(op.name, func(t *testing.T) {
			v := c.make(t)
			at := c.damage(v)
			log := captureLog(t)
			if op.name == "read" || op.name == "map" {
				c.readOnly(t, v, op.do, others)
			}
			im, m := v.open(qcow2.Options{})
			if err := op.do(im); !errors.Is(err, unix.EIO) {
				t.Errorf("%v, want EIO", err)
			}
			v.reads(t, im, others...)
			if _, err := im.WriteAt([]byte{1}, others[0]); !errors.Is(err, unix.EIO) && !v.g.External {
				t.Errorf("a write to an image that is corrupt: %v, want EIO", err)
			}
			if err := im.Flush(); err != nil {
				t.Errorf("flush: %v", err)
			}
			v.reads(t, im, others...)
			if err := im.Close(); err != nil {
				t.Errorf("close: %v", err)
			}
			if op.name == "compressed write" {
				// Space for it was taken before the entry was seen.
				v.sameMetadata(m)
				return
			}
			v.same(m, v.g.Version >= 3)
			if at&15 == 8 && v.g.Extended {
				field = "subcluster bitmap"
			}
			log.says(t, "image=image", fmt.Sprintf("%s is %#x, %s", field, v.word(at), c.says), "platter check")
			if v.g.Version < 3 {
				return // it has no place for the corrupt bit
			}
			v.data = m.content(t)
			if err := v.refused(qcow2.Options{}); !errors.Is(err, qcow2.ErrCorrupt) {
				t.Errorf("opened for writing again: %v", err)
			}
			c.readOnly(t, v, op.do, others)
		})
	}
}

// readOnly is run for an image that is opened for reading only.
func (c *wrongEntry) readOnly(t *testing.T, v *victim, do func(*qcow2.Image) error, others []int64) {
	t.Helper()
	im, m := v.open(qcow2.Options{ReadOnly: true})
	if err := do(im); !errors.Is(err, unix.EIO) && !errors.Is(err, unix.EPERM) && !strings.HasPrefix(c.says, unseen) {
		t.Errorf("read-only: %v, want EIO", err)
	}
	v.reads(t, im, others...)
	if err := im.Close(); err != nil {
		t.Error(err)
	}
	v.same(m, false)
}

// reads wants the image to read as it did before it was damaged, at some offsets.
func (v *victim) reads(t testing.TB, im *qcow2.Image, offs ...int64) {
	t.Helper()
	for _, off := range offs {
		got := make([]byte, 1000)
		if _, err := im.ReadAt(got, off); err != nil {
			t.Errorf("read at %#x: %v", off, err)
			continue
		}
		sameBytes(t, fmt.Sprintf("the disk at %#x", off), got, v.disk[off:off+1000])
	}
}
