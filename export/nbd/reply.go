package nbd

import (
	"encoding/binary"

	"golang.org/x/sys/unix"

	"platter/aio"
)

const (
	maxSegments = 1024    // of one send: IOV_MAX
	maxSend     = 4 << 20 // bytes after which a send is long enough
)

// send starts to send the replies of everything that has completed.
func (c *conn) send() {
	if c.sending || len(c.done) == 0 {
		return
	}
	if c.broken {
		c.forget(len(c.done))
		return
	}
	c.vec = c.vec[:0]
	n, size := 0, int64(0)
	for _, r := range c.done {
		segments := 1 + len(r.Vec)
		if n > 0 && (len(c.vec)+segments > maxSegments || size > maxSend) {
			break
		}
		c.appendReply(r)
		size += r.Length
		n++
	}
	c.sent = append(c.sent[:0], c.done[:n]...)
	rest := copy(c.done, c.done[n:])
	clear(c.done[rest:])
	c.done = c.done[:rest]
	c.sending = true
	c.sock.Send(c.vec)
}

// appendReply writes the header of the reply and adds header and data to what
// is sent. Replies that stand one behind the other become one piece.
func (c *conn) appendReply(r *request) {
	errno := r.Errno
	binary.BigEndian.PutUint32(r.header, magicSimple)
	binary.BigEndian.PutUint32(r.header[4:], replyError(errno))
	binary.BigEndian.PutUint64(r.header[8:], r.cookie)
	c.append(r.head)
	if r.Op == aio.OpRead && errno == 0 {
		for _, v := range r.Vec {
			c.append(v)
		}
	}
}

func (c *conn) append(v aio.Iovec) {
	if n := len(c.vec); n > 0 && c.vec[n-1].Base+uintptr(c.vec[n-1].Len) == v.Base {
		c.vec[n-1].Len += v.Len
		return
	}
	c.vec = append(c.vec, v)
}

// replyError is wireError without the errors that the specification keeps for
// commands that this server doesn't offer: reads in one piece, fast zeroes.
func replyError(errno unix.Errno) uint32 {
	wire := wireError(errno)
	if wire == wireEOVERFLOW || wire == wireENOTSUP {
		return wireEINVAL
	}
	return wire
}

// replied is told that the replies were sent, or why not.
func (c *conn) replied(errno unix.Errno) {
	c.sending = false
	if errno != 0 {
		c.broken = true
		if !c.closing {
			c.stop()
		}
	}
	for i, r := range c.sent {
		c.release(r)
		c.sent[i] = nil
	}
	c.sent = c.sent[:0]
	if c.inFlight == 0 {
		c.out.drop() // an idle connection needs none
	}
	c.loop.Defer(&c.flush)
}

// forget drops the replies of the first n completed requests.
func (c *conn) forget(n int) {
	for i, r := range c.done[:n] {
		c.release(r)
		c.done[i] = nil
	}
	c.done = c.done[:0]
}
