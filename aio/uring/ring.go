package uring

import (
	"errors"
	"fmt"
	"runtime"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Error is what a call on a ring failed with.
type Error struct {
	Op  string // the system call
	Err error
}

func (e *Error) Error() string { return e.Op + ": " + e.Err.Error() }

// Unwrap gives the errno.
func (e *Error) Unwrap() error { return e.Err }

// ErrTooOld is returned by New when the kernel's io_uring lacks what every ring
// here needs.
var ErrTooOld = errors.New("the kernel's io_uring is too old (Linux 5.11 or newer is needed)")

// Options shape a ring.
type Options struct {
	Entries uint32 // submission entries, rounded up to a power of two; 512 when 0
	SQE128  bool   // 128-byte entries, for commands; needs Linux 5.19
}

// Ring is one io_uring instance. See the package comment for which thread may
// use it.
type Ring struct {
	fd       int
	flags    uint32
	features uint32

	sqHead, sqTail, sqFlags *uint32
	sqMask, sqEntries       uint32
	sqes                    unsafe.Pointer
	sqeSize                 uintptr
	tail                    uint32 // entries handed out; published by Enter
	submitted               uint32 // entries the kernel has taken

	cqHead, cqTail *uint32
	cqMask         uint32
	cqes           unsafe.Pointer

	ringMap, cqMap, sqeMap []byte
	arg                    *waitArg
}

// waitArg is what is handed to the kernel by address inside another argument. It
// stands in a mapping of its own: goroutine stacks move.
type waitArg struct {
	arg geteventsArg
	ts  unix.Timespec
	fd  int32
}

// setups are the flag sets that New tries, best first.
var setups = []uint32{
	setupSubmitAll | setupCoopTaskrun | setupTaskrunFlag | setupSingleIssuer | setupDeferTaskrun | setupNoSQArray,
	setupSubmitAll | setupCoopTaskrun | setupTaskrunFlag | setupSingleIssuer | setupDeferTaskrun,
	setupSubmitAll | setupCoopTaskrun | setupTaskrunFlag,
	0,
}

// New makes a ring for the calling thread, to which the goroutine must be
// locked. The completion queue is four times the submission queue.
func New(o Options) (*Ring, error) {
	if o.Entries == 0 {
		o.Entries = 512
	}
	var extra uint32
	if o.SQE128 {
		extra = setupSQE128
	}
	var err error
	for _, flags := range setups {
		var r *Ring
		if r, err = setup(o.Entries, flags|extra); err == nil {
			return r, nil
		}
		if !errors.Is(err, unix.EINVAL) {
			break
		}
	}
	return nil, err
}

func setup(entries, flags uint32) (*Ring, error) {
	p := &params{flags: flags | setupCQSize, cqEntries: 4 * entries}
	fd, _, errno := unix.Syscall(unix.SYS_IO_URING_SETUP, uintptr(entries), uintptr(unsafe.Pointer(p)), 0)
	if errno != 0 {
		return nil, &Error{"io_uring_setup", errno}
	}
	r := &Ring{fd: int(fd), flags: p.flags, features: p.features}
	unix.CloseOnExec(r.fd)
	if need := uint32(featNoDrop | featSubmitStable | featFastPoll | featExtArg); p.features&need != need {
		r.Close()
		return nil, &Error{"io_uring_setup", ErrTooOld}
	}
	if err := r.mapRings(p); err != nil {
		r.Close()
		return nil, err
	}
	return r, nil
}

func (r *Ring) mapRings(p *params) error {
	sqSize := int(p.sqOff.array) + int(p.sqEntries)*4
	if p.flags&setupNoSQArray != 0 {
		sqSize = int(p.sqOff.array) // no array: its offset may be 0
	}
	cqSize := int(p.cqOff.cqes) + int(p.cqEntries)*int(unsafe.Sizeof(CQE{}))
	r.sqeSize = unsafe.Sizeof(SQE{})
	if p.flags&setupSQE128 != 0 {
		r.sqeSize *= 2
	}
	mmap := func(off int64, size int) ([]byte, error) {
		m, err := unix.Mmap(r.fd, off, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE)
		if err != nil {
			return nil, &Error{"mmap io_uring", err}
		}
		return m, nil
	}
	var err error
	if p.features&featSingleMmap != 0 {
		if r.ringMap, err = mmap(offSQRing, max(sqSize, cqSize)); err != nil {
			return err
		}
	} else {
		if r.ringMap, err = mmap(offSQRing, sqSize); err != nil {
			return err
		}
		if r.cqMap, err = mmap(offCQRing, cqSize); err != nil {
			return err
		}
	}
	if r.sqeMap, err = mmap(offSQEs, int(p.sqEntries)*int(r.sqeSize)); err != nil {
		return err
	}
	sq, cq := r.ringMap, r.ringMap
	if r.cqMap != nil {
		cq = r.cqMap
	}
	word := func(m []byte, off uint32) *uint32 { return (*uint32)(unsafe.Pointer(&m[off])) }
	r.sqHead, r.sqTail, r.sqFlags = word(sq, p.sqOff.head), word(sq, p.sqOff.tail), word(sq, p.sqOff.flags)
	r.sqMask, r.sqEntries = *word(sq, p.sqOff.ringMask), *word(sq, p.sqOff.ringEntries)
	r.cqHead, r.cqTail, r.cqMask = word(cq, p.cqOff.head), word(cq, p.cqOff.tail), *word(cq, p.cqOff.ringMask)
	r.cqes = unsafe.Pointer(&cq[p.cqOff.cqes])
	r.sqes = unsafe.Pointer(&r.sqeMap[0])
	if p.flags&setupNoSQArray == 0 {
		for i := range r.sqEntries {
			*word(sq, p.sqOff.array+4*i) = i
		}
	}
	arg, err := unix.Mmap(-1, 0, unix.Getpagesize(), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return &Error{"mmap wait argument", err}
	}
	r.arg = (*waitArg)(unsafe.Pointer(&arg[0]))
	r.arg.arg.ts = uint64(uintptr(unsafe.Pointer(&r.arg.ts)))
	return nil
}

// Close releases the ring. Operations in flight are cancelled by the kernel, and
// may still touch their memory for a moment: drain first.
func (r *Ring) Close() error {
	for _, m := range [][]byte{r.sqeMap, r.cqMap, r.ringMap} {
		if m != nil {
			_ = unix.Munmap(m)
		}
	}
	if r.arg != nil {
		_ = unix.Munmap(unsafe.Slice((*byte)(unsafe.Pointer(r.arg)), unix.Getpagesize()))
	}
	*r = Ring{fd: r.fd}
	if err := unix.Close(r.fd); err != nil {
		return fmt.Errorf("close io_uring: %w", err)
	}
	return nil
}

// Deferred reports whether completions are posted only while the owner is in
// Enter (DEFER_TASKRUN).
func (r *Ring) Deferred() bool { return r.flags&setupDeferTaskrun != 0 }

// SQE hands out the next submission entry, cleared, or nil when the queue is
// full: Enter makes room. The entry is submitted by the next Enter.
func (r *Ring) SQE() *SQE {
	if r.tail-atomic.LoadUint32(r.sqHead) >= r.sqEntries {
		return nil
	}
	e := (*SQE)(unsafe.Add(r.sqes, uintptr(r.tail&r.sqMask)*r.sqeSize))
	*e = SQE{}
	r.tail++
	return e
}

// Pending is the number of entries that wait for the next Enter.
func (r *Ring) Pending() uint32 { return r.tail - r.submitted }

// Enter submits every pending entry and lets the kernel run what is ready on
// this thread. It does not wait. A full completion queue is no error: reap and
// enter again.
func (r *Ring) Enter() error { return r.enter(0, 0, 0, false) }

// Wait does what Enter does and then sleeps until a completion is there, or,
// when timeout is not negative, until it has passed. A signal ends it early.
func (r *Ring) Wait(timeout time.Duration) error {
	if timeout < 0 {
		return r.enter(1, 0, 0, true)
	}
	r.arg.ts = unix.NsecToTimespec(int64(timeout))
	err := r.enter(1, uintptr(unsafe.Pointer(&r.arg.arg)), unsafe.Sizeof(geteventsArg{}), true)
	runtime.KeepAlive(r)
	return err
}

func (r *Ring) enter(minComplete uint32, arg, argSize uintptr, block bool) error {
	flags := uintptr(enterGetEvents)
	if arg != 0 {
		flags |= enterExtArg
	}
	atomic.StoreUint32(r.sqTail, r.tail)
	n := uintptr(r.tail - r.submitted)
	var done uintptr
	var errno unix.Errno
	if block {
		// The scheduler must know that this thread may sleep.
		done, _, errno = unix.Syscall6(unix.SYS_IO_URING_ENTER, uintptr(r.fd), n, uintptr(minComplete), flags, arg, argSize)
	} else {
		done, _, errno = unix.RawSyscall6(unix.SYS_IO_URING_ENTER, uintptr(r.fd), n, uintptr(minComplete), flags, arg, argSize)
	}
	switch errno {
	case 0:
		r.submitted += uint32(done)
		return nil
	case unix.EINTR, unix.ETIME, unix.EAGAIN, unix.EBUSY:
		// Nothing was submitted; the caller reaps and comes back.
		r.submitted = atomic.LoadUint32(r.sqHead)
		return nil
	}
	return &Error{"io_uring_enter", errno}
}

// NeedsEnter reports whether the kernel may be waiting for the thread to enter
// before it can post completions. It is a look at shared memory, for spinning.
// It may go on saying so when there is nothing left to run, until there is again.
func (r *Ring) NeedsEnter() bool {
	return atomic.LoadUint32(r.sqFlags)&(sqTaskrun|sqCQOverflow) != 0
}

// Completed is the number of completions that can be taken.
func (r *Ring) Completed() uint32 { return atomic.LoadUint32(r.cqTail) - *r.cqHead }

// CQE takes the next completion, or reports that there is none.
func (r *Ring) CQE() (CQE, bool) {
	head := *r.cqHead
	if head == atomic.LoadUint32(r.cqTail) {
		return CQE{}, false
	}
	c := *(*CQE)(unsafe.Add(r.cqes, uintptr(head&r.cqMask)*unsafe.Sizeof(CQE{})))
	atomic.StoreUint32(r.cqHead, head+1)
	return c, true
}
