package formattest

import (
	"bytes"
	"testing"

	"golang.org/x/sys/unix"

	"platter/aio"
)

// model is what an image should hold. Bytes whose content is not defined, after
// a discard or a failed write, are unknown until they are written again.
// Different ranges may be used at the same time.
type model struct {
	data    []byte
	unknown []bool
}

func newModel(size int64) *model {
	return &model{make([]byte, size), make([]bool, size)}
}

// apply does what a request that is over did to the image. data is what it
// wrote.
func (m *model) apply(r *aio.Request, data []byte) {
	at, unknown := m.data[r.Offset:r.End()], false
	switch {
	case !r.Op.Writes():
		return
	case r.Errno != 0, r.Op == aio.OpDiscard:
		unknown = true
	case r.Op == aio.OpWrite:
		copy(at, data)
	case r.Op == aio.OpWriteZeroes:
		clear(at)
	}
	doubts := m.unknown[r.Offset:r.End()]
	if !unknown {
		clear(doubts)
		return
	}
	for i := range doubts {
		doubts[i] = true
	}
	clear(at) // a good guess, with which check is fast
}

// check compares bytes read at off, and reports the first that is wrong.
func (m *model) check(t testing.TB, what string, off int64, got []byte) bool {
	t.Helper()
	if bytes.Equal(got, m.data[off:off+int64(len(got))]) {
		return true
	}
	for i, b := range got {
		at := off + int64(i)
		if !m.unknown[at] && b != m.data[at] {
			wrong := 1
			for wrong < len(got)-i && got[i+wrong] != m.data[at+int64(wrong)] {
				wrong++
			}
			t.Errorf("%s: byte %d is %#02x, want %#02x (%d bytes wrong; read %d+%d)", what, at, b, m.data[at], wrong, off, len(got))
			return false
		}
	}
	return true
}

// piece is a range of the image that one lane has to itself.
type piece struct{ off, length int64 }

// pieces cuts an image up and deals the pieces out. They are of all sizes, and
// neighbours belong to different lanes.
func (s *suite) pieces(size, block int64) [][]piece {
	dealt := make([][]piece, len(s.lanes))
	for off, i := int64(0), 0; off < size; i++ {
		length := 1 + s.rng.Int64N(6000)
		if s.rng.IntN(8) == 0 {
			length = 1 + s.rng.Int64N(300_000)
		}
		length = min((length+block-1)/block*block, size-off)
		owner := i % len(s.lanes)
		dealt[owner] = append(dealt[owner], piece{off, length})
		off += length
	}
	return dealt
}

// workload has every lane do random batches on its pieces at the same time,
// and checks what they read. A request may fail with one of the errors that are
// expected.
func (s *suite) workload(image aio.Storage, block int64, segments int, m *model, expected ...unix.Errno) {
	dealt := s.pieces(int64(len(m.data)), block)
	over := make(chan struct{})
	for i, ln := range s.lanes {
		go func() {
			defer func() { over <- struct{}{} }()
			for range s.Rounds {
				if len(dealt[i]) == 0 || !ln.round(image, dealt[i], block, segments, m, expected) {
					return
				}
			}
		}()
	}
	for range s.lanes {
		<-over
	}
	if s.t.Failed() {
		s.t.FailNow()
	}
}

// round does one random batch: at most one request on each of the pieces, so
// that the order within the batch does not matter.
func (ln *lane) round(image aio.Storage, own []piece, block int64, segments int, m *model, expected []unix.Errno) bool {
	count := min(1+ln.rng.IntN(16), len(own))
	batch := make([]*aio.Request, count)
	written := make([][]byte, count)
	for i, p := range ln.rng.Perm(len(own))[:count] {
		batch[i] = ln.request(own[p], block, segments)
		if batch[i].Op == aio.OpWrite {
			written[i] = ln.bytes(batch[i].Length)
			aio.CopyIn(batch[i].Vec, written[i])
		}
	}
	ln.submit(image, batch...)
	fine := true
	for i, r := range batch {
		m.apply(r, written[i])
		switch {
		case r.Errno != 0 && !oneOf(r.Errno, expected):
			ln.t.Errorf("%v %d+%d: %v", r.Op, r.Offset, r.Length, r.Errno)
			fine = false
		case r.Errno == 0 && r.Op == aio.OpRead:
			got := make([]byte, r.Length)
			aio.CopyOut(got, r.Vec)
			fine = m.check(ln.t, "read", r.Offset, got) && fine
		}
	}
	return fine
}

func oneOf(errno unix.Errno, list []unix.Errno) bool {
	for _, e := range list {
		if e == errno {
			return true
		}
	}
	return false
}

// request makes a random request within a piece.
func (ln *lane) request(p piece, block int64, segments int) *aio.Request {
	r := &aio.Request{}
	switch n := ln.rng.IntN(100); {
	case n < 35:
		r.Op = aio.OpRead
	case n < 70:
		r.Op = aio.OpWrite
	case n < 82:
		r.Op = aio.OpWriteZeroes
		if ln.rng.IntN(2) == 0 {
			r.Flags |= aio.FlagNoUnmap
		}
	case n < 90:
		r.Op = aio.OpDiscard
	case n < 95:
		r.Op = aio.OpCache
	default:
		r.Op = aio.OpFlush
		return r
	}
	if r.Op.Writes() && ln.rng.IntN(5) == 0 {
		r.Flags |= aio.FlagFUA
	}
	blocks := (p.length + block - 1) / block
	first := ln.rng.Int64N(blocks)
	last := first + ln.rng.Int64N(blocks-first)
	if ln.rng.IntN(4) == 0 { // the whole piece, up to its very edges
		first, last = 0, blocks-1
	}
	r.Offset = p.off + first*block
	r.Length = min((last+1)*block, p.length) - first*block
	if r.Op == aio.OpRead || r.Op == aio.OpWrite {
		if ln.rng.IntN(3) == 0 {
			r.Vec = ln.alignedVec(r.Length)
		} else {
			r.Vec = ln.vec(r.Length, 1+ln.rng.IntN(min(segments, 20)))
		}
	}
	return r
}
