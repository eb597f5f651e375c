package nbd

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"testing"

	"platter/export/nbd/nbdtest"
)

// slotSize is the part of the disk that one request at a time works on.
const slotSize = 128 * kib

// hammer is a client that keeps a number of requests in flight, each on a slot of
// the disk of its own, checks every byte that it reads, and counts replies.
type hammer struct {
	t       testing.TB
	c       *nbdtest.Client
	rng     *rand.Rand
	data    []byte // of its slots: a part of the disk's
	unknown []bool // what a failed write has left; nil when none may fail
	base    int64  // of data on the disk
	pending map[uint64]*sent
	cookie  uint64
	answers int
	failed  int
}

// sent is a request in flight.
type sent struct {
	cmd, flags uint16
	off        int // in data
	payload    []byte
	length     int
	slot       int
}

// newHammer makes a client for the slots from first on.
func newHammer(r *rig, d *disk, first, depth int, unknown []bool) *hammer {
	from, to := first*slotSize, (first+depth)*slotSize
	h := &hammer{t: r.t, c: r.dial(), rng: rand.New(rand.NewPCG(rand.Uint64(), 1)), base: int64(from),
		data: d.data[from:to:to], pending: map[uint64]*sent{}}
	if unknown != nil {
		h.unknown = unknown[from:to:to]
	}
	return h
}

// run sends requests until so many have been answered, and then waits for the
// rest. keepGoing may end it before.
func (h *hammer) run(count int, keepGoing func() bool) error {
	for slot := range len(h.data) / slotSize {
		if err := h.send(slot); err != nil {
			return err
		}
	}
	for len(h.pending) > 0 {
		slot, err := h.recv()
		if err != nil {
			return err
		}
		if h.answers < count && (keepGoing == nil || keepGoing()) {
			if err := h.send(slot); err != nil {
				return err
			}
		}
	}
	return nil
}

// send sends a random request for the slot.
func (h *hammer) send(slot int) error {
	s := &sent{slot: slot, cmd: nbdtest.CmdRead, off: slot*slotSize + h.rng.IntN(slotSize-1)}
	room := (slot+1)*slotSize - s.off
	s.length = 1 + h.rng.IntN(min(room, 9000))
	if h.rng.IntN(8) == 0 {
		s.length = room
	}
	switch n := h.rng.IntN(20); {
	case n < 9:
		s.cmd = nbdtest.CmdWrite
		s.payload = pattern(s.length, h.rng.Uint64()|1)
	case n < 10:
		s.cmd = nbdtest.CmdWriteZeroes
	case n < 11:
		s.cmd, s.off, s.length = nbdtest.CmdFlush, 0, 0
	}
	if s.cmd != nbdtest.CmdRead && s.cmd != nbdtest.CmdFlush && h.rng.IntN(16) == 0 {
		s.flags = nbdtest.FUA
	}
	h.cookie++
	h.pending[h.cookie] = s
	off := uint64(h.base) + uint64(s.off)
	if s.cmd == nbdtest.CmdFlush {
		off = 0
	}
	return h.c.Send(s.cmd, s.flags, h.cookie, off, uint32(s.length), s.payload)
}

// recv takes a reply and returns the slot that has nothing to do now.
func (h *hammer) recv() (slot int, err error) {
	cookie, errno, data, err := h.c.Recv()
	if err != nil {
		return 0, err
	}
	s := h.pending[cookie]
	if s == nil {
		return 0, fmt.Errorf("a reply to %d, which is not in flight", cookie)
	}
	delete(h.pending, cookie)
	h.answers++
	if errno != 0 {
		if h.unknown == nil {
			return 0, fmt.Errorf("command %d, %d+%d: %w", s.cmd, h.base+int64(s.off), s.length, errno)
		}
		h.failed++
		if s.cmd != nbdtest.CmdRead && s.cmd != nbdtest.CmdFlush {
			h.doubt(s)
		}
		return s.slot, nil
	}
	at := h.data[s.off : s.off+s.length]
	switch s.cmd {
	case nbdtest.CmdRead:
		if !bytes.Equal(data, at) && !h.excused(s, data) {
			return 0, fmt.Errorf("read %d+%d brings something else", h.base+int64(s.off), s.length)
		}
	case nbdtest.CmdWrite:
		copy(at, s.payload)
		h.know(s)
	case nbdtest.CmdWriteZeroes:
		clear(at)
		h.know(s)
	}
	return s.slot, nil
}

// doubt notes that nobody knows what the range holds.
func (h *hammer) doubt(s *sent) {
	for i := s.off; i < s.off+s.length; i++ {
		h.unknown[i] = true
	}
}

func (h *hammer) know(s *sent) {
	if h.unknown != nil {
		clear(h.unknown[s.off : s.off+s.length])
	}
}

// excused reports whether all that is different is unknown.
func (h *hammer) excused(s *sent, data []byte) bool {
	if h.unknown == nil || len(data) != s.length {
		return false
	}
	for i, b := range data {
		if b != h.data[s.off+i] && !h.unknown[s.off+i] {
			return false
		}
	}
	return true
}

// vanish ends the connection in the middle of what it does. What was in flight may
// have been carried out or not.
func (h *hammer) vanish() {
	h.c.Close()
	for _, s := range h.pending {
		if s.cmd != nbdtest.CmdRead && s.cmd != nbdtest.CmdFlush {
			h.doubt(s)
		}
	}
}
