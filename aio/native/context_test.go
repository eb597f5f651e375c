package native

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"platter/integration/testenv"
)

// rig is a context with its eventfd, a file and memory.
type rig struct {
	*Context
	t       *testing.T
	eventfd int
	file    *os.File
	memory  []byte
}

func newRig(t *testing.T, operations int) *rig {
	t.Helper()
	c, err := New(operations)
	if errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.EPERM) {
		testenv.Skip(t, "Linux AIO is forbidden here: "+err.Error())
	}
	if err != nil {
		t.Fatal(err)
	}
	r := &rig{Context: c, t: t}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	if r.eventfd, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Close(r.eventfd) })
	if r.file, err = os.Create(filepath.Join(t.TempDir(), "file")); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.file.Close() })
	if r.memory, err = unix.Mmap(-1, 0, 1<<16, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Munmap(r.memory) })
	return r
}

func (r *rig) addr(off int) uintptr { return uintptr(unsafe.Pointer(&r.memory[off])) }

// iocb is an operation of the rig's that prepare encodes.
func (r *rig) iocb(tag uint64, prepare func(b *IOCB, fd int32)) *IOCB {
	b := &IOCB{}
	prepare(b, int32(r.file.Fd()))
	b.Notify(int32(r.eventfd), tag)
	return b
}

// reap takes n events, which the eventfd must tell of, at most two by a call.
func (r *rig) reap(n int) map[uint64]int64 {
	r.t.Helper()
	got := map[uint64]int64{}
	deadline := time.Now().Add(30 * time.Second)
	for len(got) < n && time.Now().Before(deadline) {
		if ready, err := unix.Poll([]unix.PollFd{{Fd: int32(r.eventfd), Events: unix.POLLIN}}, 100); ready == 0 || err != nil {
			continue
		}
		var into [2]Event
		k, errno := r.Events(into[:])
		if errno != 0 && errno != unix.EINTR {
			r.t.Fatal(errno)
		}
		for _, e := range into[:k] {
			if _, twice := got[e.Data]; twice {
				r.t.Fatalf("operation %d has completed twice", e.Data)
			}
			got[e.Data] = e.Res
		}
	}
	if len(got) != n {
		r.t.Fatalf("events: %v, want %d", got, n)
	}
	return got
}

// run carries out one operation and returns its result.
func (r *rig) run(prepare func(b *IOCB, fd int32)) int64 {
	r.t.Helper()
	if n, errno := r.Submit([]*IOCB{r.iocb(7, prepare)}); n != 1 || errno != 0 {
		r.t.Fatalf("submit: %d, %v", n, errno)
	}
	return r.reap(1)[7]
}

func TestOperations(t *testing.T) {
	r := newRig(t, 8)
	copy(r.memory, "0123456789")
	vec := []unix.Iovec{{Base: &r.memory[3]}, {Base: &r.memory[7]}}
	vec[0].SetLen(1)
	vec[1].SetLen(2)
	back := []unix.Iovec{{Base: &r.memory[200]}, {Base: &r.memory[300]}}
	back[0].SetLen(4)
	back[1].SetLen(100)
	for _, step := range []struct {
		name    string
		want    int64
		prepare func(b *IOCB, fd int32)
	}{
		{"pwrite", 10, func(b *IOCB, fd int32) { b.Pwrite(fd, r.addr(0), 10, 5, 0) }},
		{"durable pwrite", 2, func(b *IOCB, fd int32) { b.Pwrite(fd, r.addr(2), 2, 0, unix.RWF_DSYNC) }},
		{"pwritev", 3, func(b *IOCB, fd int32) { b.Pwritev(fd, unsafe.Pointer(&vec[0]), 2, 15, unix.RWF_DSYNC) }},
		{"fdsync", 0, func(b *IOCB, fd int32) { b.Fdsync(fd) }},
		{"pread", 18, func(b *IOCB, fd int32) { b.Pread(fd, r.addr(100), 50, 0, 0) }},
		{"preadv", 13, func(b *IOCB, fd int32) { b.Preadv(fd, unsafe.Pointer(&back[0]), 2, 5, 0) }},
		{"pread at the end", 0, func(b *IOCB, fd int32) { b.Pread(fd, r.addr(100), 50, 18, 0) }},
		{"pread to nowhere", -int64(unix.EFAULT), func(b *IOCB, fd int32) { b.Pread(fd, 4096, 5, 0, 0) }},
	} {
		if got := r.run(step.prepare); got != step.want {
			t.Errorf("%s: %d, want %d", step.name, got, step.want)
		}
	}
	const want = "23\x00\x00\x000123456789378"
	if got, err := os.ReadFile(r.file.Name()); string(got) != want || err != nil {
		t.Errorf("the file holds %q, %v", got, err)
	}
	if got := r.memory[100:118]; string(got) != want {
		t.Errorf("pread: %q", got)
	}
	if got := string(r.memory[200:204]) + string(r.memory[300:309]); got != want[5:] {
		t.Errorf("preadv: %q", got)
	}
}

// TestBatch: the kernel takes a batch up to the first operation that is bad, and
// tells what is wrong with it when it comes first.
func TestBatch(t *testing.T) {
	r := newRig(t, 8)
	var batch []*IOCB
	for i := range 5 {
		r.memory[i] = 'a' + byte(i)
		batch = append(batch, r.iocb(uint64(i), func(b *IOCB, fd int32) { b.Pwrite(fd, r.addr(i), 1, int64(i), 0) }))
	}
	batch[2].Fd = -1
	if n, errno := r.Submit(batch); n != 2 || errno != 0 {
		t.Fatalf("%d were taken, %v", n, errno)
	}
	if n, errno := r.Submit(batch[2:]); n != 0 || errno != unix.EBADF {
		t.Fatalf("%d were taken, %v", n, errno)
	}
	batch[3].Opcode = 99
	if n, errno := r.Submit(batch[3:]); n != 0 || errno != unix.EINVAL {
		t.Fatalf("%d were taken, %v", n, errno)
	}
	if n, errno := r.Submit(batch[4:]); n != 1 || errno != 0 {
		t.Fatalf("%d were taken, %v", n, errno)
	}
	for tag, res := range r.reap(3) {
		if tag == 2 || tag == 3 || res != 1 {
			t.Errorf("operation %d: %d", tag, res)
		}
	}
	if got, err := os.ReadFile(r.file.Name()); !bytes.Equal(got, []byte("ab\x00\x00e")) || err != nil {
		t.Errorf("the file holds %q, %v", got, err)
	}
	if n, errno := r.Events(make([]Event, 2)); n != 0 || errno != 0 {
		t.Errorf("events when there are none: %d, %v", n, errno)
	}
}

// TestFull: a context takes what it was made for, and no more than it has room
// for until events have been taken.
func TestFull(t *testing.T) {
	const room, bound = 4, 1 << 20
	r := newRig(t, room)
	b := r.iocb(0, func(b *IOCB, fd int32) { b.Pread(fd, r.addr(0), 1, 0, 0) })
	var tag uint64
	next := func() (int, unix.Errno) {
		b.Data = tag
		return r.Submit([]*IOCB{b})
	}
	for tag < bound {
		n, errno := next()
		if errno == unix.EAGAIN {
			break
		}
		if n != 1 || errno != 0 {
			t.Fatalf("operation %d: %d, %v", tag, n, errno)
		}
		tag++
	}
	if tag < room || tag == bound {
		t.Fatalf("%d operations in a context for %d", tag, room)
	}
	r.reap(int(tag))
	if n, errno := next(); n != 1 || errno != 0 {
		t.Errorf("when there is room again: %d, %v", n, errno)
	}
	r.reap(1)
}

// TestTooMany: what a context may not have is an error that keeps its cause.
func TestTooMany(t *testing.T) {
	c, err := New(1 << 30)
	var e *Error
	if c != nil || !errors.As(err, &e) || e.Op != "io_setup" || (!errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EINVAL)) {
		t.Errorf("a context for a billion operations: %v, %v", c, err)
	}
}
