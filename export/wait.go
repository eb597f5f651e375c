package export

import (
	"time"

	"platter/aio"
)

// This is how a queue waits its turn. Whichever queue comes by lets go what may,
// its own requests and those of others, and posts to the loops of the others. One
// queue, the keeper, has a timer for the moment when the next request may go.

// nap is the shortest time that a timer is set for: at high rates it lets several
// requests go at a time.
const nap = 100 * time.Microsecond

// Waiting is how many requests wait for the export's throttle. Anyone may ask.
func (q *Queue) Waiting() int { return int(q.waiter.waiting.Load()) }

// Expedite lets the requests that wait for the throttle go at once, as when
// their connection ends. They count all the same: later ones of all queues wait
// the longer. It is called on the queue's thread.
func (q *Queue) Expedite() {
	if q.Waiting() == 0 {
		return
	}
	t := &q.export.turns
	t.mu.Lock()
	t.expedite(&q.waiter)
	q.forward(q.takeTurn(clock()))
}

// admit takes a batch and returns what may go now, of that and of what came
// before.
func (q *Queue) admit(batch []*aio.Request, now int64) []*aio.Request {
	t := &q.export.turns
	t.mu.Lock()
	before := q.waiter.waiting.Load()
	for _, r := range batch {
		t.add(&q.waiter, r)
	}
	added := q.waiter.waiting.Load() - before
	out := q.takeTurn(now)
	// Those at the end of the lines are of this batch.
	q.counters.throttled.add(uint64(min(q.waiter.waiting.Load(), added)))
	return out
}

// resume goes on where requests had to wait, on the thread of loop l.
func (q *Queue) resume(l *aio.Loop) {
	t := &q.export.turns
	t.mu.Lock()
	if q.home != l { // it has left meanwhile
		t.mu.Unlock()
		return
	}
	q.roused = false
	q.forward(q.takeTurn(clock()))
}

// takeTurn lets everybody's requests go that may and returns the queue's own. It
// unlocks the turns.
func (q *Queue) takeTurn(now int64) []*aio.Request {
	t := &q.export.turns
	defer t.mu.Unlock()
	wait := t.dispatch(now)
	t.wake(q)
	t.keep(q, now, wait)
	q.going, q.waiter.ready = q.waiter.ready, q.going[:0]
	return q.going
}

// wake has the queues that got requests fetch them, but for the one that is at it.
func (t *turns) wake(self *Queue) {
	for i, w := range t.woken {
		t.woken[i] = nil
		if w.queue != self {
			w.queue.rouse()
		}
	}
	t.woken = t.woken[:0]
}

// rouse has resume called on the queue's thread. mu is held.
func (q *Queue) rouse() {
	if !q.roused {
		q.roused = true
		q.home.Post(q.wakeUp)
	}
}

// keep sees to it that somebody comes back when the next request may go: q, on
// whose thread this is, unless another will be there in time.
func (t *turns) keep(q *Queue, now, wait int64) {
	due := now + max(wait, int64(nap))
	switch {
	case wait == 0 && t.keeper == q:
		q.home.Stop(&q.timer)
		t.keeper = nil
	case wait > 0 && (t.keeper == nil || t.keeper == q || due < t.due):
		t.keeper, t.due = q, due
		q.home.Reset(&q.timer, time.Duration(due-now))
	}
}

// settle has the queue wait on another loop from now on, or, nil, no more. It is
// called on the thread of the loop that it was on, and nothing waits. If others
// relied on its timer, one of them takes over.
func (q *Queue) settle(l *aio.Loop) {
	t := &q.export.turns
	t.mu.Lock()
	defer t.mu.Unlock()
	if q.home != nil {
		q.home.Stop(&q.timer)
	}
	q.home, q.roused = l, false
	q.wakeUp = func() { q.resume(l) }
	q.timer.Run = q.wakeUp
	if t.keeper == q {
		if t.keeper = t.anyone(); t.keeper != nil {
			t.keeper.rouse()
		}
	}
}
