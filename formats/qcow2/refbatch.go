package qcow2

import (
	"fmt"
	"slices"
)

// refBatch is what one commit writes of the refcounts.
type refBatch struct {
	blocks  []*block
	content [][]byte
	table   []byte  // nil unless entries are new
	offset  int64   // where the table stands
	moved   bool    // the header must follow
	old     []run   // clusters of the table before it moved
	added   []int64 // new entries
}

func (b *refBatch) empty() bool { return len(b.blocks) == 0 && b.table == nil }

// changed reports whether a commit has something to do.
func (a *allocator) changed() bool {
	a.pendingMu.Lock()
	pending := len(a.pendingFree)
	a.pendingMu.Unlock()
	a.mu.Lock()
	defer a.mu.Unlock()
	return pending > 0 || len(a.refs.changed) > 0 || len(a.dropped) > 0
}

// collect takes what a commit writes.
func (a *allocator) collect() (refBatch, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	r := &a.refs
	if err := r.pay(); err != nil {
		return refBatch{}, err
	}
	b := refBatch{blocks: r.changed, offset: r.offset, moved: r.moved, old: r.old, added: r.added}
	for _, x := range b.blocks {
		b.content = append(b.content, slices.Clone(x.b))
		x.dirty, x.writing = false, true
	}
	if len(r.added) > 0 || r.moved {
		b.table = r.tableBytes()
	}
	r.changed, r.added, r.moved, r.old = nil, nil, false, nil
	a.dropped, a.settling = nil, a.dropped
	return b, nil
}

// collectFree takes what will be free for use when a commit has ended, and
// leaves the refcounts as they are.
func (a *allocator) collectFree() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.dropped, a.settling = nil, a.dropped
}

// putBack makes what a failed commit took dirty again.
func (a *allocator) putBack(b refBatch, frees []int64) {
	a.mu.Lock()
	r := &a.refs
	for _, x := range b.blocks {
		x.writing = false
		if !x.dirty {
			x.dirty = true
			r.changed = append(r.changed, x)
		}
	}
	r.added = append(r.added, b.added...)
	r.moved = r.moved || b.moved
	r.old = append(r.old, b.old...)
	a.dropped, a.settling = append(a.dropped, a.settling...), nil
	a.mu.Unlock()
	a.pendingMu.Lock()
	a.pendingFree = append(a.pendingFree, frees...)
	a.pendingMu.Unlock()
}

// writeRefcounts writes refcount blocks, and makes new ones durable before the
// table names them, and a new table before the header does.
func (im *Image) writeRefcounts(b refBatch) error {
	for i, x := range b.blocks {
		if err := im.waiter.writeAt(im.file, b.content[i], x.offset); err != nil {
			return fmt.Errorf("write refcount block %d: %w", x.index, err)
		}
	}
	if b.table == nil {
		return nil
	}
	if err := im.waiter.flush(im.file); err != nil {
		return err
	}
	if err := im.writeRefcountTable(b); err != nil {
		return fmt.Errorf("write refcount table: %w", err)
	}
	if !b.moved {
		return nil
	}
	if err := im.waiter.flush(im.file); err != nil {
		return err
	}
	im.headerMu.Lock()
	defer im.headerMu.Unlock()
	im.header.RefcountTableOffset = b.offset
	im.header.RefcountTableClusters = uint32(int64(len(b.table)) >> im.g.ClusterBits)
	return im.writeHeader()
}

// writeRefcountTable writes the whole table if it moved, else the sectors with
// new entries.
func (im *Image) writeRefcountTable(b refBatch) error {
	if b.moved {
		return im.waiter.writeAt(im.file, b.table, b.offset)
	}
	written := int64(-1)
	for _, i := range b.added {
		sector := i * 8 &^ 511
		if sector == written {
			continue
		}
		if err := im.waiter.writeAt(im.file, b.table[sector:sector+512], b.offset+sector); err != nil {
			return err
		}
		written = sector
	}
	return nil
}
