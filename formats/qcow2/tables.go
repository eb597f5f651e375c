package qcow2

import (
	"fmt"
	"sync/atomic"

	"platter/formats/qcow2/layout"
)

// loadSlice brings the slice for a guest offset into memory, and calls done when
// it is there or can't be had. It may be called from any thread; done is called
// on a goroutine. Whoever asks for a slice that is being loaded waits for the
// same load.
func (im *Image) loadSlice(guest int64, done func(error)) {
	t := int(guest >> im.tableShift)
	index := guest & (1<<im.tableShift - 1) >> im.sliceShift
	key := loadKey{t, index}
	c := &im.cache
	c.mu.Lock()
	if l := c.loads[key]; l != nil {
		l.waiting = append(l.waiting, done)
		c.mu.Unlock()
		return
	}
	c.loads[key] = &load{waiting: []func(error){done}}
	c.mu.Unlock()
	im.background.Add(1)
	go func() {
		defer im.background.Done()
		err := im.readSlice(t, index)
		c.mu.Lock()
		waiting := c.loads[key].waiting
		delete(c.loads, key)
		c.mu.Unlock()
		for _, f := range waiting {
			f(err)
		}
	}()
}

// readSlice reads a slice and puts it in its place, unless it is there already.
func (im *Image) readSlice(t int, index int64) error {
	tab := &im.l1[t]
	slots := tab.slices.Load()
	if slots == nil {
		list := make([]atomic.Pointer[slice], 1<<(im.tableShift-im.sliceShift))
		if tab.slices.CompareAndSwap(nil, &list) {
			slots = &list
		} else {
			slots = tab.slices.Load()
		}
	}
	if (*slots)[index].Load() != nil {
		return nil
	}
	word := tab.word.Load()
	if word == 0 {
		return nil // no table: all of it is a hole
	}
	if err := im.checkTable(t, word); err != nil {
		return im.corrupted(fmt.Errorf("L1 index %d: %w", t, err))
	}
	size := min(int64(sliceSize), im.g.ClusterSize())
	s := &slice{
		table: t, off: index * size, words: make([]atomic.Uint64, size/8),
		guest: int64(t)<<im.tableShift + index<<im.sliceShift,
	}
	b := make([]byte, size)
	at := layout.EntryOffset(word) + s.off
	if err := im.waiter.readAt(im.file, b, at); err != nil {
		return fmt.Errorf("read L2 table of L1 entry %d: %w", t, err)
	}
	s.decode(b)
	im.contain(s)
	im.cache.mu.Lock()
	if !im.cache.room(im.evict) {
		// All are dirty or in use. There are never many more than the limit,
		// since those that wait for a slice are bounded, and a commit is on its way.
		im.commits.kick()
	}
	im.cache.all = append(im.cache.all, s)
	im.cache.mu.Unlock()
	s.used.Store(true)
	(*slots)[index].Store(s)
	return nil
}

// evict takes a slice out of its place.
func (im *Image) evict(s *slice) {
	index := s.off / int64(len(s.words)*8)
	(*im.l1[s.table].slices.Load())[index].Store(nil)
}

// contain replaces entries that must not be followed by poison: those that the
// format forbids, and those that point beyond the file or to metadata, which a
// guest could otherwise overwrite.
func (im *Image) contain(s *slice) {
	step := 1 << im.wordShift
	for i := 0; i < len(s.words); i += step {
		word, bitmap := s.words[i].Load(), uint64(0)
		if im.g.Extended {
			bitmap = s.words[i+1].Load()
		}
		if word|bitmap == 0 {
			continue
		}
		guest := s.guest + int64(i>>im.wordShift)<<im.g.ClusterBits
		if err := im.checkEntry(word, bitmap, guest); err != nil {
			if s.broken == nil {
				s.broken = make(map[int]uint64)
			}
			s.broken[i] = word
			s.words[i].Store(poison)
			_ = im.corrupted(fmt.Errorf("guest offset %#x: %w", guest, err))
		}
	}
}

func (im *Image) checkEntry(word, bitmap uint64, guest int64) error {
	if err := im.g.CheckL2(word, bitmap, guest); err != nil {
		return err
	}
	if im.g.External {
		return nil
	}
	from, length := layout.EntryOffset(word), int64(1)
	if word&layout.CompressedL2 != 0 {
		from, length = im.g.CompressedRange(word)
		// The last sector of the file may be cut off.
		length = min(length, max(im.fileEnd.Load()-from, 1))
	} else if from == 0 {
		return nil
	}
	if from >= im.fileEnd.Load() {
		return &layout.FieldError{Field: "L2 entry", Value: layout.Hex(word), Want: fmt.Sprintf("must name an offset below the end of the file, %#x", im.fileEnd.Load()), Kind: layout.ErrInvalid}
	}
	for c := from >> im.g.ClusterBits; c <= (from+length-1)>>im.g.ClusterBits; c++ {
		if im.metadata.at(c).kind != nothing {
			return &layout.FieldError{Field: "L2 entry", Value: layout.Hex(word), Want: "must not point to metadata", Kind: layout.ErrInvalid}
		}
	}
	return nil
}

// ownSlice finds the slice and the index for a guest offset, in a table that may
// be changed, and pins the slice. It waits, and so is for goroutines.
func (im *Image) ownSlice(guest int64) (*slice, int, error) {
	for {
		if err := im.ownTable(int(guest >> im.tableShift)); err != nil {
			return nil, 0, err
		}
		if s, i := im.at(guest); s != nil && s.pin() {
			return s, i, nil
		}
		if err := im.waitSlice(guest); err != nil {
			return nil, 0, err
		}
	}
}

// waitSlice loads a slice and waits for it.
func (im *Image) waitSlice(guest int64) error {
	done := make(chan error, 1)
	im.loadSlice(guest, func(err error) { done <- err })
	return <-done
}

// ownTable sees to it that an L1 entry names an L2 table which nobody else
// refers to: it makes a new, empty one, or copies one that a snapshot shares.
func (im *Image) ownTable(t int) error {
	tab := &im.l1[t]
	if tab.owned() {
		return nil
	}
	im.metaMu.Lock()
	defer im.metaMu.Unlock()
	if tab.owned() {
		return nil
	}
	if word := tab.word.Load(); word != 0 {
		if err := im.checkTable(t, word); err != nil {
			return im.corrupted(fmt.Errorf("L1 index %d: %w", t, err))
		}
	}
	r, err := im.alloc.reserve(1)
	if err != nil {
		return err
	}
	host := r.first << im.g.ClusterBits
	if old := tab.offset(); old != 0 {
		// What is in memory of the old table stays right: it can't have been
		// changed, since it isn't owned.
		b := make([]byte, im.g.ClusterSize())
		err := im.waiter.readAt(im.file, b, old)
		if err == nil {
			err = im.waiter.writeAt(im.file, b, host)
		}
		if err != nil {
			im.alloc.forget(r.first)
			return fmt.Errorf("copy L2 table of L1 entry %d: %w", t, err)
		}
		im.alloc.forget(old >> im.g.ClusterBits)
	}
	im.metadata.add(r.first, 1, holder{l2Table, int32(t)})
	im.l1Dirty[t] = struct{}{}
	tab.word.Store(uint64(host) | layout.Copied)
	im.commits.soon()
	return nil
}
