package qcow2

import (
	"sync/atomic"

	"platter/formats"
)

var _ formats.GapFiller = (*Image)(nil)

// Stats are counters since the image was opened.
type Stats struct {
	Lookups int64 // of L2 entries, for reads and writes
	Misses  int64 // lookups for which a piece of an L2 table had to be read
	Cached  int64 // bytes of L2 tables in memory
	Limit   int64 // the most of them that are kept, but for those in use

	Joined    int64 // writes to new clusters that were spared by joining them
	GapWrites int64 // writes to the file that filled gaps between those of the guest with zeroes
	GapBytes  int64 // the zeroes
}

// HitRate is the share of lookups that found what they needed in memory.
func (s Stats) HitRate() float64 {
	if s.Lookups == 0 {
		return 1
	}
	return 1 - float64(s.Misses)/float64(s.Lookups)
}

// counts are what a lane counts; anyone may read them.
type counts struct {
	lookups, misses             atomic.Int64 // of L2 entries, hits only, and slices that had to be read
	joined, gapWrites, gapBytes atomic.Int64
}

func (c *counts) add(d *counts) {
	c.lookups.Add(d.lookups.Load())
	c.misses.Add(d.misses.Load())
	c.joined.Add(d.joined.Load())
	c.gapWrites.Add(d.gapWrites.Load())
	c.gapBytes.Add(d.gapBytes.Load())
}

// count adds up what all lanes have counted.
func (im *Image) count() *counts {
	var sum counts
	im.laneMu.Lock() // no lane is counted twice
	defer im.laneMu.Unlock()
	sum.add(&im.past)
	if lanes := im.lanes.Load(); lanes != nil {
		for _, ln := range *lanes {
			sum.add(&ln.counts)
		}
	}
	return &sum
}

// GapStats tells what was filled between writes that were joined.
func (im *Image) GapStats() formats.GapStats {
	c := im.count()
	return formats.GapStats{Writes: uint64(c.gapWrites.Load()), Bytes: uint64(c.gapBytes.Load())}
}

// Stats may be called at any time, by anyone.
func (im *Image) Stats() Stats {
	c := im.count()
	s := Stats{Misses: c.misses.Load(), Joined: c.joined.Load(), GapWrites: c.gapWrites.Load(), GapBytes: c.gapBytes.Load()}
	s.Lookups = c.lookups.Load() + s.Misses // a miss ends a count early
	size := min(int64(sliceSize), im.g.ClusterSize())
	im.cache.mu.Lock()
	defer im.cache.mu.Unlock()
	s.Cached, s.Limit = int64(len(im.cache.all))*size, int64(im.cache.max)*size
	return s
}
