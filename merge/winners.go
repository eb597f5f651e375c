package merge

import (
	"math/bits"

	"platter/aio"
)

// appendWinners appends to vec the memory that overlapping writes leave on the
// disk when they are carried out in arrival order. The keys are sorted, and
// the writes' ranges leave no gap.
//
// It goes through the range from start to end. At each position the open
// writes are those that have begun; of these the one that arrived last wins,
// until it ends or one that arrived even later begins.
func appendWinners(vec []aio.Iovec, keys []key, batch []*aio.Request) []aio.Iovec {
	var open arrivals
	at := batch[keys[0].arrival()].Offset
	for {
		if open.empty() {
			if len(keys) == 0 {
				return vec
			}
			open.add(keys[0].arrival())
			keys = keys[1:]
		}
		last := open.last()
		winner := batch[last]
		until := winner.End()
		if until <= at {
			open.remove(last)
			continue
		}
		for len(keys) > 0 {
			next := keys[0].arrival()
			begin := batch[next].Offset
			if begin >= until {
				break
			}
			open.add(next)
			keys = keys[1:]
			if next > last {
				until = begin
				break
			}
		}
		vec = appendPart(vec, winner.Vec, at-winner.Offset, until-winner.Offset)
		at = until
	}
}

// appendPart appends the bytes from..to of the memory that part names.
func appendPart(vec, part []aio.Iovec, from, to int64) []aio.Iovec {
	skip, left := uint64(from), uint64(to-from)
	for _, v := range part {
		if left == 0 {
			break
		}
		if v.Len <= skip {
			skip -= v.Len
			continue
		}
		n := min(v.Len-skip, left)
		vec = append(vec, aio.Iovec{Base: v.Base + uintptr(skip), Len: n})
		skip, left = 0, left-n
	}
	return vec
}

// arrivals is a set of arrival numbers.
type arrivals [sectionMax / 64]uint64

func (a *arrivals) add(i int)    { a[i/64] |= 1 << (i % 64) }
func (a *arrivals) remove(i int) { a[i/64] &^= 1 << (i % 64) }
func (a *arrivals) empty() bool  { return *a == arrivals{} }

// last is the greatest number in the set, which must not be empty.
func (a *arrivals) last() int {
	for i := len(a) - 1; i > 0; i-- {
		if a[i] != 0 {
			return i*64 + bits.Len64(a[i]) - 1
		}
	}
	return bits.Len64(a[0]) - 1
}
