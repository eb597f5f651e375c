package qcow2

import (
	"cmp"
	"slices"

	"platter/aio"
)

// Options.MergeGap unless it is stated, in bytes. Where a page costs no more than
// a copy, zeroes soon cost more than the write that they save; BenchmarkMergeGap
// has figures: on a disk, filling pays up to some 20 KiB.
const (
	DefaultMergeGap = 16 << 10
	MemoryMergeGap  = 4 << 10 // in a memory file system
)

// MaxMergeGap bounds Options.MergeGap, in bytes.
const MaxMergeGap = 256 << 10

// Bounds of a joint write: long enough that the cost of a write doesn't matter
// any more, short enough that its first member doesn't wait long for the last.
const (
	jointBytes    = 1 << 20
	jointSegments = 512
)

// joint is one write to the file that stands for several parts, its members:
// writes to new clusters that are neighbours in the file, or have but a gap
// between them, which is filled with zeroes. So a batch of small writes to a new
// cluster, in whatever order, is one write.
//
// A gap may be filled because it lies in clusters that are new and read as
// zeroes, and as long as nobody else writes there: this is found out, and others
// are kept away, under the lock of the clusters' allocations (see claim). A gap
// that is longer than Options.MergeGap is left as it is: the file has zeroes
// there already.
type joint struct {
	lane    *lane
	req     aio.Request
	members []*part
	vec     []aio.Iovec
	next    *joint
}

// mergeGapOf is the longest gap to be filled.
func (im *Image) mergeGapOf(o Options) int64 {
	f, ok := im.data.(interface{ InMemory() bool })
	switch {
	case o.MergeGap != 0:
		return min(o.MergeGap, MaxMergeGap)
	case ok && f.InMemory():
		return MemoryMergeGap
	}
	return DefaultMergeGap
}

// joinFresh submits the writes to new clusters, joined.
func (ln *lane) joinFresh() {
	ln.sorted = append(ln.sorted[:0], ln.fresh...)
	list, apart := ln.sorted, !ln.im.noMerge
	slices.SortFunc(list, func(a, b *part) int { return cmp.Compare(a.req.Offset, b.req.Offset) })
	for i := 1; i < len(list) && apart; i++ {
		apart = list[i].req.Offset >= list[i-1].req.End()
	}
	if !apart {
		list = ln.fresh // where the guest writes twice to one place, in the order of arrival
	}
	for from := 0; from < len(list); {
		to := from + 1
		if apart {
			to = ln.reach(list, from)
		}
		if to-from == 1 {
			ln.out = append(ln.out, &list[from].req)
		} else {
			ln.join(list[from:to])
		}
		from = to
	}
	clear(ln.sorted)
	clear(ln.fresh)
	ln.fresh = ln.fresh[:0]
}

// reach tells how many parts, from the given one on, become one write.
func (ln *lane) reach(list []*part, from int) (to int) {
	first := list[from]
	segments := len(first.req.Vec)
	for to = from + 1; to < len(list); to++ {
		last, p := list[to-1], list[to]
		gap := p.req.Offset - last.req.End()
		segments += len(p.req.Vec)
		if gap > 0 {
			segments++
		}
		if p.req.End()-first.req.Offset > jointBytes || segments > jointSegments {
			break
		}
		if gap > 0 && (gap > ln.im.mergeGap || !ln.mayFill(list, to)) {
			break
		}
	}
	return to
}

// mayFill reports whether the gap before a part may be filled with zeroes: it
// lies in the part's cluster, and that of the part before, which are neighbours,
// and nobody else writes there.
func (ln *lane) mayFill(list []*part, at int) bool {
	a, b := list[at-1].alloc, list[at].alloc
	if a != b && a.host+ln.im.g.ClusterSize() != b.host {
		return false
	}
	return ln.claim(list, at-1) && (a == b || ln.claim(list, at))
}

// claim keeps others away from a part's cluster until it is mapped, unless there
// are some already.
func (ln *lane) claim(list []*part, at int) bool {
	a := list[at].alloc
	from, to := at, at+1
	for from > 0 && list[from-1].alloc == a {
		from--
	}
	for to < len(list) && list[to].alloc == a {
		to++
	}
	sh := ln.im.inflight.shard(a.cluster, ln.im.g.ClusterBits)
	sh.mu.Lock()
	defer sh.mu.Unlock()
	if a.mapped || a.pending != to-from {
		return false
	}
	a.exclusive = true
	return true
}

// join makes one write of parts that follow each other.
func (ln *lane) join(parts []*part) {
	j := ln.joints
	if j == nil {
		j = &joint{lane: ln}
		j.req.Op, j.req.Done = aio.OpWrite, j.done
	} else {
		ln.joints = j.next
	}
	j.members = append(j.members[:0], parts...)
	j.vec = j.vec[:0]
	end, zeroes := parts[0].req.Offset, int64(0)
	for _, p := range parts {
		if gap := p.req.Offset - end; gap > 0 {
			j.vec = append(j.vec, aio.Zeroes(gap))
			zeroes += gap
		}
		j.vec = append(j.vec, p.req.Vec...)
		end = p.req.End()
	}
	j.req.Offset, j.req.Length, j.req.Vec = parts[0].req.Offset, end-parts[0].req.Offset, j.vec
	ln.joined.Add(int64(len(parts) - 1))
	ln.filled(zeroes)
	ln.out = append(ln.out, &j.req)
}

// filled counts zeroes that are written between the guest's bytes.
func (ln *lane) filled(zeroes int64) {
	if zeroes > 0 {
		ln.gapWrites.Add(1)
		ln.gapBytes.Add(zeroes)
	}
}

// done ends the members when all has been written. When that failed, nothing is
// known of any one of them: each is written by itself then.
func (j *joint) done(r *aio.Request) {
	ln := j.lane
	for _, p := range j.members {
		if r.Errno == 0 {
			ln.ended(p, 0)
		} else {
			ln.out = append(ln.out, &p.req)
		}
	}
	clear(j.members)
	j.req.Vec = nil
	j.next, ln.joints = ln.joints, j
	ln.submit()
}
