package formattest

import (
	"fmt"

	"platter/aio"
	"platter/formats"
)

// guest makes the requests of one lane.
type guest struct {
	*lane
	size    int64
	limits  formats.Limits
	version uint64 // of its last write
}

// round does a batch, of which requests may overlap, and at times a flush among
// them or after them.
func (g *guest) round(image aio.Storage) error {
	batch := make([]*aio.Request, 1+g.rng.IntN(10))
	for i := range batch {
		batch[i] = g.request()
	}
	if g.rng.IntN(8) == 0 {
		batch[g.rng.IntN(len(batch))] = &aio.Request{Op: aio.OpFlush}
	}
	g.submit(image, batch...)
	if g.rng.IntN(8) == 0 {
		r := &aio.Request{Op: aio.OpFlush}
		g.submit(image, r)
		batch = append(batch, r)
	}
	for _, r := range batch {
		if err := outcome(r); err != nil {
			return err
		}
	}
	return nil
}

// outcome is a request's error.
func outcome(r *aio.Request) error {
	if r.Errno != 0 {
		return fmt.Errorf("%v %d+%d: %w", r.Op, r.Offset, r.Length, r.Errno)
	}
	return nil
}

func (g *guest) request() *aio.Request {
	r := &aio.Request{}
	switch n := g.rng.IntN(100); {
	case n < 15:
		r.Op = aio.OpRead
	case n < 70:
		r.Op = aio.OpWrite
	case n < 84:
		r.Op = aio.OpWriteZeroes
		if g.rng.IntN(2) == 0 {
			r.Flags |= aio.FlagNoUnmap
		}
	default:
		r.Op = aio.OpDiscard
	}
	if r.Op.Writes() && g.rng.IntN(24) == 0 {
		r.Flags |= aio.FlagFUA
	}
	return g.complete(r)
}

// complete gives a request its place and its bytes.
func (g *guest) complete(r *aio.Request) *aio.Request {
	g.place(r)
	if r.Op == aio.OpRead || r.Op == aio.OpWrite {
		r.Vec = g.vec(r.Length, 1+g.rng.IntN(min(g.limits.MaxSegments, 4)))
	}
	if r.Op == aio.OpWrite {
		g.version++
		aio.CopyIn(r.Vec, stamped(r.Offset, r.Length, g.version))
	}
	return r
}

// place chooses a range of whole sectors. Most are short; half are in the first
// part of the image, where they meet.
func (g *guest) place(r *aio.Request) {
	block := max(sectorSize, int64(g.limits.BlockSize))
	blocks := g.size / block
	n, align := 1+g.rng.Int64N(16), int64(1)
	switch g.rng.IntN(8) {
	case 0, 1: // pages
		align = max(1, pageSize/block)
		n = align * (1 + g.rng.Int64N(4))
	case 2: // clusters
		align = max(1, 64<<10/block)
		n = align * (1 + g.rng.Int64N(2))
	case 3:
		if n = 1 + g.rng.Int64N(256); r.Op == aio.OpDiscard || r.Op == aio.OpWriteZeroes {
			n = 1 + g.rng.Int64N(blocks/2+1)
		}
	}
	n = min(n, blocks)
	reach := blocks - n + 1
	if g.rng.IntN(2) == 0 {
		reach = min(reach, max(1, blocks/8))
	}
	r.Offset, r.Length = g.rng.Int64N(reach)/align*align*block, n*block
}

// readInto reads the whole image.
func (ln *lane) readInto(image aio.Storage, limits formats.Limits, buf []byte) error {
	most := min(limits.MaxTransfer, 1<<20)
	for off := int64(0); off < int64(len(buf)); off += most {
		n := min(most, int64(len(buf))-off)
		vec := ln.vec(n, 1)
		r := &aio.Request{Op: aio.OpRead, Offset: off, Length: n, Vec: vec}
		ln.submit(image, r)
		if err := outcome(r); err != nil {
			return err
		}
		aio.CopyOut(buf[off:], vec)
	}
	return nil
}
