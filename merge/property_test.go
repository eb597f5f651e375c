package merge

import (
	"math"
	"math/rand/v2"
	"slices"
	"testing"

	"pgregory.net/rapid"
	"platter/aio"
)

var bases = []int64{0, 1<<32 - 100, 1<<55 - 100, math.MaxInt64 - 256}

func TestMergedIsEquivalent(t *testing.T) {
	ops := []aio.Op{aio.OpRead, aio.OpWrite, aio.OpWrite, aio.OpDiscard, aio.OpWriteZeroes, aio.OpFlush, aio.OpCache}
	rapid.Check(t, func(rt *rapid.T) {
		base := rapid.SampledFrom(bases).Draw(rt, "base")
		start := newModel(base, 200)
		if rapid.Bool().Draw(rt, "bad") {
			at := rapid.Int64Range(0, 199).Draw(rt, "bad at")
			start.bad = [2]int64{at, at + 3}
		}
		allowed := ops
		if rapid.Bool().Draw(rt, "of one kind") {
			allowed = []aio.Op{rapid.SampledFrom(ops).Draw(rt, "kind")}
		}
		flags := rapid.SampledFrom([]aio.Flags{0, aio.FlagFUA}).Draw(rt, "flags")
		g := &guest{t: rt}
		disjoint := rapid.Bool().Draw(rt, "aligned")
		for range rapid.IntRange(0, 60).Draw(rt, "requests") {
			op := rapid.SampledFrom(allowed).Draw(rt, "op")
			offset := rapid.Int64Range(0, 190).Draw(rt, "offset")
			length := rapid.Int64Range(0, 10).Draw(rt, "length")
			if disjoint {
				offset, length = offset&^7, 8
			}
			var pieces []uint64
			for left := uint64(length); left > 0; {
				n := rapid.Uint64Range(1, left).Draw(rt, "piece")
				pieces = append(pieces, n)
				left -= n
			}
			g.add(op, flags&aio.Flags(rapid.IntRange(0, 1).Draw(rt, "flag")), base+offset, length, pieces...)
		}
		limits := Limits{
			Members:  rapid.IntRange(0, 6).Draw(rt, "members limit"),
			Bytes:    rapid.Int64Range(0, 40).Draw(rt, "bytes limit"),
			Segments: rapid.IntRange(0, 12).Draw(rt, "segments limit"),
		}
		checkEquivalent(rt, g, start, limits, func() bool { return rapid.Bool().Draw(rt, "flaky") })
	})
}

// Within generous limits, what can join does: batches of one kind become as
// many requests as there are ranges without gaps.
func TestMergedIsComplete(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		op := rapid.SampledFrom([]aio.Op{aio.OpWrite, aio.OpDiscard, aio.OpWriteZeroes}).Draw(rt, "op")
		base := rapid.SampledFrom(bases).Draw(rt, "base")
		g := &guest{t: rt}
		var covered [512]bool // every second place stands for a point between bytes
		for range rapid.IntRange(1, 50).Draw(rt, "requests") {
			offset := rapid.Int64Range(0, 240).Draw(rt, "offset")
			length := rapid.Int64Range(1, 12).Draw(rt, "length")
			g.add(op, 0, base+offset, length)
			for i := 2 * offset; i <= 2*(offset+length); i++ {
				covered[i] = true
			}
		}
		want := 0
		for i, c := range covered {
			if c && (i == 0 || !covered[i-1]) {
				want++
			}
		}
		out := New(Limits{}, nil).Merge(nil, g.requests)
		if len(out) != want {
			rt.Errorf("%d requests, want %d: %s\nof%s", len(out), want, describeAll(out), describeAll(g.requests))
		}
	})
}

func TestSort(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		spread := rapid.SampledFrom([]int64{1, 50, 1 << 30, 1<<55 - 1, math.MaxInt64 - 8}).Draw(rt, "spread")
		offsets := rapid.SliceOfN(rapid.Int64Range(0, spread), 1, sectionMax).Draw(rt, "offsets")
		var batch []*aio.Request
		for _, offset := range offsets {
			batch = append(batch, &aio.Request{Offset: offset, Length: 8})
		}
		m := New(Limits{}, nil)
		if n := m.order.collect(batch); n != len(batch) {
			rt.Fatalf("collected %d requests of %d", n, len(batch))
		}
		m.order.sort(batch)
		var got []int
		for _, k := range m.order.keys {
			got = append(got, k.arrival())
		}
		want := make([]int, len(batch))
		for i := range want {
			want[i] = i
		}
		slices.SortStableFunc(want, func(i, j int) int {
			switch {
			case offsets[i] < offsets[j]:
				return -1
			case offsets[i] > offsets[j]:
				return 1
			}
			return 0
		})
		if !slices.Equal(got, want) {
			rt.Fatalf("offsets %v in order %v, want %v", offsets, got, want)
		}
	})
}

// checkBytes makes a batch of the data, three bytes a request, and checks it.
func checkBytes(t *testing.T, data []byte) {
	if len(data) < 4 || len(data) > 4+3*400 {
		return
	}
	base := bases[data[0]%4]
	start := newModel(base, 256)
	start.bad = [2]int64{int64(data[3]), int64(data[3]) + int64(data[3]%3)}
	limits := Limits{Members: int(data[1] >> 4), Segments: int(data[1] & 15), Bytes: int64(data[2])}
	narrow := data[0] & 16 // one operation only
	only := aio.Op(data[0] >> 5 & 3)
	g := &guest{t: t}
	for data = data[4:]; len(data) >= 3; data = data[3:] {
		var flags aio.Flags
		if data[0]&8 != 0 {
			flags = aio.FlagFUA
		}
		// 6 and 7 are no operations, and lengths may be 0, or lead beyond the
		// disk and beyond the greatest offset.
		op, offset, length := aio.Op(data[0]&7), int64(data[1]), int64(data[2]&31)
		if narrow != 0 {
			op, flags, length = only, 0, length+1
		}
		pieces := []uint64{uint64(length)}
		if cut := uint64(data[0] >> 4); cut > 0 && cut < pieces[0] {
			pieces = []uint64{cut, pieces[0] - cut}
		}
		if op > aio.OpCache {
			length = 1 << 40
		}
		g.add(op, flags, base+offset, length, pieces...)
	}
	flakes := 0
	checkEquivalent(t, g, start, limits, func() bool { flakes++; return flakes%3 == 1 })
}

// TestRandomBatches has larger batches than the property tests tend to make.
func TestRandomBatches(t *testing.T) {
	rng := rand.New(rand.NewPCG(2, 2014))
	for range 1000 {
		data := make([]byte, 4+3*rng.IntN(100))
		for i := range data {
			data[i] = byte(rng.Uint32())
		}
		checkBytes(t, data)
	}
}

func FuzzMerge(f *testing.F) {
	f.Add([]byte{0, 0, 0, 0, 1, 0, 30, 1, 10, 5})
	f.Add([]byte{1, 5, 3, 200, 1, 0, 8, 0, 4, 8, 1, 2, 8})
	f.Add([]byte{2, 9, 40, 7, 4, 0, 8, 9, 8, 8, 5, 0, 0, 4, 4, 8})
	f.Add([]byte{48, 48, 0, 9, 1, 30, 8, 1, 20, 12, 1, 10, 12, 1, 24, 2, 1, 0, 31})
	f.Fuzz(checkBytes)
}
