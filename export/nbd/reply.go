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
	c.queue.Completed(c.over)
	c.over = c.over[:0]
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
		segments, length := 1, int64(0)
		if r.Op == aio.OpRead && r.Errno == 0 {
			segments, length = 1+len(r.Vec), r.Length
		}
		if n > 0 && (len(c.vec)+segments > maxSegments || size > maxSend) {
			break
		}
		c.appendReply(r)
		size += length
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
	c.vec = appendVec(c.vec, r.head)
	if r.Op == aio.OpRead && errno == 0 {
		for _, v := range r.Vec {
			c.vec = appendVec(c.vec, v)
		}
	}
}

// appendVec adds a piece of memory, to the last one when it stands behind it.
func appendVec(vec []aio.Iovec, v aio.Iovec) []aio.Iovec {
	if n := len(vec); n > 0 && vec[n-1].Base+uintptr(vec[n-1].Len) == v.Base {
		vec[n-1].Len += v.Len
		return vec
	}
	return append(vec, v)
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
	c.progress.sends++
	if errno != 0 {
		c.broken = true
		c.stop()
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
