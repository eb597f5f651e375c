package aio

import "golang.org/x/sys/unix"

// Op is what a Request asks for.
type Op uint8

const (
	// OpRead fills Vec with the bytes at Offset.
	OpRead Op = iota
	// OpWrite stores the bytes of Vec at Offset.
	OpWrite
	// OpFlush makes every write that completed before the flush was submitted
	// durable. Offset and Length are 0.
	OpFlush
	// OpDiscard tells that the range is not needed any more. It may do nothing;
	// what the range reads as afterwards is not defined.
	OpDiscard
	// OpWriteZeroes makes the range read as zeroes.
	OpWriteZeroes
	// OpCache asks for the range to be brought into the cache. It is a hint.
	OpCache
	opCount
)

// OpCount is the number of operations, for tables indexed by Op.
const OpCount = int(opCount)

var opNames = [OpCount]string{"read", "write", "flush", "discard", "write-zeroes", "cache"}

func (o Op) String() string {
	if int(o) < len(opNames) {
		return opNames[o]
	}
	return "unknown"
}

// Writes reports whether the operation changes what the image holds, and so is
// refused on a read-only one.
func (o Op) Writes() bool { return o == OpWrite || o == OpDiscard || o == OpWriteZeroes }

// Flags modify an operation.
type Flags uint8

const (
	// FlagFUA (force unit access) makes a write, write-zeroes or discard
	// durable before it completes.
	FlagFUA Flags = 1 << iota
	// FlagNoUnmap makes OpWriteZeroes keep the space allocated.
	FlagNoUnmap
	// FlagJoined tells that the request stands for several, so that more of their
	// like may be on the way. It changes nothing of what is done.
	FlagJoined
)

// Iovec is one piece of memory of a request. It has the layout of struct iovec
// in linux/uio.h, so that a []Iovec is handed to the kernel as it is.
//
// Base is a plain address, invisible to the garbage collector: the memory must
// come from an Arena or another mapping that outlives the request, never from
// a Go stack or heap. Len is less than 4 GiB, which is what a ring's entry holds.
type Iovec struct {
	Base uintptr
	Len  uint64
}

// Request is one block operation on its way from a front end to a file.
//
// A front end makes its requests once, in a slab that belongs to one queue, and
// uses them again and again. From Submit until Done is called the request, its
// Vec and the memory that Vec names belong to the layers below; afterwards they
// belong to the front end again. All of this happens on the thread of one Loop.
type Request struct {
	Op     Op
	Flags  Flags
	Errno  unix.Errno // outcome; 0 is success. Valid when Done is called.
	Offset int64      // bytes
	Length int64      // bytes; for reads and writes the sum of Vec's lengths
	Vec    []Iovec    // reads and writes only

	// Start is when the request came, as package export counts time; 0 for one
	// that didn't come by a queue. Nobody else looks at it.
	Start int64

	// Done is called once, on the loop's thread, when the request is over. That
	// may be within Submit.
	Done func(*Request)
}

// End is the first byte after the request's range.
func (r *Request) End() int64 { return r.Offset + r.Length }

// Complete ends the request with the given outcome: every layer that finishes
// a request calls it, exactly once.
func (r *Request) Complete(errno unix.Errno) {
	r.Errno = errno
	r.Done(r)
}
