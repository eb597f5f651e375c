package uring

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// memory is a mapping: the kernel is given its address.
func memory(t *testing.T) []byte {
	t.Helper()
	m, err := unix.Mmap(-1, 0, 1<<16, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Munmap(m) })
	return m
}

func addr(b []byte) uintptr { return uintptr(unsafe.Pointer(&b[0])) }

func file(t *testing.T) *os.File {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "file"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func TestFileOperations(t *testing.T) {
	r := newRing(t, Options{Entries: 8})
	f := file(t)
	fd := int32(f.Fd())
	m := memory(t)
	copy(m, "0123456789")

	sqe(t, r, 1).Write(fd, addr(m), 10, 5, 0)
	done(t, r, 1, 10)
	sqe(t, r, 2).Write(fd, addr(m[2:]), 2, 0, unix.RWF_DSYNC)
	done(t, r, 2, 2)
	vec := []unix.Iovec{{Base: &m[3]}, {Base: &m[7]}}
	vec[0].SetLen(1)
	vec[1].SetLen(2)
	sqe(t, r, 3).Writev(fd, unsafe.Pointer(&vec[0]), 2, 15, unix.RWF_DSYNC)
	done(t, r, 3, 3)
	sqe(t, r, 4).Fdatasync(fd)
	done(t, r, 4, 0)
	sqe(t, r, 5).Fallocate(fd, 0, 0, 4096)
	done(t, r, 5, 0)
	sqe(t, r, 6).Fadvise(fd, 0, 4096, unix.FADV_WILLNEED)
	done(t, r, 6, 0)

	got, err := os.ReadFile(f.Name())
	want := make([]byte, 4096)
	copy(want, "23\x00\x00\x000123456789378")
	if err != nil || !bytes.Equal(got, want) {
		t.Fatalf("the file holds %q, %v", got[:32], err)
	}

	sqe(t, r, 7).Read(fd, addr(m[100:]), 6, 5)
	done(t, r, 7, 6)
	vec[0].Base, vec[1].Base = &m[200], &m[300]
	sqe(t, r, 8).Readv(fd, unsafe.Pointer(&vec[0]), 2, 15)
	done(t, r, 8, 3)
	if string(m[100:106]) != "012345" || m[200] != '3' || string(m[300:302]) != "78" {
		t.Errorf("read %q, %q, %q", m[100:106], m[200:201], m[300:302])
	}
	sqe(t, r, 9).Read(fd, addr(m), 10, 1<<20)
	done(t, r, 9, 0)
	sqe(t, r, 10).Read(-1, addr(m), 10, 0)
	done(t, r, 10, -int32(unix.EBADF))
}

func TestSocketOperations(t *testing.T) {
	r := newRing(t, Options{Entries: 8})
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pair[0])
	m := memory(t)
	copy(m, "ping pong")
	sqe(t, r, 1).Recv(int32(pair[0]), addr(m[100:]), 100)
	if err := r.Enter(); err != nil {
		t.Fatal(err)
	}
	sqe(t, r, 2).Send(int32(pair[1]), addr(m), 5, unix.MSG_NOSIGNAL)
	got := map[uint64]int32{}
	for range 2 {
		c := reap(t, r)
		got[c.UserData] = c.Res
	}
	if got[1] != 5 || got[2] != 5 || string(m[100:105]) != "ping " {
		t.Errorf("%v, received %q", got, m[100:105])
	}
	vec := []unix.Iovec{{Base: &m[5]}, {Base: &m[0]}}
	vec[0].SetLen(4)
	vec[1].SetLen(4)
	msg := &unix.Msghdr{Iov: &vec[0], Iovlen: 2}
	sqe(t, r, 3).Sendmsg(int32(pair[1]), unsafe.Pointer(msg), unix.MSG_NOSIGNAL)
	done(t, r, 3, 8)
	sqe(t, r, 4).Recv(int32(pair[0]), addr(m[100:]), 100)
	done(t, r, 4, 8)
	if string(m[100:108]) != "pongping" {
		t.Errorf("received %q", m[100:108])
	}
	unix.Close(pair[1])
	sqe(t, r, 5).Recv(int32(pair[0]), addr(m[100:]), 100)
	done(t, r, 5, 0)
	sqe(t, r, 6).Send(int32(pair[0]), addr(m), 5, unix.MSG_NOSIGNAL)
	done(t, r, 6, -int32(unix.EPIPE))
}

// TestPollMultishot: an eventfd that nobody reads gives a completion for every
// write to it, until it is cancelled.
func TestPollMultishot(t *testing.T) {
	r := newRing(t, Options{Entries: 8})
	event, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(event)
	sqe(t, r, 1).PollMultishot(int32(event), unix.POLLIN)
	if err := r.Enter(); err != nil {
		t.Fatal(err)
	}
	for range 5 {
		if r.Completed() != 0 {
			t.Fatal("an event without a write")
		}
		if _, err := unix.Write(event, []byte{1, 0, 0, 0, 0, 0, 0, 0}); err != nil {
			t.Fatal(err)
		}
		if c := reap(t, r); c.UserData != 1 || c.Res&unix.POLLIN == 0 || c.Flags&CQEMore == 0 {
			t.Fatalf("%+v", c)
		}
	}
	sqe(t, r, 2).Cancel(1)
	got := map[uint64]CQE{}
	for range 2 {
		c := reap(t, r)
		got[c.UserData] = c
	}
	if c := got[1]; c.Res != -int32(unix.ECANCELED) || c.Flags&CQEMore != 0 {
		t.Errorf("the poll ended with %+v", c)
	}
	if c := got[2]; c.Res != 0 {
		t.Errorf("the cancel ended with %d", c.Res)
	}
	sqe(t, r, 2).Cancel(1)
	if c := reap(t, r); c.UserData != 2 || c.Res != -int32(unix.ENOENT) {
		t.Errorf("what is over was cancelled: %+v", c)
	}
}

// TestCommand: a payload has room for 16 bytes, or 80 with SQE128; the rest of
// its room is cleared; a file without commands refuses them.
func TestCommand(t *testing.T) {
	for _, tc := range []struct {
		big  bool
		room int
	}{{false, 16}, {true, 80}} {
		r := newRing(t, Options{Entries: 2, SQE128: tc.big})
		f := file(t)
		payload := bytes.Repeat([]byte{0xaa}, tc.room+1)
		area := func(e *SQE) []byte { return unsafe.Slice((*byte)(unsafe.Pointer(&e.Addr3)), tc.room) }

		e := sqe(t, r, 1)
		if e.Command(r, int32(f.Fd()), 5, payload) {
			t.Errorf("SQE128 %v: %d bytes fit", tc.big, len(payload))
		}
		done(t, r, 1, 0) // a no-op
		for _, n := range []int{tc.room, tc.room - 3, 0} {
			for range 2 { // every entry of the queue
				e = sqe(t, r, 2)
				if !e.Command(r, int32(f.Fd()), 5, payload[:n]) {
					t.Fatalf("SQE128 %v: %d bytes do not fit", tc.big, n)
				}
				want := append(bytes.Repeat([]byte{0xaa}, n), make([]byte, tc.room-n)...)
				if e.Opcode != OpURingCmd || e.Off != 5 || !bytes.Equal(area(e), want) {
					t.Errorf("SQE128 %v: entry %+v, payload % x", tc.big, *e, area(e))
				}
				done(t, r, 2, -int32(unix.EOPNOTSUPP))
			}
		}
		// An ordinary operation behind a command is not confused by its bytes.
		sqe(t, r, 3)
		done(t, r, 3, 0)
	}
}
