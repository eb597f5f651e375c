package nbd

import "platter/aio"

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
)

// budget is the memory that the connections of one loop share for data in
// flight. A request takes all it will need before any of it is received or
// read, so one that has begun can always end; a connection whose next request
// doesn't fit waits, first come, first served.
type budget struct {
	left    int64
	waiting []*conn
}

// take reports whether n bytes were to be had. If not, the connection is
// resumed when there are more.
func (b *budget) take(c *conn, n int64) bool {
	if n == 0 {
		return true
	}
	if (len(b.waiting) == 0 || b.waiting[0] == c) && n <= b.left {
		b.left -= n
		if len(b.waiting) > 0 {
			b.waiting = append(b.waiting[:0], b.waiting[1:]...)
			b.wakeFirst()
		}
		return true
	}
	if !c.waiting {
		c.waiting = true
		b.waiting = append(b.waiting, c)
	}
	return false
}

// give takes bytes back.
func (b *budget) give(n int64) {
	b.left += n
	if n > 0 {
		b.wakeFirst()
	}
}

// leave forgets a connection that is going away.
func (b *budget) leave(c *conn) {
	for i, w := range b.waiting {
		if w == c {
			b.waiting = append(b.waiting[:i], b.waiting[i+1:]...)
			b.wakeFirst()
			return
		}
	}
}

func (b *budget) wakeFirst() {
	if len(b.waiting) > 0 {
		c := b.waiting[0]
		c.loop.Defer(&c.flush)
	}
}

// outMemory is room for replies, handed out from the front of one block after
// the other.
type outMemory struct {
	arena *aio.Arena
	block *aio.Block
	pos   int
}

// room is what is left of the current block; a new one is begun when that is
// less than n bytes. It reports false when there is no memory.
func (m *outMemory) room(n int) (int, bool) {
	if m.block != nil && aio.BlockSize-m.pos < n {
		m.drop()
	}
	if m.block == nil {
		if m.block = m.arena.Get(); m.block == nil {
			return 0, false
		}
		m.pos = 0
	}
	return aio.BlockSize - m.pos, true
}

// drop gives the current block up; requests may still hold it.
func (m *outMemory) drop() {
	if m.block != nil {
		m.block.Release()
		m.block = nil
	}
}

// reserve lays out the reply of r: its header, in one piece, and behind it the
// data of a read.
func (m *outMemory) reserve(r *request) bool {
	if _, ok := m.room(simpleSize); !ok {
		return false
	}
	r.hold(m.block)
	r.head = m.block.Iovec(m.pos, simpleSize)
	r.header = m.block.Bytes()[m.pos : m.pos+simpleSize]
	m.pos += simpleSize
	if r.Op != aio.OpRead || r.refuse != 0 {
		return true
	}
	for left := int(r.Length); left > 0; {
		room, ok := m.room(1)
		if !ok {
			return false
		}
		n := min(left, room)
		r.hold(m.block)
		r.vec = append(r.vec, m.block.Iovec(m.pos, n))
		m.pos += n
		left -= n
	}
	r.Vec = r.vec
	return true
}
