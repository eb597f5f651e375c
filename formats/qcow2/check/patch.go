package check

import (
	"encoding/binary"
	"fmt"
)

const sector = 512 // what a disk writes as a whole or not at all

// patch is a part of the file, of whole sectors, in which some bytes change.
type patch struct {
	data  []byte
	off   int64
	from  int // what has changed
	to    int
	dirty bool
}

func (p *patch) putWord(at int, word uint64) {
	binary.BigEndian.PutUint64(p.data[at:], word)
	p.touch(at, at+8)
}

// touch notes that the bytes between two places have changed.
func (p *patch) touch(from, to int) {
	if !p.dirty {
		p.from, p.to, p.dirty = from, to, true
	}
	p.from, p.to = min(p.from, from), max(p.to, to)
}

// write writes the sectors that have changed.
func (p *patch) write(c *checker) error {
	if !p.dirty {
		return nil
	}
	from := p.from &^ (sector - 1)
	to := min((p.to+sector-1)&^(sector-1), len(p.data))
	p.dirty = false
	return c.write(p.data[from:to], p.off+int64(from))
}

// begin comes before anything is written: it clears the autoclear features that
// are unknown here, as the specification demands.
func (c *checker) begin() error {
	if c.done.wrote {
		return nil
	}
	c.done.wrote = true
	if !c.h.ClearUnknown() {
		return nil
	}
	return c.writeHeader()
}

// write writes to the image.
func (c *checker) write(p []byte, off int64) error {
	if err := c.begin(); err != nil {
		return err
	}
	if _, err := c.f.WriteAt(p, off); err != nil {
		return fmt.Errorf("write %d bytes at offset %#x: %w", len(p), off, err)
	}
	c.done.pending = true
	return nil
}

// sync makes what was written durable.
func (c *checker) sync() error {
	if !c.done.pending {
		return nil
	}
	if err := c.f.Sync(); err != nil {
		return fmt.Errorf("sync image: %w", err)
	}
	c.done.pending = false
	return nil
}

// writeHeader writes the fields that a repair changes. They stand in one sector,
// so that a power cut leaves either all or none of them changed.
func (c *checker) writeHeader() error {
	if err := c.begin(); err != nil {
		return err
	}
	head := patch{data: make([]byte, sector)}
	if err := c.readAt(head.data, 0); err != nil {
		return err
	}
	be := binary.BigEndian
	be.PutUint64(head.data[48:], uint64(c.h.RefcountTableOffset))
	be.PutUint32(head.data[56:], c.h.RefcountTableClusters)
	be.PutUint64(head.data[64:], uint64(c.h.SnapshotsOffset))
	if c.h.Version >= 3 {
		be.PutUint64(head.data[72:], c.h.Incompatible)
		be.PutUint64(head.data[88:], c.h.Autoclear)
	}
	head.touch(0, sector)
	if err := head.write(c); err != nil {
		return err
	}
	return c.sync()
}
