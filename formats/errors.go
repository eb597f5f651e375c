package formats

import (
	"errors"
	"io/fs"

	"golang.org/x/sys/unix"
)

// What can be wrong with an image, for errors.Is. A missing or unreadable file
// is fs.ErrNotExist or fs.ErrPermission, and one that is to be created but
// exists already is fs.ErrExist.
var (
	// ErrLocked: another user of the image excludes this one.
	ErrLocked = errors.New("image is in use")
	// ErrFormat: the format is unknown here, or the file is not of the format
	// that was stated.
	ErrFormat = errors.New("image format not supported")
	// ErrIsDirectory: the path leads to a directory.
	ErrIsDirectory = errors.New("is a directory, not an image")
	// ErrNotImage: neither a regular file nor a block device.
	ErrNotImage = errors.New("neither a regular file nor a block device")
	// ErrEmpty: the image has no bytes and Options.NotEmpty was set.
	ErrEmpty = errors.New("image is empty")
	// ErrBadOptions: the options contradict each other.
	ErrBadOptions = errors.New("invalid options")
)

// Error is what opening, locking or creating an image returns: a message for
// the user with the file, the cause and, where there is one, the remedy.
type Error struct {
	Op     string // "open", "create", "lock"
	Path   string
	Err    error
	Remedy string // what to do about it; may be empty
}

func (e *Error) Error() string {
	s := e.Op + " " + e.Path + ": " + e.Err.Error()
	if e.Remedy != "" {
		s += " (" + e.Remedy + ")"
	}
	return s
}

func (e *Error) Unwrap() error { return e.Err }

// Explain makes an Error of what went wrong with the file at path: it strips
// what the message would say twice and adds the remedy that fits the cause. An
// Error stays as it is, and nil stays nil.
func Explain(op, path string, err error) error {
	if err == nil {
		return nil
	}
	var explained *Error
	if errors.As(err, &explained) {
		return err
	}
	var pathErr *fs.PathError
	if errors.As(err, &pathErr) && pathErr.Path == path {
		err = pathErr.Err
	}
	return &Error{Op: op, Path: path, Err: err, Remedy: remedy(op, err)}
}

func remedy(op string, err error) string {
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return "check the path, or make the image first: serve --create SIZE"
	case errors.Is(err, fs.ErrExist):
		return "it is kept as it is; open it without creating it, or choose another name"
	case errors.Is(err, unix.EROFS):
		return "open it with --read-only"
	case errors.Is(err, fs.ErrPermission) && op == "create":
		return "choose a folder that you may write to"
	case errors.Is(err, fs.ErrPermission):
		return "change the file's permissions, or open it with --read-only if reading is allowed"
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		return "free some space, or make a smaller image"
	case errors.Is(err, unix.EFBIG):
		return "the file system takes no file of that size; make a smaller image"
	case errors.Is(err, ErrIsDirectory):
		return "name the image file in it"
	}
	return ""
}
