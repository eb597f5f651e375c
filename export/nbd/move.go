package nbd

import (
	"slices"

	"platter/aio"
	"platter/export"
)

var _ export.Mover = (*conn)(nil)

// pause is how a connection is drained, or moves to another loop.
//
// To move it takes no more requests, but for a write of which a part has come;
// what is in flight completes and is answered; and the receive is cancelled. Then
// nothing holds memory of the loop's arena or of its budget, but for what was
// received and not looked at yet, which is less than a block and carried along.
// What the client sends meanwhile waits in the socket.
type pause struct {
	paused  bool   // no request is taken
	drained func() // called when none is in flight

	to       *aio.Loop   // where the connection is to move
	moved    func(error) // called when it has
	patience *aio.Timer  // ends the move if the client does nothing
	carried  []byte      // brought along: to be parsed before anything is received
}

// Drain takes no more requests, and calls done when the export has none.
func (c *conn) Drain(done func()) {
	c.paused, c.drained = true, done
	c.budget.unqueue(c) // lest others wait behind it
	c.loop.Defer(&c.flush)
}

// Resume takes requests again.
func (c *conn) Resume() {
	c.paused = false
	c.progress.receives++ // till now its client could not do anything
	c.loop.Defer(&c.flush)
}

func (c *conn) reportDrained() {
	if c.drained != nil && c.working == 0 {
		done := c.drained
		c.drained = nil
		done()
	}
}

// Move takes the connection to another loop.
func (c *conn) Move(to *aio.Loop, done func(error)) {
	c.to, c.moved = to, done
	c.budget.unqueue(c)
	c.beImpatient()
	c.loop.Defer(&c.flush)
}

// beImpatient gives the move up when the client does nothing that would let what
// is in flight end: it neither takes replies nor sends the rest of a write.
func (c *conn) beImpatient() {
	before := c.progress
	c.patience = c.loop.AfterFunc(c.budget.patient(), func() {
		c.patience = nil
		if !c.stalled(before) {
			c.beImpatient()
			return
		}
		c.log.Warn("connection stays on its loop", "cause", "its client neither takes its replies nor sends the rest of a write")
		done := c.moved
		c.to, c.moved = nil, nil
		c.loop.Defer(&c.flush)
		done(export.ErrStays)
	})
}

// leaving reports whether the connection is about to leave its loop: it takes
// nothing more here.
func (c *conn) leaving() bool { return c.to != nil && c.payload == nil }

// leave gives back all that the connection has on its loop, and goes on on the
// other. Nothing is in flight.
func (c *conn) leave() {
	c.stopTimers()
	if c.in != nil {
		c.carried = slices.Clone(c.in.Bytes()[c.pos:c.end])
		c.in.Release()
		c.in = nil
	}
	c.pos, c.end = 0, 0
	c.out.drop()
	c.budget.leave(c)
	c.lanes.vacate(c.lane)
	c.loop.Undefer(&c.flush)
	fd, to, done := c.sock.Detach(), c.to, c.moved
	c.to, c.moved = nil, nil
	c.queue.MoveTo(to, func() {
		c.settle(fd)
		done(nil)
	})
}

// unpack puts what was carried along where received data stands, and reports
// whether there was memory for it.
func (c *conn) unpack() bool {
	if len(c.carried) > 0 && !c.makeRoom() {
		c.retry()
		return false
	}
	return true
}
