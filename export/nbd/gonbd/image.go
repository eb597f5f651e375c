package gonbd

import (
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/pojntfx/go-nbd/pkg/backend"
	"golang.org/x/sys/unix"

	"platter/aio"
	"platter/formats"
)

// Options says what go-nbd's interface can't tell about a backend. The zero
// value suits a backend that is written to.
type Options struct {
	ReadOnly bool

	// BlockSize is the smallest unit of reads and writes in bytes, a power of 2
	// up to 64 KiB; 0 means 1.
	BlockSize uint32
	// PreferredSize is the size in bytes from which on requests are cheap, a
	// power of 2; 0 means 4096 or BlockSize, whichever is more.
	PreferredSize uint32
}

const (
	maxBlockSize = 64 << 10
	maxTransfer  = 32 << 20 // what NBD clients take for granted
	keepBuffer   = 1 << 20  // longest buffer that is kept for the next call
)

// zeroes is what WriteZeroes writes.
var zeroes [64 << 10]byte

// image is a go-nbd backend as an Image.
type image struct {
	backend backend.Backend
	size    int64
	options Options
	calls   sync.Pool // of *call
}

var _ formats.Image = (*image)(nil)

// Image makes an image of a backend. The backend stays its owner's: closing the
// image leaves it alone. It is called from several goroutines at a time, for
// ranges that may overlap only where a client's requests do. Its size is asked
// for once, here. A write is durable after a Sync that follows it; a discard is
// ignored, as backends know none.
//
// The backend must not itself wait for I/O of this process's loops, as a Disk
// does: enough of its calls would fill the pool that such I/O may need.
//
// The error is ErrBackend with the reason: the backend's size, or an option
// that doesn't fit it.
func Image(b backend.Backend, o Options) (formats.Image, error) {
	size, err := b.Size()
	if err != nil {
		return nil, fmt.Errorf("%w: ask for its size: %w", ErrBackend, err)
	}
	o.BlockSize = max(o.BlockSize, 1)
	if o.PreferredSize == 0 {
		o.PreferredSize = max(4096, o.BlockSize)
	}
	switch {
	case o.BlockSize&(o.BlockSize-1) != 0 || o.BlockSize > maxBlockSize:
		return nil, fmt.Errorf("%w: a block size of %d is no power of 2 up to %d", ErrBackend, o.BlockSize, maxBlockSize)
	case o.PreferredSize&(o.PreferredSize-1) != 0 || o.PreferredSize < o.BlockSize:
		return nil, fmt.Errorf("%w: a preferred size of %d is no power of 2 from %d on", ErrBackend, o.PreferredSize, o.BlockSize)
	case size < 0 || size%int64(o.BlockSize) != 0:
		return nil, fmt.Errorf("%w: a size of %d is no multiple of the block size %d", ErrBackend, size, o.BlockSize)
	}
	return &image{backend: b, size: size, options: o}, nil
}

func (m *image) Size() int64    { return m.size }
func (m *image) ReadOnly() bool { return m.options.ReadOnly }
func (m *image) Format() string { return "go-nbd" }
func (m *image) Close() error   { return nil }

func (m *image) Limits() formats.Limits {
	return formats.Limits{
		BlockSize:          m.options.BlockSize,
		PreferredSize:      m.options.PreferredSize,
		MaxTransfer:        maxTransfer,
		MaxSegments:        1024,
		DiscardGranularity: m.options.PreferredSize,
		MultiConn:          true,
	}
}

// Submit sends each request to the pool. What is wrong completes at once.
func (m *image) Submit(l *aio.Loop, batch []*aio.Request) {
	for _, r := range batch {
		if errno := m.check(r); errno != 0 {
			r.Complete(errno)
			continue
		}
		c := m.newCall(r)
		l.Go(c.work, c.done)
	}
}

func (m *image) check(r *aio.Request) unix.Errno {
	switch {
	case m.options.ReadOnly && r.Op.Writes():
		return unix.EPERM
	case r.Offset < 0 || r.Length < 0:
		return unix.EINVAL
	case r.Offset > m.size || r.Length > m.size-r.Offset:
		if r.Op == aio.OpWrite || r.Op == aio.OpWriteZeroes {
			return unix.ENOSPC
		}
		return unix.EINVAL
	case (r.Op == aio.OpRead || r.Op == aio.OpWrite) && r.Length > maxTransfer:
		return unix.EINVAL
	}
	return 0
}

// call is one request on its way through the pool. Its functions are made once.
type call struct {
	image      *image
	req        *aio.Request
	errno      unix.Errno
	buf        []byte // a backend wants Go memory
	work, done func()
}

func (m *image) newCall(r *aio.Request) *call {
	c, ok := m.calls.Get().(*call)
	if !ok {
		c = &call{image: m}
		c.work, c.done = c.perform, c.complete
	}
	c.req = r
	return c
}

// perform runs on a thread of the pool.
func (c *call) perform() {
	b, r := c.image.backend, c.req
	var err error
	switch r.Op {
	case aio.OpRead:
		p := c.buffer(r.Length)
		if err = readFull(b, p, r.Offset); err == nil {
			aio.CopyIn(r.Vec, p)
		}
	case aio.OpWrite:
		p := c.buffer(r.Length)
		aio.CopyOut(p, r.Vec)
		err = writeFull(b, p, r.Offset)
	case aio.OpWriteZeroes:
		for off := r.Offset; off < r.End() && err == nil; off += int64(len(zeroes)) {
			err = writeFull(b, zeroes[:min(int64(len(zeroes)), r.End()-off)], off)
		}
	case aio.OpFlush:
		// Nobody may write to the backend of a read-only image.
		if !c.image.options.ReadOnly {
			err = b.Sync()
		}
	case aio.OpDiscard, aio.OpCache:
	default:
		err = unix.EINVAL
	}
	if err == nil && r.Op.Writes() && r.Flags&aio.FlagFUA != 0 {
		err = b.Sync()
	}
	c.errno = errnoOf(err)
}

// complete runs on the loop's thread.
func (c *call) complete() {
	r, errno := c.req, c.errno
	c.req = nil
	if cap(c.buf) > keepBuffer {
		c.buf = nil
	}
	c.image.calls.Put(c)
	r.Complete(errno)
}

func (c *call) buffer(n int64) []byte {
	if int64(cap(c.buf)) < n {
		c.buf = make([]byte, n)
	}
	return c.buf[:n]
}

// readFull reads p. A backend may report the end of its data together with the
// last of them, and must not fall short. It is not asked for nothing: go-nbd's
// memory backend never wakes up from that at its end.
func readFull(b backend.Backend, p []byte, off int64) error {
	if len(p) == 0 {
		return nil
	}
	n, err := b.ReadAt(p, off)
	if n == len(p) && (err == nil || errors.Is(err, io.EOF)) {
		return nil
	}
	if err == nil {
		err = io.ErrUnexpectedEOF
	}
	return err
}

func writeFull(b backend.Backend, p []byte, off int64) error {
	if len(p) == 0 {
		return nil
	}
	n, err := b.WriteAt(p, off)
	if err == nil && n != len(p) {
		err = io.ErrShortWrite
	}
	return err
}
