package nbd

import (
	"time"

	"golang.org/x/sys/unix"

	"platter/aio"
)

// minReceive is the smallest room, in bytes, that a receive is worth.
const minReceive = 64 << 10

// maxBatch bounds the requests of a batch, and maxSend the bytes that they read
// and write: the first waits no longer for its reply than the last takes. It is
// as many as package merge sorts at a time.
const maxBatch = 256

// retryMemory is how long a connection waits when there is no block to receive
// into or to reply from.
const retryMemory = 10 * time.Millisecond

// receive asks for more, unless what came last is still to be parsed.
func (c *conn) receive() {
	if c.receiving || c.closing || len(c.carried) > 0 || c.pos < c.end && !c.partial() {
		return
	}
	if !c.makeRoom() {
		c.retry()
		return
	}
	c.receiving = true
	c.sock.Recv(c.in.Iovec(c.end, aio.BlockSize-c.end))
}

// retry goes on a little later, when there may be memory again.
func (c *conn) retry() {
	if c.retrying != nil {
		return
	}
	c.retrying = c.loop.AfterFunc(retryMemory, func() {
		c.retrying = nil
		c.loop.Defer(&c.flush)
	})
}

// partial reports whether what is not parsed yet can't be, since more of it has
// to come.
func (c *conn) partial() bool {
	return c.payload == nil && c.end-c.pos < requestSize
}

// makeRoom sees to it that the next receive has a place: behind what was
// received last, or, when nothing of that is needed any more, over it.
func (c *conn) makeRoom() bool {
	if c.in != nil && c.pos == c.end && c.in.Unshared() {
		c.pos, c.end = 0, 0
	}
	if c.in != nil && aio.BlockSize-c.end >= minReceive {
		return true
	}
	next := c.loop.Arena().Get()
	if next == nil {
		return false
	}
	if c.in != nil {
		c.end = copy(next.Bytes(), c.in.Bytes()[c.pos:c.end]) // less than a header
		c.in.Release()
	} else {
		c.end = copy(next.Bytes(), c.carried)
		c.carried = nil
	}
	c.pos = 0
	c.in = next
	return true
}

// received is told what came.
func (c *conn) received(n int, errno unix.Errno) {
	c.receiving = false
	c.progress.receives++
	c.loop.Defer(&c.flush)
	if errno == unix.ECANCELED {
		return
	}
	if n == 0 {
		c.ended = true
		if errno != 0 && errno != unix.ECONNRESET {
			c.log.Warn("receive failed", "error", errno)
		}
		c.closing = true
	}
	if c.closing {
		return
	}
	c.end += n
	c.full = c.parse()
}

// parse takes every request that is complete and submits them as one batch. If
// there were more than a batch may have it reports so: they are for the next
// turn, when this batch's replies are on their way.
func (c *conn) parse() (full bool) {
	c.batchBytes = 0
	for !full && c.next() {
		full = len(c.batch) >= maxBatch || c.batchBytes >= maxSend
	}
	if len(c.batch) > 0 {
		batch := c.batch
		c.batch = c.batch[:0]
		c.working += len(batch)
		c.queue.Submit(batch)
	}
	return full
}

// next takes one step: a header, or a piece of payload. It reports whether there
// may be another.
func (c *conn) next() bool {
	if c.closing || c.paused {
		return false
	}
	if c.payload != nil {
		return c.takePayload()
	}
	if c.leaving() || c.end-c.pos < requestSize || c.inFlight >= maxInFlight {
		return false
	}
	h, ok := parseHeader(c.in.Bytes()[c.pos:c.end])
	if !ok {
		c.fail("what was sent is not a request")
		return false
	}
	if h.command == cmdDisc {
		c.closing, c.ended = true, true
		return false
	}
	if h.command == cmdWrite && h.length > maxPayload {
		c.fail("a write of more than 64 MiB")
		return false
	}
	if !c.out.header() {
		c.retry()
		return false
	}
	r := c.newRequest()
	r.fill(h)
	if r.refuse == 0 || h.command == cmdWrite {
		if r.Op == aio.OpRead || r.Op == aio.OpWrite {
			r.room = r.Length
		}
		if !c.budget.take(c, r.room) {
			r.next, c.free = c.free, r
			return false
		}
	}
	c.pos += requestSize
	c.inFlight++
	if !c.out.reserve(r) {
		r.refuse = unix.ENOMEM
	}
	if h.command == cmdWrite && r.Length > 0 {
		c.payload, c.missing = r, r.Length
		return true
	}
	c.admit(r)
	return true
}

// takePayload gives what has come of a write's payload to the write, where it
// stands.
func (c *conn) takePayload() bool {
	r := c.payload
	n := int(min(c.missing, int64(c.end-c.pos)))
	if n == 0 {
		return false
	}
	r.hold(c.in)
	r.vec = appendVec(r.vec, c.in.Iovec(c.pos, n)) // one piece for each block, however many came
	c.pos += n
	if c.missing -= int64(n); c.missing > 0 {
		return false
	}
	r.Vec = r.vec
	c.payload = nil
	c.admit(r)
	return true
}

// admit adds a request to the batch, or answers it if it is refused.
func (c *conn) admit(r *request) {
	if r.refuse != 0 {
		c.working++
		r.Complete(r.refuse)
		return
	}
	c.batch = append(c.batch, &r.Request)
	c.batchBytes += r.room
}
