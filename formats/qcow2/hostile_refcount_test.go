package qcow2_test

import (
	"bytes"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"platter/formats"
	"platter/formats/qcow2"
	"platter/formats/qcow2/layout"
)

// hole is the guest offset of a hole in a victim of 512 KiB.
const hole = 256 << 10

// corrupted closes an image that turned out to be corrupt. It wants every write
// to fail, what the guest had to be readable still, and tables to be what they
// were.
func (v *victim) corrupted(im *qcow2.Image, m *memory, reads ...int64) {
	v.t.Helper()
	for what, err := range map[string]error{
		"write in place":       second(im.WriteAt([]byte{1}, 100)),
		"write to new cluster": second(im.WriteAt([]byte{1}, hole+64<<10)),
		"zero":                 im.Zero(0, 4096),
		"discard":              discard(v.t, im, 0, 64<<10),
		"compressed write":     im.WriteCompressed(make([]byte, v.g.ClusterSize()), 0),
	} {
		if !errors.Is(err, unix.EIO) {
			v.t.Errorf("%s after that: %v, want EIO", what, err)
		}
	}
	if err := im.Flush(); err != nil && !errors.Is(err, unix.EIO) {
		v.t.Errorf("flush: %v", err)
	}
	v.reads(v.t, im, append(reads, 0, 100<<10)...)
	if err := im.Close(); err != nil && !errors.Is(err, unix.EIO) {
		v.t.Errorf("close: %v", err)
	}
	v.sameMetadata(m)
	if m.content(v.t)[79]&byte(layout.Corrupt) == 0 {
		v.t.Error("the corrupt bit is not set")
	}
}

func second(_ int, err error) error { return err }

// TestWrongRefcountTableEntry: without refcounts nothing can be allocated nor
// freed, but what is mapped can be read and overwritten.
func TestWrongRefcountTableEntry(t *testing.T) {
	type wrong struct {
		name string
		word func(v *victim) uint64
		says string
	}
	list := []wrong{
		{"reserved bit", func(v *victim) uint64 { return uint64(v.refcounts(0)) | 1 }, "must not have reserved bits set"},
		{"unaligned", func(v *victim) uint64 { return uint64(v.refcounts(0)) + 512 }, "must be a multiple of the cluster size below 64 PiB"},
		{"beyond 64 PiB", func(v *victim) uint64 { return 1 << 60 }, "must be a multiple of the cluster size below 64 PiB"},
		{"negative", func(v *victim) uint64 { return 1<<64 - 1<<10 }, "must be a multiple of the cluster size below 64 PiB"},
		{"end of the file", func(v *victim) uint64 { return uint64(v.end()) }, "must name an offset below the end of the file"},
		{"far beyond the end of the file", func(v *victim) uint64 { return 1 << 50 }, "must name an offset below the end of the file"},
	}
	for _, table := range tables {
		at := table.at
		switch table.name {
		case "a refcount block":
			continue
		case "an L2 table":
			at = func(v *victim) int64 { return v.table(3) }
		}
		list = append(list, wrong{table.name, func(v *victim) uint64 { return uint64(at(v)) }, "must not point to other metadata"})
	}
	for _, c := range list {
		t.Run(c.name, func(t *testing.T) {
			for _, op := range []struct {
				name string
				do   func(im *qcow2.Image) error
			}{
				{"allocate", func(im *qcow2.Image) error {
					_, err := im.WriteAt([]byte{1}, hole+10)
					return err
				}},
				{"allocate for compressed data", func(im *qcow2.Image) error { return im.WriteCompressed(make([]byte, 1024), hole) }},
				{"free", func(im *qcow2.Image) error {
					if err := im.Zero(32<<10, 32<<10); err != nil {
						return fmt.Errorf("zero: %w", err) // by its entry alone
					}
					// The first flush makes that durable, the second tells that it was.
					return errors.Join(im.Flush(), im.Flush(), second(im.WriteAt([]byte{1}, 0)))
				}},
			} {
				t.Run(op.name, func(t *testing.T) {
					// Whose L2 tables are its own, and not the snapshot's.
					v := small(t)
					word := c.word(v)
					v.set(v.h.RefcountTableOffset, word)
					log := captureLog(t)
					im, m := v.open(qcow2.Options{})
					if _, err := im.WriteAt(v.disk[:100], 0); err != nil {
						t.Errorf("write in place: %v", err)
					}
					if err := op.do(im); !errors.Is(err, unix.EIO) {
						t.Errorf("%v, want EIO", err)
					}
					log.says(t, fmt.Sprintf("refcount table entry is %#x, %s", word, c.says))
					if op.name == "free" {
						// The entries that were changed are those of L2 table 0.
						copy(v.data[v.table(0):], m.content(t)[v.table(0):][:1024])
					}
					v.corrupted(im, m) // and what the fourth L2 table maps is lost if a refcount block is there, too
				})
			}
			v := small(t)
			v.set(v.h.RefcountTableOffset, c.word(v))
			im, m := v.open(qcow2.Options{ReadOnly: true})
			sameBytes(t, "read-only", readAll(t, im), v.disk)
			if err := im.Close(); err != nil {
				t.Error(err)
			}
			v.same(m, false)
		})
	}
}

// TestSharedRefcountBlock: two entries that name one block would each count for
// itself.
func TestSharedRefcountBlock(t *testing.T) {
	v := small(t)
	v.set(v.h.RefcountTableOffset+8, uint64(v.refcounts(0)))
	log := captureLog(t)
	im, m := v.open(qcow2.Options{})
	var failed error
	for off := int64(hole); off < 384<<10 && failed == nil; off += 1024 {
		_, failed = im.WriteAt([]byte{1}, off)
	}
	if failed == nil { // all went into the first block
		t.Fatal("the second block was not needed")
	}
	if !errors.Is(failed, unix.EIO) {
		t.Errorf("%v, want EIO", failed)
	}
	log.says(t, fmt.Sprintf("refcount table entry is %#x, must not name the refcount block of entry 0", v.refcounts(0)))
	if err := im.Flush(); err != nil {
		t.Errorf("flush: %v", err)
	}
	v.set(v.l1(2), m.l1(t, v, 2)) // a new table
	v.corrupted(im, m, 480<<10)
}

// l1 is an entry of the L1 table as the file has it now.
func (m *memory) l1(t testing.TB, v *victim, i int64) uint64 {
	t.Helper()
	now := *v
	now.data = m.content(t)
	return now.word(v.l1(i))
}

// TestRefcountOfMetadataTooLow: nobody gets a cluster that holds a table or the
// header, though its refcount says that it is free.
func TestRefcountOfMetadataTooLow(t *testing.T) {
	list := append(slices.Clone(tables), tables[0])
	list[len(tables)].name = "the header"
	list[len(tables)].at = func(*victim) int64 { return 0 }
	for _, table := range list {
		for name, write := range map[string]func(v *victim, im *qcow2.Image) error{
			"plain": func(_ *victim, im *qcow2.Image) error {
				return second(im.WriteAt(make([]byte, 64<<10), hole))
			},
			"copy on write": func(v *victim, im *qcow2.Image) error {
				return second(im.WriteAt([]byte{1}, 0)) // compressed, so that it must be written anew
			},
		} {
			t.Run(table.name+"/"+name, func(t *testing.T) {
				v := small(t)
				if name == "copy on write" {
					v = newVictim(t, "cluster_size=1K", 512<<10, "snapshot", "compressed")
				}
				at := table.at(v)
				v.setRefcount(at, 0)
				log := captureLog(t)
				im, m := v.open(qcow2.Options{})
				if err := write(v, im); !errors.Is(err, unix.EIO) {
					t.Errorf("%v, want EIO", err)
				}
				log.says(t, fmt.Sprintf("cluster %#x holds metadata but has a refcount of 0", at))
				v.corrupted(im, m, 480<<10)
			})
		}
	}
}

// TestRefcountOfDataTooLow: a cluster that is in use and has no reference turns
// out when it is freed.
func TestRefcountOfDataTooLow(t *testing.T) {
	for _, c := range []struct {
		name string
		free func(t *testing.T, im *qcow2.Image) error
	}{
		{"discard", func(t *testing.T, im *qcow2.Image) error { return discard(t, im, bad, 4096) }},
		{"zero", func(_ *testing.T, im *qcow2.Image) error { return im.Zero(bad, 4096) }},
		{"compressed write", func(_ *testing.T, im *qcow2.Image) error {
			// Into a new cluster: the old one is not to be handed out.
			return im.WriteCompressed(make([]byte, 4096), bad)
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			v := newVictim(t, "cluster_size=4K", 512<<10, "snapshot")
			host := layout.EntryOffset(v.word(v.l2(bad)))
			v.setRefcount(host, 0)
			log := captureLog(t)
			im, m := v.open(qcow2.Options{})
			if err := errors.Join(c.free(t, im), im.Flush(), im.Flush()); err != nil {
				t.Errorf("before it is noticed: %v", err)
			}
			log.says(t, fmt.Sprintf("cluster %#x is in use but has a refcount of 0", host))
			copy(v.data[v.l2(bad):], m.content(t)[v.l2(bad):][:8])
			v.corrupted(im, m, 480<<10)
		})
	}
}

// TestTableInPlaceOfData: a cluster that is in use and seems to be free becomes an
// L2 table. It isn't given away when the data that stood there is freed.
func TestTableInPlaceOfData(t *testing.T) {
	v := small(t)
	host := layout.EntryOffset(v.word(v.l2(bad)))
	v.setRefcount(host, 0)
	log := captureLog(t)
	im, m := v.open(qcow2.Options{})
	if _, err := im.ReadAt(make([]byte, 1), bad); err != nil {
		t.Fatal(err)
	}
	want := bytes.Repeat([]byte("a table maps this"), 100)
	if _, err := im.WriteAt(want, hole); err != nil {
		t.Fatal(err)
	}
	if err := im.Flush(); err != nil {
		t.Fatal(err)
	}
	if got := layout.EntryOffset(m.l1(t, v, 2)); got != host {
		t.Fatalf("the table is at %#x, not at %#x", got, host)
	}
	if err := errors.Join(im.Zero(bad, 1024), im.Flush(), im.Flush()); err != nil {
		t.Error(err)
	}
	log.says(t, fmt.Sprintf("L2 entry is %#x, where metadata is", v.word(v.l2(bad))))
	got := make([]byte, len(want))
	if _, err := im.ReadAt(got, hole); err != nil {
		t.Error(err)
	}
	sameBytes(t, "what the table maps", got, want)
	if err := im.Close(); err != nil {
		t.Error(err)
	}
	v.data = m.content(t)
	im, _ = v.open(qcow2.Options{ReadOnly: true})
	if _, err := im.ReadAt(got, hole); err != nil {
		t.Error(err)
	}
	sameBytes(t, "what the table maps, opened again", got, want)
	if err := im.Close(); err != nil {
		t.Error(err)
	}
	if v.data[79]&byte(layout.Corrupt) == 0 {
		t.Error("the corrupt bit is not set")
	}
}

// TestFreedTwice: two entries name one cluster, of which the second is freed when
// it has no reference left.
func TestFreedTwice(t *testing.T) {
	v := newVictim(t, "cluster_size=4K", 512<<10, "snapshot")
	v.set(v.l2(bad), v.word(v.l2(bad+8192)))
	log := captureLog(t)
	im, m := v.open(qcow2.Options{})
	if err := errors.Join(im.Zero(bad, 4096), im.Zero(bad+8192, 4096), im.Flush(), im.Flush()); err != nil {
		t.Error(err)
	}
	log.says(t, "is in use but has a refcount of 0")
	for _, off := range []int64{bad, bad + 8192} {
		copy(v.data[v.l2(off):], m.content(t)[v.l2(off):][:8])
	}
	v.corrupted(im, m, 480<<10)
}

// TestNewTablesAreMetadata: an entry that named a place where nothing was names a
// table, once that has come to stand there.
func TestNewTablesAreMetadata(t *testing.T) {
	for _, c := range []struct {
		name string
		at   func(v *victim, m *memory) int64
	}{
		{"L2 table", func(v *victim, m *memory) int64 { return layout.EntryOffset(m.l1(v.t, v, 2)) }},
		{"refcount block", func(v *victim, m *memory) int64 {
			now := *v
			now.data = m.content(v.t)
			return now.refcounts(1)
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			fill := func(im *qcow2.Image) {
				t.Helper()
				if _, err := im.WriteAt(make([]byte, 128<<10), hole); err != nil {
					t.Fatal(err)
				}
				if err := im.Flush(); err != nil {
					t.Fatal(err)
				}
			}
			// Where will it be?
			v := small(t)
			im, m := v.open(qcow2.Options{})
			fill(im)
			at := c.at(v, m)
			if err := im.Close(); err != nil {
				t.Fatal(err)
			}
			v.set(v.l2(480<<10), uint64(at)|layout.Copied)
			log := captureLog(t)
			im, m = v.open(qcow2.Options{})
			fill(im)
			if now := c.at(v, m); now != at {
				t.Fatalf("the new table is at %#x this time, not at %#x", now, at)
			}
			if _, err := im.WriteAt([]byte{1, 2, 3}, 480<<10); !errors.Is(err, unix.EIO) {
				t.Errorf("%v, want EIO", err)
			}
			log.says(t, "must not point to metadata")
			if err := im.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestFreedTablesAreNoMetadata fills an image so that the refcount table moves,
// whose old place gets data then, and reads entries again that name it.
func TestFreedTablesAreNoMetadata(t *testing.T) {
	rng := seeded(t)
	path := filepath.Join(t.TempDir(), "image")
	const size = 8 << 20
	qemuCreate(t, path, size, "cluster_size=512,refcount_bits=64")
	im := open(t, path, formats.Options{MetadataCache: 1}) // the least there can be
	want := make([]byte, size)
	for i := range want {
		want[i] = byte(rng.Uint32())
	}
	before, err := im.Info()
	if err != nil {
		t.Fatal(err)
	}
	// All L2 tables come first, lest one of them takes the place.
	const step = 32 << 10
	for off := int64(0); off < size; off += step {
		if _, err := im.WriteAt(want[off:off+512], off); err != nil {
			t.Fatal(err)
		}
	}
	for off := int64(0); off < size; off += step {
		if _, err := im.WriteAt(want[off:off+step], off); err != nil {
			t.Fatal(err)
		}
		if err := im.Flush(); err != nil {
			t.Fatal(err)
		}
	}
	after, err := im.Info()
	if err != nil {
		t.Fatal(err)
	}
	if before.Header.RefcountTableOffset == after.Header.RefcountTableOffset {
		t.Fatal("the refcount table has not moved")
	}
	sameBytes(t, "the disk", readAll(t, im), want)
	if _, err := im.WriteAt(want[:1000], 0); err != nil {
		t.Errorf("write: %v", err)
	}
	// Was it used again?
	again := false
	list, err := im.Extents(nil, 0, size, 0)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range list {
		again = again || before.Header.RefcountTableOffset >= e.Offset && before.Header.RefcountTableOffset < e.Offset+e.Length
	}
	if !again {
		t.Error("the old place of the refcount table has not been used again")
	}
	if err := im.Close(); err != nil {
		t.Fatal(err)
	}
	qemuCheck(t, path)
}
