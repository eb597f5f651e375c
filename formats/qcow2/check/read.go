package check

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sync"
)

const (
	pieceBytes = 1 << 20 // of a long table that are read at a time
	runBytes   = 4 << 20 // of neighbouring tables that are read at a time
	gapBytes   = 64 << 10
	readAhead  = 4 // runs
)

// readAt fills p from the file. Behind its end there are zeroes, as there would
// be if it grew.
func (c *checker) readAt(p []byte, off int64) error {
	n, err := 0, error(nil)
	if off < c.size {
		n, err = c.f.ReadAt(p[:min(int64(len(p)), c.size-off)], off)
	}
	if err != nil && !errors.Is(err, io.EOF) {
		return fmt.Errorf("read %d bytes at offset %#x: %w", len(p), off, err)
	}
	clear(p[n:])
	return nil
}

// ReadAt makes the checker an io.ReaderAt for what parses a table by itself.
func (c *checker) ReadAt(p []byte, off int64) (int, error) {
	if err := c.readAt(p, off); err != nil {
		return 0, err
	}
	return len(p), nil
}

// meter counts the metadata that is read.
type meter struct {
	done, total int64
	limit       int64 // the most that a sound image can have, and some
	report      func(done, total int64)
}

// expect announces n bytes to be read.
func (m *meter) expect(n int64) error {
	if m.total += n; m.total > m.limit {
		return ErrTangled
	}
	return nil
}

func (m *meter) read(n int64) {
	m.done += n
	if m.report != nil {
		m.report(m.done, m.total)
	}
}

// finish reports the end, even when there was nothing to read.
func (m *meter) finish() { m.read(m.total - m.done) }

// inFile is how much of n bytes from off on lies within the file. The offset may
// be one that no file has.
func (c *checker) inFile(off, n int64) int64 {
	if off < 0 || off >= c.size {
		return 0
	}
	return min(n, c.size-off)
}

// words calls f for each word of a table that isn't 0, in order. A word that f
// returns changed is written back.
func (c *checker) words(off, entries int64, f func(i int64, word uint64) (uint64, error)) error {
	length := c.inFile(off, entries*8) &^ 7
	if err := c.meter.expect(length); err != nil {
		return err
	}
	buf := make([]byte, min(length, pieceBytes))
	for at := int64(0); at < length; at += pieceBytes {
		piece := patch{data: buf[:min(length-at, pieceBytes)], off: off + at}
		if err := c.readAt(piece.data, piece.off); err != nil {
			return err
		}
		c.meter.read(int64(len(piece.data)))
		for i := 0; i < len(piece.data); i += 8 {
			word := binary.BigEndian.Uint64(piece.data[i:])
			if word == 0 {
				continue
			}
			changed, err := f((at+int64(i))/8, word)
			if err != nil {
				return err
			}
			if changed != word {
				piece.putWord(i, changed)
			}
		}
		if err := piece.write(c); err != nil {
			return err
		}
	}
	return nil
}

// block is a table or a refcount block to be read as a whole.
type block struct {
	off int64
	key int64 // whatever the reader wants to know of it
}

// run is neighbouring blocks that are read together.
type run struct {
	blocks []block
	buf    []byte
	off    int64
	done   chan error
}

// blocks reads blocks of a cluster each, which are sorted by offset, and calls f
// with them in that order. The data are f's until it returns. Neighbours are
// read together, and some runs ahead of f.
func (c *checker) blocks(list []block, f func(b block, data []byte) error) error {
	size := c.g.ClusterSize()
	if err := c.meter.expect(int64(len(list)) * size); err != nil {
		return err
	}
	var (
		queue = make(chan *run, readAhead)
		free  = make(chan []byte, readAhead)
		stop  = make(chan struct{})
		tasks sync.WaitGroup
	)
	defer tasks.Wait()
	defer close(stop)
	tasks.Go(func() {
		defer close(queue)
		for len(list) > 0 {
			r := nextRun(list, size)
			list = list[len(r.blocks):]
			select {
			case queue <- r:
			case <-stop:
				return
			}
			select {
			case r.buf = <-free:
			default:
			}
			last := r.blocks[len(r.blocks)-1]
			if n := last.off + size - r.off; n <= int64(cap(r.buf)) {
				r.buf = r.buf[:n]
			} else {
				r.buf = make([]byte, n)
			}
			tasks.Go(func() { r.done <- c.readAt(r.buf, r.off) })
		}
	})
	for r := range queue {
		if err := <-r.done; err != nil {
			return err
		}
		for _, b := range r.blocks {
			if err := f(b, r.buf[b.off-r.off:][:size]); err != nil {
				return err
			}
		}
		c.meter.read(int64(len(r.blocks)) * size)
		select {
		case free <- r.buf:
		default:
		}
	}
	return nil
}

// nextRun takes blocks from the list's start as far as they are neighbours.
func nextRun(list []block, size int64) *run {
	n, end := 1, list[0].off+size
	for n < len(list) && list[n].off <= end+gapBytes && list[n].off+size-list[0].off <= runBytes {
		end = list[n].off + size
		n++
	}
	return &run{blocks: list[:n], off: list[0].off, done: make(chan error, 1)}
}
