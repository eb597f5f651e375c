// Package merge joins the block requests of a batch, so that many small
// requests that lie next to each other reach the file as few large ones.
//
// Each queue has one [Merger]. A front end takes everything that is ready from
// its ring or socket, and the Merger turns that batch into the requests to
// submit: requests that join nothing are handed on as they are, and requests
// that join become the members of one composite, which completes them. The
// package is pure: no I/O, no locks, no clocks, no goroutines.
//
// # What joins
//
// Requests of one kind, that is with the same operation and the same flags:
//
//   - reads whose ranges follow each other exactly;
//   - writes whose ranges follow each other exactly or overlap. Where they
//     overlap the write that arrived last wins, and the composite's vector is
//     put together from the winning parts of its members;
//   - discards and write-zeroes whose ranges follow each other or overlap.
//
// # What is kept in order
//
// Carrying out the result one by one has the same outcome as carrying out the
// batch one by one: the same content, and the same bytes in every read. For
// that the batch is cut into sections, and nothing moves from one section to
// another. A flush is a section of its own, and so is every request whose range
// or operation makes no sense. A request that overlaps an earlier one of
// another kind begins a new section, unless both are reads. Within a section no
// two requests of different kinds get into each other's way, and a composite
// takes the place of its first member, so that the result follows arrival
// order as far as joining allows.
//
// # How
//
// A section's requests are sorted by offset, as integers that hold offset and
// arrival number (order.go). A scan of neighbours then tells whether any two
// requests touch; in random I/O they do not, and the section is handed on
// unchanged. Otherwise neighbours are grouped within the limits (join.go) and
// each group becomes a composite (composite.go).
package merge

import "platter/aio"

// Limits bound a composite. A request that exceeds them by itself is handed on
// unchanged; no composite ever does. 0 stands for the default.
type Limits struct {
	// Members is the greatest number of requests in a composite. The default
	// is 128; more than 256 never join.
	Members int
	// Bytes is the greatest length of a composite's range. The default is 1 MiB.
	Bytes int64
	// Segments is the greatest number of entries in a composite's vector. The
	// default is 1024, the kernel's IOV_MAX. Overlapping writes are counted as
	// if each overlap had cut a write in two, so that they may stay below it.
	Segments int
}

func (l Limits) withDefaults() Limits {
	if l.Members == 0 {
		l.Members = 128
	}
	if l.Bytes == 0 {
		l.Bytes = 1 << 20
	}
	if l.Segments == 0 {
		l.Segments = 1024
	}
	return l
}

// sectionMax is the greatest number of requests in a section: arrival numbers
// within a section fit in a byte.
const sectionMax = 256

// groupsMax is the greatest number of groups in a section, plus 1.
const groupsMax = sectionMax/2 + 1

// Merger joins the requests of one queue. It belongs to the thread of the
// queue's loop, on which the requests that it returns must complete too.
// In the steady state it allocates nothing.
type Merger struct {
	limits   Limits
	resubmit func([]*aio.Request)
	free     []*composite // composites that are not in flight

	// What follows describes the section at hand; only Merge uses it.
	order      order
	groups     []group               // what becomes composites; 0 is not used
	composites [groupsMax]*composite // by group
	groupOf    [sectionMax]uint8     // by arrival; 0: none
}

// New returns a Merger that keeps to the limits.
//
// When a composite fails, the Merger hands its members to resubmit, in arrival
// order and each only after the one before has completed, so that each gets
// its own outcome and overlapping writes keep their order. resubmit passes the
// requests to where the composite went, without merging them again; they may
// complete before it returns. The slice is the Merger's again on return.
func New(limits Limits, resubmit func([]*aio.Request)) *Merger {
	return &Merger{
		limits:   limits.withDefaults(),
		resubmit: resubmit,
		groups:   make([]group, 1, groupsMax),
	}
}

// Merge appends to dst the requests to submit in place of the batch, in the
// order in which to submit them, and returns it. dst and batch must not
// overlap, and are the caller's on return.
//
// A request that joined nothing is appended as it is. The others belong to
// the composites that were appended, until those call Done of each, once.
// Merge itself completes nothing. It may be called from within a Done.
func (m *Merger) Merge(dst, batch []*aio.Request) []*aio.Request {
	for len(batch) > 1 {
		n := m.order.collect(batch)
		if n == 0 { // a flush, or a request to leave alone
			n = 1
			dst = append(dst, batch[0])
		} else {
			dst = m.section(dst, batch[:n])
		}
		batch = batch[n:]
	}
	return append(dst, batch...)
}

// section merges requests among which there is no flush, and which m.order has
// collected.
func (m *Merger) section(dst, batch []*aio.Request) []*aio.Request {
	m.order.sort(batch)
	if !m.order.touching(batch) {
		return append(dst, batch...)
	}
	if !m.order.mixed || !m.order.conflicting(batch) {
		return m.join(dst, batch)
	}
	for len(batch) > 0 {
		n := peaceful(batch)
		m.order.collect(batch[:n])
		m.order.sort(batch[:n])
		dst = m.join(dst, batch[:n])
		batch = batch[n:]
	}
	return dst
}
