// Package raw is the format without a format: a guest's byte n is the file's
// byte n. Files and block devices serve alike.
//
// Submit hands a batch to the file below as it is, without a copy, an
// allocation or a lock. It only keeps out what must not reach the file: writes
// to a read-only image, and requests beyond the end, which would make the file
// grow. Holes of the file are the image's unallocated ranges.
//
// When nobody stated that an image is raw, and it was merely found to look like
// nothing else, a guest could write the header of another format to its start
// and so decide what the next program opens, backing files of its choice
// included (CVE-2008-2004). A guard stops that: see guard.go.
package raw

import (
	"errors"

	"golang.org/x/sys/unix"

	"platter/aio"
	"platter/formats"
)

func init() {
	formats.Register(formats.Driver{Name: formats.RawName, Open: open})
}

func open(s formats.Source) (formats.Image, error) {
	return New(s.File, Options{Path: s.Path, ReadOnly: s.Options.ReadOnly, Guard: s.Probed})
}

// Options tell what New cannot find out from the storage.
type Options struct {
	Path     string // the file's name, for Extents
	ReadOnly bool   // refuse writes with EPERM
	Guard    bool   // refuse writes that make the image look like another format, with EPERM
}

// Image is a raw image.
type Image struct {
	storage  aio.Storage
	fd       int // -1 when the storage has no file descriptor
	path     string
	size     int64
	readOnly bool
	limits   formats.Limits
	guard    *guard // nil when any write is fine
}

var (
	_ formats.Image  = (*Image)(nil)
	_ formats.Mapper = (*Image)(nil)
)

// New makes an image of the storage and owns it from then on, unless it fails.
// When the storage has a method Fd() int, as aio.File does, the image asks the
// file system what it can do and where the holes are.
func New(storage aio.Storage, o Options) (*Image, error) {
	im := &Image{storage: storage, fd: -1, path: o.Path, size: storage.Size(), readOnly: o.ReadOnly}
	if f, ok := storage.(interface{ Fd() int }); ok {
		im.fd = f.Fd()
	}
	im.limits = limitsOf(im.fd, im.size, im.readOnly)
	if o.Guard && !o.ReadOnly {
		g, err := newGuard(storage)
		if err != nil {
			return nil, err
		}
		im.guard = g
	}
	return im, nil
}

// Format is "raw".
func (im *Image) Format() string { return formats.RawName }

// Size is the storage's size when the image was opened, to the byte.
func (im *Image) Size() int64 { return im.size }

// ReadOnly reports whether writes are refused.
func (im *Image) ReadOnly() bool { return im.readOnly }

// Limits tells what the file below likes. Any range is fine.
func (im *Image) Limits() formats.Limits { return im.limits }

// Close closes the storage and so lets go of the lock. No request may be in
// flight.
func (im *Image) Close() error {
	err := im.storage.Close()
	if im.guard != nil {
		err = errors.Join(err, im.guard.close())
		im.guard = nil
	}
	return err
}

// Submit passes the batch on to the storage, but for requests that it must not
// see. See formats.Image.
func (im *Image) Submit(l *aio.Loop, batch []*aio.Request) {
	passed := 0 // batch[:passed] is dealt with
	for i, r := range batch {
		errno, watched := im.check(r)
		if errno == 0 && !watched {
			continue
		}
		if passed < i {
			im.storage.Submit(l, batch[passed:i])
		}
		passed = i + 1
		if watched {
			im.guard.submit(l, r)
		} else {
			r.Complete(errno)
		}
	}
	if passed < len(batch) {
		im.storage.Submit(l, batch[passed:])
	}
}

// check says with what error a request is to be refused, or whether the guard
// must see it.
func (im *Image) check(r *aio.Request) (errno unix.Errno, watched bool) {
	if r.Op == aio.OpFlush {
		return 0, false
	}
	if im.readOnly && r.Op.Writes() {
		return unix.EPERM, false
	}
	if r.Offset < 0 || r.Length < 0 {
		return unix.EINVAL, false
	}
	if r.Offset > im.size || r.Length > im.size-r.Offset {
		if r.Op == aio.OpWrite || r.Op == aio.OpWriteZeroes {
			return unix.ENOSPC, false
		}
		return unix.EINVAL, false
	}
	return 0, im.guard != nil && r.Offset < im.guard.size && r.Op.Writes()
}
