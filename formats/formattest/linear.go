package formattest

import (
	"encoding/binary"
	"fmt"
	"sync"
	"sync/atomic"

	"platter/aio"
	"platter/formats"
)

// linearizable has all loops do overlapping reads, writes, discards,
// write-zeroes and flushes at the same time. Every request must seem to happen
// at one moment between its submission and its completion, for each sector: a
// read finds what the last write before it left, or one that was under way.
func linearizable(s *suite) {
	s.Create(s.t, s.path, s.aligned(contested))
	image, _ := s.open(false, nil)
	var (
		clock atomic.Int64
		wg    sync.WaitGroup
		mu    sync.Mutex
		all   []*event
	)
	for i, ln := range s.lanes {
		wg.Add(1)
		go func() {
			defer wg.Done()
			for round := range s.Rounds {
				events := ln.contend(image, &clock, uint64(i*s.Rounds+round)<<8)
				mu.Lock()
				all = append(all, events...)
				mu.Unlock()
			}
		}()
	}
	wg.Wait()
	for sector := int64(0); sector < contested/512; sector++ {
		if err := checkRegister(all, sector); err != nil {
			s.t.Fatal(err)
		}
	}
}

// contested is the size of the image that all fight for, in bytes: some clusters
// of the usual size, and few enough sectors to meet on.
const contested = 256 << 10

// event is a request that is over: when it began and ended, and what it wrote or
// found.
type event struct {
	op         aio.Op
	begin, end int64
	off, last  int64    // first and last sector
	tag        uint64   // of a write, in all of its words
	found      []uint64 // of a read: the first word of each sector, and its last
}

func (e *event) String() string {
	return fmt.Sprintf("%v of sectors %d to %d, tag %#x, at %d..%d", e.op, e.off, e.last, e.tag, e.begin, e.end)
}

// covers reports whether the event is about the sector.
func (e *event) covers(sector int64) bool { return e.off <= sector && sector <= e.last }

// contend does one batch of requests anywhere.
func (ln *lane) contend(image formats.Image, clock *atomic.Int64, tag uint64) []*event {
	const sectors = contested / 512
	batch := make([]*aio.Request, 1+ln.rng.IntN(4))
	events := make([]*event, len(batch))
	for i := range batch {
		off := ln.rng.Int64N(sectors)
		n := 1 + ln.rng.Int64N(min(sectors-off, 1<<ln.rng.IntN(9)))
		e := &event{off: off, last: off + n - 1, tag: tag | uint64(i) + 1}
		switch k := ln.rng.IntN(20); {
		case k < 9:
			e.op = aio.OpRead
		case k < 16:
			e.op = aio.OpWrite
		case k < 18:
			e.op = aio.OpWriteZeroes
		case k < 19:
			e.op = aio.OpDiscard
		default:
			e.op = aio.OpFlush
		}
		r := &aio.Request{Op: e.op, Offset: off * 512, Length: n * 512}
		switch e.op {
		case aio.OpRead:
			r.Vec = ln.vec(r.Length, 1)
		case aio.OpWrite:
			r.Vec = ln.vec(r.Length, 2)
			b := make([]byte, r.Length)
			for at := 0; at < len(b); at += 8 {
				binary.LittleEndian.PutUint64(b[at:], e.tag)
			}
			aio.CopyIn(r.Vec, b)
		case aio.OpFlush:
			r.Offset, r.Length = 0, 0
		}
		batch[i], events[i] = r, e
	}
	begin := clock.Add(1)
	ln.submit(image, batch...)
	end := clock.Add(1)
	for i, e := range events {
		e.begin, e.end = begin, end
		if batch[i].Errno != 0 {
			ln.t.Errorf("%v: %v", e, batch[i].Errno)
		}
		if e.op != aio.OpRead {
			continue
		}
		b := make([]byte, batch[i].Length)
		aio.CopyOut(b, batch[i].Vec)
		for at := 0; at < len(b); at += 512 {
			e.found = append(e.found, binary.LittleEndian.Uint64(b[at:]), binary.LittleEndian.Uint64(b[at+504:]))
		}
	}
	return events
}

// checkRegister looks at one sector as a register that every event reads or
// writes. A sector that is read while it is written may be torn, so its first
// and its last word are looked at by themselves.
func checkRegister(all []*event, sector int64) error {
	var writes, reads []*event
	byTag := map[uint64]*event{}
	for _, e := range all {
		switch {
		case !e.covers(sector):
		case e.op == aio.OpRead:
			reads = append(reads, e)
		case e.op == aio.OpWrite:
			byTag[e.tag] = e
			writes = append(writes, e)
		case e.op == aio.OpWriteZeroes, e.op == aio.OpDiscard:
			writes = append(writes, e)
		}
	}
	// The content of a new image, before all else.
	zeroes := []*event{{op: aio.OpWriteZeroes}}
	for _, w := range writes {
		if w.op != aio.OpWrite {
			zeroes = append(zeroes, w)
		}
	}
	// stale reports whether r can't have found w's value: it came later, or
	// another for certain came between them. A discard may do nothing.
	stale := func(w, r *event) bool {
		if w.begin > r.end {
			return true
		}
		for _, x := range writes {
			if x.op != aio.OpDiscard && x.begin > w.end && x.end < r.begin {
				return true
			}
		}
		return false
	}
	for word := range 2 {
		var sources []*event // of each read, nil for zeroes
		for _, r := range reads {
			v := r.found[int(sector-r.off)*2+word]
			w := byTag[v]
			fine := false
			switch {
			case v == 0:
				for _, z := range zeroes {
					fine = fine || !stale(z, r)
				}
			case w != nil:
				fine = !stale(w, r)
			}
			if !fine {
				return fmt.Errorf("sector %d: %v found %#x, which was not to be read then; written by %v", sector, r, v, w)
			}
			sources = append(sources, w)
		}
		for i, first := range reads {
			for j, second := range reads {
				a, b := sources[i], sources[j]
				if first.end < second.begin && a != nil && b != nil && b.end < a.begin {
					return fmt.Errorf("sector %d: %v found %v, and %v after it found the older %v", sector, first, a, second, b)
				}
			}
		}
	}
	return nil
}
