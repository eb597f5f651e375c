package aio

import (
	"bytes"
	"math/rand/v2"
	"sync"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"platter/aio/native"
	"platter/aio/uring"
)

// verdict is what becomes of one operation at the system-call boundary: with an
// errno the kernel doesn't see it, and cut hands it only half of the pages.
type verdict struct {
	errno unix.Errno
	cut   bool
}

// judge decides what becomes of an operation, each time one is about to enter the
// kernel. A verdict may differ from one time to the next.
type judge func(kind opKind, off int64) verdict

// inject has judge decide on the loop's file operations, wherever its engine hands
// them to the kernel, until the test ends.
func inject(t testing.TB, l *Loop, j judge) {
	t.Helper()
	var mu sync.Mutex // threads of the pool ask too
	locked := func(kind opKind, off int64) verdict {
		mu.Lock()
		defer mu.Unlock()
		return j(kind, off)
	}
	set := func(transfer transferFunc, ring ringFaults, wrap func(nativeContext) nativeContext) {
		l.Call(func() {
			l.transfer = transfer
			switch d := l.driver.(type) {
			case *ringDriver:
				d.faults = ring
			case *nativeDriver:
				d.context = wrap(d.context)
			}
		})
	}
	set(faultyTransfer(locked), &faultyRing{judge: locked, errnos: map[*op]unix.Errno{}},
		func(c nativeContext) nativeContext { return &faultyContext{nativeContext: c, loop: l, judge: locked} })
	t.Cleanup(func() {
		set(transfer, nil, func(c nativeContext) nativeContext { return c.(*faultyContext).nativeContext })
	})
}

// half is the first half of what vec names, in whole pages as O_DIRECT wants it;
// all of it when that is less than two.
func half(vec []Iovec) []Iovec {
	var size uint64
	for _, v := range vec {
		size += v.Len
	}
	left := size / 2 / 4096 * 4096
	if left == 0 {
		return vec
	}
	var cut []Iovec
	for _, v := range vec {
		if v.Len = min(v.Len, left); v.Len > 0 {
			cut = append(cut, v)
		}
		left -= v.Len
	}
	return cut
}

// faultyTransfer is the system call that inline transfers, reads of the page cache
// and threads of the pool make.
func faultyTransfer(j judge) transferFunc {
	return func(write bool, fd int32, vec []Iovec, off int64, flags uint32, block bool) (uintptr, unix.Errno) {
		kind := opReadv
		if write {
			kind = opWritev
		}
		v := j(kind, off)
		if v.errno != 0 {
			return 0, v.errno
		}
		if v.cut {
			vec = half(vec)
		}
		return transfer(write, fd, vec, off, flags, block)
	}
}

// faultyRing changes entries of a ring.
type faultyRing struct {
	judge
	errnos map[*op]unix.Errno // of entries that became one that does nothing
	cuts   [][]Iovec          // kept until the kernel has read them
}

func (r *faultyRing) submitting(o *op, e *uring.SQE) {
	if o.kind > opFdatasync {
		return
	}
	v := r.judge(o.kind, o.off)
	switch {
	case v.errno != 0:
		r.errnos[o] = v.errno
		*e = uring.SQE{Opcode: uring.OpNop, UserData: e.UserData}
	case v.cut && o.kind != opFdatasync:
		cut := half(o.vec)
		r.cuts = append(r.cuts, cut)
		before, addr, n := *e, unsafe.Pointer(&cut[0]), uint32(min(len(cut), maxSegments))
		if o.kind == opReadv {
			e.Readv(before.Fd, addr, n, uint64(o.off))
		} else {
			e.Writev(before.Fd, addr, n, uint64(o.off), o.flags)
		}
		e.Flags, e.UserData = before.Flags, before.UserData
	}
}

func (r *faultyRing) completed(o *op) {
	if errno, ok := r.errnos[o]; ok {
		o.res = -int32(errno)
		delete(r.errnos, o)
	}
}

// faultyContext changes what io_submit takes and what io_getevents gives.
type faultyContext struct {
	nativeContext
	loop   *Loop
	judge  judge                    // of what was submitted; these and what follows may be nil
	admit  func() (int, unix.Errno) // how many a Submit takes at most, or why none
	refuse func(o *op) unix.Errno   // why Submit doesn't take this one
	most   int                      // that Events gives at a time
	hold   int                      // events that must have come before any is given
	flaky  bool                     // every other Events is interrupted

	calls    []int // sizes of the batches that Submit was given
	inFlight int
	peak     int // of inFlight
	turn     int
	events   []native.Event
}

func (c *faultyContext) Submit(batch []*native.IOCB) (int, unix.Errno) {
	c.calls = append(c.calls, len(batch))
	if c.admit != nil {
		n, errno := c.admit()
		if errno != 0 {
			return 0, errno
		}
		batch = batch[:min(n, len(batch))]
	}
	for i, b := range batch {
		if errno := c.submit(b); errno != 0 {
			if i == 0 {
				return 0, errno
			}
			return i, 0
		}
		c.inFlight++
		c.peak = max(c.peak, c.inFlight)
	}
	return len(batch), 0
}

func (c *faultyContext) submit(b *native.IOCB) unix.Errno {
	o := c.loop.ops[b.Data]
	if c.refuse != nil {
		if errno := c.refuse(o); errno != 0 {
			return errno
		}
	}
	var v verdict
	if c.judge != nil {
		v = c.judge(o.kind, o.off)
	}
	if v.errno != 0 {
		c.events = append(c.events, native.Event{Data: b.Data, Res: -int64(v.errno)})
		signal(int(b.ResFD))
		return 0
	}
	changed := *b
	if v.cut && o.kind != opFdatasync {
		cut := half(o.vec)
		if o.kind == opReadv {
			changed.Preadv(b.Fd, unsafe.Pointer(&cut[0]), min(len(cut), maxSegments), b.Offset, b.RWFlags)
		} else {
			changed.Pwritev(b.Fd, unsafe.Pointer(&cut[0]), min(len(cut), maxSegments), b.Offset, b.RWFlags)
		}
		changed.Notify(b.ResFD, b.Data)
	}
	_, errno := c.nativeContext.Submit([]*native.IOCB{&changed})
	return errno
}

func (c *faultyContext) Events(into []native.Event) (int, unix.Errno) {
	if c.turn++; c.flaky && c.turn%2 == 1 {
		return 0, unix.EINTR
	}
	for {
		var more [16]native.Event
		n, errno := c.nativeContext.Events(more[:])
		if errno != 0 && errno != unix.EINTR {
			return 0, errno
		}
		if n == 0 && errno == 0 {
			break
		}
		c.events = append(c.events, more[:n]...)
	}
	if len(c.events) < c.hold {
		return 0, 0
	}
	c.hold = 0
	if c.most > 0 {
		into = into[:c.most]
	}
	n := copy(into, c.events)
	c.events = c.events[n:]
	c.inFlight -= n
	return n, 0
}

// workload is a batch of reads and writes of a few pages each, of which no two
// touch the same page, and a flush.
type workload struct {
	t      testing.TB
	loop   *Loop
	file   *File
	memory *Memory
	batch  []*Request
	over   []int // how often each has completed
}

const (
	workSlot = 8 * 4096 // bytes of the file and of memory for each request
	workFile = 1 << 20  // bytes that newWorkload needs for each 32 requests
)

func newWorkload(t testing.TB, l *Loop, f *File, requests int, rng *rand.Rand) *workload {
	t.Helper()
	w := &workload{t: t, loop: l, file: f, memory: newMemory(t, requests*workSlot), over: make([]int, requests+1)}
	for i := range requests {
		pages := 1 + rng.IntN(8)
		r := &Request{Op: Op(i % 2), Offset: int64(i * workSlot), Length: int64(pages * 4096)} // read, write
		for p := 0; p < pages; {
			n := 1 + rng.IntN(pages-p)
			r.Vec = append(r.Vec, w.memory.Iovec(i*workSlot+p*4096, n*4096))
			p += n
		}
		if r.Op == OpWrite {
			copy(w.memory.Bytes()[i*workSlot:], wholePattern()[rng.IntN(1<<20):][:r.Length])
		}
		w.batch = append(w.batch, r)
	}
	w.batch = append(w.batch, &Request{Op: OpFlush})
	return w
}

// run carries the batch out and sees that each request completes once, with what
// want says, and that the bytes are where they should be.
func (w *workload) run(want func(r *Request) unix.Errno) {
	w.t.Helper()
	model := content(w.t, w.file)
	left, over := len(w.batch), make(chan struct{})
	for i, r := range w.batch {
		r.Errno = unix.EINPROGRESS
		r.Done = func(*Request) {
			w.over[i]++
			if left--; left == 0 {
				close(over)
			}
		}
	}
	w.loop.Post(func() { w.file.Submit(w.loop, w.batch) })
	waitFor(w.t, over, "workload")
	active := 1
	for range 10 { // should anything complete again
		w.loop.Call(func() { active = w.loop.active })
	}
	if active != 0 {
		w.t.Errorf("%d operations are left", active)
	}
	for i, r := range w.batch {
		if w.over[i] != 1 || r.Errno != want(r) {
			w.t.Errorf("%v of %d bytes at %d: completed %d times, %v, want %v", r.Op, r.Length, r.Offset, w.over[i], r.Errno, want(r))
		}
		if r.Errno == 0 && r.Op == OpWrite {
			copy(model[r.Offset:r.End()], w.memory.Bytes()[i*workSlot:])
		}
	}
	for i, r := range w.batch {
		if r.Errno == 0 && r.Op == OpRead && !bytes.Equal(w.memory.Bytes()[i*workSlot:][:r.Length], model[r.Offset:r.End()]) {
			w.t.Errorf("%d bytes at %d were read wrong", r.Length, r.Offset)
		}
	}
	if !bytes.Equal(content(w.t, w.file), model) {
		w.t.Error("the file holds something else")
	}
}

func succeed(*Request) unix.Errno { return 0 }

// TestFaults: each engine copes with what the kernel may answer, in every way to a
// file.
func TestFaults(t *testing.T) {
	const requests = 64
	// tries counts how often each operation has come.
	tries := func(verdicts ...verdict) func() judge {
		return func() judge {
			type call struct {
				kind opKind
				off  int64
			}
			seen := map[call]int{}
			return func(kind opKind, off int64) verdict {
				c := call{kind, off}
				seen[c]++
				if n := seen[c]; n <= len(verdicts) {
					return verdicts[n-1]
				}
				return verdict{}
			}
		}
	}
	bad := func(off int64) bool { return off/workSlot%7 >= 5 } // reads and writes
	for _, tc := range []struct {
		name  string
		judge func() judge
		want  func(r *Request) unix.Errno
	}{
		{"no fault", tries(), succeed},
		{"short", func() judge { return func(opKind, int64) verdict { return verdict{cut: true} } }, succeed},
		{"EAGAIN", tries(verdict{errno: unix.EAGAIN}), succeed},
		{"EAGAIN again", tries(verdict{errno: unix.EAGAIN}, verdict{errno: unix.EAGAIN}, verdict{errno: unix.EAGAIN}), succeed},
		{"EINTR", tries(verdict{errno: unix.EINTR}, verdict{errno: unix.EINTR}), succeed},
		{"EAGAIN, then short", tries(verdict{errno: unix.EAGAIN}, verdict{cut: true}), succeed},
		{"errors", func() judge {
			return func(kind opKind, off int64) verdict {
				if kind == opFdatasync || !bad(off) {
					return verdict{}
				}
				return verdict{errno: unix.ENOSPC}
			}
		}, func(r *Request) unix.Errno {
			if r.Op == OpFlush || !bad(r.Offset) {
				return 0
			}
			return unix.ENOSPC
		}},
		{"anything", func() judge {
			rng := rand.New(rand.NewPCG(4, 4))
			return func(opKind, int64) verdict {
				return []verdict{{}, {cut: true}, {errno: unix.EAGAIN}, {errno: unix.EINTR}}[rng.IntN(4)]
			}
		}, succeed},
	} {
		t.Run(tc.name, func(t *testing.T) {
			eachKind(t, requests/32*workFile, func(t *testing.T, l *Loop, f *File) {
				if f.opts.Sync {
					return // the same as buffered, but slow
				}
				asked := 0
				j := tc.judge()
				inject(t, l, func(kind opKind, off int64) verdict { asked++; return j(kind, off) })
				newWorkload(t, l, f, requests, rand.New(rand.NewPCG(5, 5))).run(tc.want)
				if asked < requests {
					t.Errorf("only %d operations were looked at", asked)
				}
			})
		})
	}
}
