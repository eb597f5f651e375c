package uring

import (
	"errors"
	"runtime"
	"strings"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"platter/integration/testenv"
)

// newRing makes a ring for the test's goroutine.
func newRing(t *testing.T, o Options) *Ring {
	t.Helper()
	lockThread(t)
	r, err := New(o)
	return usable(t, r, err)
}

func lockThread(t *testing.T) {
	runtime.LockOSThread()
	t.Cleanup(runtime.UnlockOSThread)
}

func usable(t *testing.T, r *Ring, err error) *Ring {
	t.Helper()
	if errors.Is(err, unix.EPERM) || errors.Is(err, unix.EACCES) || errors.Is(err, unix.ENOSYS) {
		testenv.Skip(t, "io_uring is forbidden here: "+err.Error())
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	})
	return r
}

// sqe is an entry that must be there.
func sqe(t *testing.T, r *Ring, tag uint64) *SQE {
	t.Helper()
	e := r.SQE()
	if e == nil {
		t.Fatal("the submission queue is full")
	}
	e.UserData = tag
	return e
}

// reap waits for the next completion, for a long time at most.
func reap(t *testing.T, r *Ring) CQE {
	t.Helper()
	deadline := time.Now().Add(30 * time.Second)
	for {
		if c, ok := r.CQE(); ok {
			return c
		}
		if time.Now().After(deadline) {
			t.Fatal("no completion came")
		}
		if err := r.Wait(time.Second); err != nil {
			t.Fatal(err)
		}
	}
}

// done waits for the completion of the one operation in flight.
func done(t *testing.T, r *Ring, tag uint64, res int32) {
	t.Helper()
	if c := reap(t, r); c.UserData != tag || c.Res != res {
		t.Fatalf("completion %d with %d; want %d with %d", c.UserData, c.Res, tag, res)
	}
}

// TestSetups makes a ring with every set of flags that this kernel takes: the
// last one always, and the others newest first as New tries them.
func TestSetups(t *testing.T) {
	lockThread(t)
	for i, flags := range setups {
		r, err := setup(8, flags)
		if errors.Is(err, unix.EINVAL) && i < len(setups)-1 {
			t.Logf("the kernel is too old for flags %#x", flags)
			continue
		}
		usable(t, r, err)
		if r.sqEntries != 8 || r.cqMask != 31 {
			t.Errorf("flags %#x: %d entries, completion mask %d", flags, r.sqEntries, r.cqMask)
		}
		if want := flags&setupDeferTaskrun != 0; r.Deferred() != want {
			t.Errorf("flags %#x: Deferred is %v", flags, r.Deferred())
		}
		for tag := range uint64(20) { // more than once round the ring
			sqe(t, r, tag)
			done(t, r, tag, 0)
		}
		readPipe(t, r) // a completion that comes by task work
	}
}

// readPipe has a read wait in the kernel before there is anything to read.
func readPipe(t *testing.T, r *Ring) {
	t.Helper()
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	defer unix.Close(p[0])
	defer unix.Close(p[1])
	m := memory(t)
	sqe(t, r, 7).Read(int32(p[0]), addr(m), 100, 0)
	if err := r.Enter(); err != nil {
		t.Fatal(err)
	}
	if r.Completed() != 0 {
		t.Fatal("an empty pipe was read")
	}
	if _, err := unix.Write(p[1], []byte("hello")); err != nil {
		t.Fatal(err)
	}
	done(t, r, 7, 5)
	if string(m[:5]) != "hello" {
		t.Errorf("read %q", m[:5])
	}
}

func TestNewErrors(t *testing.T) {
	lockThread(t)
	_, err := New(Options{Entries: 1 << 30})
	var e *Error
	if !errors.As(err, &e) || e.Op != "io_uring_setup" {
		t.Fatalf("a ring of 2^30 entries: %v", err)
	}
	if !errors.Is(&Error{"io_uring_setup", ErrTooOld}, ErrTooOld) || !strings.Contains(ErrTooOld.Error(), "5.11") {
		t.Error(ErrTooOld)
	}
}

// TestQueueFull: the queue hands out as many entries as it has, and all of them
// again after Enter.
func TestQueueFull(t *testing.T) {
	r := newRing(t, Options{Entries: 4})
	for round := range uint64(3) {
		for i := range uint64(4) {
			sqe(t, r, round<<8|i)
		}
		if r.SQE() != nil || r.Pending() != 4 {
			t.Fatalf("%d entries pending and room for more", r.Pending())
		}
		if err := r.Enter(); err != nil {
			t.Fatal(err)
		}
		if r.Pending() != 0 || r.Completed() != 4 {
			t.Fatalf("%d pending, %d completed", r.Pending(), r.Completed())
		}
		for i := range uint64(4) {
			done(t, r, round<<8|i, 0)
		}
	}
}

// TestCompletionOverflow: completions beyond the queue's size wait in the kernel
// and come in order; none is lost.
func TestCompletionOverflow(t *testing.T) {
	for _, flags := range []uint32{setups[0], 0} {
		lockThread(t)
		r, err := setup(4, flags)
		if errors.Is(err, unix.EINVAL) {
			continue
		}
		usable(t, r, err)
		const total = 100 // the queue holds 16
		for i := range uint64(total) {
			e := r.SQE()
			for e == nil {
				if err := r.Enter(); err != nil {
					t.Fatal(err)
				}
				e = r.SQE()
			}
			e.UserData = i
		}
		if err := r.Enter(); err != nil {
			t.Fatal(err)
		}
		if r.Completed() != 16 || !r.NeedsEnter() {
			t.Errorf("flags %#x: %d completed, NeedsEnter %v", flags, r.Completed(), r.NeedsEnter())
		}
		for i := range uint64(total) {
			done(t, r, i, 0)
		}
		if r.Completed() != 0 || r.NeedsEnter() {
			t.Errorf("flags %#x: something is left", flags)
		}
	}
}

// TestSubmissionError: on a ring without SUBMIT_ALL the kernel stops at an entry
// that it refuses; the entries behind it are submitted later.
func TestSubmissionError(t *testing.T) {
	for _, flags := range []uint32{setups[0], 0} {
		lockThread(t)
		r, err := setup(8, flags)
		if errors.Is(err, unix.EINVAL) {
			continue
		}
		usable(t, r, err)
		for i := range uint64(6) {
			if e := sqe(t, r, i); i == 2 {
				e.Opcode = 255
			}
		}
		for i := range uint64(6) {
			want := int32(0)
			if i == 2 {
				want = -int32(unix.EINVAL)
			}
			done(t, r, i, want)
		}
		if r.Pending() != 0 {
			t.Errorf("flags %#x: %d pending", flags, r.Pending())
		}
	}
}

// TestWait: Wait returns for a completion, at once when there is one, and after
// its time-out when there is none.
func TestWait(t *testing.T) {
	r := newRing(t, Options{Entries: 4})
	begin := time.Now()
	for n := 1; time.Since(begin) < 20*time.Millisecond; n++ { // a signal ends it early
		if err := r.Wait(20 * time.Millisecond); err != nil {
			t.Fatal(err)
		}
		if n == 100 {
			t.Fatal("it does not wait")
		}
	}
	if r.Completed() != 0 {
		t.Error("something completed")
	}
	sqe(t, r, 1)
	if err := r.Wait(-1); err != nil {
		t.Fatal(err)
	}
	if err := r.Wait(-1); err != nil { // it is still there
		t.Fatal(err)
	}
	done(t, r, 1, 0)
	if err := r.Wait(0); err != nil {
		t.Fatal(err)
	}
	if _, ok := r.CQE(); ok || r.Completed() != 0 {
		t.Error("a completion of nothing")
	}
}

func TestSupports(t *testing.T) {
	r := newRing(t, Options{Entries: 4})
	for _, tc := range []struct {
		ops  []Opcode
		want bool
	}{
		{nil, true},
		{[]Opcode{OpNop, OpReadv, OpFsync, OpRead, OpWrite, OpSendmsg}, true},
		{[]Opcode{255}, false},
		{[]Opcode{OpNop, 254, OpRead}, false},
	} {
		got, err := r.Supports(tc.ops...)
		if err != nil || got != tc.want {
			t.Errorf("Supports(%v) = %v, %v", tc.ops, got, err)
		}
	}
}

// TestRegisteredFiles reads through a slot, which outlives the descriptor.
func TestRegisteredFiles(t *testing.T) {
	r := newRing(t, Options{Entries: 4})
	var e *Error
	if err := r.UpdateFile(0, -1); !errors.As(err, &e) || e.Op != "io_uring_register" {
		t.Errorf("a slot of an unregistered table: %v", err)
	}
	if err := r.RegisterFiles(4); err != nil {
		t.Fatal(err)
	}
	m := memory(t)
	read := func(slot int32) { sqe(t, r, 9).Read(slot, addr(m), 5, 0) }
	fixed := func(slot int32, res int32) {
		t.Helper()
		read(slot)
		(*SQE)(unsafe.Add(r.sqes, uintptr((r.tail-1)&r.sqMask)*r.sqeSize)).Flags |= SQEFixedFile
		done(t, r, 9, res)
	}
	fixed(2, -int32(unix.EBADF)) // empty
	f := file(t)
	if _, err := f.WriteString("hello"); err != nil {
		t.Fatal(err)
	}
	if err := r.UpdateFile(2, int32(f.Fd())); err != nil {
		t.Fatal(err)
	}
	f.Close()
	fixed(2, 5)
	if string(m[:5]) != "hello" {
		t.Errorf("read %q", m[:5])
	}
	if err := r.UpdateFile(2, -1); err != nil {
		t.Fatal(err)
	}
	fixed(2, -int32(unix.EBADF))
	if err := r.UpdateFile(4, -1); !errors.Is(err, unix.EINVAL) {
		t.Errorf("a slot beyond the table: %v", err)
	}
}

// TestNoAllocation: an entry, a kernel entry and a completion allocate nothing.
func TestNoAllocation(t *testing.T) {
	r := newRing(t, Options{Entries: 8})
	m := memory(t)
	f := file(t)
	fd := int32(f.Fd())
	allocs := testing.AllocsPerRun(200, func() {
		r.SQE().Write(fd, addr(m), 512, 0, 0)
		if r.Enter() != nil {
			panic("enter")
		}
		for {
			if _, ok := r.CQE(); ok {
				break
			}
			if r.Wait(time.Second) != nil {
				panic("wait")
			}
		}
	})
	if allocs != 0 {
		t.Errorf("%v allocations", allocs)
	}
}

func TestClose(t *testing.T) {
	lockThread(t)
	r, err := New(Options{Entries: 4})
	if err != nil {
		usable(t, r, err)
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	if err := r.Close(); !errors.Is(err, unix.EBADF) {
		t.Errorf("closed twice: %v", err)
	}
}
