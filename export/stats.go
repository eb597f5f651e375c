package export

import (
	"math/bits"
	"sync/atomic"
	"time"

	"platter/aio"
	"platter/formats"
)

// Stats is what queues have done since they were opened.
type Stats struct {
	Requests   [aio.OpCount]uint64    // by operation; without those refused
	Bytes      [aio.OpCount]uint64    // by operation
	Latency    [aio.OpCount]Histogram // by operation, from Submit to Completed
	InFlight   uint64                 // submitted, not completed; those that wait are among them
	Waiting    uint64                 // for the throttle, now
	Throttled  uint64                 // requests that had to wait for it
	Batches    uint64                 // calls of Submit that had something to do
	BatchSizes [batchSizes]uint64     // [i]: batches of at least 1<<i requests and fewer than twice that; the last: more, too
	Merged     uint64                 // requests saved by merging
	Refused    uint64                 // out of bounds or not permitted

	// Gaps is what the image has done for all of its users: see
	// formats.GapFiller. A queue's own Stats has none.
	Gaps formats.GapStats
}

// batchSizes is one more than the power of two of the largest batches that are
// told apart.
const batchSizes = 12

func (s *Stats) add(t *Stats) {
	for op := range s.Requests {
		s.Requests[op] += t.Requests[op]
		s.Bytes[op] += t.Bytes[op]
		s.Latency[op].add(&t.Latency[op])
	}
	s.InFlight += t.InFlight
	s.Waiting += t.Waiting
	s.Throttled += t.Throttled
	s.Batches += t.Batches
	for i, n := range t.BatchSizes {
		s.BatchSizes[i] += n
	}
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
	requests, bytes [aio.OpCount]counter
	latency         [aio.OpCount][latencyBuckets]counter
	batches         [batchSizes]counter
	merged, refused counter
	throttled       counter
}

// epoch is where clock begins.
var epoch = time.Now()

// clock is a moment: nanoseconds since the process began, never 0.
func clock() int64 { return int64(time.Since(epoch)) + 1 }

// submitted counts a batch and notes in its requests when it came.
func (c *counters) submitted(batch []*aio.Request, now int64) {
	var requests, bytes [aio.OpCount]uint64
	for _, r := range batch {
		r.Start = now
		requests[r.Op]++
		bytes[r.Op] += uint64(r.Length)
	}
	for op, n := range requests {
		if n > 0 {
			c.requests[op].add(n)
			c.bytes[op].add(bytes[op])
		}
	}
	c.batches[min(bits.Len(uint(len(batch))), batchSizes)-1].add(1)
}

// completed counts a batch of completions. An atomic store costs more than all
// of the rest, and requests that came together tend to end together: neighbours
// of one latency share a store.
func (c *counters) completed(batch []*aio.Request, now int64) {
	var same *counter
	n := uint64(0)
	for _, r := range batch {
		if r.Start == 0 {
			continue
		}
		bucket := &c.latency[r.Op][bucketOf(now-r.Start)]
		r.Start = 0
		if bucket != same {
			if same != nil {
				same.add(n)
			}
			same, n = bucket, 0
		}
		n++
	}
	if same != nil {
		same.add(n)
	}
}

// read is what has been counted. Completions are read first: in between there
// may be more requests, and a count of those in flight that is below zero means
// nothing.
func (c *counters) read() *Stats {
	s := &Stats{}
	var completed uint64
	for op := range c.latency {
		for i := range c.latency[op] {
			n := c.latency[op][i].n.Load()
			s.Latency[op][i] = n
			completed += n
		}
	}
	s.Merged, s.Refused, s.Throttled = c.merged.n.Load(), c.refused.n.Load(), c.throttled.n.Load()
	for op := range s.Requests {
		s.Requests[op] = c.requests[op].n.Load()
		s.Bytes[op] = c.bytes[op].n.Load()
		s.InFlight += s.Requests[op]
	}
	s.InFlight -= completed
	for i := range s.BatchSizes {
		n := c.batches[i].n.Load()
		s.BatchSizes[i] = n
		s.Batches += n
	}
	return s
}
