package merge

import (
	"fmt"
	"slices"

	"golang.org/x/sys/unix"
	"pgregory.net/rapid"
	"platter/aio"
)

// The model is a disk of a few bytes and a memory of a few more. Merging never
// looks into memory, so an Iovec's Base is an index into the memory.
//
// The disk has a bad part: an operation that meets it stops there, with what
// came before carried out, and fails.
type model struct {
	base   int64 // the disk's first offset
	disk   []byte
	memory []byte
	bad    [2]int64 // from, to
}

func newModel(base int64, diskSize int) *model {
	m := &model{base: base, disk: make([]byte, diskSize)}
	for i := range m.disk {
		m.disk[i] = byte(128 + i*3)
	}
	return m
}

// with is a copy of the model with memory for the guest's requests.
func (m *model) with(g *guest) *model {
	c := *m
	c.disk, c.memory = slices.Clone(m.disk), make([]byte, g.brk)
	for i := range c.memory {
		c.memory[i] = byte(i*7 + i>>8)
	}
	return &c
}

// execute carries a request out and returns its outcome.
func (m *model) execute(r *aio.Request) unix.Errno {
	if r.Op == aio.OpFlush || r.Op == aio.OpCache {
		return 0
	}
	if r.Offset < m.base || r.Length < 0 || r.Length > int64(len(m.disk)) ||
		r.Offset-m.base > int64(len(m.disk))-r.Length {
		return unix.EINVAL
	}
	at, end := r.Offset-m.base, r.Offset-m.base+r.Length
	var errno unix.Errno
	if at < m.bad[1] && end > m.bad[0] {
		end, errno = max(at, m.bad[0]), unix.EIO
	}
	switch r.Op {
	case aio.OpDiscard:
		for i := at; i < end; i++ {
			m.disk[i] = 0xdd
		}
	case aio.OpWriteZeroes:
		clear(m.disk[at:end])
	default:
		for _, v := range r.Vec {
			memory := m.memory[v.Base : v.Base+uintptr(v.Len)]
			memory = memory[:min(int64(len(memory)), end-at)]
			if r.Op == aio.OpWrite {
				copy(m.disk[at:], memory)
			} else {
				copy(memory, m.disk[at:])
			}
			at += int64(len(memory))
		}
	}
	return errno
}

// guest makes requests for a model, gives each memory of its own and notes how
// they end.
type guest struct {
	t        rapid.TB
	requests []*aio.Request
	original []aio.Request
	vecs     [][]aio.Iovec // copies of the requests' vectors
	ends     []int         // how often Done was called
	order    []int         // in which order
	brk      uintptr       // memory up to here is taken
	then     func(i int)   // called within Done
}

// add makes a request; pieces says how its memory is parted, and is by default
// all of it in one.
func (g *guest) add(op aio.Op, flags aio.Flags, offset, length int64, pieces ...uint64) *aio.Request {
	r := &aio.Request{Op: op, Flags: flags, Offset: offset, Length: length, Errno: unix.ENOTRECOVERABLE}
	if op == aio.OpRead || op == aio.OpWrite {
		if pieces == nil {
			pieces = []uint64{uint64(length)}
		}
		for _, n := range pieces {
			r.Vec = append(r.Vec, aio.Iovec{Base: g.brk, Len: n})
			g.brk += uintptr(n) + 1 // never next to each other
		}
	}
	i := len(g.requests)
	r.Done = func(done *aio.Request) {
		if done != r {
			g.t.Errorf("request %d: Done was called with another request", i)
		}
		g.ends[i]++
		g.order = append(g.order, i)
		if g.then != nil {
			g.then(i)
		}
	}
	g.requests = append(g.requests, r)
	g.original = append(g.original, *r)
	g.vecs = append(g.vecs, slices.Clone(r.Vec))
	g.ends = append(g.ends, 0)
	return r
}

// check says what merging has done to the requests that it must not do.
func (g *guest) check(wantEnds int) {
	g.t.Helper()
	for i, r := range g.requests {
		o := g.original[i]
		if r.Op != o.Op || r.Flags != o.Flags || r.Offset != o.Offset || r.Length != o.Length || !slices.Equal(r.Vec, g.vecs[i]) {
			g.t.Errorf("request %d has been changed: %s", i, describe(r))
		}
		if g.ends[i] != wantEnds {
			g.t.Errorf("request %d ended %d times, want %d", i, g.ends[i], wantEnds)
		}
	}
}

func describe(r *aio.Request) string {
	return fmt.Sprintf("%v/%d %d+%d %v", r.Op, r.Flags, r.Offset, r.Length, r.Vec)
}

func describeAll(batch []*aio.Request) (s string) {
	for i, r := range batch {
		s += fmt.Sprintf("\n  %d: %s", i, describe(r))
	}
	return s
}

// checkEquivalent merges the guest's requests as one batch and carries out the
// result one by one; composites for which flaky says so fail at first. The
// outcome has to be that of carrying out the requests one by one. It returns
// what Merge did.
func checkEquivalent(t rapid.TB, g *guest, start *model, limits Limits, flaky func() bool) []*aio.Request {
	t.Helper()
	want := start.with(g)
	errnos := make([]unix.Errno, len(g.requests))
	for i, r := range g.requests {
		errnos[i] = want.execute(r)
	}

	got := start.with(g)
	m := New(limits, func(batch []*aio.Request) {
		for _, r := range batch {
			r.Complete(got.execute(r))
		}
	})
	clear(g.ends)
	out := m.Merge(nil, g.requests)
	g.check(0)
	checkShape(t, g.requests, out, limits.withDefaults())
	for _, r := range slices.Clone(out) {
		errno := got.execute(r)
		if !slices.Contains(g.requests, r) && flaky() {
			errno = unix.EAGAIN
		}
		r.Complete(errno)
	}
	g.check(1)
	if t.Failed() {
		t.Fatalf("batch:%s", describeAll(g.requests))
	}
	for i, r := range g.requests {
		if r.Errno != errnos[i] {
			t.Errorf("request %d: errno %d, want %d", i, r.Errno, errnos[i])
		}
		for _, v := range r.Vec {
			a, b := got.memory[v.Base:v.Base+uintptr(v.Len)], want.memory[v.Base:v.Base+uintptr(v.Len)]
			if r.Errno == 0 && !slices.Equal(a, b) {
				t.Errorf("request %d: memory %v, want %v", i, a, b)
			}
		}
	}
	if !slices.Equal(got.disk, want.disk) {
		t.Errorf("disk\n%v, want\n%v", got.disk, want.disk)
	}
	if t.Failed() {
		t.Fatalf("batch:%s\nbad: %v", describeAll(g.requests), start.bad)
	}
	return out
}

// checkShape checks that the composites in out keep to the limits and are
// whole, and that what is no composite stands in arrival order.
func checkShape(t rapid.TB, batch, out []*aio.Request, limits Limits) {
	t.Helper()
	last, alone := -1, 0
	composites := 0
	for _, r := range out {
		if i := slices.Index(batch, r); i >= 0 {
			alone++
			if i <= last {
				t.Errorf("request %d comes after request %d", i, last)
			}
			last = i
			continue
		}
		composites++
		if r.Length > limits.Bytes || len(r.Vec) > limits.Segments {
			t.Errorf("composite exceeds the limits: %s", describe(r))
		}
		sum := int64(0)
		for _, v := range r.Vec {
			if v.Len == 0 {
				t.Errorf("composite with an empty segment: %s", describe(r))
			}
			sum += int64(v.Len)
		}
		if (r.Op == aio.OpRead || r.Op == aio.OpWrite) && sum != r.Length {
			t.Errorf("composite of %d bytes has memory for %d", r.Length, sum)
		}
	}
	if members := len(batch) - alone; members < 2*composites || members > composites*limits.Members {
		t.Errorf("%d composites have %d members", composites, members)
	}
}
