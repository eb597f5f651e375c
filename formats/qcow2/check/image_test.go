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

// Clusters of the images that build makes.
const (
	tableCluster = 1 + iota
	blockCluster
	l1Cluster
	l2Cluster
	snapshotsCluster
	snapshotL1Cluster
	snapshotL2Cluster
	sharedCluster
	dataCluster
	zeroCluster
	compressedCluster
	directoryCluster
	bitmapTableCluster
	bitmapCluster
	builtClusters
)

// build makes a small image with one of everything: an L2 table with clusters of
// all kinds, a snapshot that shares one of them, and in version 3 a bitmap.
func build(t testing.TB, version uint32, clusterBits, refcountOrder uint32, features uint64) *image {
	t.Helper()
	h := &layout.Header{
		Version: version, ClusterBits: clusterBits, RefcountOrder: refcountOrder, Incompatible: features,
		L1Offset: l1Cluster << clusterBits, RefcountTableOffset: tableCluster << clusterBits, RefcountTableClusters: 1,
		Snapshots: 1, SnapshotsOffset: snapshotsCluster << clusterBits,
	}
	g := h.Geometry()
	h.Size, h.L1Entries = 4<<(g.L2Bits()+g.ClusterBits), 4
	at := func(cluster int64) uint64 { return uint64(cluster << clusterBits) }
	m := &image{t, make([]byte, builtClusters<<clusterBits), h, g}

	entry := func(table, i int64, word, bitmap uint64) {
		off := table<<clusterBits + i*int64(g.L2EntrySize())
		m.set(off, word)
		if g.Extended {
			m.set(off+8, bitmap)
		}
	}
	const some = 0xff
	entry(l2Cluster, 0, at(sharedCluster), some)
	entry(l2Cluster, 1, at(dataCluster)|layout.Copied, some|some<<40)
	if version >= 3 && !g.Extended {
		entry(l2Cluster, 2, at(zeroCluster)|layout.Copied|layout.ZeroFlag, 0)
		entry(l2Cluster, 3, layout.ZeroFlag, 0)
	} else {
		entry(l2Cluster, 2, at(zeroCluster)|layout.Copied, some<<32)
	}
	for i := range int64(2) {
		word, ok := g.CompressedEntry(int64(at(compressedCluster))+100*i, 100)
		if !ok {
			t.Fatal("compressed data can't be named")
		}
		entry(l2Cluster, 4+i, word, 0)
	}
	m.set(l1Cluster<<clusterBits, at(l2Cluster)|layout.Copied)

	entry(snapshotL2Cluster, 0, at(sharedCluster), some)
	m.set(snapshotL1Cluster<<clusterBits, at(snapshotL2Cluster)|layout.Copied)
	copy(m.data[at(snapshotsCluster):], layout.AppendSnapshots(nil, []layout.Snapshot{
		{ID: "1", Name: "first", L1Offset: int64(at(snapshotL1Cluster)), L1Entries: 4, Size: h.Size},
	}))

	last := int64(compressedCluster)
	if version >= 3 {
		last = bitmapCluster
		list := []layout.Bitmap{{Name: "dirty", TableOffset: int64(at(bitmapTableCluster)), TableEntries: 1, Type: layout.DirtyTracking, GranularityBits: 16}}
		directory := layout.AppendBitmaps(nil, list)
		copy(m.data[at(directoryCluster):], directory)
		m.set(bitmapTableCluster<<clusterBits, at(bitmapCluster))
		x := layout.BitmapsExtension{Count: 1, DirectorySize: int64(len(directory)), DirectoryOffset: int64(at(directoryCluster))}
		h.SetExtension(layout.ExtensionBitmaps, x.Encode())
		h.Autoclear = layout.BitmapsValid
	} else {
		m.data = m.data[:at(last+1)]
	}
	m.set(tableCluster<<clusterBits, at(blockCluster))
	for cluster := range last + 1 {
		m.setRefcount(int64(at(cluster)), 1)
	}
	m.setRefcount(int64(at(sharedCluster)), 2)
	m.setRefcount(int64(at(compressedCluster)), 2)
	if err := h.Encode(m.data[:1<<clusterBits]); err != nil {
		t.Fatal(err)
	}
	return m
}

// at is where a cluster is.
func (m *image) at(cluster int64) int64 { return cluster << m.g.ClusterBits }

// run checks the image, which a repair changes.
func (m *image) run(r Repair) (*Report, error) {
	m.t.Helper()
	f := newMemory(m.data)
	report, err := Run(f, Options{Repair: r, Log: logTo(m.t)})
	m.data = f.data
	return report, err
}

// mustRun is run without an error.
func (m *image) mustRun(r Repair) *Report {
	m.t.Helper()
	report, err := m.run(r)
	if err != nil {
		m.t.Fatalf("Run: %v", err)
	}
	return report
}
