package check

import (
	"bytes"
	"encoding/binary"
	"os"
	"testing"

	"platter/formats/qcow2/layout"
)

// image is an image in memory, to be damaged.
type image struct {
	t    testing.TB
	data []byte
	h    *layout.Header
	g    layout.Geometry
}

func loadImage(t testing.TB, path string) *image {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	h, err := layout.ParseHeader(data)
	if err != nil {
		t.Fatal(err)
	}
	return &image{t, data, h, h.Geometry()}
}

func (m *image) save(path string) {
	m.t.Helper()
	if err := os.WriteFile(path, m.data, 0o644); err != nil {
		m.t.Fatal(err)
	}
}

func (m *image) word(off int64) uint64       { return binary.BigEndian.Uint64(m.data[off:]) }
func (m *image) set(off int64, v uint64)     { binary.BigEndian.PutUint64(m.data[off:], v) }
func (m *image) set32(off int64, v uint32)   { binary.BigEndian.PutUint32(m.data[off:], v) }
func (m *image) flip(off int64, bits uint64) { m.set(off, m.word(off)^bits) }

// replace puts another host offset into the entry at off.
func (m *image) replace(off, host int64) {
	m.set(off, m.word(off)&^layout.OffsetMask|uint64(host))
}

func (m *image) clusters() int64 { return m.g.Clusters(int64(len(m.data))) }

// l1 is where an entry of the active L1 table is.
func (m *image) l1(i int64) int64 { return m.h.L1Offset + 8*i }

// l2 is where the L2 entry of a guest offset is.
func (m *image) l2(guest int64) int64 { return m.entryBelow(m.h.L1Offset, guest) }

func (m *image) entryBelow(l1Offset, guest int64) int64 {
	m.t.Helper()
	cluster := guest >> m.g.ClusterBits
	table := layout.EntryOffset(m.word(l1Offset + cluster>>m.g.L2Bits()*8))
	if table == 0 {
		m.t.Fatalf("guest offset %#x has no L2 table", guest)
	}
	return table + cluster&(1<<m.g.L2Bits()-1)*int64(m.g.L2EntrySize())
}

// host is the host offset that an entry names.
func (m *image) host(off int64) int64 {
	m.t.Helper()
	host := layout.EntryOffset(m.word(off))
	if host == 0 {
		m.t.Fatalf("the entry at %#x is empty", off)
	}
	return host
}

// block is where the refcount block of a cluster is.
func (m *image) block(cluster int64) int64 {
	return int64(m.word(m.h.RefcountTableOffset + cluster>>m.g.RefcountBlockBits()*8))
}

// setRefcount stores a refcount for the cluster at an offset of the file.
func (m *image) setRefcount(off int64, v uint64) {
	cluster := off >> m.g.ClusterBits
	m.g.SetRefcount(m.data[m.block(cluster):], int(cluster&(1<<m.g.RefcountBlockBits()-1)), v)
}

// snapshot is where the L1 table of a snapshot is, by its number.
func (m *image) snapshot(n int) layout.Snapshot {
	m.t.Helper()
	list, err := layout.ReadSnapshots(newMemory(m.data), m.h)
	if err != nil {
		m.t.Fatal(err)
	}
	return list[n]
}

// bitmap is a bitmap, by its number, bitmapDirectory where the first's entry is.
func (m *image) bitmap(n int) layout.Bitmap {
	m.t.Helper()
	list, err := layout.ReadBitmaps(newMemory(m.data), m.h)
	if err != nil {
		m.t.Fatal(err)
	}
	return list[n]
}

func (m *image) bitmapDirectory() int64 {
	m.t.Helper()
	x, err := m.h.Bitmaps()
	if err != nil || x == nil {
		m.t.Fatalf("no bitmaps: %v", err)
	}
	return x.DirectoryOffset
}

// rewriteSnapshots gives every entry of the snapshot table so many bytes of
// extra data. The table must still fit into its cluster.
func (m *image) rewriteSnapshots(extra int) {
	m.t.Helper()
	list, err := layout.ReadSnapshots(newMemory(m.data), m.h)
	if err != nil {
		m.t.Fatal(err)
	}
	var table []byte
	for _, s := range list {
		full := layout.AppendSnapshots(nil, []layout.Snapshot{s})
		data := append(bytes.Clone(full[40:64]), make([]byte, 2048)...)
		binary.BigEndian.PutUint32(full[36:], uint32(extra))
		table = append(append(table, full[:40]...), data[:extra]...)
		table = append(append(table, s.ID...), s.Name...)
		table = append(table, make([]byte, -len(table)&7)...)
	}
	clear(m.data[m.h.SnapshotsOffset:][:m.g.ClusterSize()])
	copy(m.data[m.h.SnapshotsOffset:], table)
}
