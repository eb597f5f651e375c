package raw

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"platter/formats"
)

// CreateOptions tell how Create makes a file.
type CreateOptions struct {
	Perm        fs.FileMode // before the umask; 0 means 0o644
	Preallocate bool        // take the space now, so that no write runs out of it later
}

// Create makes a raw image of size zero bytes at path. It is sparse unless it is
// preallocated, and durable on return. A file that exists is never touched, and
// the error is then fs.ErrExist. When something else goes wrong, nothing is
// left behind. Every error is a *formats.Error.
func Create(path string, size int64, o CreateOptions) error {
	return formats.Explain("create", path, create(path, size, o))
}

func create(path string, size int64, o CreateOptions) error {
	if size < 0 {
		return fmt.Errorf("%w: a size of %d bytes", formats.ErrBadOptions, size)
	}
	if o.Perm == 0 {
		o.Perm = 0o644
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, o.Perm)
	if err != nil {
		return err
	}
	if err := errors.Join(fill(f, size, o.Preallocate), f.Close()); err != nil {
		return errors.Join(err, os.Remove(path))
	}
	return formats.SyncDir(filepath.Dir(path))
}

func fill(f *os.File, size int64, preallocate bool) error {
	if err := f.Truncate(size); err != nil {
		return err
	}
	if preallocate {
		if err := formats.Preallocate(f, 0, size); err != nil {
			return err
		}
	}
	return f.Sync()
}
