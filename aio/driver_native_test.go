package aio

import (
	"errors"
	"math/rand/v2"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"platter/aio/native"
	"platter/integration/testenv"
)

// nativeRig is a loop with native, a file with O_DIRECT, and what stands before
// the loop's context.
func nativeRig(t *testing.T, requests int) (*Loop, *File, *faultyContext) {
	t.Helper()
	l := newLoop(t, LoopOptions{Engine: EngineNative, Poll: DefaultPoll})
	f := openFile(t, newFile(t, testenv.DiskDir(t), requests/32*workFile), FileOptions{Direct: true})
	if !f.async {
		testenv.Skip(t, "the file system has no RWF_NOWAIT with O_DIRECT")
	}
	c := &faultyContext{loop: l}
	l.Call(func() {
		d := l.driver.(*nativeDriver)
		c.nativeContext, d.context = d.context, c
	})
	t.Cleanup(func() { l.Call(func() { l.driver.(*nativeDriver).context = c.nativeContext }) })
	return l, f, c
}

// TestNativeSubmit: whatever io_submit takes and io_getevents gives, each request
// completes once and in the end.
func TestNativeSubmit(t *testing.T) {
	const requests = 2 * nativeRoom // more than there is room for
	rng := rand.New(rand.NewPCG(6, 6))
	asked := 0
	for _, tc := range []struct {
		name  string
		admit func() (int, unix.Errno)
		most  int
		hold  int
		flaky bool
	}{
		{name: "no fault"},
		{name: "one at a time", admit: func() (int, unix.Errno) { return 1, 0 }},
		{name: "any number", admit: func() (int, unix.Errno) { return rng.IntN(requests), 0 }},
		{name: "none at first", admit: func() (int, unix.Errno) {
			if asked++; asked <= 10 {
				return 0, unix.EAGAIN
			}
			return requests, 0
		}},
		{name: "no room now and then", admit: func() (int, unix.Errno) {
			if asked++; asked%3 != 0 {
				return 0, unix.EAGAIN
			}
			return 5, 0
		}},
		{name: "events one by one", most: 1},
		{name: "events in threes", most: 3},
		{name: "more events than asked for at a time", hold: nativeRoom},
		{name: "interrupted", flaky: true},
		{name: "everything", admit: func() (int, unix.Errno) {
			if rng.IntN(3) == 0 {
				return 0, unix.EAGAIN
			}
			return rng.IntN(9), 0
		}, most: 2, flaky: true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			asked = 0
			l, f, c := nativeRig(t, requests)
			c.admit, c.most, c.hold, c.flaky = tc.admit, tc.most, tc.hold, tc.flaky
			newWorkload(t, l, f, requests, rng).run(succeed)
			if c.peak > nativeRoom || c.inFlight != 0 || len(c.events) != 0 {
				t.Errorf("%d in flight at most, %d now, %d events are left", c.peak, c.inFlight, len(c.events))
			}
			if tc.name == "no fault" && c.peak != nativeRoom {
				t.Errorf("%d in flight at most", c.peak)
			}
		})
	}
}

// TestNativeRefused: what io_submit refuses to start fails alone, or is done by
// the pool when that can.
func TestNativeRefused(t *testing.T) {
	const requests = 96
	bad := func(off int64) bool { return off/workSlot%5 == 0 }
	for _, tc := range []struct {
		name  string
		errno unix.Errno
		want  unix.Errno
	}{
		{"EINVAL", unix.EINVAL, unix.EINVAL},
		{"EBADF", unix.EBADF, unix.EBADF},
		{"EFAULT", unix.EFAULT, unix.EFAULT},
		{"EOPNOTSUPP", unix.EOPNOTSUPP, 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			l, f, c := nativeRig(t, requests)
			refused := 0
			c.refuse = func(o *op) unix.Errno {
				if o.kind == opFdatasync || !bad(o.off) {
					return 0
				}
				refused++
				return tc.errno
			}
			newWorkload(t, l, f, requests, rand.New(rand.NewPCG(7, 7))).run(func(r *Request) unix.Errno {
				if r.Op == OpFlush || !bad(r.Offset) {
					return 0
				}
				return tc.want
			})
			if refused == 0 || c.peak == 0 {
				t.Errorf("%d were refused, %d in flight at most", refused, c.peak)
			}
		})
	}
}

// TestNativeOneSubmit: all that a turn has started enters the kernel at once, in
// the order in which it was started.
func TestNativeOneSubmit(t *testing.T) {
	l, f, c := nativeRig(t, 64)
	w := newWorkload(t, l, f, 64, rand.New(rand.NewPCG(8, 8)))
	var order []int64
	c.judge = func(_ opKind, off int64) verdict { order = append(order, off); return verdict{} }
	w.run(succeed)
	if c.calls[0] != len(w.batch) || !slices.IsSorted(order[:64]) {
		t.Errorf("io_submit was given %v, offsets %v", c.calls, order)
	}
}

// TestNativeWouldWait: what would have to wait goes to the pool, and not to the
// kernel again in the same way.
func TestNativeWouldWait(t *testing.T) {
	l, f, c := nativeRig(t, 32)
	asked := 0
	c.judge = func(opKind, int64) verdict { asked++; return verdict{errno: unix.EAGAIN} }
	w := newWorkload(t, l, f, 32, rand.New(rand.NewPCG(9, 9)))
	w.run(succeed)
	if asked != len(w.batch) {
		t.Errorf("%d operations for %d requests", asked, len(w.batch))
	}
}

// TestNativeWays: which operations io_submit gets. The rest would keep the loop
// waiting.
func TestNativeWays(t *testing.T) {
	for _, tc := range []struct {
		kind string
		want []opKind
	}{
		{"buffered", []opKind{opFdatasync}},
		{"direct", []opKind{opReadv, opWritev, opFdatasync}},
		{"dsync", []opKind{opFdatasync, opFdatasync}}, // also after the zeroes
		{"tmpfs", []opKind{opFdatasync}},
	} {
		l, _, c := nativeRig(t, 32)
		var got []opKind
		c.judge = func(kind opKind, _ int64) verdict { got = append(got, kind); return verdict{} }
		k := kinds[slices.IndexFunc(kinds, func(k kind) bool { return k.name == tc.kind })]
		f := openFile(t, newFile(t, k.dir(t), 1<<20), k.opts)
		f.nowait = f.nowait && !k.engine
		m := newMemory(t, 4096)
		for _, r := range []Request{
			{Op: OpRead, Length: 4096, Vec: []Iovec{m.Iovec(0, 4096)}},
			{Op: OpWrite, Length: 4096, Vec: []Iovec{m.Iovec(0, 4096)}},
			{Op: OpFlush},
			{Op: OpCache, Length: 4096},
			{Op: OpDiscard, Length: 4096},
			{Op: OpWriteZeroes, Length: 4096},
		} {
			must(t, l, f, r)
		}
		if !slices.Equal(got, tc.want) {
			t.Errorf("%s: operations %v, want %v", tc.kind, got, tc.want)
		}
	}
}

// TestNativeWithoutFdsync: a kernel that can't sync by io_submit is asked once.
func TestNativeWithoutFdsync(t *testing.T) {
	l, f, c := nativeRig(t, 32)
	refused := 0
	c.refuse = func(o *op) unix.Errno {
		if o.kind != opFdatasync {
			return 0
		}
		refused++
		return unix.EINVAL
	}
	for range 5 {
		must(t, l, f, Request{Op: OpFlush})
	}
	if refused != 1 {
		t.Errorf("it was asked %d times", refused)
	}
}

// TestNativeNoRoom: while others have all the room, a loop with nothing in flight
// asks for it from time to time, and neither spins nor sleeps for ever.
func TestNativeNoRoom(t *testing.T) {
	l, f, c := nativeRig(t, 32)
	var asked atomic.Int64
	var room atomic.Bool
	c.admit = func() (int, unix.Errno) {
		asked.Add(1)
		if !room.Load() {
			return 0, unix.EAGAIN
		}
		return nativeRoom, 0
	}
	m := newMemory(t, 4096)
	r := Request{Op: OpRead, Length: 4096, Vec: []Iovec{m.Iovec(0, 4096)}}
	start := time.Now()
	over := begin(l, f, &r)
	for asked.Load() < 30 { // nobody else wakes the loop
		if time.Since(start) > patience {
			t.Fatalf("it was asked %d times", asked.Load())
		}
		time.Sleep(nativeRetry)
	}
	if n := asked.Load(); n > int64(time.Since(start)/nativeRetry)+10 {
		t.Errorf("it was asked %d times in %v", n, time.Since(start))
	}
	room.Store(true)
	waitFor(t, over, "read")
	if r.Errno != 0 {
		t.Error(r.Errno)
	}
}

// TestNativeSparse: writes to where nothing is allocated yet, for which the
// kernel has to wait, and reads of what they wrote.
func TestNativeSparse(t *testing.T) {
	l, _, _ := nativeRig(t, 32)
	path := newFile(t, testenv.DiskDir(t), 0)
	if err := unix.Truncate(path, 3*workFile); err != nil {
		t.Fatal(err)
	}
	f := openFile(t, path, FileOptions{Direct: true})
	for seed := range uint64(3) {
		newWorkload(t, l, f, 96, rand.New(rand.NewPCG(seed, 10))).run(succeed)
	}
}

// TestWhyNoNative: the message names the cause, and what to do.
func TestWhyNoNative(t *testing.T) {
	for errno, want := range map[unix.Errno]string{
		unix.EAGAIN: "raise",
		unix.ENOSYS: "without it",
		unix.EPERM:  "seccomp",
		unix.EACCES: "seccomp",
		unix.ENOMEM: "",
	} {
		got := whyNoNative(&native.Error{Op: "io_setup", Err: errno})
		if (want == "") != (got == "") || !strings.Contains(got, want) || strings.Contains(got, "?") {
			t.Errorf("%v: %q", errno, got)
		}
	}
	if _, err := newNativeContext(1 << 30); !errors.Is(err, ErrNoNative) || !strings.Contains(err.Error(), "io_setup") {
		t.Errorf("a context for a billion operations: %v", err)
	}
}
