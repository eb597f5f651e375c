package qcow2

import (
	"cmp"
	"fmt"
	"slices"
	"sync"

	"platter/formats/qcow2/layout"
)

// metadata knows which host clusters hold the image's own tables, so that no
// wrong entry leads a guest's write there and no wrong refcount has them handed
// out. Anyone may ask at any time. An image that is only read has none.
type metadata struct {
	bits  uint  // of the cluster size
	fixed []run // what stays while the image is open, in order

	mu     sync.Mutex       // taken last
	tables map[int64]holder // the others, by cluster
}

// holder is what a cluster of metadata holds.
type holder struct {
	kind  holderKind
	index int32 // of the entry that names it
}

type holderKind uint8

const (
	nothing       holderKind = iota // or the guest's data
	fixture                         // header, L1 table, snapshot table, or what two claim
	refcountTable                   // a piece of it
	refcountBlock
	l2Table
)

// at tells what a cluster holds.
func (m *metadata) at(cluster int64) holder {
	i, found := slices.BinarySearchFunc(m.fixed, cluster, func(r run, c int64) int { return cmp.Compare(r.first, c) })
	if found || i > 0 && cluster-m.fixed[i-1].first < m.fixed[i-1].count {
		return holder{kind: fixture}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.tables[cluster]
}

// add notes that clusters hold a table. If they hold another of its kind already
// that stays, and if they hold one of another kind nobody may use them.
func (m *metadata) add(first, count int64, h holder) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for c := first; c < first+count; c++ {
		switch old, taken := m.tables[c]; {
		case !taken:
			m.tables[c] = h
		case old.kind != h.kind:
			m.tables[c] = holder{kind: fixture}
		}
	}
}

// remove notes that clusters are free.
func (m *metadata) remove(r run) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for c := r.first; c < r.first+r.count; c++ {
		delete(m.tables, c)
	}
}

// collectMetadata notes where the image's own tables stand. The fixed ones and
// the refcount table must not overlap; others are looked at when they are used.
func (im *Image) collectMetadata() error {
	h, m := im.header, &im.metadata
	m.bits, m.tables = im.g.ClusterBits, make(map[int64]holder)
	list, size, err := layout.ReadSnapshotTable(im.reader(), h)
	if err != nil {
		return err
	}
	type place struct {
		run
		field string
	}
	var places []place
	add := func(field string, off, length int64) {
		if length > 0 {
			places = append(places, place{run{off >> m.bits, im.g.Clusters(length)}, field})
		}
	}
	add("header", 0, 1)
	add("l1_table_offset", h.L1Offset, int64(h.L1Entries)*8)
	add("refcount_table_offset", h.RefcountTableOffset, int64(h.RefcountTableClusters)<<m.bits)
	add("snapshots_offset", h.SnapshotsOffset, size)
	for i, s := range list {
		add(fmt.Sprintf("l1_table_offset of snapshot %d", i), s.L1Offset, int64(s.L1Entries)*8)
	}
	slices.SortFunc(places, func(a, b place) int { return cmp.Compare(a.first, b.first) })
	for i, p := range places {
		if i > 0 && p.first < places[i-1].first+places[i-1].count {
			return &layout.FieldError{Field: p.field, Value: layout.Hex(p.first << m.bits),
				Want: "must not lie within what is at " + places[i-1].field, Kind: layout.ErrInvalid}
		}
		if p.field == "refcount_table_offset" {
			m.add(p.first, p.count, holder{kind: refcountTable})
			continue
		}
		m.fixed = append(m.fixed, p.run)
	}
	for i := range im.l1 {
		if off := im.l1[i].offset(); off != 0 {
			m.add(off>>m.bits, 1, holder{l2Table, int32(i)})
		}
	}
	for i, word := range im.alloc.refs.table {
		if word != 0 {
			m.add(int64(word>>m.bits), 1, holder{refcountBlock, int32(i)})
		}
	}
	return nil
}

// checkTable reports what is wrong with an L1 entry that isn't 0.
func (im *Image) checkTable(index int, word uint64) error {
	if err := im.g.CheckL1(word); err != nil {
		return err
	}
	off := layout.EntryOffset(word)
	var want string
	switch h := im.metadata.at(off >> im.g.ClusterBits); {
	case off == 0:
		want = "must name an L2 table"
	case off+im.g.ClusterSize() > im.fileEnd.Load():
		want = fmt.Sprintf("must name an offset below the end of the file, %#x", im.fileEnd.Load())
	case im.readOnly:
		return nil
	case h.kind != l2Table:
		want = "must not point to other metadata"
	case h.index != int32(index):
		want = fmt.Sprintf("must not name the L2 table of entry %d", h.index)
	default:
		return nil
	}
	return &layout.FieldError{Field: "L1 entry", Value: layout.Hex(word), Want: want, Kind: layout.ErrInvalid}
}

// checkBlock reports what is wrong with an entry of the refcount table that
// isn't 0.
func (im *Image) checkBlock(index int64, word uint64) error {
	if err := im.g.CheckRefcountTable(word); err != nil {
		return err
	}
	var want string
	switch h := im.metadata.at(int64(word >> im.g.ClusterBits)); {
	case int64(word)+im.g.ClusterSize() > im.fileEnd.Load():
		want = fmt.Sprintf("must name an offset below the end of the file, %#x", im.fileEnd.Load())
	case h.kind != refcountBlock:
		want = "must not point to other metadata"
	case int64(h.index) != index:
		want = fmt.Sprintf("must not name the refcount block of entry %d", h.index)
	default:
		return nil
	}
	return &layout.FieldError{Field: "refcount table entry", Value: layout.Hex(word), Want: want, Kind: layout.ErrInvalid}
}
