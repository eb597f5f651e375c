package aio

import (
	"testing"

	"golang.org/x/sys/unix"

	"platter/integration/testenv"
)

// TestDurability: which operations the kernel is asked for, for each kind of
// file.
func TestDurability(t *testing.T) {
	l := newLoop(t, LoopOptions{})
	m := newMemory(t, 4096)
	const write, sync, punch = opWritev, opFdatasync, opFallocate
	for _, tc := range []struct {
		name  string
		opts  FileOptions
		r     Request
		kinds []opKind
		flags uint32 // of the first
	}{
		{"write", FileOptions{}, Request{Op: OpWrite}, []opKind{write}, 0},
		{"FUA", FileOptions{}, Request{Op: OpWrite, Flags: FlagFUA}, []opKind{write}, unix.RWF_DSYNC},
		{"direct FUA", FileOptions{Direct: true}, Request{Op: OpWrite, Flags: FlagFUA}, []opKind{write}, unix.RWF_DSYNC},
		{"FUA with O_DSYNC", FileOptions{Sync: true}, Request{Op: OpWrite, Flags: FlagFUA}, []opKind{write}, 0},
		{"FUA without flushes", FileOptions{NoFlush: true}, Request{Op: OpWrite, Flags: FlagFUA}, []opKind{write}, 0},
		{"flush", FileOptions{}, Request{Op: OpFlush}, []opKind{sync}, 0},
		{"flush with O_DSYNC", FileOptions{Sync: true}, Request{Op: OpFlush}, []opKind{sync}, 0},
		{"flush without flushes", FileOptions{NoFlush: true}, Request{Op: OpFlush}, nil, 0},
		{"flush, read-only", FileOptions{ReadOnly: true}, Request{Op: OpFlush}, nil, 0},
		{"zeroes", FileOptions{}, Request{Op: OpWriteZeroes}, []opKind{punch}, 3},
		{"zeroes FUA", FileOptions{}, Request{Op: OpWriteZeroes, Flags: FlagFUA}, []opKind{punch, sync}, 3},
		{"zeroes with O_DSYNC", FileOptions{Sync: true}, Request{Op: OpWriteZeroes}, []opKind{punch, sync}, 3},
		{"zeroes FUA without flushes", FileOptions{NoFlush: true}, Request{Op: OpWriteZeroes, Flags: FlagFUA}, []opKind{punch}, 3},
		{"discard", FileOptions{Sync: true}, Request{Op: OpDiscard}, []opKind{punch}, 3},
		{"discard FUA", FileOptions{}, Request{Op: OpDiscard, Flags: FlagFUA}, []opKind{punch, sync}, 3},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f := openFile(t, newFile(t, testenv.DiskDir(t), 1<<16), tc.opts)
			var kinds []opKind
			var flags []uint32
			intercept(t, l, func(o *op) bool {
				kinds, flags = append(kinds, o.kind), append(flags, o.flags)
				return false
			})
			if tc.r.Op != OpFlush {
				tc.r.Length = 4096
			}
			if tc.r.Op == OpWrite {
				tc.r.Vec = []Iovec{m.Iovec(0, 4096)}
			}
			must(t, l, f, tc.r)
			if len(kinds) != len(tc.kinds) || (len(kinds) > 0 && flags[0] != tc.flags) {
				t.Fatalf("operations %v, flags %#x", kinds, flags)
			}
			for i := range kinds {
				if kinds[i] != tc.kinds[i] {
					t.Errorf("operations %v", kinds)
				}
			}
		})
	}
}

// TestFailedFlush: after a flush has failed none succeeds any more, also not the
// one that a write-zeroes with FUA ends with, on any loop; reads still do.
func TestFailedFlush(t *testing.T) {
	eachEngine(t, func(t *testing.T, l *Loop) {
		f := openFile(t, newFile(t, testenv.DiskDir(t), 1<<16), FileOptions{})
		other := newLoop(t, LoopOptions{Engine: l.Engine()})
		m := newMemory(t, 4096)
		failures := 1
		intercept(t, l, func(o *op) bool {
			if o.kind != opFdatasync || failures == 0 {
				return false
			}
			failures--
			return answer(o, -int32(unix.ENOSPC))
		})
		if e := one(t, l, f, Request{Op: OpFlush}); e != unix.ENOSPC {
			t.Errorf("the flush that failed: %v", e)
		}
		for _, l := range []*Loop{l, other} {
			if e := one(t, l, f, Request{Op: OpFlush}); e != unix.EIO {
				t.Errorf("a later flush: %v", e)
			}
			if e := one(t, l, f, Request{Op: OpWriteZeroes, Flags: FlagFUA, Length: 512}); e != unix.EIO {
				t.Errorf("a later write-zeroes with FUA: %v", e)
			}
			must(t, l, f, Request{Op: OpRead, Length: 4096, Vec: []Iovec{m.Iovec(0, 4096)}})
		}
	})
}

// TestFailedDurableWrite: the kernel tells of a failed write-back once, and it
// may tell a write with FUA.
func TestFailedDurableWrite(t *testing.T) {
	for _, tc := range []struct {
		name    string
		opts    FileOptions
		flags   Flags
		offset  int64
		failure unix.Errno
		then    unix.Errno
	}{
		{"FUA", FileOptions{}, FlagFUA, 0, unix.EIO, unix.EIO},
		{"O_DSYNC", FileOptions{Sync: true}, 0, 0, unix.EIO, unix.EIO},
		{"direct", FileOptions{Direct: true}, FlagFUA, 0, unix.EIO, unix.EIO},
		{"direct, part of a block", FileOptions{Direct: true}, FlagFUA, 1, unix.EIO, unix.EIO},
		{"plain", FileOptions{}, 0, 0, unix.EIO, 0},
		{"no space", FileOptions{}, FlagFUA, 0, unix.ENOSPC, 0},
	} {
		l := newLoop(t, LoopOptions{})
		f := openFile(t, newFile(t, testenv.DiskDir(t), 1<<16), tc.opts)
		m := newMemory(t, 8192)
		intercept(t, l, func(o *op) bool { return o.kind == opWritev && answer(o, -int32(tc.failure)) })
		r := Request{Op: OpWrite, Flags: tc.flags, Offset: tc.offset, Length: 4096, Vec: []Iovec{m.Iovec(0, 4096)}}
		if e := one(t, l, f, r); e != tc.failure {
			t.Errorf("%s: write: %v", tc.name, e)
		}
		if e := one(t, l, f, Request{Op: OpFlush}); e != tc.then {
			t.Errorf("%s: flush: %v, want %v", tc.name, e, tc.then)
		}
	}
}

// TestFlushesTogether: flushes of several loops that come while one runs wait for
// it and share the next; when that fails all of them do.
func TestFlushesTogether(t *testing.T) {
	eachEngine(t, func(t *testing.T, l *Loop) {
		f := openFile(t, newFile(t, testenv.DiskDir(t), 1<<16), FileOptions{})
		other := newLoop(t, LoopOptions{Engine: l.Engine()})
		running := make(chan *op, 10)
		hold := func(o *op) bool { running <- o; return true }
		intercept(t, l, hold)
		intercept(t, other, hold)
		var first Request
		first.Op = OpFlush
		over := begin(l, f, &first)
		held := <-running
		var rest []*Request
		var waits []<-chan struct{}
		for i := range 6 {
			batch := []*Request{{Op: OpFlush}, {Op: OpFlush}}
			rest = append(rest, batch...)
			waits = append(waits, begin([]*Loop{other, l}[i%2], f, batch...))
		}
		for range 10 {
			l.Call(func() {})
			other.Call(func() {})
		}
		if len(running) != 0 {
			t.Fatal("two run at a time")
		}
		held.loop.Post(func() { answer(held, 0) })
		waitFor(t, over, "first flush")
		held = <-running
		held.loop.Post(func() { answer(held, -int32(unix.EIO)) })
		for _, w := range waits {
			waitFor(t, w, "flushes")
		}
		if len(running) != 0 {
			t.Error("more than two ran")
		}
		if first.Errno != 0 {
			t.Errorf("the first flush: %v", first.Errno)
		}
		for _, r := range rest {
			if r.Errno != unix.EIO {
				t.Errorf("a flush that waited: %v", r.Errno)
			}
		}
	})
}
