package qcow2

import (
	"fmt"
	"io"

	"golang.org/x/sys/unix"

	"platter/aio"
	"platter/formats"
)

var (
	_ io.ReaderAt = (*Image)(nil)
	_ io.WriterAt = (*Image)(nil)
)

// Open opens the image at path by itself, for programs that want to read or
// write it as they would a file: see ReadAt, WriteAt and Flush. It is locked as
// formats.Open says.
func Open(path string, o formats.Options) (*Image, error) {
	o.Format = "qcow2"
	image, err := formats.Open(path, o)
	if err != nil {
		return nil, err
	}
	return image.(*Image), nil
}

// ReadAt fills p with what the guest has at off, as io.ReaderAt says. It waits,
// may be called by many goroutines at a time, and must not be called on a loop.
func (im *Image) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, fmt.Errorf("read at %d: %w", off, unix.EINVAL)
	}
	if off >= im.size && len(p) > 0 {
		return 0, io.EOF
	}
	n := int(min(int64(len(p)), im.size-off))
	if err := im.waiter.readAt(im, p[:n], off); err != nil {
		return 0, err
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// WriteAt stores p at off, as io.WriterAt says; beyond the end of the image it
// fails with ENOSPC and writes nothing. It is durable after a Flush. It waits,
// may be called by many goroutines at a time, and must not be called on a loop.
func (im *Image) WriteAt(p []byte, off int64) (int, error) {
	if off < 0 || off > im.size || int64(len(p)) > im.size-off {
		return 0, fmt.Errorf("write %d bytes at %d of an image of %d: %w", len(p), off, im.size, unix.ENOSPC)
	}
	if err := im.waiter.writeAt(im, p, off); err != nil {
		return 0, err
	}
	return len(p), nil
}

// Zero makes a range read as zeroes, and frees its space where whole clusters
// are concerned. Otherwise it is like WriteAt.
func (im *Image) Zero(off, length int64) error {
	return im.waiter.do(im, aio.Request{Op: aio.OpWriteZeroes, Offset: off, Length: length})
}

// Flush makes all that was written before durable. It waits, and must not be
// called on a loop.
func (im *Image) Flush() error { return im.waiter.flush(im) }
