package check

import (
	"math"
	"slices"
	"testing"
)

func TestCountsKeepNumbersOfEveryWidth(t *testing.T) {
	var a counts
	want := map[int64]uint64{}
	for i, v := range []uint64{1, 255, 256, 65535, 65536, 1<<32 - 1, 1 << 32, math.MaxUint64} {
		for _, cluster := range []int64{int64(i), int64(i) + chunkSize - 1, int64(i)<<40 + 5} {
			a.set(cluster, v)
			want[cluster] = v
		}
	}
	for cluster, v := range want {
		if got := a.get(cluster); got != v {
			t.Errorf("cluster %d: got %d, want %d", cluster, got, v)
		}
	}
	if got := a.get(1 << 30); got != 0 {
		t.Errorf("a cluster that was never set has %d", got)
	}
}

func TestCountsTakeAByteUntilTheyNeedMore(t *testing.T) {
	var a counts
	a.set(7, 255)
	if got := len(a.chunks[0].data); got != chunkSize {
		t.Errorf("%d bytes for %d clusters", got, chunkSize)
	}
	a.add(7, 1)
	if got := len(a.chunks[0].data); got != 2*chunkSize || a.get(7) != 256 {
		t.Errorf("%d bytes for %d clusters, the count is %d", got, chunkSize, a.get(7))
	}
	a.set(1<<40, 0)
	if len(a.chunks) != 1 {
		t.Error("a 0 takes memory")
	}
}

func TestCountsStopAtTheLargestNumber(t *testing.T) {
	var a counts
	a.add(3, math.MaxUint64-1)
	a.add(3, 5)
	if got := a.get(3); got != math.MaxUint64 {
		t.Errorf("got %d", got)
	}
}

func TestEitherGoesThroughBothInOrder(t *testing.T) {
	var a, b counts
	a.set(5, 1)
	a.set(1<<33, 2)
	b.set(5, 3)
	b.set(100_000, 4)
	type triple struct {
		cluster  int64
		inA, inB uint64
	}
	var got []triple
	either(&a, &b, func(cluster int64, inA, inB uint64) { got = append(got, triple{cluster, inA, inB}) })
	if want := []triple{{5, 1, 3}, {100_000, 0, 4}, {1 << 33, 2, 0}}; !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

func TestSpansJoin(t *testing.T) {
	var s spans
	for _, x := range []span{{10, 12}, {13, 13}, {5, 6}, {11, 20}, {7, 8}, {30, 30}} {
		s.add(x.first, x.last)
	}
	s.merge()
	if want := []span{{5, 8}, {10, 20}, {30, 30}}; !slices.Equal(s.list, want) || s.full {
		t.Errorf("got %v, want %v", s.list, want)
	}
}

func TestSpansAreBounded(t *testing.T) {
	var s spans
	for i := range int64(3 * maxSpans) { // all of one range, but not in order
		s.add(i^1, i^1)
	}
	if s.full {
		t.Error("a single range is too much")
	}
	s = spans{}
	for i := range int64(3 * maxSpans) {
		s.add(2*i, 2*i)
	}
	if !s.full || len(s.list) > maxSpans {
		t.Errorf("full is %v after %d ranges", s.full, len(s.list))
	}
}

func TestL2TablesAreKeptOnce(t *testing.T) {
	var l l2Tables
	const tables, uses = 3000, 100
	for i := range int64(tables * uses) {
		t := l2Table{off: i * 7919 % tables * 512, index: i}
		if i%4 == 0 {
			t.active = 1
		} else {
			t.others = 1
		}
		l.add(t)
	}
	if cap(l) > 1<<18 {
		t.Errorf("there is room for %d tables", cap(l))
	}
	l.merge()
	if len(l) != tables {
		t.Fatalf("%d tables, want %d", len(l), tables)
	}
	var active, others uint64
	for i, table := range l {
		if table.off != int64(i)*512 {
			t.Fatalf("table %d is at %d", i, table.off)
		}
		active, others = active+table.active, others+table.others
	}
	if active != tables*uses/4 || others != tables*uses*3/4 {
		t.Errorf("%d active and %d other uses", active, others)
	}
}
