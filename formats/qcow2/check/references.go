package check

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"slices"

	"platter/formats/qcow2/layout"
)

// count counts the references to all clusters, and looks at every entry that
// makes one. The refcounts must have been loaded.
func (c *checker) count() error {
	c.metadata(0, c.g.ClusterSize(), "header")
	if err := c.countL1(c.h.L1Offset, int64(c.h.L1Entries), true); err != nil {
		return fmt.Errorf("read L1 table: %w", err)
	}
	if err := c.countSnapshots(); err != nil {
		return err
	}
	if err := c.countL2(); err != nil {
		return fmt.Errorf("read L2 tables: %w", err)
	}
	c.countEncryption()
	if err := c.countBitmaps(); err != nil {
		return err
	}
	c.countRefcounts()
	return nil
}

// refer counts n references to the clusters of size bytes from off on. It is a
// corruption, and false is returned, if they aren't all in the file. A last
// cluster that the file's end cuts off is in it.
func (c *checker) refer(off, size int64, n uint64, what string) bool {
	if size == 0 {
		return true
	}
	if off < 0 || off >= layout.MaxOffset || size < 0 || size >= c.size+c.g.ClusterSize()-off {
		c.corrupt(int64(n), "%s at offset %#x, size %#x, exceeds the end of the file", what, uint64(off), size)
		c.beyondEnd(off, size)
		return false
	}
	last := (off + size - 1) >> c.g.ClusterBits
	for cluster := off >> c.g.ClusterBits; cluster <= last; cluster++ {
		c.refs.add(cluster, n)
	}
	return true
}

// beyondEnd notes the clusters behind the file's end that something refers to,
// lest a repair puts anything there.
func (c *checker) beyondEnd(off, size int64) {
	if off >= 0 && off < layout.MaxOffset && size > 0 {
		size = min(size, layout.MaxOffset)
		c.beyond.add(off>>c.g.ClusterBits, (off+size-1)>>c.g.ClusterBits)
	}
}

// metadata counts one reference to clusters that belong to one structure only.
// Those that are in the file are its own even if not all are.
func (c *checker) metadata(off, size int64, what string) bool {
	c.own(off, c.inFile(off, size))
	return c.refer(off, size, 1, what)
}

func (c *checker) own(off, size int64) {
	if size <= 0 {
		return
	}
	for cluster := off >> c.g.ClusterBits; cluster < c.g.Clusters(off+size); cluster++ {
		c.owners.set(cluster, min(c.owners.get(cluster)+1, 3))
	}
}

// l2Table is an L2 table with the number of L1 entries that refer to it.
type l2Table struct {
	off    int64
	active uint64 // in the disk's own L1 table
	others uint64 // in the snapshots'
	index  int64  // of an L1 entry: which part of the disk the table maps
}

// l2Tables gathers L2 tables. Those that many L1 entries share are kept once.
type l2Tables []l2Table

func (l *l2Tables) add(t l2Table) {
	if len(*l) >= 1<<16 && len(*l) == cap(*l) {
		l.merge()
		*l = slices.Grow(*l, max(len(*l), 1<<16))
	}
	*l = append(*l, t)
}

// merge sorts the tables by their place in the file.
func (l *l2Tables) merge() {
	slices.SortStableFunc(*l, func(a, b l2Table) int { return cmp.Compare(a.off, b.off) })
	kept := (*l)[:0]
	for _, t := range *l {
		if n := len(kept); n > 0 && kept[n-1].off == t.off {
			kept[n-1].active += t.active
			kept[n-1].others += t.others
		} else {
			kept = append(kept, t)
		}
	}
	*l = kept
}

const l1Reserved = 0x7f<<56 | 0x1ff

// countL1 counts the references of an L1 table, and gathers its L2 tables.
func (c *checker) countL1(off, entries int64, active bool) error {
	if entries == 0 {
		return nil
	}
	c.metadata(off, entries*8, "L1 table")
	return c.words(off, entries, func(i int64, word uint64) (uint64, error) {
		t := l2Table{off: layout.EntryOffset(word), others: 1, index: i}
		if t.off == 0 {
			c.corrupt(1, "L1 entry %d names no L2 table, but has bits set: %#x", i, word)
			if active && word == layout.Copied {
				c.found.flags++
			}
			return word, nil
		}
		if word&l1Reserved != 0 {
			c.corrupt(1, "L1 entry %d has reserved bits set: %#x", i, word)
		}
		inFile := c.refer(t.off, c.g.ClusterSize(), 1, "L2 table")
		if !aligned(c.g, t.off) {
			c.corrupt(1, "L1 entry %d names an L2 table that is not cluster aligned: %#x", i, word)
		}
		if active {
			t.active, t.others = 1, 0
			wrong, err := c.wrongFlag(word, t.off)
			if err != nil {
				return word, err
			}
			if wrong {
				c.corrupt(1, "L1 entry %d has a wrong copied flag: %#x", i, word)
				c.found.flags++
			}
		}
		if inFile {
			c.l2.add(t)
		}
		return word, nil
	})
}

// wrongFlag reports whether the copied flag of an entry contradicts the refcount
// of the cluster at off, as far as that is known.
func (c *checker) wrongFlag(word uint64, off int64) (bool, error) {
	n, known, err := c.refcount(off >> c.g.ClusterBits)
	return known && (n == 1) != (word&layout.Copied != 0), err
}

func (c *checker) countL2() error {
	c.l2.merge()
	list := make([]block, len(c.l2))
	for i, t := range c.l2 {
		list[i] = block{t.off, int64(i)}
		if aligned(c.g, t.off) {
			c.own(t.off, 1)
		}
	}
	return c.blocks(list, func(b block, data []byte) error {
		return c.checkL2(c.l2[b.key], data)
	})
}

func (c *checker) countSnapshots() error {
	for i, s := range c.snapshots.list {
		switch {
		case !aligned(c.g, s.L1Offset):
			c.corrupt(1, "snapshot %d (%.50q) has an L1 table that is not cluster aligned: %#x", i, s.Name, uint64(s.L1Offset))
		case int64(s.L1Entries)*8 > layout.MaxL1Bytes:
			c.corrupt(1, "snapshot %d (%.50q) has an L1 table that is too large: %d entries", i, s.Name, s.L1Entries)
		default:
			if err := c.countL1(s.L1Offset, int64(s.L1Entries), false); err != nil {
				return fmt.Errorf("read L1 table of snapshot %d: %w", i, err)
			}
		}
	}
	c.metadata(c.h.SnapshotsOffset, c.snapshots.size, "snapshot table")
	return nil
}

// countEncryption counts the area that a LUKS header takes.
func (c *checker) countEncryption() {
	if x, ok := c.h.Extension(layout.ExtensionEncryption); ok {
		c.metadata(int64(binary.BigEndian.Uint64(x)), int64(binary.BigEndian.Uint64(x[8:])), "encryption header")
	}
}

// countBitmaps counts the bitmap directory, the bitmaps' tables and their
// clusters. Without the autoclear bit the bitmaps are void, and none are known.
func (c *checker) countBitmaps() error {
	if len(c.bitmaps) == 0 {
		return nil
	}
	x, err := c.h.Bitmaps()
	if err != nil {
		return err
	}
	c.metadata(x.DirectoryOffset, x.DirectorySize, "bitmap directory")
	for _, m := range c.bitmaps {
		c.metadata(m.TableOffset, int64(m.TableEntries)*8, "bitmap table")
		err := c.words(m.TableOffset, int64(m.TableEntries), func(i int64, word uint64) (uint64, error) {
			if err := c.g.CheckBitmapTable(word); err != nil {
				c.corrupt(1, "bitmap %q, entry %d: %v", m.Name, i, err)
			} else if off := layout.EntryOffset(word); off != 0 {
				c.metadata(off, c.g.ClusterSize(), "bitmap data")
			}
			return word, nil
		})
		if err != nil {
			return fmt.Errorf("read table of bitmap %q: %w", m.Name, err)
		}
	}
	return nil
}
