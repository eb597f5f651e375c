package aio

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// opKind is what an op asks the engine for.
type opKind uint8

const (
	opReadv opKind = iota
	opWritev
	opFdatasync
	opFallocate
	opFadvise
	opRecv
	opSend
	opCancel // of the op whose index is n; only rings know it
	opFunc   // work on a pool thread
)

// op is one kernel operation of a loop: what a driver starts, and what it calls
// back with the result. Ops are made once and used again; each keeps its place
// in the loop's table, by which a completion finds it.
type op struct {
	loop  *Loop
	next  *op // in the list it stands in: free, backlog, pool queue, completed
	index uint32
	kind  opKind
	fd    int32
	slot  int32   // registered file, or -1
	flags uint32  // RWF_*, fallocate mode, advice
	off   int64   //
	n     int64   // bytes, for operations without a vector
	vec   []Iovec // what is left to transfer
	msg   unix.Msghdr
	work  func()

	res  int32     // bytes or -errno, when done is called
	done func(*op) // on the loop's thread

	cancelled bool // of a receive: it is to end

	// The request a file's op works for.
	file    *File
	req     *Request
	left    int64   // bytes to go
	scratch []Iovec // a vector of the op's own, when the request's can't be used
	step    zeroStep
	bounce  bounce

	// A direct write's lock, see rangeLocks.
	locked    bool
	exclusive bool
}

// errno is the operation's outcome without its count.
func (o *op) errno() unix.Errno {
	if o.res < 0 {
		return unix.Errno(-o.res)
	}
	return 0
}

// header points the message header at the vector, of which one message takes at
// most IOV_MAX elements.
func (o *op) header() *unix.Msghdr {
	o.msg = unix.Msghdr{Iov: (*unix.Iovec)(unsafe.Pointer(&o.vec[0]))}
	o.msg.SetIovlen(min(len(o.vec), maxSegments))
	return &o.msg
}

// maxSegments is IOV_MAX, UIO_MAXIOV in linux/uio.h.
const maxSegments = 1024

// perform carries the operation out by a system call on the calling thread and
// sets res. Calls that may sleep go through the scheduler.
func (o *op) perform() {
	var n uintptr
	var errno unix.Errno
	for {
		switch o.kind {
		case opReadv:
			n, errno = o.loop.transfer(false, o.fd, o.vec, o.off, 0, true)
		case opWritev:
			n, errno = o.loop.transfer(true, o.fd, o.vec, o.off, o.flags, true)
		case opFdatasync:
			_, _, errno = unix.Syscall(unix.SYS_FDATASYNC, uintptr(o.fd), 0, 0)
		case opFallocate:
			_, _, errno = unix.Syscall6(unix.SYS_FALLOCATE, uintptr(o.fd), uintptr(o.flags), uintptr(o.off), uintptr(o.n), 0, 0)
		case opFadvise:
			_, _, errno = unix.Syscall6(unix.SYS_FADVISE64, uintptr(o.fd), uintptr(o.off), uintptr(o.n), uintptr(o.flags), 0, 0)
		case opRecv:
			n, _, errno = unix.RawSyscall6(unix.SYS_RECVFROM, uintptr(o.fd), o.vec[0].Base, uintptr(o.vec[0].Len), unix.MSG_DONTWAIT, 0, 0)
		case opSend:
			n, _, errno = unix.RawSyscall(unix.SYS_SENDMSG, uintptr(o.fd), uintptr(unsafe.Pointer(o.header())), unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
		case opFunc:
			o.work()
			o.res = 0
			return
		}
		if errno != unix.EINTR {
			break
		}
	}
	if o.res = int32(n); errno != 0 {
		o.res = -int32(errno)
	}
}

type transferFunc func(write bool, fd int32, vec []Iovec, off int64, flags uint32, block bool) (uintptr, unix.Errno)

// transfer is preadv2 or pwritev2, by way of the cheaper pread or pwrite where they do
// the same. With block unset the scheduler isn't told: for calls that only copy
// memory.
func transfer(write bool, fd int32, vec []Iovec, off int64, flags uint32, block bool) (uintptr, unix.Errno) {
	trap := uintptr(unix.SYS_PREADV2)
	if write {
		trap = unix.SYS_PWRITEV2
	}
	addr, count, high := uintptr(unsafe.Pointer(unsafe.SliceData(vec))), uintptr(min(len(vec), maxSegments)), uintptr(off>>32)
	low := uintptr(off)
	if len(vec) == 1 && flags == 0 {
		trap = unix.SYS_PREAD64
		if write {
			trap = unix.SYS_PWRITE64
		}
		addr, count = vec[0].Base, uintptr(vec[0].Len)
	}
	if block {
		n, _, errno := unix.Syscall6(trap, uintptr(fd), addr, count, low, high, uintptr(flags))
		return n, errno
	}
	n, _, errno := unix.RawSyscall6(trap, uintptr(fd), addr, count, low, high, uintptr(flags))
	return n, errno
}
