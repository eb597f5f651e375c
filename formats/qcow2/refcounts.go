package qcow2

import (
	"encoding/binary"
	"fmt"

	"golang.org/x/sys/unix"

	"platter/formats/qcow2/layout"
)

// refcounts is the refcount table with the blocks that are in memory. The
// allocator's lock guards it.
type refcounts struct {
	im      *Image
	a       *allocator
	g       layout.Geometry
	table   []uint64 // as on the disk, and new entries
	offset  int64    // where the table stands
	old     []run    // clusters that the table had before it grew
	moved   bool     // the table must be written as a whole, and then the header
	added   []int64  // indices of entries that must be written
	owed    []run    // clusters of a table that moved, without refcounts yet
	blocks  map[int64]*block
	max     int // blocks to keep
	changed []*block
}

// block is a refcount block in memory.
type block struct {
	index   int64
	offset  int64
	b       []byte
	dirty   bool // in refcounts.changed
	writing bool // by a commit
}

// load finds the block for a cluster, nil if all of its refcounts are 0.
func (r *refcounts) load(cluster int64) (*block, error) {
	index := cluster >> r.g.RefcountBlockBits()
	if index >= int64(len(r.table)) || r.table[index] == 0 {
		return nil, nil
	}
	if b := r.blocks[index]; b != nil {
		return b, nil
	}
	if err := r.im.checkBlock(index, r.table[index]); err != nil {
		return nil, r.im.corrupted(fmt.Errorf("refcount table index %d: %w", index, err))
	}
	b := &block{index: index, offset: int64(r.table[index]), b: make([]byte, r.g.ClusterSize())}
	if err := r.im.waiter.readAt(r.im.file, b.b, b.offset); err != nil {
		return nil, fmt.Errorf("read refcount block %d: %w", index, err)
	}
	r.evict()
	r.blocks[index] = b
	return b, nil
}

// evict makes room for another block, if there is a clean one.
func (r *refcounts) evict() {
	if len(r.blocks) < r.max {
		return
	}
	for index, b := range r.blocks {
		if !b.dirty && !b.writing {
			delete(r.blocks, index)
			return
		}
	}
}

func (r *refcounts) get(cluster int64) (uint64, error) {
	b, err := r.load(cluster)
	if b == nil || err != nil {
		return 0, err
	}
	return r.g.Refcount(b.b, r.slot(cluster)), nil
}

func (r *refcounts) slot(cluster int64) int {
	return int(cluster & (1<<r.g.RefcountBlockBits() - 1))
}

// addRange changes the refcounts of a run by delta; all of them or, when it
// fails, none.
func (r *refcounts) addRange(x run, delta int) error {
	for c := x.first; c < x.first+x.count; c++ {
		if err := r.add(c, delta); err != nil {
			for c--; c >= x.first; c-- {
				if undo := r.add(c, -delta); undo != nil {
					break // both say the same
				}
			}
			return err
		}
	}
	return nil
}

func (r *refcounts) add(cluster int64, delta int) error {
	b, err := r.load(cluster)
	if err != nil {
		return err
	}
	if b == nil && delta > 0 {
		if b, err = r.newBlock(cluster >> r.g.RefcountBlockBits()); err != nil {
			return err
		}
	}
	if b == nil {
		return r.im.corrupted(fmt.Errorf("%w: cluster %#x is in use but has no refcount block", layout.ErrInvalid, cluster<<r.g.ClusterBits))
	}
	v := r.g.Refcount(b.b, r.slot(cluster))
	switch {
	case delta < 0 && v < uint64(-delta):
		return r.im.corrupted(fmt.Errorf("%w: cluster %#x is in use but has a refcount of %d", layout.ErrInvalid, cluster<<r.g.ClusterBits, v))
	case delta > 0 && v > r.g.MaxRefcount()-uint64(delta):
		return fmt.Errorf("cluster %#x has a refcount of %d, which can't be raised: %w", cluster<<r.g.ClusterBits, v, unix.ENOSPC)
	}
	r.g.SetRefcount(b.b, r.slot(cluster), v+uint64(delta))
	r.markDirty(b)
	return nil
}

func (r *refcounts) markDirty(b *block) {
	if !b.dirty {
		b.dirty = true
		r.changed = append(r.changed, b)
	}
}

// newBlock makes the refcount block with the given index. It comes to stand at
// the frontier, and the refcount table grows if it has to.
func (r *refcounts) newBlock(index int64) (*block, error) {
	if index >= int64(len(r.table)) {
		if err := r.growTable(index); err != nil {
			return nil, err
		}
		if b, err := r.load(index << r.g.RefcountBlockBits()); b != nil || err != nil {
			return b, err // made on the way
		}
	}
	at, err := r.a.take(1)
	if err != nil {
		return nil, err
	}
	b := &block{index: index, offset: at.first << r.g.ClusterBits, b: make([]byte, r.g.ClusterSize())}
	// Its own refcount may stand in it, or in another block that has to be made.
	if at.first>>r.g.RefcountBlockBits() == index {
		r.g.SetRefcount(b.b, r.slot(at.first), 1)
	} else if err := r.add(at.first, 1); err != nil {
		return nil, err
	}
	r.evict()
	r.blocks[index] = b
	r.table[index] = uint64(b.offset)
	r.im.metadata.add(at.first, 1, holder{refcountBlock, int32(index)})
	r.added = append(r.added, index)
	r.markDirty(b)
	return b, nil
}

// growTable moves the refcount table to a new place at the frontier, large
// enough for the block with the given index.
func (r *refcounts) growTable(index int64) error {
	per := r.g.ClusterSize() / 8 // entries in a cluster of the table
	clusters := r.g.Clusters(int64(len(r.table)) * 8)
	most := int64(layout.MaxRefcountTableBytes) >> r.g.ClusterBits
	// Doubling leaves room for the table itself and for the blocks it needs.
	want := min(max(2*clusters, (index+2)/per+1), most)
	for want < most && (r.a.frontier+2*want)>>r.g.RefcountBlockBits()+2 > want*per {
		want++
	}
	if index >= want*per {
		return errNoSpace
	}
	at, err := r.a.take(want)
	if err != nil {
		return err
	}
	r.old = append(r.old, run{r.offset >> r.g.ClusterBits, clusters})
	r.table = append(r.table, make([]uint64, want*per-int64(len(r.table)))...)
	r.offset = at.first << r.g.ClusterBits
	r.moved = true
	r.im.metadata.add(at.first, at.count, holder{kind: refcountTable})
	r.owed = append(r.owed, at)
	return r.pay()
}

// pay raises the refcounts of a refcount table that has moved. Until that has
// been done nothing else may be.
func (r *refcounts) pay() error {
	for len(r.owed) > 0 {
		owed := r.owed
		r.owed = nil // raising may make the table grow again
		for i, at := range owed {
			if err := r.addRange(at, 1); err != nil {
				r.owed = append(r.owed, owed[i:]...)
				return err
			}
		}
	}
	return nil
}

// tableBytes is the table as it goes to the disk.
func (r *refcounts) tableBytes() []byte {
	b := make([]byte, 0, 8*len(r.table))
	for _, word := range r.table {
		b = binary.BigEndian.AppendUint64(b, word)
	}
	return b
}
