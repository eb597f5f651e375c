package export

import "math"

// bucket is a token bucket: tokens come at a rate, and no more of them are kept
// than a burst. It isn't golang.org/x/time/rate's Limiter because a request must
// be able to ask several buckets and take from all or none, under one lock for a
// whole batch, and because a request larger than the burst, which a Limiter
// refuses, takes what isn't there yet.
//
// The zero value never runs out.
type bucket struct {
	rate  float64 // tokens per nanosecond; 0: any number
	burst float64
	level float64 // below 0: debt
	at    int64   // when level was right
}

// set changes the rate (per second) and the burst. What is there is kept, or
// owed; a bucket that had no rate begins full.
func (b *bucket) set(rate, burst float64, now int64) {
	if b.rate == 0 {
		b.level = burst
	}
	b.fill(now)
	b.rate, b.burst = rate/1e9, burst
	b.level = min(b.level, burst)
}

// fill adds the tokens that have come.
func (b *bucket) fill(now int64) {
	if b.rate > 0 {
		b.level = min(b.level+float64(now-b.at)*b.rate, b.burst)
	}
	b.at = now
}

// wait is how long it takes until n tokens may be taken, in nanoseconds; 0: they
// may be taken now. More than the burst there never are, so that whoever wants
// more waits for a full bucket.
func (b *bucket) wait(n float64) int64 {
	if b.rate == 0 {
		return 0
	}
	// Sums of tokens that are fractions may be a little off: a millionth is
	// nobody's advantage.
	missing := min(n, b.burst) - b.level
	if missing <= 1e-6 {
		return 0
	}
	return int64(min(math.Ceil(missing/b.rate), 1e18))
}

// take takes n tokens, there or not.
func (b *bucket) take(n float64) {
	if b.rate > 0 {
		b.level -= n
	}
}
