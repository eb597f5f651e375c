package native

import (
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Error is what making or ending a context failed with.
type Error struct {
	Op  string // the system call
	Err error
}

func (e *Error) Error() string { return e.Op + ": " + e.Err.Error() }

// Unwrap gives the errno.
func (e *Error) Unwrap() error { return e.Err }

// Context is a queue of operations in flight, aio_context_t.
type Context struct {
	id   uintptr
	zero unix.Timespec // how long Events waits
}

// New makes a context for at least so many operations in flight. They count
// towards fs.aio-max-nr, which all processes share: beyond it New fails with
// EAGAIN.
func New(operations int) (*Context, error) {
	c := &Context{}
	_, _, errno := unix.Syscall(unix.SYS_IO_SETUP, uintptr(operations), uintptr(unsafe.Pointer(&c.id)), 0)
	if errno != 0 {
		return nil, &Error{"io_setup", errno}
	}
	return c, nil
}

// Submit starts the operations of the batch, in order, and returns how many the
// kernel has taken, which may be fewer: when the next one is bad, or when there is
// no room for it. It fails only with what is wrong with the first: EAGAIN when no
// more fit the context until events have been taken.
func (c *Context) Submit(batch []*IOCB) (int, unix.Errno) {
	n, _, errno := unix.RawSyscall(unix.SYS_IO_SUBMIT, c.id, uintptr(len(batch)), uintptr(unsafe.Pointer(unsafe.SliceData(batch))))
	runtime.KeepAlive(batch)
	if errno != 0 {
		return 0, errno
	}
	return int(n), 0
}

// Events takes completions that are there, without waiting for any, and returns
// how many. There may be more than it returns, unless that is 0.
func (c *Context) Events(into []Event) (int, unix.Errno) {
	n, _, errno := unix.RawSyscall6(unix.SYS_IO_GETEVENTS, c.id, 0, uintptr(len(into)),
		uintptr(unsafe.Pointer(unsafe.SliceData(into))), uintptr(unsafe.Pointer(&c.zero)), 0)
	runtime.KeepAlive(c)
	if errno != 0 {
		return 0, errno
	}
	return int(n), 0
}

// Close ends the context. It waits for operations in flight, whose events are
// lost.
func (c *Context) Close() error {
	if _, _, errno := unix.Syscall(unix.SYS_IO_DESTROY, c.id, 0, 0); errno != 0 {
		return &Error{"io_destroy", errno}
	}
	return nil
}
