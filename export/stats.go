package export

import (
	"sync/atomic"

	"platter/aio"
)

// Stats is what queues have done since they were opened.
type Stats struct {
	Requests [aio.OpCount]uint64 // by operation; without those refused
	Bytes    [aio.OpCount]uint64 // by operation
	Batches  uint64              // calls of Submit that had something to do
	Merged   uint64              // requests saved by merging
	Refused  uint64              // out of bounds or not permitted
}

func (s *Stats) add(t Stats) {
	for op := range s.Requests {
		s.Requests[op] += t.Requests[op]
		s.Bytes[op] += t.Bytes[op]
	}
	s.Batches += t.Batches
	s.Merged += t.Merged
	s.Refused += t.Refused
}

// counter is written by one thread and read by others.
type counter struct {
	n atomic.Uint64
}

func (c *counter) add(n uint64) { c.n.Store(c.n.Load() + n) }

// counters are a queue's. They are added to once per batch, not per request.
type counters struct {
	requests, bytes          [aio.OpCount]counter
	batches, merged, refused counter
}

func (c *counters) count(batch []*aio.Request) {
	var requests, bytes [aio.OpCount]uint64
	for _, r := range batch {
		requests[r.Op]++
		bytes[r.Op] += uint64(r.Length)
	}
	for op, n := range requests {
		if n > 0 {
			c.requests[op].add(n)
			c.bytes[op].add(bytes[op])
		}
	}
	c.batches.add(1)
}

func (c *counters) read() Stats {
	s := Stats{Batches: c.batches.n.Load(), Merged: c.merged.n.Load(), Refused: c.refused.n.Load()}
	for op := range s.Requests {
		s.Requests[op] = c.requests[op].n.Load()
		s.Bytes[op] = c.bytes[op].n.Load()
	}
	return s
}
