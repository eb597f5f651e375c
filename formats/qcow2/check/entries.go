package check

import (
	"encoding/binary"

	"platter/formats/qcow2/layout"
)

const l2Reserved = 0x3f<<56 | 0x1fe

// l2Entry is an entry with the second word that extended entries have.
type l2Entry struct {
	word, bitmap uint64
}

// eachEntry calls f for the entries of an L2 table that aren't 0.
func eachEntry(g layout.Geometry, table []byte, f func(i int, e l2Entry) error) error {
	step := g.L2EntrySize()
	for at := 0; at < len(table); at += step {
		e := l2Entry{word: binary.BigEndian.Uint64(table[at:])}
		if g.Extended {
			e.bitmap = binary.BigEndian.Uint64(table[at+8:])
		}
		if e.word|e.bitmap == 0 {
			continue
		}
		if err := f(at/step, e); err != nil {
			return err
		}
	}
	return nil
}

// kind is the entry's kind as QEMU tells it. Of entries with the zero flag it
// takes those at offset 0 for plain ones even where that is a data file's start.
func (e l2Entry) kind(g layout.Geometry) layout.Kind {
	k := g.Kind(e.word)
	if k == layout.ZeroAllocated && layout.EntryOffset(e.word) == 0 {
		return layout.ZeroPlain
	}
	return k
}

// hasHost reports whether an entry of the kind names a whole cluster.
func hasHost(k layout.Kind) bool { return k == layout.Data || k == layout.ZeroAllocated }

// readsZero reports whether an entry that names a cluster holds no data there.
func (e l2Entry) readsZero(g layout.Geometry) bool {
	if g.Extended {
		return uint32(e.bitmap) == 0
	}
	return e.word&layout.ZeroFlag != 0
}

// checkL2 counts the references of an L2 table, once for each L1 entry that
// refers to it, and looks at its entries.
func (c *checker) checkL2(t l2Table, table []byte) error {
	var (
		g    = c.g
		uses = t.active + t.others
		next int64 // where the cluster after the one before would be
	)
	flags, err := c.flagsMatter(t)
	if err != nil {
		return err
	}
	return eachEntry(g, table, func(i int, e l2Entry) error {
		before := c.report.Corruptions
		bad := func(what string) {
			c.corrupt(int64(uses), "L2 table at %#x, entry %d %s: %#x %#x", t.off, i, what, e.word, e.bitmap)
		}
		off := layout.EntryOffset(e.word)
		kind := e.kind(g)
		if kind != layout.Compressed && e.word&l2Reserved != 0 {
			bad("has reserved bits set")
		}
		switch {
		case kind == layout.Compressed:
			if e.word&layout.Copied != 0 {
				bad("is compressed and has the copied flag")
			}
			if g.External {
				bad("is compressed, although the image has a data file")
				break
			}
			if e.bitmap != 0 {
				bad("is compressed and has a subcluster bitmap")
			}
			start, length := g.CompressedRange(e.word)
			c.refer(start, length, uses, "compressed data")
			c.report.AllocatedClusters += int64(t.active)
			c.report.CompressedClusters += int64(t.active)
			c.report.FragmentedClusters += int64(t.active)
		case hasHost(kind):
			if uint32(e.bitmap)&uint32(e.bitmap>>32) != 0 {
				bad("has a subcluster that is both allocated and zero")
			}
			if off&(g.ClusterSize()-1) != 0 {
				bad("names a cluster that is not aligned")
				if e.readsZero(g) {
					c.found.zeroes++
				}
			}
			c.report.AllocatedClusters += int64(t.active)
			if next != 0 && off != next {
				c.report.FragmentedClusters += int64(t.active)
			}
			next = off + g.ClusterSize()
			if !g.External {
				c.refer(off, g.ClusterSize(), uses, "data cluster")
			}
			if flags {
				if err := c.checkFlag(t, i, e); err != nil {
					return err
				}
			}
		case uint32(e.bitmap) != 0:
			bad("has allocated subclusters, but no cluster")
		}
		if c.report.Corruptions == before {
			guest := (t.index<<g.L2Bits() + int64(i)) << g.ClusterBits
			if err := g.CheckL2(e.word, e.bitmap, guest); err != nil {
				c.corrupt(int64(uses), "L2 table at %#x, entry %d: %v", t.off, i, err)
			}
		}
		return nil
	})
}

// flagsMatter reports whether a table's copied flags are looked at: not those of
// snapshots, and not where the table's own refcount can't be told.
func (c *checker) flagsMatter(t l2Table) (bool, error) {
	if t.active == 0 {
		return false, nil
	}
	_, known, err := c.refcount(t.off >> c.g.ClusterBits)
	return known, err
}

// checkFlag looks at the copied flag of an entry that names a cluster.
func (c *checker) checkFlag(t l2Table, i int, e l2Entry) error {
	wrong, err := c.wrongL2Flag(e)
	if wrong {
		c.corrupt(int64(t.active), "L2 table at %#x, entry %d has a wrong copied flag: %#x", t.off, i, e.word)
		c.found.flags += int64(t.active)
	}
	return err
}

// wrongL2Flag is wrongFlag for an L2 entry. The clusters of a data file have
// only one owner.
func (c *checker) wrongL2Flag(e l2Entry) (bool, error) {
	if c.g.External {
		return e.word&layout.Copied == 0, nil
	}
	return c.wrongFlag(e.word, layout.EntryOffset(e.word))
}
