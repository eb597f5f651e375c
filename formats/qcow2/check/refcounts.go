package check

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"math"
	"slices"

	"platter/formats/qcow2/layout"
)

// maxFile is the longest that QEMU takes a file to be.
const maxFile = math.MaxInt64 &^ (1<<30 - 1)

// blockOffset is where a refcount table entry says that its block is.
func blockOffset(word uint64) int64 { return int64(word &^ layout.RefcountTableReserved) }

// readable reports whether the refcounts that a refcount table entry stands for
// can be told at all. They are 0 where there is no block, or where the file has
// no bytes for it.
func (c *checker) readable(word uint64) bool {
	off := blockOffset(word)
	return off >= 0 && aligned(c.g, off) && off <= maxFile-c.g.ClusterSize()
}

// entry is the refcount table entry for a cluster.
func (c *checker) entry(cluster int64) uint64 {
	if i := cluster >> c.g.RefcountBlockBits(); i < int64(len(c.table)) {
		return c.table[i]
	}
	return 0
}

// loadRefcounts reads the refcount table and, into c.stored, the blocks.
func (c *checker) loadRefcounts() error {
	entries := int64(c.h.RefcountTableClusters) << c.g.ClusterBits / 8
	c.table = make([]uint64, c.inFile(c.h.RefcountTableOffset, entries*8)/8)
	err := c.words(c.h.RefcountTableOffset, int64(len(c.table)), func(i int64, word uint64) (uint64, error) {
		c.table[i] = word
		return word, nil
	})
	if err != nil {
		return fmt.Errorf("read refcount table: %w", err)
	}
	var list []block
	perBlock := c.g.RefcountBlockBits()
	for i, word := range c.table {
		off := blockOffset(word)
		switch {
		case !c.readable(word):
			c.found.unreadable = true
		case off != 0 && off < c.size && int64(i)<<perBlock <= c.clusters:
			list = append(list, block{off, int64(i)})
		}
	}
	slices.SortFunc(list, func(a, b block) int { return cmp.Compare(a.off, b.off) })
	err = c.blocks(list, func(b block, data []byte) error {
		c.load(data, b.key<<perBlock)
		return nil
	})
	if err != nil {
		return fmt.Errorf("read refcount blocks: %w", err)
	}
	return nil
}

// load takes over the refcounts of a block, whose first one is that of cluster
// first, as far as the file reaches. A cluster that only begins behind its end
// may be the end of compressed data.
func (c *checker) load(data []byte, first int64) {
	perWord := 64 >> c.g.RefcountOrder
	for at := 0; at < len(data); at += 8 {
		if binary.LittleEndian.Uint64(data[at:]) == 0 {
			continue
		}
		for i := range perWord {
			n := at/8*perWord + i
			if cluster := first + int64(n); cluster <= c.clusters {
				if v := c.g.Refcount(data, n); v != 0 {
					c.stored.set(cluster, v)
				}
			}
		}
	}
}

// refcount is the stored refcount of a cluster; ok is false where the refcount
// table is too damaged to tell. Clusters far behind the file's end, which no
// sound image refers to, have theirs read singly.
func (c *checker) refcount(cluster int64) (v uint64, ok bool, err error) {
	loaded := cluster <= c.clusters
	if loaded && !c.found.unreadable {
		return min(c.stored.get(cluster), c.most), true, nil
	}
	word := c.entry(cluster)
	switch {
	case !c.readable(word):
		return 0, false, nil
	case loaded:
		return min(c.stored.get(cluster), c.most), true, nil
	case word == 0:
		return 0, true, nil
	}
	i := cluster & (1<<c.g.RefcountBlockBits() - 1)
	var few [8]byte // the refcount, or those that share its byte
	at := i << c.g.RefcountOrder / 64 * 8
	if err := c.readAt(few[:], blockOffset(word)+at); err != nil {
		return 0, false, fmt.Errorf("read refcount of cluster %d: %w", cluster, err)
	}
	return c.g.Refcount(few[:], int(i-at*8>>c.g.RefcountOrder)), true, nil
}

// countRefcounts counts the references to the refcount table and its blocks.
// It comes last: a block that anything else refers to can't be trusted.
func (c *checker) countRefcounts() {
	size := c.g.ClusterSize()
	tableBytes := int64(c.h.RefcountTableClusters) << c.g.ClusterBits
	if !c.metadata(c.h.RefcountTableOffset, tableBytes, "refcount table") {
		c.damaged(1)
	}
	for i, word := range c.table {
		off := blockOffset(word)
		switch {
		case word&layout.RefcountTableReserved != 0:
			c.corrupt(1, "refcount table entry %d has reserved bits set: %#x", i, word)
			c.damaged(1)
		case !aligned(c.g, off):
			c.corrupt(1, "refcount block %d is not cluster aligned: %#x", i, off)
			c.damaged(1)
		case off < 0 || off>>c.g.ClusterBits >= c.clusters:
			c.corrupt(1, "refcount block %d is outside the image: %#x", i, uint64(off))
			c.damaged(1)
			c.beyondEnd(off, size)
		case off != 0:
			c.metadata(off, size, "refcount block")
			cluster := off >> c.g.ClusterBits
			n := c.refs.get(cluster)
			if min(n, c.most) != 1 {
				c.corrupt(1, "refcount block %d refcount=%d", i, n)
				c.damaged(1)
			}
			c.found.rebuild = c.found.rebuild || n != 1 || c.owners.get(cluster) != 1
		}
	}
	for at := int64(0); at < tableBytes && c.h.RefcountTableOffset+at < c.size; at += size {
		c.found.rebuild = c.found.rebuild || c.refs.get((c.h.RefcountTableOffset+at)>>c.g.ClusterBits) != 1
	}
}

// damaged notes faults of the refcount structure itself.
func (c *checker) damaged(faults int64) {
	c.found.structure += faults
	c.found.rebuild = true
}

// compare holds the refcounts against the references.
func (c *checker) compare() {
	var highest int64
	c.countUnreadable()
	either(&c.stored, &c.refs, func(cluster int64, refcount, refs uint64) {
		if refs > c.most {
			c.corrupt(int64(refs-c.most), "cluster %d has %d references, more than a refcount of %d bits can hold: copy the image with convert", cluster, refs, 1<<c.g.RefcountOrder)
			refs = c.most
		}
		// One cluster behind the end is known only if compressed data reach it.
		if cluster > c.clusters || cluster == c.clusters && refs == 0 || !c.readable(c.entry(cluster)) {
			return
		}
		highest = cluster
		switch {
		case refcount < refs:
			c.corrupt(1, "cluster %d refcount=%d reference=%d", cluster, refcount, refs)
			c.found.refcounts++
			c.found.rebuild = c.found.rebuild || c.entry(cluster) == 0
		case refcount > refs:
			c.report.Leaks++
			c.logf("Leaked cluster %d refcount=%d reference=%d", cluster, refcount, refs)
		case c.owners.get(cluster) > 1:
			c.corrupt(1, "cluster %d is metadata of more than one owner", cluster)
		}
	})
	c.report.ImageEndOffset = (highest + 1) << c.g.ClusterBits
}

// countUnreadable counts a check error for each cluster without a refcount.
func (c *checker) countUnreadable() {
	perBlock := c.g.RefcountBlockBits()
	for i, word := range c.table {
		first := int64(i) << perBlock
		if first >= c.clusters {
			return
		}
		if !c.readable(word) {
			last := min(first+1<<perBlock, c.clusters) - 1
			c.report.CheckErrors += last - first + 1
			c.logf("ERROR refcounts of clusters %d to %d can't be read", first, last)
		}
	}
}
