package qcow2

import (
	"platter/aio"
	"platter/formats/qcow2/layout"
)

// kind is what a piece of the guest's disk is to the data path.
type kind uint8

const (
	missing    kind = iota // the metadata isn't in memory
	hole                   // the backing file's, or zeroes
	zero                   // reads as zeroes
	data                   // stands at host
	compressed             // packed
	broken                 // the metadata is wrong: EIO
)

// mapping is a run of guest bytes of one kind.
type mapping struct {
	kind   kind
	copied bool   // data that may be written in place
	host   int64  // of data: offset in the data file, which goes on for length
	length int64  // bytes
	word   uint64 // the L2 entry of the first cluster
	slice  *slice // where word stands, nil without an L2 table
	index  int    // of word in slice.words
}

// at finds the L2 entry for a guest offset: the slice and the index of the
// entry's first word in it. The slice is nil when it isn't in memory.
func (im *Image) at(off int64) (s *slice, index int) {
	slices := im.l1[off>>im.tableShift].slices.Load()
	if slices == nil {
		return nil, 0
	}
	s = (*slices)[off&(1<<im.tableShift-1)>>im.sliceShift].Load()
	if s == nil {
		return nil, 0
	}
	if !s.used.Load() { // else the line would go from core to core
		s.used.Store(true)
	}
	return s, int(off&(1<<im.sliceShift-1)>>im.g.ClusterBits) << im.wordShift
}

// lookup tells what stands at off, and how far that goes on, at most to end. It
// looks no further than a slice. It takes no lock and never waits.
func (im *Image) lookup(off, end int64) mapping {
	s, i := im.at(off)
	if s == nil {
		t := &im.l1[off>>im.tableShift]
		if t.word.Load() == 0 {
			next := (off>>im.tableShift + 1) << im.tableShift
			return mapping{kind: hole, length: min(end, next) - off}
		}
		return mapping{kind: missing}
	}
	if im.g.Extended {
		return im.lookupExtended(s, i, off, end)
	}
	word := s.words[i].Load()
	m := mapping{word: word, slice: s, index: i}
	m.kind, m.host = im.decode(word)
	m.copied = word&layout.Copied != 0
	cluster := int64(1) << im.g.ClusterBits
	within := off & (cluster - 1)
	m.host += within
	m.length = cluster - within
	// Requests mostly lie within a cluster: whoever goes on is rare.
	for next := off + m.length; next < end && i+1 < len(s.words) && m.kind != compressed; next += cluster {
		i++
		following := s.words[i].Load()
		k, host := im.decode(following)
		if k != m.kind || k == data && (host != m.host+m.length || (following^word)&layout.Copied != 0) {
			break
		}
		m.length += cluster
	}
	m.length = min(m.length, end-off)
	return m
}

// plain is lookup for what is most common: bytes within one cluster, which has
// data and nothing special about it.
func (im *Image) plain(off, end int64) (host int64, copied, ok bool) {
	if im.g.Extended || im.g.External || (off^(end-1))>>im.g.ClusterBits != 0 {
		return 0, false, false
	}
	s, i := im.at(off)
	if s == nil {
		return 0, false, false
	}
	word := s.words[i].Load()
	host = layout.EntryOffset(word)
	if word&^(layout.Copied|layout.OffsetMask) != 0 || host == 0 {
		return 0, false, false
	}
	return host + off&(1<<im.g.ClusterBits-1), word&layout.Copied != 0, true
}

// preload loads the L2 entries that a batch begins with, one after the other but
// without waiting for any, so that they are in the processor's cache when they are
// looked at.
func (im *Image) preload(batch []*aio.Request) (sum uint64) {
	for _, r := range batch {
		if uint64(r.Offset) >= uint64(im.size) {
			continue
		}
		if s, i := im.at(r.Offset); s != nil {
			sum += s.words[i].Load()
		}
	}
	return sum
}

// decode reads a standard L2 entry.
func (im *Image) decode(word uint64) (k kind, host int64) {
	switch {
	case word&^(layout.Copied|layout.OffsetMask) == 0:
		host = layout.EntryOffset(word)
		if host != 0 || im.g.External && word&layout.Copied != 0 {
			return data, host
		}
		return hole, 0
	case word&layout.CompressedL2 != 0:
		return compressed, 0
	case word == poison:
		return broken, 0
	}
	return zero, layout.EntryOffset(word)
}

// lookupExtended is lookup for entries with subclusters. It looks no further
// than one cluster.
func (im *Image) lookupExtended(s *slice, i int, off, end int64) mapping {
	word, bitmap := im.loadExtended(s, i)
	m := mapping{word: word, slice: s, index: i, copied: word&layout.Copied != 0}
	cluster := int64(1) << im.g.ClusterBits
	within := off & (cluster - 1)
	m.host = layout.EntryOffset(word) + within
	switch {
	case word&layout.CompressedL2 != 0:
		m.kind, m.length = compressed, cluster-within
	case word == poison:
		m.kind, m.length = broken, cluster-within
	default:
		bits := im.g.SubclusterBits()
		sub := uint(within >> bits)
		m.kind = subclusterKind(bitmap, sub)
		next := sub + 1
		for next < 32 && subclusterKind(bitmap, next) == m.kind {
			next++
		}
		m.length = int64(next)<<bits - within
	}
	m.length = min(m.length, end-off)
	return m
}

// loadExtended reads both words of an extended entry as they were at one
// moment: whoever changes the offset clears the bitmap before.
func (im *Image) loadExtended(s *slice, i int) (word, bitmap uint64) {
	for {
		word = s.words[i].Load()
		bitmap = s.words[i+1].Load()
		if s.words[i].Load() == word {
			return word, bitmap
		}
	}
}

func subclusterKind(bitmap uint64, sub uint) kind {
	switch {
	case bitmap>>sub&1 != 0:
		return data
	case bitmap>>(sub+32)&1 != 0:
		return zero
	}
	return hole
}
