package merge

import (
	"math"
	"slices"
	"testing"

	"platter/aio"
)

func never() bool { return false }

// span is what is looked at of a request.
type span struct {
	op     aio.Op
	offset int64
	length int64
}

// merged merges the guest's requests, checks that the outcome is that of the
// requests themselves, and that the result is what is wanted.
func merged(t *testing.T, g *guest, base int64, limits Limits, want ...span) []*aio.Request {
	t.Helper()
	out := New(limits, nil).Merge(nil, g.requests)
	var got []span
	for _, r := range out {
		got = append(got, span{r.Op, r.Offset, r.Length})
	}
	if !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	checkEquivalent(t, g, newModel(base, 4096), limits, never)
	return out
}

func TestSingleRequestIsHandedOn(t *testing.T) {
	g := &guest{t: t}
	r := g.add(aio.OpWrite, 0, 0, 8)
	m := New(Limits{}, nil)
	if out := m.Merge(nil, g.requests); len(out) != 1 || out[0] != r {
		t.Errorf("got %s", describeAll(out))
	}
	if out := m.Merge(nil, nil); len(out) != 0 {
		t.Errorf("nothing became %s", describeAll(out))
	}
}

func TestMergeAppends(t *testing.T) {
	g := &guest{t: t}
	first := g.add(aio.OpRead, 0, 0, 8)
	out := New(Limits{}, nil).Merge([]*aio.Request{first}, []*aio.Request{g.add(aio.OpRead, 0, 100, 8), g.add(aio.OpRead, 0, 108, 8)})
	if len(out) != 2 || out[0] != first || out[1].Offset != 100 || out[1].Length != 16 {
		t.Errorf("got %s", describeAll(out))
	}
}

func TestContiguous(t *testing.T) {
	for _, op := range []aio.Op{aio.OpRead, aio.OpWrite, aio.OpDiscard, aio.OpWriteZeroes} {
		t.Run(op.String(), func(t *testing.T) {
			g := &guest{t: t}
			g.add(op, 0, 0, 10)
			g.add(op, 0, 10, 5)
			g.add(op, 0, 15, 1)
			merged(t, g, 0, Limits{}, span{op, 0, 16})
		})
	}
}

func TestContiguousInAnyOrder(t *testing.T) {
	g := &guest{t: t}
	for _, block := range []int64{3, 9, 1, 2, 0, 7, 30, 4, 8} {
		g.add(aio.OpWrite, 0, block*8, 8, 3, 5)
	}
	merged(t, g, 0, Limits{}, span{aio.OpWrite, 0, 40}, span{aio.OpWrite, 56, 24}, span{aio.OpWrite, 240, 8})
}

func TestGapIsKept(t *testing.T) {
	g := &guest{t: t}
	a, b := g.add(aio.OpWrite, 0, 0, 8), g.add(aio.OpWrite, 0, 9, 8)
	out := merged(t, g, 0, Limits{}, span{aio.OpWrite, 0, 8}, span{aio.OpWrite, 9, 8})
	if out[0] != a || out[1] != b {
		t.Error("the requests were replaced")
	}
}

// The data loss of 2014: a merged write ended where its last member ended, and
// so lost the end of an earlier one that contained it.
func TestOneStrictlyInsideAnother(t *testing.T) {
	t.Run("inner last", func(t *testing.T) {
		g := &guest{t: t}
		outer := g.add(aio.OpWrite, 0, 100, 30)
		inner := g.add(aio.OpWrite, 0, 110, 5)
		out := merged(t, g, 0, Limits{}, span{aio.OpWrite, 100, 30})
		want := []aio.Iovec{
			{Base: outer.Vec[0].Base, Len: 10},
			{Base: inner.Vec[0].Base, Len: 5},
			{Base: outer.Vec[0].Base + 15, Len: 15},
		}
		if !slices.Equal(out[0].Vec, want) {
			t.Errorf("vector %v, want %v", out[0].Vec, want)
		}
	})
	t.Run("outer last", func(t *testing.T) {
		g := &guest{t: t}
		g.add(aio.OpWrite, 0, 110, 5)
		outer := g.add(aio.OpWrite, 0, 100, 30, 12, 18)
		out := merged(t, g, 0, Limits{}, span{aio.OpWrite, 100, 30})
		if !slices.Equal(out[0].Vec, outer.Vec) {
			t.Errorf("vector %v, want the outer write's", out[0].Vec)
		}
	})
	t.Run("then a contiguous one", func(t *testing.T) {
		g := &guest{t: t}
		g.add(aio.OpWrite, 0, 100, 30, 15, 15)
		g.add(aio.OpWrite, 0, 110, 10, 2, 8)
		g.add(aio.OpWrite, 0, 130, 10)
		g.add(aio.OpWrite, 0, 120, 1)
		merged(t, g, 0, Limits{}, span{aio.OpWrite, 100, 40})
	})
}

func TestEqualRanges(t *testing.T) {
	g := &guest{t: t}
	g.add(aio.OpWrite, 0, 8, 8)
	g.add(aio.OpWrite, 0, 8, 8)
	last := g.add(aio.OpWrite, 0, 8, 8, 2, 6)
	out := merged(t, g, 0, Limits{}, span{aio.OpWrite, 8, 8})
	if !slices.Equal(out[0].Vec, last.Vec) {
		t.Errorf("vector %v, want the last write's", out[0].Vec)
	}
}

func TestChainOfOverlaps(t *testing.T) {
	orders := map[string]func(i int) int{
		"ascending":  func(i int) int { return i },
		"descending": func(i int) int { return 199 - i },
		"scattered":  func(i int) int { return i * 77 % 200 },
	}
	for name, at := range orders {
		t.Run(name, func(t *testing.T) {
			g := &guest{t: t}
			for i := range 200 {
				g.add(aio.OpWrite, 0, int64(at(i))*5, 12, 1, 4, 7)
			}
			merged(t, g, 0, Limits{Members: 256}, span{aio.OpWrite, 0, 199*5 + 12})
		})
	}
}

func TestOverlappingDiscards(t *testing.T) {
	for _, op := range []aio.Op{aio.OpDiscard, aio.OpWriteZeroes} {
		g := &guest{t: t}
		g.add(op, 0, 10, 20)
		g.add(op, 0, 12, 3)
		g.add(op, 0, 25, 10)
		g.add(op, 0, 0, 10)
		merged(t, g, 0, Limits{}, span{op, 0, 35})
	}
}

func TestOverlappingReads(t *testing.T) {
	g := &guest{t: t}
	g.add(aio.OpRead, 0, 0, 8)
	g.add(aio.OpRead, 0, 0, 8)
	g.add(aio.OpRead, 0, 4, 8)
	g.add(aio.OpRead, 0, 12, 8)
	g.add(aio.OpRead, 0, 30, 2)
	merged(t, g, 0, Limits{}, span{aio.OpRead, 0, 8}, span{aio.OpRead, 0, 8}, span{aio.OpRead, 4, 16}, span{aio.OpRead, 30, 2})
}

// A run of more requests than IOV_MAX segments allow becomes several.
func TestSegmentsLimit(t *testing.T) {
	g := &guest{t: t}
	for i := range 200 {
		g.add(aio.OpWrite, 0, int64(i)*16, 16, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1)
	}
	limits := Limits{Members: 256} // 200 * 16 segments are more than 1024
	merged(t, g, 0, limits, span{aio.OpWrite, 0, 1024}, span{aio.OpWrite, 1024, 1024}, span{aio.OpWrite, 2048, 1024}, span{aio.OpWrite, 3072, 128})
}

func TestSegmentsLimitOfOverlaps(t *testing.T) {
	g := &guest{t: t}
	g.add(aio.OpWrite, 0, 0, 100)
	for i := range 10 {
		g.add(aio.OpWrite, 0, int64(i)*10+5, 2)
	}
	merged(t, g, 0, Limits{Segments: 21}, span{aio.OpWrite, 0, 100})
	// One segment less, and the last write to arrive stands alone.
	merged(t, g, 0, Limits{Segments: 20}, span{aio.OpWrite, 0, 100}, span{aio.OpWrite, 95, 2})
}

func TestMembersLimit(t *testing.T) {
	g := &guest{t: t}
	for i := range 300 {
		g.add(aio.OpRead, 0, int64(i)*4, 4)
	}
	merged(t, g, 0, Limits{}, span{aio.OpRead, 0, 512}, span{aio.OpRead, 512, 512}, span{aio.OpRead, 1024, 176})
}

// Whatever the arrival order, contiguous ranges are parted by offset.
func TestMembersLimitInAnyOrder(t *testing.T) {
	g := &guest{t: t}
	for _, block := range []int64{5, 1, 3, 0, 4, 2} {
		g.add(aio.OpWrite, 0, block*4, 4)
	}
	merged(t, g, 0, Limits{Members: 3}, span{aio.OpWrite, 12, 12}, span{aio.OpWrite, 0, 12})
}

func TestMembersLimitOfOverlaps(t *testing.T) {
	g := &guest{t: t}
	for i := range 10 {
		g.add(aio.OpWrite, 0, int64(i)*4, 6)
	}
	merged(t, g, 0, Limits{Members: 4}, span{aio.OpWrite, 0, 18}, span{aio.OpWrite, 16, 18}, span{aio.OpWrite, 32, 10})

	for _, first := range []int64{0, 8} {
		g = &guest{t: t}
		g.add(aio.OpWrite, 0, first, 8)
		g.add(aio.OpWrite, 0, 8-first, 8)
		g.add(aio.OpWrite, 0, 4, 8)
		merged(t, g, 0, Limits{Members: 2}, span{aio.OpWrite, 0, 16}, span{aio.OpWrite, 4, 8})
	}
}

func TestBytesLimit(t *testing.T) {
	g := &guest{t: t}
	g.add(aio.OpWrite, 0, 0, 40)
	g.add(aio.OpWrite, 0, 40, 60)
	g.add(aio.OpWrite, 0, 100, 1)
	big := g.add(aio.OpWrite, 0, 101, 200)
	g.add(aio.OpWrite, 0, 301, 1)
	out := merged(t, g, 0, Limits{Bytes: 100}, span{aio.OpWrite, 0, 100}, span{aio.OpWrite, 100, 1}, span{aio.OpWrite, 101, 200}, span{aio.OpWrite, 301, 1})
	if out[2] != big {
		t.Error("the big request was replaced")
	}
}

func TestLargeOffsets(t *testing.T) {
	for _, base := range []int64{1<<31 - 64, 1<<32 - 64, 1<<54 - 64, 1<<55 - 64, 1 << 62, math.MaxInt64 - 4096} {
		g := &guest{t: t}
		// In 32 bits the second is greater than the first, and in the lower 55
		// bits of an offset the third is the smallest.
		g.add(aio.OpWrite, 0, base+24, 8)
		g.add(aio.OpWrite, 0, base+16, 8)
		g.add(aio.OpWrite, 0, base+64, 8)
		g.add(aio.OpWrite, 0, base+68, 8)
		g.add(aio.OpWrite, 0, base, 8)
		merged(t, g, base, Limits{}, span{aio.OpWrite, base + 16, 16}, span{aio.OpWrite, base + 64, 12}, span{aio.OpWrite, base, 8})
	}
}

// Offsets that are equal in their lower bits are not equal.
func TestFarApart(t *testing.T) {
	g := &guest{t: t}
	for i := range 60 {
		g.add(aio.OpWrite, 0, int64(i%8)<<56+int64(i)*8, 8)
	}
	out := New(Limits{}, nil).Merge(nil, g.requests)
	if !slices.Equal(out, g.requests) {
		t.Errorf("got %s", describeAll(out))
	}
}

// A range that ends beyond the greatest offset has an End that is negative.
func TestEndOverflow(t *testing.T) {
	g := &guest{t: t}
	g.add(aio.OpWrite, 0, math.MaxInt64-8, 8)
	g.add(aio.OpWrite, 0, math.MaxInt64-8, 9, 9)
	g.add(aio.OpDiscard, 0, math.MaxInt64-4, math.MaxInt64)
	g.add(aio.OpDiscard, 0, -8, 8)
	g.add(aio.OpDiscard, 0, 0, math.MinInt64)
	g.add(aio.OpDiscard, 0, 0, 0)
	g.add(aio.OpDiscard, 0, 1, 8)
	out := New(Limits{Bytes: math.MaxInt64}, nil).Merge(nil, g.requests)
	if !slices.Equal(out, g.requests) {
		t.Errorf("got %s", describeAll(out))
	}
}

func TestFlushIsBarrier(t *testing.T) {
	g := &guest{t: t}
	g.add(aio.OpWrite, 0, 8, 8)
	g.add(aio.OpWrite, 0, 0, 8)
	g.add(aio.OpFlush, 0, 0, 0)
	g.add(aio.OpWrite, 0, 16, 8)
	g.add(aio.OpWrite, 0, 24, 8)
	g.add(aio.OpFlush, 0, 0, 0)
	g.add(aio.OpFlush, 0, 0, 0)
	g.add(aio.OpWrite, 0, 32, 8)
	flush := span{aio.OpFlush, 0, 0}
	merged(t, g, 0, Limits{}, span{aio.OpWrite, 0, 16}, flush, span{aio.OpWrite, 16, 16}, flush, flush, span{aio.OpWrite, 32, 8})
}

// The last write must not join the first: the read in between needs what the
// second wrote, and not what the last one writes.
func TestConflictIsBarrier(t *testing.T) {
	g := &guest{t: t}
	g.add(aio.OpWrite, 0, 8, 8)
	g.add(aio.OpWrite, 0, 0, 8)
	g.add(aio.OpRead, 0, 4, 8)
	g.add(aio.OpRead, 0, 12, 8)
	g.add(aio.OpWrite, 0, 4, 8)
	g.add(aio.OpWrite, 0, 12, 8)
	merged(t, g, 0, Limits{}, span{aio.OpWrite, 0, 16}, span{aio.OpRead, 4, 16}, span{aio.OpWrite, 4, 16})
}

func TestConflictsOfAllKinds(t *testing.T) {
	ops := []aio.Op{aio.OpRead, aio.OpWrite, aio.OpDiscard, aio.OpWriteZeroes}
	for _, a := range ops {
		for _, b := range ops {
			if a == b {
				continue
			}
			t.Run(a.String()+" and "+b.String(), func(t *testing.T) {
				g := &guest{t: t}
				g.add(a, 0, 0, 8)
				g.add(b, 0, 4, 8)
				g.add(a, 0, 8, 8)
				merged(t, g, 0, Limits{}, span{a, 0, 8}, span{b, 4, 8}, span{a, 8, 8})
			})
		}
	}
}

// Reads with different flags are of different kinds, and still may overlap.
func TestReadsNeverConflict(t *testing.T) {
	g := &guest{t: t}
	g.add(aio.OpRead, 0, 20, 8)
	g.add(aio.OpRead, 0, 0, 8)
	g.add(aio.OpRead, aio.FlagFUA, 4, 8)
	g.add(aio.OpRead, aio.FlagFUA, 12, 8)
	g.add(aio.OpRead, 0, 28, 8)
	merged(t, g, 0, Limits{}, span{aio.OpRead, 20, 16}, span{aio.OpRead, 0, 8}, span{aio.OpRead, 4, 16})
}

func TestOtherKindsElsewhereAreNoBarrier(t *testing.T) {
	g := &guest{t: t}
	g.add(aio.OpRead, 0, 0, 8)
	g.add(aio.OpWrite, 0, 100, 8)
	g.add(aio.OpCache, 0, 4, 8)
	g.add(aio.OpDiscard, 0, 16, 8)
	g.add(aio.OpRead, 0, 8, 8) // ends where the discard begins
	g.add(aio.OpWrite, 0, 108, 8)
	g.add(aio.OpDiscard, 0, 24, 8)
	merged(t, g, 0, Limits{}, span{aio.OpRead, 0, 16}, span{aio.OpWrite, 100, 16}, span{aio.OpCache, 4, 8}, span{aio.OpDiscard, 16, 16})
}

func TestFUAAndPlainWritesAreNotMixed(t *testing.T) {
	g := &guest{t: t}
	g.add(aio.OpWrite, 0, 0, 8)
	g.add(aio.OpWrite, aio.FlagFUA, 8, 8)
	g.add(aio.OpWrite, aio.FlagFUA, 16, 8)
	g.add(aio.OpWrite, 0, 24, 8)
	g.add(aio.OpWrite, aio.FlagFUA, 28, 8) // a conflict
	g.add(aio.OpWrite, 0, 32, 8)
	out := merged(t, g, 0, Limits{}, span{aio.OpWrite, 0, 8}, span{aio.OpWrite, 8, 16}, span{aio.OpWrite, 24, 8}, span{aio.OpWrite, 28, 8}, span{aio.OpWrite, 32, 8})
	if out[1].Flags != aio.FlagFUA|aio.FlagJoined {
		t.Error("the composite of FUA writes has no FUA")
	}
	g = &guest{t: t}
	g.add(aio.OpWriteZeroes, 0, 0, 8)
	g.add(aio.OpWriteZeroes, aio.FlagNoUnmap, 8, 8)
	merged(t, g, 0, Limits{}, span{aio.OpWriteZeroes, 0, 8}, span{aio.OpWriteZeroes, 8, 8})
}
