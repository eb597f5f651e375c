package merge

import (
	"slices"
	"testing"

	"golang.org/x/sys/unix"
	"platter/aio"
)

// A composite that fails says nothing about its members: none of them ends
// until it has been retried by itself, and each ends as its retry did.
func TestNoEarlyCompletion(t *testing.T) {
	g := &guest{t: t}
	g.add(aio.OpWrite, aio.FlagFUA, 8, 8)
	g.add(aio.OpWrite, aio.FlagFUA, 0, 8, 4, 4)
	g.add(aio.OpWrite, aio.FlagFUA, 4, 8)
	var retries []*aio.Request
	m := New(Limits{}, func(batch []*aio.Request) { retries = append(retries, batch...) })
	out := m.Merge(nil, g.requests)
	if len(out) != 1 || out[0].Length != 16 {
		t.Fatalf("got %s", describeAll(out))
	}
	outcomes := []unix.Errno{0, unix.EIO, unix.ENOSPC}
	out[0].Complete(unix.EIO)
	for i, errno := range outcomes {
		if len(retries) != i+1 || len(g.order) != i {
			t.Fatalf("%d retried and %d ended, want %d and %d", len(retries), len(g.order), i+1, i)
		}
		if got, want := describe(retries[i]), describe(g.requests[i]); got != want {
			t.Errorf("retried %s, want %s", got, want)
		}
		retries[i].Complete(errno)
		if g.requests[i].Errno != errno {
			t.Errorf("request %d: errno %d, want %d", i, g.requests[i].Errno, errno)
		}
	}
	g.check(1)
	if !slices.Equal(g.order, []int{0, 1, 2}) || len(retries) != 3 {
		t.Errorf("ended in order %v after %d retries", g.order, len(retries))
	}
	if len(m.free) != 1 {
		t.Errorf("%d composites are free, want 1", len(m.free))
	}
}

func TestSuccessEndsMembersInArrivalOrder(t *testing.T) {
	g := &guest{t: t}
	for _, block := range []int64{3, 0, 2, 1} {
		g.add(aio.OpRead, 0, block*8, 8)
	}
	out := New(Limits{}, nil).Merge(nil, g.requests)
	g.check(0)
	out[0].Complete(0)
	g.check(1)
	if !slices.Equal(g.order, []int{0, 1, 2, 3}) {
		t.Errorf("ended in order %v", g.order)
	}
	for i, r := range g.requests {
		if r.Errno != 0 {
			t.Errorf("request %d: errno %d", i, r.Errno)
		}
	}
}

// Many members that fail at once must not nest their retries.
func TestRetriesWithinSubmitDoNotNest(t *testing.T) {
	g := &guest{t: t}
	for i := range 128 {
		g.add(aio.OpRead, 0, int64(i)*8, 8)
	}
	depth, deepest := 0, 0
	m := New(Limits{}, func(batch []*aio.Request) {
		depth++
		deepest = max(deepest, depth)
		batch[0].Complete(unix.EIO)
		depth--
	})
	m.Merge(nil, g.requests)[0].Complete(unix.EIO)
	g.check(1)
	if deepest != 1 {
		t.Errorf("resubmit was called %d deep", deepest)
	}
}

// A member's Done may merge and complete other requests, while the composite
// is still at work on the members that follow.
func TestMergeWithinDone(t *testing.T) {
	for _, errno := range []unix.Errno{0, unix.EIO} {
		g, inner := &guest{t: t}, &guest{t: t}
		for i := range 4 {
			g.add(aio.OpRead, 0, int64(i)*8, 8)
		}
		m := New(Limits{}, func(batch []*aio.Request) { batch[0].Complete(0) })
		g.then = func(i int) {
			from := len(inner.requests)
			inner.add(aio.OpRead, 0, int64(i)*100, 8)
			inner.add(aio.OpRead, 0, int64(i)*100+8, 8)
			out := m.Merge(nil, inner.requests[from:])
			if len(out) != 1 {
				t.Fatalf("got %s", describeAll(out))
			}
			out[0].Complete(errno)
		}
		m.Merge(nil, g.requests)[0].Complete(errno)
		g.check(1)
		inner.check(1)
	}
}

func TestFreeCompositesHoldOnToNothing(t *testing.T) {
	g := &guest{t: t}
	g.add(aio.OpWrite, 0, 0, 8)
	g.add(aio.OpWrite, 0, 8, 8)
	m := New(Limits{}, func(batch []*aio.Request) { batch[0].Complete(0) })
	for _, errno := range []unix.Errno{0, unix.EIO} {
		m.Merge(nil, g.requests)[0].Complete(errno)
		c := m.free[0]
		if c.request.Vec != nil || c.one[0] != nil || slices.ContainsFunc(c.members[:cap(c.members)], func(r *aio.Request) bool { return r != nil }) {
			t.Errorf("composite still holds pointers after errno %d", errno)
		}
	}
	if len(m.free) != 1 {
		t.Errorf("%d composites are free, want 1", len(m.free))
	}
	if slices.ContainsFunc(m.composites[:], func(c *composite) bool { return c != nil }) {
		t.Error("the merger still holds a composite")
	}
}

func TestNoAllocations(t *testing.T) {
	sequential := make([]int, batchSize)
	overlapping := make([]int, batchSize)
	for i := range sequential {
		sequential[i] = (i*37 + 5) % batchSize
		overlapping[i] = i % 16
	}
	mixed := newBatch(aio.OpRead, overlapping)
	for i := range mixed {
		mixed[i].Op = []aio.Op{aio.OpRead, aio.OpWrite, aio.OpDiscard, aio.OpFlush, aio.OpCache}[i%5]
	}
	batches := map[string][]*aio.Request{
		"one":         newBatch(aio.OpRead, sequential[:1]),
		"random":      randomBatches(aio.OpWrite, batchSize)[0],
		"sequential":  newBatch(aio.OpRead, sequential),
		"overlapping": newBatch(aio.OpWrite, overlapping),
		"mixed":       mixed,
	}
	for name, batch := range batches {
		for _, limits := range []Limits{{}, {Members: 3}} {
			m := New(limits, func(batch []*aio.Request) { batch[0].Complete(0) })
			out := make([]*aio.Request, 0, sectionMax)
			outcome := unix.Errno(0)
			if n := testing.AllocsPerRun(100, func() {
				out = m.Merge(out[:0], batch)
				outcome ^= unix.EIO // every other time each composite fails
				for _, r := range out {
					r.Complete(outcome)
				}
			}); n != 0 {
				t.Errorf("%s, %+v: %v allocations per batch", name, limits, n)
			}
		}
	}
}
