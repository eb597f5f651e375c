package nbd

import "platter/aio"

// firstReply is where the first reply of a block begins, in bytes. Data that
// begins 16 bytes into a page, as it would behind a header at 0, is the worst
// place to copy a page's worth to: each load looks to the processor as if it
// depended on the store just before (4K aliasing), which costs a 64k read half
// its speed again.
const firstReply = 256 - simpleSize

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
		m.pos = firstReply
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

// header reports whether there is memory for the header of a reply.
func (m *outMemory) header() bool {
	_, ok := m.room(simpleSize)
	return ok
}

// reserve lays out the reply of r: its header, in one piece, for which header
// has made sure that there is memory, and behind it the data of a read. It
// reports false when there is no memory for the data.
func (m *outMemory) reserve(r *request) bool {
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
