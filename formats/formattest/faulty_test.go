package formattest

import (
	"testing"

	"golang.org/x/sys/unix"

	"platter/aio"
)

// held is a storage that completes requests when it is told to.
type held struct{ waiting []*aio.Request }

func (h *held) Size() int64                              { return 1 << 20 }
func (h *held) Close() error                             { return nil }
func (h *held) Submit(_ *aio.Loop, batch []*aio.Request) { h.waiting = append(h.waiting, batch...) }

// release completes the first request that waits.
func (h *held) release(errno unix.Errno) {
	r := h.waiting[0]
	h.waiting = h.waiting[1:]
	r.Complete(errno)
}

func submitted(f *Faulty, op aio.Op, flags aio.Flags) *aio.Request {
	r := &aio.Request{Op: op, Flags: flags, Errno: unix.ENOANO, Done: func(*aio.Request) {}}
	f.Submit(nil, []*aio.Request{r})
	return r
}

func TestFaultyFails(t *testing.T) {
	below := &held{}
	f := NewFaulty(below)
	f.Inject(Fault{Errno: unix.EIO, After: 1, Times: 2, Match: func(r *aio.Request) bool { return r.Op == aio.OpWrite }})
	for i, want := range []unix.Errno{0, unix.EIO, unix.EIO, 0, 0} {
		r := submitted(f, aio.OpWrite, 0)
		if want == 0 {
			below.release(0)
		}
		if r.Errno != want {
			t.Errorf("write %d: %v, want %v", i, r.Errno, want)
		}
	}
	submitted(f, aio.OpRead, 0)
	below.release(0)
	if hits := f.Heal(); hits != 2 {
		t.Errorf("%d hits", hits)
	}
	f.Inject(Fault{Errno: unix.ENOSPC, Match: func(*aio.Request) bool { return true }})
	for range 5 {
		if r := submitted(f, aio.OpRead, 0); r.Errno != unix.ENOSPC {
			t.Error(r.Errno)
		}
	}
}

// TestFaultyAccounts: only a flush that was submitted after a write completed
// makes it durable, if it succeeds.
func TestFaultyAccounts(t *testing.T) {
	below := &held{}
	f := NewFaulty(below)
	want := func(n int, when string) {
		t.Helper()
		if got := f.Unflushed(); got != n {
			t.Errorf("%s: %d unflushed, want %d", when, got, n)
		}
	}
	submitted(f, aio.OpWrite, 0)
	submitted(f, aio.OpFlush, 0)
	want(0, "before the write completes")
	below.release(0)
	want(1, "after a write")
	below.release(0)
	want(1, "after a flush that came before the write completed")
	submitted(f, aio.OpFlush, 0)
	below.release(unix.EIO)
	want(1, "after a failed flush")
	submitted(f, aio.OpFlush, 0)
	submitted(f, aio.OpWriteZeroes, 0)
	below.release(0)
	below.release(0)
	want(1, "after a flush, with zeroes after it")
	submitted(f, aio.OpWrite, aio.FlagFUA)
	below.release(0)
	want(1, "after a write with FUA")
	submitted(f, aio.OpDiscard, 0)
	below.release(unix.EIO)
	want(1, "after a failed discard")
}
