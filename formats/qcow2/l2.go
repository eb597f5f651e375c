package qcow2

import (
	"encoding/binary"
	"sync"
	"sync/atomic"

	"platter/formats/qcow2/layout"
)

// sliceSize is how much of an L2 table is kept, loaded and written as one, in
// bytes; all of it when clusters are smaller.
const sliceSize = 4096

// slice is a piece of an L2 table in memory. Its words are read at any time
// without a lock. They change under mu, after a look at gone: a slice that was
// evicted must not be changed, but can still be read by who found it before.
type slice struct {
	table int   // L1 index
	off   int64 // from the start of its table in bytes
	guest int64 // guest offset of the first entry
	words []atomic.Uint64
	used  atomic.Bool // since the clock hand last passed

	mu      sync.Mutex
	pins    int            // keep it from being evicted
	dirty   bool           // differs from the disk
	writing bool           // being written by a commit
	gone    bool           // evicted: look again
	broken  map[int]uint64 // what the disk has where words have poison
}

// poison stands in memory in place of an entry that must not be followed: no
// valid entry has this reserved bit.
const poison = 1 << 61

// pin keeps the slice in the cache until unpin. It fails when it is gone.
func (s *slice) pin() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.gone {
		return false
	}
	s.pins++
	return true
}

func (s *slice) unpin() {
	s.mu.Lock()
	s.pins--
	s.mu.Unlock()
}

// decode fills the slice from the disk's bytes.
func (s *slice) decode(b []byte) {
	for i := range s.words {
		s.words[i].Store(binary.BigEndian.Uint64(b[8*i:]))
	}
}

// encode is what the disk is to hold. The caller holds mu.
func (s *slice) encode(b []byte) []byte {
	for i := range s.words {
		word := s.words[i].Load()
		if word == poison {
			word = s.broken[i]
		}
		b = binary.BigEndian.AppendUint64(b, word)
	}
	return b
}

// table is an L1 entry and what is in memory of the L2 table that it names.
type table struct {
	word   atomic.Uint64
	slices atomic.Pointer[[]atomic.Pointer[slice]]
}

// offset is where the L2 table stands in the file, 0 if there is none.
func (t *table) offset() int64 { return layout.EntryOffset(t.word.Load()) }

// owned reports whether the L2 table may be changed: it is no snapshot's.
func (t *table) owned() bool { return t.word.Load()&layout.Copied != 0 }

// cache holds slices, up to a number of them.
type cache struct {
	max int

	mu    sync.Mutex
	all   []*slice
	hand  int
	loads map[loadKey]*load

	dirtyMu sync.Mutex // taken after a slice's mu
	dirty   []*slice
	full    func() // called when much is dirty
}

// loadKey names a slice that is being loaded.
type loadKey struct {
	table int
	index int64
}

type load struct {
	waiting []func(error)
}

// markDirty notes that the slice must be written. The caller holds s.mu.
func (c *cache) markDirty(s *slice) {
	if s.dirty {
		return
	}
	s.dirty = true
	c.dirtyMu.Lock()
	c.dirty = append(c.dirty, s)
	n := len(c.dirty)
	c.dirtyMu.Unlock()
	if n == max(c.max/4, 1) {
		c.full()
	}
}

// takeDirty takes over the list of slices to write.
func (c *cache) takeDirty() []*slice {
	c.dirtyMu.Lock()
	defer c.dirtyMu.Unlock()
	list := c.dirty
	c.dirty = nil
	return list
}

func (c *cache) dirtyCount() int {
	c.dirtyMu.Lock()
	defer c.dirtyMu.Unlock()
	return len(c.dirty)
}

// room makes room for one more slice, and reports whether there is any; there
// is none while all are dirty or pinned. The caller holds c.mu.
func (c *cache) room(evict func(*slice)) bool {
	if len(c.all) < c.max {
		return true
	}
	for range 2 * len(c.all) {
		c.hand = (c.hand + 1) % len(c.all)
		s := c.all[c.hand]
		if s.used.Swap(false) {
			continue
		}
		s.mu.Lock()
		free := !s.dirty && !s.writing && s.pins == 0
		s.gone = free
		s.mu.Unlock()
		if free {
			evict(s)
			last := len(c.all) - 1
			c.all[c.hand] = c.all[last]
			c.all[last] = nil
			c.all = c.all[:last]
			return true
		}
	}
	return false
}
