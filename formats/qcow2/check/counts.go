package check

import (
	"cmp"
	"maps"
	"math"
	"slices"

	"platter/formats/qcow2/layout"
)

// counts is an array with a number for each cluster, 0 until it is set. It takes
// memory only for the parts of the file that something was noted of: a byte for
// each cluster there, more where a number needs it.
type counts struct {
	chunks map[int64]*chunk
	last   *chunk // the one used last, and its number
	lastAt int64
}

const (
	chunkBits = 12
	chunkSize = 1 << chunkBits
)

// chunk holds the numbers of chunkSize neighbours, all in the same width. The
// width and the packing are those of a refcount block of this order.
type chunk struct {
	order uint
	data  []byte
}

const byteOrder = 3 // a refcount of 8 bits

func (c *chunk) get(i int64) uint64 {
	if c.order == byteOrder {
		return uint64(c.data[i])
	}
	return layout.Geometry{RefcountOrder: c.order}.Refcount(c.data, int(i))
}

func (c *chunk) set(i int64, v uint64) {
	for v > (layout.Geometry{RefcountOrder: c.order}).MaxRefcount() {
		wider := newChunk(c.order + 1)
		for j := range int64(chunkSize) {
			wider.set(j, c.get(j))
		}
		*c = *wider
	}
	layout.Geometry{RefcountOrder: c.order}.SetRefcount(c.data, int(i), v)
}

func newChunk(order uint) *chunk {
	return &chunk{order, make([]byte, chunkSize<<order/8)}
}

func (a *counts) chunk(number int64) *chunk {
	if a.last == nil || a.lastAt != number {
		a.last, a.lastAt = a.chunks[number], number
	}
	return a.last
}

func (a *counts) get(cluster int64) uint64 {
	if c := a.chunk(cluster >> chunkBits); c != nil {
		return c.get(cluster & (chunkSize - 1))
	}
	return 0
}

func (a *counts) set(cluster int64, v uint64) {
	number := cluster >> chunkBits
	c := a.chunk(number)
	if c == nil {
		if v == 0 {
			return
		}
		if a.chunks == nil {
			a.chunks = make(map[int64]*chunk)
		}
		c = newChunk(byteOrder)
		a.chunks[number], a.last = c, c
	}
	c.set(cluster&(chunkSize-1), v)
}

// add adds n, up to the largest number there is.
func (a *counts) add(cluster int64, n uint64) {
	if c, i := a.chunk(cluster>>chunkBits), cluster&(chunkSize-1); c != nil && c.order == byteOrder && n < math.MaxUint8-uint64(c.data[i]) {
		c.data[i] += uint8(n) // by far the most common
		return
	}
	v := a.get(cluster)
	a.set(cluster, v+min(n, math.MaxUint64-v))
}

// either calls f for every cluster for which a or b is not 0, in order.
func either(a, b *counts, f func(cluster int64, inA, inB uint64)) {
	numbers := slices.Collect(maps.Keys(a.chunks))
	numbers = slices.AppendSeq(numbers, maps.Keys(b.chunks))
	slices.Sort(numbers)
	for _, number := range slices.Compact(numbers) {
		first := number << chunkBits
		for cluster := first; cluster < first+chunkSize; cluster++ {
			if inA, inB := a.get(cluster), b.get(cluster); inA != 0 || inB != 0 {
				f(cluster, inA, inB)
			}
		}
	}
}

// spans is a set of clusters, kept as ranges.
type spans struct {
	list []span
	full bool // it grew too large and is not complete
}

// span is the clusters from first to last.
type span struct{ first, last int64 }

const maxSpans = 1 << 17

func (s *spans) add(first, last int64) {
	if s.full {
		return
	}
	if n := len(s.list); n > 0 && first >= s.list[n-1].first && first <= s.list[n-1].last+1 {
		s.list[n-1].last = max(last, s.list[n-1].last)
		return
	}
	if len(s.list) >= maxSpans {
		if s.merge(); len(s.list) > maxSpans/2 {
			s.full = true
			return
		}
	}
	s.list = append(s.list, span{first, last})
}

// merge sorts the ranges and joins those that touch.
func (s *spans) merge() {
	slices.SortFunc(s.list, func(a, b span) int { return cmp.Compare(a.first, b.first) })
	kept := s.list[:0]
	for _, x := range s.list {
		if n := len(kept); n > 0 && x.first <= kept[n-1].last+1 {
			kept[n-1].last = max(kept[n-1].last, x.last)
		} else {
			kept = append(kept, x)
		}
	}
	s.list = kept
}
