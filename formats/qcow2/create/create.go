// Package create makes qcow2 images, as qemu-img create does with the same
// options.
//
// A new image has its tables one behind the other at the start of the file, and
// behind them, when it is preallocated, the clusters of the disk in their order:
// a plan tells where, and writing it is filling a few arrays. What becomes an
// image stays unreadable until all of it is durable, and what cannot be finished
// is removed.
package create

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"platter/formats"
)

// Create makes a qcow2 image of a disk of size bytes at path, and its data file
// when there is to be one. A size that is no multiple of 512 is rounded up to
// one. When size is 0, Options.Size counts, and without that the size of the
// backing file.
//
// The image is durable on return. A file that exists is never touched, neither
// at path nor in the place of the data file, and the error is then fs.ErrExist.
// When something else goes wrong, nothing is left behind. Should the machine
// fail meanwhile, what it leaves doesn't open as a qcow2 image. Every error is a
// *formats.Error; it is formats.ErrBadOptions and an *OptionError if such an
// image cannot be. Create may run concurrently with itself: of two that make the
// same file, one does.
func Create(path string, size int64, o Options) error {
	err := create(path, size, o.withDefaults())
	var bad *OptionError
	if errors.As(err, &bad) {
		plain := *bad
		plain.Remedy = ""
		return &formats.Error{Op: "create", Path: path, Err: &plain, Remedy: bad.Remedy}
	}
	return formats.Explain("create", path, err)
}

func create(path string, size int64, o Options) (err error) {
	if err := o.check(path); err != nil {
		return err
	}
	if size, err = o.diskSize(size); err != nil {
		return err
	}
	p, err := newPlan(path, size, &o)
	if err != nil {
		return err
	}
	var made newFiles
	defer func() { err = made.finish(err) }()
	// The image comes first, so that no data file is made for one that exists.
	image, err := made.add(path, &o)
	if err != nil {
		return err
	}
	if p.External {
		data, err := made.add(p.dataPath, &o)
		if err == nil {
			err = p.writeData(data, o.Preallocation)
		}
		if err != nil {
			return formats.Explain("create", p.dataPath, err)
		}
	}
	return p.write(image, o.Preallocation)
}

// diskSize is the size that the caller, the options or the backing file tell.
func (o *Options) diskSize(size int64) (int64, error) {
	switch {
	case size != 0 && o.Size != 0:
		return 0, &OptionError{"size", fmt.Sprint(o.Size), fmt.Sprintf("is given besides a size of %d", size), "give the size once"}
	case size != 0:
		return size, nil
	case o.Size != 0 || o.BackingFile == "":
		return o.Size, nil
	case o.BackingSize == nil:
		return 0, &OptionError{"size", "", "is not given, and the backing file's is not known", "give a size"}
	}
	return o.BackingSize()
}

// newFiles are the files that were made, to be finished or removed together.
type newFiles []diskFile

// add makes a file.
func (s *newFiles) add(path string, o *Options) (diskFile, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, o.Perm)
	if err != nil {
		return diskFile{}, err
	}
	*s = append(*s, diskFile{f})
	if o.NoCOW {
		_ = setNoCOW(f) // a wish: most file systems never copy on write and don't know the flag
	}
	return diskFile{f}, nil
}

// finish closes the files and makes their names durable. If that fails, or
// something has failed already, it removes them.
func (s newFiles) finish(err error) error {
	for _, f := range s {
		if closeErr := f.Close(); err == nil {
			err = closeErr
		}
	}
	for _, f := range s {
		if err == nil {
			err = formats.SyncDir(filepath.Dir(f.Name()))
		}
	}
	if err == nil {
		return nil
	}
	for _, f := range s {
		if removeErr := os.Remove(f.Name()); removeErr != nil {
			err = errors.Join(err, removeErr)
		}
	}
	return err
}

// diskFile is a file on a file system.
type diskFile struct{ *os.File }

// Allocate is part of file.
func (f diskFile) Allocate(off, n int64) error { return formats.Preallocate(f.File, off, n) }

// noCOW is FS_NOCOW_FL of linux/fs.h: data is overwritten in place.
const noCOW = 0x00800000

// setNoCOW asks for no copy-on-write, which must be done while the file is
// empty.
func setNoCOW(f *os.File) error {
	flags, err := unix.IoctlGetInt(int(f.Fd()), unix.FS_IOC_GETFLAGS)
	if err != nil {
		return err
	}
	return unix.IoctlSetPointerInt(int(f.Fd()), unix.FS_IOC_SETFLAGS, flags|noCOW)
}
