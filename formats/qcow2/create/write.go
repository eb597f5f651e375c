package create

import (
	"encoding/binary"
	"errors"
	"io"

	"golang.org/x/sys/unix"

	"platter/formats/qcow2/layout"
)

// file is what an image is written to. It is empty at first, and what is not
// written reads as zero.
type file interface {
	io.WriterAt
	Truncate(size int64) error
	// Allocate takes the space for a range, without writing to it. It fails
	// with EOPNOTSUPP where that cannot be done.
	Allocate(off, n int64) error
	Sync() error
}

// unfinished stands in the place of the header's version until everything else
// is durable: a version that nobody knows and everybody refuses. Without it a
// file that was never finished could be taken for a raw image.
const unfinished = 1<<32 - 1

// versionEnd is the end of the magic number and the version.
const versionEnd = 8

// write writes the image. Whenever it stops, what is there is refused by
// whoever opens it; the last write makes it an image, and that lies within one
// sector, which a power cut leaves old or new.
func (p *plan) write(image file, mode Preallocation) error {
	head := append([]byte(nil), p.head...)
	binary.BigEndian.PutUint32(head[4:], unfinished)
	if _, err := image.WriteAt(head, 0); err != nil {
		return err
	}
	if err := image.Sync(); err != nil {
		return err
	}
	if err := image.Truncate(p.length); err != nil {
		return err
	}
	if err := reserve(image, p.ClusterSize(), p.length, mode); err != nil {
		return err
	}
	if err := p.writeTables(image); err != nil {
		return err
	}
	if err := image.Sync(); err != nil {
		return err
	}
	if _, err := image.WriteAt(p.head[:versionEnd], 0); err != nil {
		return err
	}
	return image.Sync()
}

// writeData makes the external data file, as long as the disk.
func (p *plan) writeData(data file, mode Preallocation) error {
	if err := data.Truncate(p.header.Size); err != nil {
		return err
	}
	if err := reserve(data, 0, p.header.Size, mode); err != nil {
		return err
	}
	return data.Sync()
}

// writeTables writes what is not zero of the tables.
func (p *plan) writeTables(w io.WriterAt) error {
	size := p.ClusterSize()
	blocks := p.offset(p.refcountBlocks)
	err := writeWords(w, p.offset(p.refcountTable), p.refcountBlocks.count, func(i int64) uint64 {
		return uint64(blocks + i*size)
	})
	if err != nil {
		return err
	}
	if err := p.writeRefcounts(w); err != nil {
		return err
	}
	if p.mapped == 0 {
		return nil
	}
	l2 := p.offset(p.l2)
	err = writeWords(w, p.offset(p.l1), p.l2.count, func(i int64) uint64 {
		return uint64(l2+i*size) | layout.Copied
	})
	if err != nil {
		return err
	}
	return p.writeL2(w)
}

// writeRefcounts gives each cluster of the file a refcount of 1.
func (p *plan) writeRefcounts(w io.WriterAt) error {
	perWord := int64(64 >> p.RefcountOrder)
	ones := func(n int64) uint64 {
		var word [8]byte
		for i := range n {
			p.SetRefcount(word[:], int(i), 1)
		}
		return binary.BigEndian.Uint64(word[:])
	}
	all := ones(perWord)
	clusters := p.data.end()
	return writeWords(w, p.offset(p.refcountBlocks), (clusters+perWord-1)/perWord, func(i int64) uint64 {
		if rest := clusters - i*perWord; rest < perWord {
			return ones(rest)
		}
		return all
	})
}

// writeL2 maps every cluster of the disk. With extended entries no subcluster
// is allocated yet, only the host cluster: reads still reach the backing file.
func (p *plan) writeL2(w io.WriterAt) error {
	host := int64(0) // in a data file, guest and host offset are the same
	if !p.External {
		host = p.offset(p.data)
	}
	words := int64(p.L2EntrySize() / 8)
	return writeWords(w, p.offset(p.l2), p.mapped*words, func(i int64) uint64 {
		if i%words > 0 {
			return 0
		}
		return uint64(host+i/words<<p.ClusterBits) | layout.Copied
	})
}

// chunk is how many bytes are written at once.
const chunk = 1 << 20

// writeWords writes n words from off on; word tells what they are.
func writeWords(w io.WriterAt, off, n int64, word func(i int64) uint64) error {
	buf := make([]byte, 0, min(8*n, chunk))
	for i := int64(0); i < n; {
		buf = buf[:0]
		for ; i < n && len(buf) < cap(buf); i++ {
			buf = binary.BigEndian.AppendUint64(buf, word(i))
		}
		if _, err := w.WriteAt(buf, off); err != nil {
			return err
		}
		off += int64(len(buf))
	}
	return nil
}

// reserve takes the space for a file from an offset to its end, as far as the
// mode asks for it. Where it can only be taken by writing, it is.
func reserve(f file, from, end int64, mode Preallocation) error {
	if mode < PreallocateFalloc || from >= end {
		return nil
	}
	err := f.Allocate(from, end-from)
	switch {
	case errors.Is(err, unix.EOPNOTSUPP):
	case err != nil || mode == PreallocateFalloc:
		return err
	}
	zeroes := make([]byte, min(end-from, chunk))
	for off := from; off < end; off += chunk {
		if _, err := f.WriteAt(zeroes[:min(end-off, chunk)], off); err != nil {
			return err
		}
	}
	return nil
}
