package export

import (
	"math"
	"sync"
	"sync/atomic"

	"platter/aio"
)

// turns decides which requests of a throttled export go when. Those that must
// wait stand in lines, one for each queue and direction, and the lines of a
// direction take turns, a request each: so a queue with a hundred requests
// doesn't keep one with a single request waiting for more than the one in front
// of it. Directions take turns too, but one that has used up its own rate doesn't
// hold up the other.
//
// Everything but active is guarded by mu, which a throttled queue takes once for
// every batch.
type turns struct {
	active atomic.Bool // there is a throttle; a queue looks at nothing else without one

	mu       sync.Mutex
	throttle Throttle
	total    tokens
	own      [directions]tokens
	lines    [directions]ring
	next     direction // whose turn it is
	woken    []*waiter // that got requests by this dispatch
	keeper   *Queue    // whose timer is set; not nil while requests wait
	due      int64     // when that is
}

// direction is what rates tell apart.
type direction uint8

const (
	reads direction = iota
	writes
	directions
)

func directionOf(op aio.Op) direction {
	if op.Writes() {
		return writes
	}
	return reads
}

// tokens are a pair of buckets that a request takes from.
type tokens struct {
	requests, bytes bucket
}

func (t *tokens) fill(now int64) {
	t.requests.fill(now)
	t.bytes.fill(now)
}

func (t *tokens) wait(bytes float64) int64 { return max(t.requests.wait(1), t.bytes.wait(bytes)) }

func (t *tokens) take(bytes float64) {
	t.requests.take(1)
	t.bytes.take(bytes)
}

// data is how many bytes a request carries.
func data(r *aio.Request) float64 {
	if r.Op == aio.OpRead || r.Op == aio.OpWrite {
		return float64(r.Length)
	}
	return 0
}

// waiter is a queue as the turns see it.
type waiter struct {
	queue   *Queue
	lines   [directions]line
	ready   []*aio.Request // that may go
	waiting atomic.Int64   // requests in both lines; anyone may read it
}

// set changes the rates.
func (t *turns) set(to Throttle, now int64) {
	t.throttle = to
	for _, v := range []struct {
		tokens    *tokens
		iops, bps int64
	}{{&t.total, to.IOPS.Total, to.BPS.Total}, {&t.own[reads], to.IOPS.Read, to.BPS.Read}, {&t.own[writes], to.IOPS.Write, to.BPS.Write}} {
		v.tokens.requests.set(float64(v.iops), to.IOPS.burst(v.iops, 1), now)
		v.tokens.bytes.set(float64(v.bps), to.BPS.burst(v.bps, MinBytesBurst), now)
	}
}

// add puts a request at the end of its line. A flush takes no turn: it speaks
// only for writes that have completed, of which none waits here, so that it may
// pass all that do; and it moves no data that a rate could mean.
func (t *turns) add(w *waiter, r *aio.Request) {
	if r.Op == aio.OpFlush {
		t.grant(w, r)
		return
	}
	d := directionOf(r.Op)
	l := &w.lines[d]
	if l.empty() {
		l.waiter = w
		t.lines[d].push(l)
	}
	l.push(r)
	w.waiting.Add(1)
}

func (t *turns) grant(w *waiter, r *aio.Request) {
	if len(w.ready) == 0 {
		t.woken = append(t.woken, w)
	}
	w.ready = append(w.ready, r)
}

// dispatch lets go what may, and returns for how many nanoseconds nothing else
// may; 0 when nothing waits.
func (t *turns) dispatch(now int64) (wait int64) {
	t.total.fill(now)
	for d := range t.own {
		t.own[d].fill(now)
	}
	for {
		wait = math.MaxInt64
		went := false
		for range directions {
			first := t.lines[t.next].first
			if first == nil {
				t.next ^= 1
				continue
			}
			size := data(first.front())
			if own := t.own[t.next].wait(size); own > 0 {
				wait = min(wait, own)
				t.next ^= 1
				continue
			}
			if total := t.total.wait(size); total > 0 {
				// Its turn it is, and smaller ones must not take what it waits
				// for.
				return total
			}
			t.serve(first, t.next, size)
			went = true
			t.next ^= 1
		}
		if !went {
			break
		}
	}
	if wait == math.MaxInt64 {
		return 0
	}
	return wait
}

// serve lets the first request of a line go, and the line stand at the end.
func (t *turns) serve(l *line, d direction, size float64) {
	t.total.take(size)
	t.own[d].take(size)
	t.lines[d].pop()
	t.grant(l.waiter, l.pop())
	l.waiter.waiting.Add(-1)
	if !l.empty() {
		t.lines[d].push(l)
	}
}

// expedite lets everything of one queue go, on the debt of all.
func (t *turns) expedite(w *waiter) {
	for d := range directions {
		l := &w.lines[d]
		if l.empty() {
			continue
		}
		t.lines[d].remove(l)
		for !l.empty() {
			r := l.pop()
			t.total.take(data(r))
			t.own[d].take(data(r))
			t.grant(w, r)
			w.waiting.Add(-1)
		}
	}
}

// anyone is a queue with requests that wait, or nil.
func (t *turns) anyone() *Queue {
	for d := range t.lines {
		if l := t.lines[d].first; l != nil {
			return l.waiter.queue
		}
	}
	return nil
}

// line is the requests of one queue and direction that wait, in the order in
// which they came.
type line struct {
	waiter   *waiter
	next     *line // in its ring
	requests []*aio.Request
	gone     int // requests[:gone] have left
}

func (l *line) empty() bool { return l.gone == len(l.requests) }

func (l *line) front() *aio.Request { return l.requests[l.gone] }

func (l *line) push(r *aio.Request) {
	if len(l.requests) == cap(l.requests) && l.gone > len(l.requests)/2 {
		n := copy(l.requests, l.requests[l.gone:])
		clear(l.requests[n:])
		l.requests, l.gone = l.requests[:n], 0
	}
	l.requests = append(l.requests, r)
}

func (l *line) pop() *aio.Request {
	r := l.requests[l.gone]
	l.requests[l.gone] = nil
	if l.gone++; l.empty() {
		l.requests, l.gone = l.requests[:0], 0
	}
	return r
}

// ring is lines in the order of their turns.
type ring struct {
	first, last *line
}

func (r *ring) push(l *line) {
	if r.first == nil {
		r.first = l
	} else {
		r.last.next = l
	}
	r.last = l
}

func (r *ring) pop() {
	l := r.first
	r.first, l.next = l.next, nil
	if r.first == nil {
		r.last = nil
	}
}

// remove takes a line out of the middle.
func (r *ring) remove(l *line) {
	var before *line
	for x := r.first; x != l; x = x.next {
		before = x
	}
	if before == nil {
		r.pop()
		return
	}
	before.next, l.next = l.next, nil
	if r.last == l {
		r.last = before
	}
}
