package nbd

import (
	"log/slog"
	"time"

	"platter/aio"
	"platter/export"
)

// conn is a connection in its transmission phase. Everything happens on its
// loop's thread.
//
// It ends in steps: no more requests are taken (closing), what is in flight
// completes and is answered, a client that didn't ask for the end is told of it
// (part), then the socket is closed and onClose called. So nothing of a
// connection that is gone can overwrite what a later one wrote.
//
// It may move to another loop: see move.go.
type conn struct {
	queue *export.Queue
	log   *slog.Logger
	// onClose is called once, when the connection is gone.
	onClose func()

	// What belongs to the loop that the connection is on.
	loop   *aio.Loop
	lanes  *lanes
	lane   *lane
	budget *budget // the lane's
	sock   *aio.Socket
	flush  aio.Task // sends replies and goes on receiving, at the end of a turn

	in         *aio.Block // what was received: in[pos:end] is not parsed yet
	pos, end   int
	payload    *request // the write whose payload is being received
	missing    int64    // bytes of it that have not come
	receiving  bool
	waiting    bool       // for the loop's budget
	retrying   *aio.Timer // to go on when there may be memory again
	batch      []*aio.Request
	batchBytes int64 // that the requests of it read and write
	full       bool  // what was received in this turn was more than a batch

	out     outMemory
	free    *request
	done    []*request     // completed, not sent
	over    []*aio.Request // completed in this turn
	sent    []*request     // being sent
	vec     []aio.Iovec
	sending bool

	inFlight int   // requests without a sent reply
	working  int   // requests that the export has
	held     int64 // bytes of the loop's budget
	progress progress
	closing  bool
	ended    bool // the client sends nothing more
	broken   bool // the client takes no replies any more
	parting  bool
	linger   *aio.Timer // ends the parting
	gone     bool
	pause
}

// lingerTime is how long a client gets to notice that the connection ends.
const lingerTime = time.Second

// newConn takes over the descriptor of a socket whose negotiation is over. It is
// called on the thread of the queue's loop.
func newConn(fd int, q *export.Queue, lanes *lanes, log *slog.Logger, onClose func()) *conn {
	c := &conn{queue: q, lanes: lanes, log: log, onClose: onClose}
	c.flush.Run = c.endOfTurn
	c.settle(fd)
	q.Attach(c)
	return c
}

// settle begins to work on the queue's loop.
func (c *conn) settle(fd int) {
	c.loop = c.queue.Loop()
	c.lane = c.lanes.on(c.loop)
	c.budget = &c.lane.budget
	c.budget.join(c)
	c.out.arena = c.loop.Arena()
	c.sock = c.loop.NewSocket(fd, c.received, c.replied)
	c.loop.Defer(&c.flush)
}

// stop ends the connection gracefully.
func (c *conn) stop() {
	if c.gone {
		return
	}
	c.closing = true
	c.loop.Defer(&c.flush)
}

// fail ends a connection whose client broke the protocol.
func (c *conn) fail(why string) {
	c.log.Warn("connection closed", "cause", why)
	c.closing = true
}

// endOfTurn is what remains to do when everything that was ready has been
// handled: parse what had to wait, send, receive, or go.
func (c *conn) endOfTurn() {
	if c.gone {
		return
	}
	c.send() // before more is begun
	switch {
	case c.closing:
		c.budget.unqueue(c)
	case c.full:
		c.full = false
		c.loop.Defer(&c.flush)
	case c.unpack() && c.pos < c.end && c.parse():
		c.loop.Defer(&c.flush)
	}
	if c.closing || c.paused || c.to != nil {
		c.queue.Expedite() // whoever waits for the end doesn't wait for the throttle
	}
	c.send()
	c.reportDrained()
	switch quiet := !c.sending && c.working == 0 && len(c.done) == 0; {
	case c.closing:
		if quiet {
			c.part()
		}
	case !c.leaving():
		c.receive()
	case c.receiving:
		c.sock.CancelRecv() // comes back when it has ended
	case quiet:
		c.leave()
	}
}

// part ends a connection that has nothing left to answer. Unless the client is
// known to be gone it gets to read its last replies: it is told of the end, and
// what it still sends is received and thrown away, for as long as lingerTime.
func (c *conn) part() {
	if c.ended || c.broken || c.in == nil {
		if c.receiving {
			c.sock.Shutdown() // comes back when the receive has ended
		} else {
			c.close()
		}
		return
	}
	if !c.parting {
		c.parting = true
		c.sock.StopSending()
		c.linger = c.loop.AfterFunc(lingerTime, c.cut)
	}
	if !c.receiving {
		c.receiving = true
		c.sock.Recv(c.in.Iovec(0, aio.BlockSize))
	}
}

func (c *conn) close() {
	c.gone = true
	c.stopTimers()
	if c.payload != nil { // half a write: nothing of it is written
		c.release(c.payload)
		c.payload = nil
	}
	c.budget.leave(c)
	c.lanes.vacate(c.lane)
	if c.in != nil {
		c.in.Release()
		c.in = nil
	}
	c.out.drop()
	c.sock.Close()
	c.queue.Close()
	c.onClose()
}

func (c *conn) stopTimers() {
	for _, t := range []**aio.Timer{&c.linger, &c.retrying, &c.patience} {
		if *t != nil {
			c.loop.Stop(*t)
			*t = nil
		}
	}
}

// cut ends the connection without regard for replies that the client doesn't
// take.
func (c *conn) cut() {
	if !c.gone {
		c.closing = true
		c.sock.Shutdown()
		c.loop.Defer(&c.flush)
	}
}
