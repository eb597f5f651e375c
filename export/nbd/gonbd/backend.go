package gonbd

import (
	"io"
	"sync"

	"github.com/pojntfx/go-nbd/pkg/backend"
	"golang.org/x/sys/unix"

	"platter/aio"
	"platter/formats"
)

const (
	slots    = 16        // requests that a Disk has in flight at most
	slotSize = 256 << 10 // longest piece that a call is cut into, in bytes
)

// Disk is an image of ours with the blocking calls of a go-nbd backend. Any
// number of goroutines may make them at a time, except the loop's own; up to 16
// are on their way together. Ranges may begin and end anywhere, whatever the
// image's block size.
//
// Nothing written is durable before a Sync that began after the write returned.
type Disk struct {
	image formats.Image
	loop  *aio.Loop
	block int64

	// edges is held shared by writes of whole blocks, and alone by one that
	// reads a block, changes a part of it and writes it back.
	edges sync.RWMutex
	free  chan *slot // nil: not made yet
}

var _ backend.Backend = (*Disk)(nil)

// slot carries one request at a time.
type slot struct {
	disk   *Disk
	memory *aio.Memory
	req    aio.Request
	vec    [1]aio.Iovec
	batch  [1]*aio.Request
	submit func()
	done   chan struct{}
}

// Backend makes a go-nbd backend of an image, whose requests run on l. Image and
// loop stay the caller's: they must outlive the backend.
func Backend(img formats.Image, l *aio.Loop) *Disk {
	d := &Disk{image: img, loop: l, block: int64(max(img.Limits().BlockSize, 1)), free: make(chan *slot, slots)}
	for range slots {
		d.free <- nil
	}
	return d
}

// Close waits for the calls that are under way and gives the memory back. It
// does not close the image. No call may follow.
func (d *Disk) Close() error {
	var first error
	for range slots {
		if s := <-d.free; s != nil {
			if err := s.memory.Close(); err != nil && first == nil {
				first = err
			}
		}
	}
	return first
}

// Size is the length in bytes, without a last block that is not whole.
func (d *Disk) Size() (int64, error) { return d.size(), nil }

func (d *Disk) size() int64 { return d.image.Size() / d.block * d.block }

// ReadAt fills p from off on, as io.ReaderAt says.
func (d *Disk) ReadAt(p []byte, off int64) (int, error) {
	want := len(p)
	p, err := d.within("read", p, off)
	if err != nil {
		return 0, err
	}
	n := 0
	for n < len(p) {
		part, err := d.readPiece(p[n:], off+int64(n))
		if n += part; err != nil {
			return n, err
		}
	}
	if n < want {
		return n, io.EOF
	}
	return n, nil
}

// WriteAt stores p from off on, as io.WriterAt says. What does not fit into the
// image is not written, and the error then wraps io.ErrShortWrite.
func (d *Disk) WriteAt(p []byte, off int64) (int, error) {
	want := len(p)
	p, err := d.within("write", p, off)
	if err != nil {
		return 0, err
	}
	n := 0
	for n < len(p) {
		part, err := d.writePiece(p[n:], off+int64(n))
		if n += part; err != nil {
			return n, err
		}
	}
	if n < want {
		return n, &Error{Op: "write", Offset: off, Length: int64(want), Err: io.ErrShortWrite}
	}
	return n, nil
}

// Sync makes every write durable that has returned.
func (d *Disk) Sync() error {
	s, err := d.take()
	if err != nil {
		return err
	}
	defer d.give(s)
	return s.do(aio.OpFlush, 0, 0)
}

// within cuts p to what lies in the image.
func (d *Disk) within(op string, p []byte, off int64) ([]byte, error) {
	if off < 0 {
		return nil, &Error{Op: op, Offset: off, Length: int64(len(p)), Err: unix.EINVAL}
	}
	return p[:min(int64(len(p)), max(d.size()-off, 0))], nil
}

// piece is the whole blocks that the beginning of p at off touches, as far as
// they fit into a slot, and how many bytes of p they hold.
func (d *Disk) piece(p []byte, off int64) (start, length int64, n int) {
	most := min(slotSize, max(d.image.Limits().MaxTransfer, d.block)) / d.block * d.block
	start = off / d.block * d.block
	end := (off + int64(len(p)) + d.block - 1) / d.block * d.block
	length = min(end-start, most)
	return start, length, int(min(int64(len(p)), start+length-off))
}

// readPiece reads the beginning of p, at least one byte.
func (d *Disk) readPiece(p []byte, off int64) (int, error) {
	s, err := d.take()
	if err != nil {
		return 0, err
	}
	defer d.give(s)
	start, length, n := d.piece(p, off)
	if err := s.do(aio.OpRead, start, length); err != nil {
		return 0, err
	}
	copy(p[:n], s.memory.Bytes()[off-start:])
	return n, nil
}

// writePiece writes the beginning of p, at least one byte. Blocks of which p
// holds only a part are read first.
func (d *Disk) writePiece(p []byte, off int64) (int, error) {
	s, err := d.take()
	if err != nil {
		return 0, err
	}
	defer d.give(s)
	start, length, n := d.piece(p, off)
	if int64(n) == length {
		d.edges.RLock()
		defer d.edges.RUnlock()
	} else {
		d.edges.Lock()
		defer d.edges.Unlock()
		if err := s.do(aio.OpRead, start, length); err != nil {
			return 0, err
		}
	}
	copy(s.memory.Bytes()[off-start:], p[:n])
	if err := s.do(aio.OpWrite, start, length); err != nil {
		return 0, err
	}
	return n, nil
}

// take waits for a free slot.
func (d *Disk) take() (*slot, error) {
	s := <-d.free
	if s != nil {
		return s, nil
	}
	memory, err := aio.NewMemory(slotSize)
	if err != nil {
		d.free <- nil
		return nil, err
	}
	s = &slot{disk: d, memory: memory, done: make(chan struct{}, 1)}
	s.req.Done = func(*aio.Request) { s.done <- struct{}{} }
	s.batch[0] = &s.req
	s.submit = func() { d.image.Submit(d.loop, s.batch[:]) }
	return s, nil
}

func (d *Disk) give(s *slot) { d.free <- s }

// do has the loop carry out one request on the slot's memory, and waits for it.
func (s *slot) do(op aio.Op, off, length int64) error {
	s.req.Op, s.req.Offset, s.req.Length, s.req.Vec = op, off, length, nil
	if op == aio.OpRead || op == aio.OpWrite {
		s.vec[0] = s.memory.Iovec(0, int(length))
		s.req.Vec = s.vec[:]
	}
	s.disk.loop.Post(s.submit)
	<-s.done
	if s.req.Errno != 0 {
		return &Error{Op: op.String(), Offset: off, Length: length, Err: s.req.Errno}
	}
	return nil
}
