package check

import (
	"math"

	"platter/formats/qcow2/layout"
)

// repairs is what a repair has done so far.
type repairs struct {
	corruptions int64
	leaks       int64
	wrote       bool
	pending     bool // something isn't durable yet
}

// repair repairs what was found. It returns the pass that found what is left.
func (c *checker) repair() (*checker, error) {
	var err error
	for range 2 { // a table may only be writable when refcounts have left it alone
		if c, err = c.repairOnce(); err != nil {
			return c, err
		}
		if c.options.Repair != RepairAll || c.found.zeroes == 0 {
			break
		}
	}
	c.report.CorruptionsFixed, c.report.LeaksFixed = c.done.corruptions, c.done.leaks
	return c, c.clearFeatures()
}

func (c *checker) repairOnce() (*checker, error) {
	c.meter = meter{limit: math.MaxInt64} // of what a repair reads nobody is told
	if c.options.Repair == RepairAll && c.found.zeroes > 0 {
		if err := c.clearZeroes(); err != nil {
			return c, err
		}
		again, err := c.again(Options{Repair: RepairAll})
		if err != nil {
			return again, err
		}
		again.options, again.meter = c.options, c.meter
		c = again
	}
	if err := c.correct(); err != nil || !c.done.wrote {
		return c, err
	}
	if c.options.Log != nil {
		c.options.Log("The image has been repaired; checking it again")
	}
	return c.again(c.options)
}

// again is another pass of the same repair.
func (c *checker) again(o Options) (*checker, error) {
	next, err := inspect(c.f, o)
	next.done = c.done
	return next, err
}

// correct corrects refcounts and copied flags. Increases are durable first, then
// the flags that let somebody write to a shared cluster go, then refcounts fall,
// and what has become unshared gets its flag.
func (c *checker) correct() error {
	var steps []func() error
	switch all := c.options.Repair == RepairAll; {
	case all && (c.found.rebuild || c.snapshots.faults > 0):
		steps = []func() error{c.rebuild, c.clearFlags, c.setFlags}
	case all:
		steps = []func() error{c.raise, c.clearFlags, c.lower, c.setFlags}
	case c.report.CheckErrors == 0 && c.report.Corruptions == c.found.flags:
		steps = []func() error{c.clearFlags, c.lower, c.setFlags}
	default:
		steps = []func() error{c.lower}
	}
	for _, step := range steps {
		if err := step(); err != nil {
			return err
		}
		if err := c.sync(); err != nil {
			return err
		}
	}
	return nil
}

// raise raises the refcounts that are below the references.
func (c *checker) raise() error {
	return c.adjust(&c.done.corruptions, func(refcount, refs uint64) bool { return refcount < refs })
}

// lower lowers the refcounts that are above the references.
func (c *checker) lower() error {
	return c.adjust(&c.done.leaks, func(refcount, refs uint64) bool { return refcount > refs })
}

// adjust makes the refcounts that wrong tells equal to the references, as far as
// their blocks are sound.
func (c *checker) adjust(fixed *int64, wrong func(refcount, refs uint64) bool) error {
	var (
		perBlock = c.g.RefcountBlockBits()
		list     []int64 // of blocks
	)
	either(&c.stored, &c.refs, func(cluster int64, refcount, refs uint64) {
		i := cluster >> perBlock
		if n := len(list); (n == 0 || list[n-1] != i) && wrong(refcount, min(refs, c.most)) && c.inUse(cluster) && c.sound(i) {
			list = append(list, i)
		}
	})
	block := make([]byte, c.g.ClusterSize())
	for _, i := range list {
		p := patch{data: block, off: int64(c.table[i])}
		if err := c.readAt(block, p.off); err != nil {
			return err
		}
		for n := range int64(1) << perBlock {
			cluster := i<<perBlock + n
			refs := min(c.refs.get(cluster), c.most)
			if !c.inUse(cluster) || !wrong(c.stored.get(cluster), refs) {
				continue
			}
			c.g.SetRefcount(block, int(n), refs)
			at := int(n << c.g.RefcountOrder / 8)
			p.touch(at, at+max(1, 1<<c.g.RefcountOrder/8))
			c.stored.set(cluster, refs)
			*fixed++
		}
		if err := p.write(c); err != nil {
			return err
		}
	}
	return nil
}

// inUse reports whether a cluster's refcount is of interest: whether it is in
// the file, or compressed data reach into it.
func (c *checker) inUse(cluster int64) bool {
	return cluster < c.clusters || cluster == c.clusters && c.refs.get(cluster) > 0
}

// sound reports whether a refcount block can be written where it is.
func (c *checker) sound(i int64) bool {
	if i >= int64(len(c.table)) {
		return false
	}
	word := c.table[i]
	return word != 0 && c.g.CheckRefcountTable(word) == nil && c.writable(int64(word), c.g.ClusterSize()) &&
		c.refs.get(int64(word)>>c.g.ClusterBits) == 1
}

// writable reports whether the table of size bytes at off is in the file, at the
// start of a cluster, and no other metadata in its clusters.
func (c *checker) writable(off, size int64) bool {
	if !aligned(c.g, off) || off < 0 || off >= c.size || size > c.clusters<<c.g.ClusterBits-off {
		return false
	}
	last := (off + size - 1) >> c.g.ClusterBits
	for cluster := off >> c.g.ClusterBits; cluster <= last; cluster++ {
		if c.owners.get(cluster) != 1 {
			return false
		}
	}
	return true
}

// clearFlags takes copied flags away where the cluster is shared, setFlags sets
// them where it is not.
func (c *checker) clearFlags() error { return c.correctFlags(false) }
func (c *checker) setFlags() error   { return c.correctFlags(true) }

// correctFlags makes the copied flags of the active tables agree with the
// refcounts, those that must be set or those that must be clear.
func (c *checker) correctFlags(set bool) error {
	if c.found.flags == 0 && !c.done.wrote {
		return nil
	}
	correct := func(word uint64, off int64, wrong bool) uint64 {
		if !wrong || (word&layout.Copied == 0) != set {
			return word
		}
		switch refs := c.refs.get(off >> c.g.ClusterBits); {
		case set && refs > 1 && !c.g.External: // more than a refcount can tell
			return word
		case !set && refs == 1: // the refcount is about to fall
			return word
		}
		c.done.corruptions++
		return word ^ layout.Copied
	}
	if l1 := int64(c.h.L1Entries); l1 > 0 && c.writable(c.h.L1Offset, l1*8) {
		err := c.words(c.h.L1Offset, l1, func(_ int64, word uint64) (uint64, error) {
			off := layout.EntryOffset(word)
			if off == 0 && word == layout.Copied { // about no cluster at all
				c.done.corruptions++
				return 0, nil
			}
			if off == 0 {
				return word, nil
			}
			wrong, err := c.wrongFlag(word, off)
			return correct(word, off, wrong), err
		})
		if err != nil {
			return err
		}
	}
	return c.rewriteL2(func(t l2Table) bool { return t.active > 0 }, func(e l2Entry) (l2Entry, error) {
		if !hasHost(e.kind(c.g)) {
			return e, nil
		}
		wrong, err := c.wrongL2Flag(e)
		e.word = correct(e.word, layout.EntryOffset(e.word), wrong)
		return e, err
	})
}

// clearZeroes takes the offset out of entries that read as zeroes and whose
// offset is not a cluster's. In version 2 there are none.
func (c *checker) clearZeroes() error {
	every := func(l2Table) bool { return true }
	err := c.rewriteL2(every, func(e l2Entry) (l2Entry, error) {
		if off := layout.EntryOffset(e.word); !hasHost(e.kind(c.g)) || aligned(c.g, off) || !e.readsZero(c.g) {
			return e, nil
		}
		c.done.corruptions++
		if c.g.Extended {
			return l2Entry{bitmap: e.bitmap}, nil
		}
		return l2Entry{word: layout.ZeroFlag}, nil
	})
	if err != nil {
		return err
	}
	return c.sync()
}

// rewriteL2 replaces entries of the chosen L2 tables, those that can be written.
func (c *checker) rewriteL2(chosen func(l2Table) bool, f func(l2Entry) (l2Entry, error)) error {
	var list []block
	for _, t := range c.l2 {
		if chosen(t) && c.writable(t.off, c.g.ClusterSize()) {
			list = append(list, block{off: t.off})
		}
	}
	return c.blocks(list, func(b block, data []byte) error {
		p := patch{data: data, off: b.off}
		err := eachEntry(c.g, data, func(i int, e l2Entry) error {
			changed, err := f(e)
			if err != nil {
				return err
			}
			at := i * c.g.L2EntrySize()
			if changed.word != e.word {
				p.putWord(at, changed.word)
			}
			if changed.bitmap != e.bitmap {
				p.putWord(at+8, changed.bitmap)
			}
			return nil
		})
		if err != nil {
			return err
		}
		return p.write(c)
	})
}

// clearFeatures clears the dirty and the corrupt bit of an image without
// corruptions.
func (c *checker) clearFeatures() error {
	marks := layout.Dirty | layout.Corrupt
	if c.report.CheckErrors > 0 || c.report.Corruptions > 0 || c.h.Incompatible&marks == 0 {
		return nil
	}
	c.h.Incompatible &^= marks
	return c.writeHeader()
}
