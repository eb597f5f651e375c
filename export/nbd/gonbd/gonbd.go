// Package gonbd connects images with the backends of github.com/pojntfx/go-nbd,
// both ways: Backend hands an image of ours to code that wants a backend.Backend,
// and Image lets anything that is a backend.Backend be exported like an image.
//
// A backend blocks and an image doesn't, so each way costs a change of
// goroutine per call: Backend posts requests to a loop and waits for them, and
// Image has the loop's pool of threads make the calls.
package gonbd

import (
	"errors"
	"fmt"
	"io/fs"

	"golang.org/x/sys/unix"
)

// ErrBackend says that a go-nbd backend can't be an image.
var ErrBackend = errors.New("unusable go-nbd backend")

// Error is an operation on an image that failed.
type Error struct {
	Op     string
	Offset int64 // bytes
	Length int64 // bytes
	Err    error // a unix.Errno, or io.ErrShortWrite
}

func (e *Error) Error() string {
	return fmt.Sprintf("%s %d bytes at %d: %v", e.Op, e.Length, e.Offset, e.Err)
}

func (e *Error) Unwrap() error { return e.Err }

// errnoOf is the errno for an error of a backend: the one that it wraps, or the
// one that says the same.
func errnoOf(err error) unix.Errno {
	var errno unix.Errno
	switch {
	case err == nil:
		return 0
	case errors.As(err, &errno) && errno != 0:
		return errno
	case errors.Is(err, fs.ErrPermission):
		return unix.EPERM
	case errors.Is(err, errors.ErrUnsupported):
		return unix.EOPNOTSUPP
	}
	return unix.EIO
}
