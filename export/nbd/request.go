package nbd

import (
	"encoding/binary"

	"golang.org/x/sys/unix"

	"platter/aio"
)

// request is one command of a client, from its header to its reply. A connection
// makes them as it needs them and uses them again.
type request struct {
	aio.Request
	conn   *conn
	next   *request // in the connection's free list
	cookie uint64
	refuse unix.Errno   // why the command is answered without being carried out
	head   aio.Iovec    // where the header of the reply stands
	header []byte       // the same
	vec    []aio.Iovec  // backs Request.Vec
	blocks []*aio.Block // held until the reply is sent
	room   int64        // bytes taken from the loop's budget
}

// newRequest takes a request from the free list.
func (c *conn) newRequest() *request {
	r := c.free
	if r == nil {
		r = &request{conn: c}
		r.Done = r.completed
		return r
	}
	c.free, r.next = r.next, nil
	return r
}

// release gives back what the request holds.
func (c *conn) release(r *request) {
	for i, b := range r.blocks {
		b.Release()
		r.blocks[i] = nil
	}
	r.blocks, r.vec, r.Vec = r.blocks[:0], r.vec[:0], nil
	c.budget.give(c, r.room)
	c.inFlight--
	r.next, c.free = c.free, r
}

// completed is the request's Done.
func (r *request) completed(*aio.Request) {
	c := r.conn
	c.working--
	c.done = append(c.done, r)
	c.over = append(c.over, &r.Request)
	c.loop.Defer(&c.flush)
}

// hold keeps the block until the reply is sent.
func (r *request) hold(b *aio.Block) {
	if n := len(r.blocks); n == 0 || r.blocks[n-1] != b {
		b.Hold()
		r.blocks = append(r.blocks, b)
	}
}

// header is a command as it stands on the wire.
type header struct {
	flags, command uint16
	cookie         uint64
	offset         uint64
	length         uint32
}

// parseHeader reads the requestSize bytes of b; ok tells whether they begin as
// a request does.
func parseHeader(b []byte) (h header, ok bool) {
	_ = b[requestSize-1]
	return header{
		flags:   binary.BigEndian.Uint16(b[4:]),
		command: binary.BigEndian.Uint16(b[6:]),
		cookie:  binary.BigEndian.Uint64(b[8:]),
		offset:  binary.BigEndian.Uint64(b[16:]),
		length:  binary.BigEndian.Uint32(b[24:]),
	}, binary.BigEndian.Uint32(b) == magicRequest
}

// commands are what a client may ask for, by number.
var commands = [...]struct {
	op    aio.Op
	known bool
	flags uint16 // that it may have
}{
	cmdRead:        {aio.OpRead, true, cmdFlagFUA},
	cmdWrite:       {aio.OpWrite, true, cmdFlagFUA},
	cmdFlush:       {aio.OpFlush, true, cmdFlagFUA},
	cmdTrim:        {aio.OpDiscard, true, cmdFlagFUA},
	cmdCache:       {aio.OpCache, true, cmdFlagFUA},
	cmdWriteZeroes: {aio.OpWriteZeroes, true, cmdFlagFUA | cmdFlagNoHole},
}

// fill makes the request what the header says, or sets why it is refused.
func (r *request) fill(h header) {
	r.cookie, r.refuse, r.room = h.cookie, 0, 0
	r.Flags = 0
	if int(h.command) >= len(commands) || !commands[h.command].known {
		r.refuse, r.Length = unix.EINVAL, 0
		return
	}
	k := &commands[h.command]
	r.Op, r.Offset, r.Length = k.op, int64(h.offset), int64(h.length)
	if h.flags&^k.flags != 0 {
		r.refuse = unix.EINVAL
	}
	if h.flags&cmdFlagFUA != 0 && r.Op.Writes() {
		r.Flags |= aio.FlagFUA
	}
	if h.flags&cmdFlagNoHole != 0 {
		r.Flags |= aio.FlagNoUnmap
	}
	if r.Op == aio.OpFlush {
		r.Offset, r.Length = 0, 0
	}
	if r.Op == aio.OpRead && r.Length > maxPayload {
		r.refuse = unix.EINVAL
	}
}
