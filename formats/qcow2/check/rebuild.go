package check

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"slices"

	"platter/formats/qcow2/layout"
)

// plan is where a new refcount structure goes: the blocks, behind them the
// table, and perhaps a snapshot table.
type plan struct {
	start     int64   // the first cluster
	blocks    []int64 // which blocks there are, in order
	table     int64   // clusters of the refcount table
	snapshots []byte  // the snapshot table if it is to be replaced
	end       int64   // the cluster behind it all
}

// rebuild writes a new refcount table with new blocks from the references, and a
// new snapshot table if the old one has faults. Nothing of what the image uses
// is touched until the header switches to the new tables, in one sector. What
// the old ones took is free from then on.
func (c *checker) rebuild() error {
	length, err := c.f.Size()
	if err != nil {
		return fmt.Errorf("find size of image: %w", err)
	}
	p, err := c.place()
	if err != nil {
		return err
	}
	next, err := c.recount(p)
	if err == nil {
		err = next.writePlan(p)
	}
	if err != nil && p.end<<c.g.ClusterBits > length {
		err = errors.Join(err, c.f.Truncate(length))
	}
	if err != nil {
		return err
	}
	c.done.corruptions += c.found.refcounts + c.found.structure + c.snapshots.faults
	c.done.leaks += c.report.Leaks
	c.h, c.table, c.size, c.clusters = next.h, next.table, next.size, next.clusters
	c.refs, c.stored, c.owners, c.l2 = next.refs, next.refs, next.owners, next.l2
	c.found.unreadable = false
	return c.writeHeader()
}

// place finds room for the new tables: behind the end of the file or, where it
// can't grow as on a block device, behind everything that is in use.
func (c *checker) place() (plan, error) {
	p, err := c.plan(c.clusters)
	if err != nil {
		return p, err
	}
	if err := c.begin(); err != nil {
		return p, err
	}
	grow := c.f.Truncate(p.end << c.g.ClusterBits)
	if grow == nil {
		return p, nil
	}
	p, err = c.plan(c.used())
	if err != nil || p.end<<c.g.ClusterBits > c.size {
		return p, fmt.Errorf("make room for new refcounts: %w", grow)
	}
	return p, nil
}

// used is the cluster behind all that are in use, or have been: those with a
// refcount, and those of refcount blocks whose entries are damaged.
func (c *checker) used() int64 {
	var end int64
	either(&c.stored, &c.refs, func(cluster int64, _, _ uint64) { end = max(end, cluster+1) })
	for _, word := range c.table {
		if off := blockOffset(word); c.inFile(off, 1) > 0 {
			end = max(end, c.g.Clusters(off+c.g.ClusterSize()))
		}
	}
	return end
}

// plan finds a place from a cluster on that no entry of the image refers to.
// Entries may well name clusters behind the end, above all when the file was cut
// off.
func (c *checker) plan(start int64) (plan, error) {
	p := plan{start: start}
	switch {
	case c.owners.get(0) > 1:
		// What that table says changes when the header switches.
		return p, fmt.Errorf("%w: the header is part of another table; copy it with convert", ErrBeyondRepair)
	case c.beyond.full:
		return p, fmt.Errorf("%w: its entries refer to too many places behind the end of the file; copy it with convert", ErrBeyondRepair)
	}
	c.beyond.merge()
	if c.snapshots.faults > 0 {
		p.snapshots = layout.AppendSnapshots(nil, c.snapshots.list)
	}
	needed := make(map[int64]bool)
	either(&c.refs, &counts{}, func(cluster int64, _, _ uint64) {
		needed[cluster>>c.g.RefcountBlockBits()] = true
	})
	if c.refs.get(p.start) > 0 { // compressed data end there
		p.start++
	}
	if err := c.fit(&p, needed); err != nil {
		return p, err
	}
	for _, s := range c.beyond.list {
		if s.first < p.end && s.last >= p.start {
			p.start = s.last + 1
			if err := c.fit(&p, needed); err != nil {
				return p, err
			}
		}
	}
	return p, nil
}

// fit computes how much must be written if it is to begin at p.start. The blocks
// and the table count themselves.
func (c *checker) fit(p *plan, needed map[int64]bool) error {
	perBlock := c.g.RefcountBlockBits()
	p.end = p.start + 1
	for {
		last := (p.end - 1) >> perBlock
		p.table = c.g.Clusters((last + 1) * 8)
		if p.table<<c.g.ClusterBits > layout.MaxRefcountTableBytes {
			return fmt.Errorf("%w: its refcount table would have more than 8 MiB; copy it with convert, to larger clusters", ErrBeyondRepair)
		}
		all := maps.Clone(needed)
		for i := min(p.start, c.clusters) >> perBlock; i <= last; i++ {
			all[i] = true
		}
		p.blocks = slices.Sorted(maps.Keys(all))
		end := p.start + int64(len(p.blocks)) + p.table + c.g.Clusters(int64(len(p.snapshots)))
		if end == p.end {
			return nil
		}
		p.end = end
	}
}

// recount is a pass over the image as it will be with the plan carried out.
func (c *checker) recount(p plan) (*checker, error) {
	h := *c.h
	cluster := func(n int64) int64 { return (p.start + n) << c.g.ClusterBits }
	next := &checker{
		f: c.f, h: &h, g: c.g, most: c.most, done: c.done,
		size: max(c.size, p.end<<c.g.ClusterBits), clusters: max(c.clusters, p.end),
		snapshots: c.snapshots, bitmaps: c.bitmaps,
		meter: meter{limit: c.meter.limit},
	}
	blocks := int64(len(p.blocks))
	h.RefcountTableOffset, h.RefcountTableClusters = cluster(blocks), uint32(p.table)
	next.table = make([]uint64, p.table<<c.g.ClusterBits/8)
	for i, at := range p.blocks {
		next.table[at] = uint64(cluster(int64(i)))
	}
	if p.snapshots != nil {
		h.SnapshotsOffset, next.snapshots.size = cluster(blocks+p.table), int64(len(p.snapshots))
	}
	if err := next.count(); err != nil {
		return nil, err
	}
	for n := p.start; n < p.end; n++ { // trust nothing
		if next.refs.get(n) != 1 {
			return nil, fmt.Errorf("%w: no place was found for new refcounts; copy it with convert", ErrBeyondRepair)
		}
	}
	return next, nil
}

// writePlan writes the new tables and makes them durable.
func (c *checker) writePlan(p plan) error {
	block := make([]byte, c.g.ClusterSize())
	perBlock := c.g.RefcountBlockBits()
	for _, i := range p.blocks {
		clear(block)
		for n := range int64(1) << perBlock {
			if refs := c.refs.get(i<<perBlock + n); refs > 0 {
				c.g.SetRefcount(block, int(n), min(refs, c.most))
			}
		}
		if err := c.write(block, int64(c.table[i])); err != nil {
			return err
		}
	}
	table := make([]byte, 0, len(c.table)*8)
	for _, word := range c.table {
		table = binary.BigEndian.AppendUint64(table, word)
	}
	if err := c.write(table, c.h.RefcountTableOffset); err != nil {
		return err
	}
	if p.snapshots != nil {
		padded := make([]byte, c.g.Clusters(int64(len(p.snapshots)))<<c.g.ClusterBits)
		copy(padded, p.snapshots)
		if err := c.write(padded, c.h.SnapshotsOffset); err != nil {
			return err
		}
	}
	return c.sync()
}
