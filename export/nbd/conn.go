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
type conn struct {
	loop   *aio.Loop
	queue  *export.Queue
	budget *budget
	log    *slog.Logger
	// onClose is called once, when the connection is gone.
	onClose func()

	sock  *aio.Socket
	flush aio.Task // sends replies and goes on receiving, at the end of a turn

	in         *aio.Block // what was received: in[pos:end] is not parsed yet
	pos, end   int
	payload    *request // the write whose payload is being received
	missing    int64    // bytes of it that have not come
	receiving  bool
	waiting    bool // for the loop's budget
	retrying   bool // a timer is set to go on when there may be memory again
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
}

// lingerTime is how long a client gets to notice that the connection ends.
const lingerTime = time.Second

// newConn takes over the descriptor of a socket whose negotiation is over.
func newConn(fd int, l *aio.Loop, q *export.Queue, b *budget, log *slog.Logger, onClose func()) *conn {
	c := &conn{loop: l, queue: q, budget: b, log: log, onClose: onClose, out: outMemory{arena: l.Arena()}}
	c.sock = l.NewSocket(fd, c.received, c.replied)
	c.flush.Run = c.endOfTurn
	b.join(c)
	l.Defer(&c.flush)
	return c
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
	case c.pos < c.end && c.parse():
		c.loop.Defer(&c.flush)
	}
	if c.closing {
		c.queue.Expedite()
	}
	c.send()
	c.receive()
	if c.closing && !c.sending && c.working == 0 && len(c.done) == 0 {
		c.part()
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
	if c.linger != nil {
		c.loop.Stop(c.linger)
	}
	if c.payload != nil { // half a write: nothing of it is written
		c.release(c.payload)
		c.payload = nil
	}
	c.budget.leave(c)
	if c.in != nil {
		c.in.Release()
		c.in = nil
	}
	c.out.drop()
	c.sock.Close()
	c.queue.Close()
	c.onClose()
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
