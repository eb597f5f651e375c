package formats

import (
	"errors"
	"fmt"
	"io"

	"golang.org/x/sys/unix"
)

// QEMU's image locks. Every user of an image holds shared OFD locks on single
// bytes of the file, one per permission that it uses (from permBase on) and one
// per permission that it does not grant to others (from unshareBase on). Nobody
// ever takes an exclusive lock; users first lock their bytes and then ask
// whether anybody else has locked a byte that contradicts them. Of two that
// come at once at least one therefore sees the other.
//
// An OFD lock belongs to the open file: it goes with the last close of it, also
// when the process is killed.
const (
	permBase    = 100
	unshareBase = 200
)

// The permissions by their number, which is the place of their byte.
const (
	permConsistentRead = 0
	permWrite          = 1
	permResize         = 3 // 2, writing what is there already, is not used here
)

// Lock locks the image in the open file fd against other programs, platter and
// QEMU's among them: writers exclude each other and readers, readers share. For
// writing, fd needs to be open for reading too. The lock lasts until fd's file
// is closed. Where the file system has no locks, Lock does nothing.
//
// The error is an *Error with ErrLocked that names who holds the image if that
// can be found out. It leaves locks behind: close the file.
func Lock(path string, fd int, write bool) error {
	if _, err := heldByOther(fd, permBase); errors.Is(err, errNoLocks) {
		return nil
	}
	using := []int64{permConsistentRead}
	if write {
		using = append(using, permWrite)
	}
	denied := []int64{permWrite, permResize}

	// First claim, then look: see above.
	for _, p := range using {
		if err := claim(fd, permBase+p); err != nil {
			return lockError(path, err)
		}
	}
	for _, p := range denied {
		if err := claim(fd, unshareBase+p); err != nil {
			return lockError(path, err)
		}
	}
	for _, p := range using {
		if err := conflict(path, fd, unshareBase+p, write); err != nil {
			return err
		}
	}
	for _, p := range denied {
		if err := conflict(path, fd, permBase+p, write); err != nil {
			return err
		}
	}
	return nil
}

// errNoLocks says that the file system does not know locks.
var errNoLocks = errors.New("no file locks here")

func claim(fd int, at int64) error {
	l := unix.Flock_t{Type: unix.F_RDLCK, Whence: io.SeekStart, Start: at, Len: 1}
	return unix.FcntlFlock(uintptr(fd), unix.F_OFD_SETLK, &l)
}

// heldByOther asks whether an exclusive lock on the byte would be refused.
func heldByOther(fd int, at int64) (bool, error) {
	l := unix.Flock_t{Type: unix.F_WRLCK, Whence: io.SeekStart, Start: at, Len: 1}
	if err := unix.FcntlFlock(uintptr(fd), unix.F_OFD_GETLK, &l); err != nil {
		return false, fmt.Errorf("%w: %w", errNoLocks, err)
	}
	return l.Type != unix.F_UNLCK, nil
}

func conflict(path string, fd int, at int64, write bool) error {
	held, err := heldByOther(fd, at)
	if err != nil {
		return lockError(path, err)
	}
	if !held {
		return nil
	}
	e := &Error{"lock", path, ErrLocked, "stop the program that uses it"}
	if who := lockHolder(fd); who != "" {
		e.Err = fmt.Errorf("%w by %s", ErrLocked, who)
		e.Remedy = "stop that program"
	}
	if write {
		e.Remedy += ", or open the image with --read-only --force-share"
	} else {
		e.Remedy += ", or read the image while it changes with --force-share"
	}
	return e
}

// lockError explains a claim that failed. Only a foreign exclusive lock can
// refuse it.
func lockError(path string, err error) error {
	if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EACCES) {
		return &Error{"lock", path, ErrLocked, "stop the program that holds a lock on the whole file"}
	}
	return &Error{"lock", path, err, ""}
}
