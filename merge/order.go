package merge

import (
	"cmp"
	"math/bits"
	"slices"

	"platter/aio"
)

// A key stands for one request of a section: its offset above its arrival
// number. Keys are in the order of offsets, and among equal ones of arrival.
type key uint64

const (
	arrivalBits = 8
	arrivalMask = 1<<arrivalBits - 1
)

// arrival is the request's index in the section.
func (k key) arrival() int { return int(k & arrivalMask) }

// order is a section by offset.
type order struct {
	keys   []key // one for each request that may join
	mixed  bool  // the requests are not all of one kind
	sorted bool  // keys is in order
	wide   bool  // there are offsets that do not fit in a key

	collected   [sectionMax]key // memory of keys, before
	distributed [sectionMax]key // and after distribute
	buckets     [2 * sectionMax]uint16
}

// kind tells requests apart that never join.
func kind(r *aio.Request) uint16 { return uint16(r.Op)<<8 | uint16(r.Flags) }

// domain tells requests apart that may not overtake each other when they
// overlap. It is the kind, except that reads never stand in a read's way.
func domain(r *aio.Request) uint16 {
	if r.Op == aio.OpRead {
		return uint16(aio.OpRead) << 8
	}
	return kind(r)
}

const joinable = 1<<aio.OpRead | 1<<aio.OpWrite | 1<<aio.OpDiscard | 1<<aio.OpWriteZeroes

// collect makes the keys of the section that the batch begins with and returns
// the section's length, which is 0 when a flush or a senseless request comes
// first.
func (o *order) collect(batch []*aio.Request) int {
	var (
		n         int
		differing uint16 // bits in which the kinds differ
		high      int64  // bits that are set in any offset
		last      = int64(-1)
		sorted    = true
		first     = kind(batch[0])
	)
	if len(batch) > sectionMax {
		batch = batch[:sectionMax]
	}
	end := len(batch)
	for i, r := range batch {
		offset, length := r.Offset, r.Length
		// The sign is set by a negative offset, by a length that is not
		// positive, and by an end beyond the greatest offset.
		if joinable>>r.Op&1 == 0 || offset|(length-1)|(offset+length) < 0 {
			if r.Op == aio.OpCache { // a hint, may stand anywhere
				continue
			}
			end = i
			break
		}
		differing |= kind(r) ^ first
		high |= offset
		sorted = sorted && last <= offset
		last = offset
		o.collected[n] = key(offset)<<arrivalBits | key(i)
		n++
	}
	o.keys = o.collected[:n]
	o.mixed = differing != 0
	o.sorted = sorted
	o.wide = high>>(63-arrivalBits) != 0
	return end
}

// sort puts the keys in order.
func (o *order) sort(batch []*aio.Request) {
	switch {
	case o.sorted:
	case o.wide:
		o.sortWide(batch, o.keys)
	default:
		o.sortKeys()
	}
	o.sorted = true
}

// sortWide sorts keys that have lost the upper bits of their offsets.
func (o *order) sortWide(batch []*aio.Request, keys []key) {
	slices.SortFunc(keys, func(a, b key) int {
		i, j := a.arrival(), b.arrival()
		if c := cmp.Compare(batch[i].Offset, batch[j].Offset); c != 0 {
			return c
		}
		return cmp.Compare(i, j)
	})
}

// crowd is how many keys are too many to sort by insertion.
const crowd = 12

// sortKeys sorts by distributing the keys over buckets of equal width, which
// leaves little to do when offsets are spread out, as in random I/O.
func (o *order) sortKeys() {
	if len(o.keys) > crowd && !o.distribute() {
		slices.Sort(o.keys)
		return
	}
	keys := o.keys
	for i := 1; i < len(keys); i++ {
		k, j := keys[i], i
		for ; j > 0 && keys[j-1] > k; j-- {
			keys[j] = keys[j-1]
		}
		keys[j] = k
	}
}

// distribute puts the keys in the order of their buckets. It reports false,
// and leaves them as they are, when one of the buckets is crowded.
func (o *order) distribute() bool {
	keys := o.keys
	lowest, highest := keys[0], keys[0]
	for _, k := range keys {
		lowest, highest = min(lowest, k), max(highest, k)
	}
	width := bits.Len(uint(len(keys) - 1)) // one or two buckets for each key
	buckets := o.buckets[:1<<width]
	shift := max(0, bits.Len64(uint64(highest-lowest))-width) & 63
	clear(buckets)
	for _, k := range keys {
		buckets[(k-lowest)>>shift]++
	}
	next := uint16(0)
	for i, n := range buckets {
		if n > crowd {
			return false
		}
		buckets[i] = next
		next += n
	}
	o.keys = o.distributed[:len(keys)]
	for _, k := range keys {
		at := &buckets[(k-lowest)>>shift]
		o.keys[*at] = k
		*at++
	}
	return true
}

// touching reports whether any request begins at or before the end of another
// that precedes it by offset: only then is there anything to join or to keep
// apart.
func (o *order) touching(batch []*aio.Request) bool {
	end := int64(-1)
	for _, k := range o.keys {
		r := batch[k.arrival()]
		if r.Offset <= end {
			return true
		}
		end = r.End()
	}
	return false
}

// conflicting reports whether any two requests of different domains overlap.
// As long as none do, only requests of one domain reach beyond the offset that
// has been come to.
func (o *order) conflicting(batch []*aio.Request) bool {
	var (
		leader uint16 // the domain that reaches farthest
		end    int64  // how far it reaches
	)
	for _, k := range o.keys {
		r := batch[k.arrival()]
		if d := domain(r); d != leader {
			if r.Offset < end {
				return true
			}
			leader = d
		}
		end = max(end, r.End())
	}
	return false
}

// peaceful returns how many requests the batch begins with before one overlaps
// an earlier request of another domain.
func peaceful(batch []*aio.Request) int {
	for j, r := range batch {
		if r.Op == aio.OpCache {
			continue
		}
		d := domain(r)
		for _, q := range batch[:j] {
			if q.Op != aio.OpCache && q.Offset < r.End() && r.Offset < q.End() && domain(q) != d {
				return j
			}
		}
	}
	return len(batch)
}
