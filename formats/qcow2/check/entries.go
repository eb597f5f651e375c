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

// faults calls bad for everything that is wrong with an entry by itself, as
// qemu-img counts it. guest is the guest offset that it maps.
func (e l2Entry) faults(g layout.Geometry, guest int64, bad func(what string)) {
	found := false
	fault := func(is bool, what string) {
		if is {
			found = true
			bad(what)
		}
	}
	switch kind := e.kind(g); {
	case kind == layout.Compressed:
		fault(e.word&layout.Copied != 0, "is compressed and has the copied flag")
		fault(g.External, "is compressed, although the image has a data file")
		fault(!g.External && e.bitmap != 0, "is compressed and has a subcluster bitmap")
		return
	case hasHost(kind):
		fault(uint32(e.bitmap)&uint32(e.bitmap>>32) != 0, "has a subcluster that is both allocated and zero")
		fault(!aligned(g, layout.EntryOffset(e.word)), "names a cluster that is not aligned")
	default:
		fault(uint32(e.bitmap) != 0, "has allocated subclusters, but no cluster")
	}
	fault(e.word&l2Reserved != 0, "has reserved bits set")
	// What qemu-img doesn't look at is only to be found in such images.
	if !found && (g.Version < 3 || g.Extended || g.External) {
		if err := g.CheckL2(e.word, e.bitmap, guest); err != nil {
			bad("is wrong: " + err.Error())
		}
	}
}

func aligned(g layout.Geometry, off int64) bool { return off&(g.ClusterSize()-1) == 0 }

// checkL2 counts the references of an L2 table, once for each L1 entry that
// refers to it, and looks at its entries.
func (c *checker) checkL2(t l2Table, table []byte) error {
	var (
		g      = c.g
		active = int64(t.active)
		uses   = t.active + t.others
		next   int64 // where the cluster after the one before would be
	)
	flags, err := c.flagsMatter(t)
	if err != nil {
		return err
	}
	return eachEntry(g, table, func(i int, e l2Entry) error {
		guest := (t.index<<g.L2Bits() + int64(i)) << g.ClusterBits
		e.faults(g, guest, func(what string) {
			c.corrupt(int64(uses), "L2 table at %#x, entry %d %s: %#x %#x", t.off, i, what, e.word, e.bitmap)
		})
		switch kind := e.kind(g); {
		case kind == layout.Compressed && !g.External:
			off, length := g.CompressedRange(e.word)
			c.refer(off, length, uses, "compressed data")
			c.report.AllocatedClusters += active
			c.report.CompressedClusters += active
			c.report.FragmentedClusters += active
		case hasHost(kind):
			off := layout.EntryOffset(e.word)
			if !aligned(g, off) && e.readsZero(g) && g.Version >= 3 {
				c.found.zeroes++
			}
			c.report.AllocatedClusters += active
			if next != 0 && off != next {
				c.report.FragmentedClusters += active
			}
			next = off + g.ClusterSize()
			if !g.External {
				c.refer(off, g.ClusterSize(), uses, "data cluster")
			}
			if flags {
				return c.checkFlag(t, i, e)
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
