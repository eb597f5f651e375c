package qcow2

// Stats are counters since the image was opened.
type Stats struct {
	Lookups int64 // of L2 entries, for reads and writes
	Misses  int64 // lookups for which a piece of an L2 table had to be read
	Cached  int64 // bytes of L2 tables in memory
	Limit   int64 // the most of them that are kept, but for those in use
}

// HitRate is the share of lookups that found what they needed in memory.
func (s Stats) HitRate() float64 {
	if s.Lookups == 0 {
		return 1
	}
	return 1 - float64(s.Misses)/float64(s.Lookups)
}

// Stats may be called at any time, by anyone.
func (im *Image) Stats() Stats {
	misses := im.pastMisses.Load()
	s := Stats{Misses: misses, Lookups: im.pastLookups.Load() + misses}
	if lanes := im.lanes.Load(); lanes != nil {
		for _, ln := range *lanes {
			misses := ln.misses.Load()
			s.Misses += misses
			s.Lookups += ln.lookups.Load() + misses // a miss ends a count early
		}
	}
	size := min(int64(sliceSize), im.g.ClusterSize())
	im.cache.mu.Lock()
	defer im.cache.mu.Unlock()
	s.Cached, s.Limit = int64(len(im.cache.all))*size, int64(im.cache.max)*size
	return s
}
