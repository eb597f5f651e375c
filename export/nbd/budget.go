package nbd

import (
	"cmp"
	"slices"
	"time"

	"platter/aio"
)

const (
	// maxPayload is the longest read or write that is carried out, in bytes. It
	// is more than is promised (maxBlock): some clients never ask.
	maxPayload = 64 << 20
	// maxBlock is the longest read or write that clients are told of.
	maxBlock = 32 << 20
	// maxInFlight bounds the requests of a connection that have no reply yet.
	maxInFlight = 1024
	// loopBudget bounds the bytes in flight on all connections of a loop. It
	// takes at least one request of any size.
	loopBudget = 2 * maxPayload
	// maxHeld bounds what one connection has of that, but for a single request.
	maxHeld = loopBudget / 2
	// maxWaiting is the same for a connection with requests that wait for its
	// export's throttle: others, of other exports, mustn't wait for that.
	maxWaiting = 4 << 20
	// defaultPatience is how long a client that others wait for may do nothing.
	defaultPatience = 30 * time.Second
)

// budget is the memory that the connections of one loop share for data in
// flight. A request takes all it will need before any of it is received or
// read, so one that has begun can always end; a connection whose next request
// doesn't fit waits, first come, first served.
//
// No connection gets more than its share, and one that holds what others wait
// for must make progress: see watch.
type budget struct {
	left     int64
	waiting  []*conn
	conns    []*conn // of the loop
	watching bool
	patience time.Duration // defaultPatience when 0
}

// progress counts what a connection's client has done.
type progress struct {
	receives, sends uint64
}

// join makes a connection known, and leave forgets it.
func (b *budget) join(c *conn) { b.conns = append(b.conns, c) }

func (b *budget) leave(c *conn) {
	b.unqueue(c)
	i := slices.Index(b.conns, c)
	b.conns = slices.Delete(b.conns, i, i+1)
}

// take reports whether n bytes were to be had. If not, the connection is
// resumed when there are more: when others give some back, or, if it has its
// share, when it has sent replies.
func (b *budget) take(c *conn, n int64) bool {
	if n == 0 {
		return true
	}
	share := int64(maxHeld)
	if c.queue.Waiting() > 0 {
		share = maxWaiting
	}
	if c.held > 0 && c.held+n > share {
		return false
	}
	if (len(b.waiting) == 0 || b.waiting[0] == c) && n <= b.left {
		b.left -= n
		c.held += n
		b.unqueue(c)
		return true
	}
	if !c.waiting {
		c.waiting = true
		b.waiting = append(b.waiting, c)
		b.watch(c.loop)
	}
	return false
}

// give takes bytes back.
func (b *budget) give(c *conn, n int64) {
	b.left += n
	c.held -= n
	if n > 0 {
		b.wakeFirst()
	}
}

// unqueue has the connection wait no more.
func (b *budget) unqueue(c *conn) {
	if !c.waiting {
		return
	}
	c.waiting = false
	i := slices.Index(b.waiting, c)
	b.waiting = slices.Delete(b.waiting, i, i+1)
	b.wakeFirst()
}

func (b *budget) wakeFirst() {
	if len(b.waiting) > 0 {
		c := b.waiting[0]
		c.loop.Defer(&c.flush)
	}
}

// watch cuts off, while connections wait, those that hold what they wait for and
// whose clients do nothing: neither take their replies nor send the rest of a
// write.
func (b *budget) watch(l *aio.Loop) {
	if b.watching {
		return
	}
	b.watching = true
	before := make(map[*conn]progress, len(b.conns))
	for _, c := range b.conns {
		before[c] = c.progress
	}
	l.AfterFunc(b.patient(), func() {
		b.watching = false
		if len(b.waiting) == 0 {
			return
		}
		for _, c := range b.conns { // others may be on another loop by now
			if p, known := before[c]; known && c.held > 0 && c.stalled(p) {
				c.log.Warn("connection closed", "cause", "its client does nothing while others wait for the memory that it holds")
				c.cut()
			}
		}
		b.watch(l)
	})
}

// patient is how long a client that others wait for may do nothing.
func (b *budget) patient() time.Duration { return cmp.Or(b.patience, defaultPatience) }

// stalled reports whether the client has kept the connection from going on since
// before.
func (c *conn) stalled(before progress) bool {
	return !c.gone && c.working == 0 &&
		(c.sending && c.progress.sends == before.sends || c.payload != nil && !c.paused && c.progress.receives == before.receives)
}
