package merge

import (
	"cmp"
	"slices"

	"platter/aio"
)

// group is a run of neighbours in the order of offsets, all of one kind, whose
// ranges leave no gap.
type group struct {
	from, to   int   // the keys
	start, end int64 // the range that they cover together
	segments   int   // of their vectors together
	overlap    bool  // some of the ranges overlap
}

// begin makes the group consist of the one request.
func (g *group) begin(at int, r *aio.Request) {
	g.from, g.to = at, at+1
	g.start, g.end = r.Offset, r.End()
	g.segments = len(r.Vec)
	g.overlap = false
}

func (g *group) members() int { return g.to - g.from }

// grow takes the group that follows in, if the limits allow it. It says
// whether they do.
func (m *Merger) grow(g, next *group, overlap bool) bool {
	start, end := min(g.start, next.start), max(g.end, next.end)
	segments := g.segments + next.segments
	overlap = overlap || g.overlap || next.overlap
	if !m.fits(next.to-g.from, end-start, segments, overlap) {
		return false
	}
	g.to, g.start, g.end, g.segments, g.overlap = next.to, start, end, segments, overlap
	return true
}

// fits reports whether a composite keeps to the limits.
func (m *Merger) fits(members int, bytes int64, segments int, overlap bool) bool {
	if overlap && segments > 0 {
		// n ranges lie on top of each other in at most 2n-1 visible parts, and
		// so at most n-1 cuts are made in a vector.
		segments += members - 1
	}
	return members <= m.limits.Members && bytes <= m.limits.Bytes && segments <= m.limits.Segments
}

// join appends the section to dst, joined. m.order holds it sorted, and no
// requests of different domains overlap: whatever touches a request and is of
// its kind is its neighbour in the order of offsets.
func (m *Merger) join(dst, batch []*aio.Request) []*aio.Request {
	clear(m.groupOf[:len(batch)])
	m.gather(batch)
	for i, r := range batch {
		n := m.groupOf[i]
		if n == 0 {
			dst = append(dst, r)
			continue
		}
		c := m.composites[n]
		if c == nil {
			c = m.take()
			m.fill(c, &m.groups[n], batch)
			m.composites[n] = c
			dst = append(dst, &c.request)
		}
		c.members = append(c.members, r)
	}
	clear(m.composites[:len(m.groups)])
	return dst
}

// gather finds the section's groups.
//
// Writes that overlap can't be told apart by offset alone, so the limits never
// part them here: they are a knot, which a group takes in as a whole.
func (m *Merger) gather(batch []*aio.Request) {
	keys := m.order.keys
	m.groups = m.groups[:1]
	var (
		open     group // may still grow
		openKind uint16
		knot     group
	)
	for i := 0; i < len(keys); {
		r := batch[keys[i].arrival()]
		knot.begin(i, r)
		knotKind := kind(r)
		if r.Op != aio.OpRead { // reads each need a copy of their own
			m.tie(&knot, batch)
		}
		i = knot.to
		if open.end == knot.start && openKind == knotKind && open.members() > 0 && m.grow(&open, &knot, false) {
			continue
		}
		m.close(&open)
		if knot.overlap && !m.fits(knot.members(), knot.end-knot.start, knot.segments, true) {
			m.untie(&knot, batch)
			open = group{}
			continue
		}
		open, openKind = knot, knotKind
	}
	m.close(&open)
}

// tie takes into the knot the requests that overlap it. They are of its kind,
// or they would not be in one section.
func (m *Merger) tie(knot *group, batch []*aio.Request) {
	for _, k := range m.order.keys[knot.to:] {
		r := batch[k.arrival()]
		if r.Offset >= knot.end {
			return
		}
		knot.to++
		knot.end = max(knot.end, r.End())
		knot.segments += len(r.Vec)
		knot.overlap = true
	}
}

// untie parts a knot that exceeds the limits into groups of requests that
// arrived one after the other, so that no group's place is taken by a request
// which one of another group has to come before.
func (m *Merger) untie(knot *group, batch []*aio.Request) {
	keys := m.order.keys
	slices.SortFunc(keys[knot.from:knot.to], func(a, b key) int { return cmp.Compare(a.arrival(), b.arrival()) })
	var open, next group
	open.begin(knot.from, batch[keys[knot.from].arrival()])
	for open.to < knot.to {
		next.begin(open.to, batch[keys[open.to].arrival()])
		touch := next.start <= open.end && open.start <= next.end
		overlap := next.start < open.end && open.start < next.end
		if touch && m.grow(&open, &next, overlap) {
			continue
		}
		m.closeUntied(&open, batch)
		open = next
	}
	m.closeUntied(&open, batch)
}

func (m *Merger) closeUntied(g *group, batch []*aio.Request) {
	m.order.sortWide(batch, m.order.keys[g.from:g.to])
	m.close(g)
}

// close ends a group: with two members or more it is going to be a composite.
func (m *Merger) close(g *group) {
	if g.members() < 2 {
		return
	}
	n := uint8(len(m.groups))
	m.groups = append(m.groups, *g)
	for _, k := range m.order.keys[g.from:g.to] {
		m.groupOf[k.arrival()] = n
	}
}

// fill makes the composite's request of the group's requests.
func (m *Merger) fill(c *composite, g *group, batch []*aio.Request) {
	keys := m.order.keys[g.from:g.to]
	first := batch[keys[0].arrival()]
	c.request.Op, c.request.Flags = first.Op, first.Flags|aio.FlagJoined
	c.request.Offset, c.request.Length = g.start, g.end-g.start
	switch {
	case g.segments == 0:
	case g.overlap:
		c.vec = appendWinners(c.vec, keys, batch)
	default:
		for _, k := range keys {
			c.vec = append(c.vec, batch[k.arrival()].Vec...)
		}
	}
	c.request.Vec = c.vec
}
