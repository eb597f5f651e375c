package qcow2

import (
	"golang.org/x/sys/unix"

	"platter/aio"
	"platter/formats/qcow2/layout"
)

// zero starts a discard or write-zeroes. What it does to whole clusters is a
// change of the mapping; all of it is done by a goroutine.
func (ln *lane) zero(o *op) {
	im, r := ln.im, o.r
	if r.Length == 0 {
		ln.release(o)
		return
	}
	o.commit = true
	unmap := r.Op == aio.OpDiscard || r.Flags&aio.FlagNoUnmap == 0
	im.background.Add(1)
	go func() {
		defer im.background.Done()
		im.writers <- struct{}{}
		var err error
		if r.Op == aio.OpDiscard {
			err = im.discardRange(r.Offset, r.End())
		} else {
			err = im.zeroRange(r.Offset, r.End(), unmap)
		}
		<-im.writers
		ln.loop.Post(func() {
			if err != nil {
				o.errno = errnoOf(err)
			}
			ln.release(o)
			ln.submit()
		})
	}()
}

// zeroRange makes a range read as zeroes: whole clusters by their entries, the
// rest by writing.
func (im *Image) zeroRange(off, end int64, unmap bool) error {
	for off < end {
		next := min(im.clusterEnd(off), end)
		whole := off&(im.g.ClusterSize()-1) == 0 && (next == im.clusterEnd(off) || next == im.size)
		if whole {
			n, err := im.zeroClusters(off, end, unmap)
			if err != nil {
				return err
			}
			if n > 0 {
				off += n
				continue
			}
		}
		if err := im.zeroPart(off, next-off); err != nil {
			return err
		}
		off = next
	}
	return nil
}

// zeroPart makes a piece of one cluster read as zeroes.
func (im *Image) zeroPart(off, n int64) error {
	m, err := im.waitLookup(off, off+n)
	if err != nil {
		return err
	}
	if m.length >= n && im.readsZero(m, off, n) {
		return nil
	}
	if m.kind == data && m.copied && m.length >= n {
		return im.waiter.do(im.data, aio.Request{Op: aio.OpWriteZeroes, Flags: aio.FlagNoUnmap, Offset: m.host, Length: n})
	}
	return im.writeCluster(nil, off, n)
}

// readsZero reports whether a mapping needs nothing to read as zeroes.
func (im *Image) readsZero(m mapping, off, n int64) bool {
	return m.kind == zero || m.kind == hole && off >= im.backingSize
}

// waitLookup is lookup for goroutines: it loads what is missing.
func (im *Image) waitLookup(off, end int64) (mapping, error) {
	for {
		m := im.lookup(off, end)
		switch m.kind {
		case missing:
			if err := im.waitSlice(off); err != nil {
				return m, err
			}
		case broken:
			return m, unix.EIO
		default:
			return m, nil
		}
	}
}

// zeroClusters makes clusters read as zeroes by their entries alone, from off
// on, and returns how many bytes it did: 0 when this can't be done here. off is
// the start of a cluster.
func (im *Image) zeroClusters(off, end int64, unmap bool) (int64, error) {
	if im.rawData() {
		return 0, nil
	}
	// Nothing to do where there is nothing.
	m, err := im.waitLookup(off, end)
	if err != nil {
		return 0, err
	}
	if m.slice == nil && im.readsZero(m, off, m.length) {
		return m.length, nil
	}
	return im.change(off, end, func(old entry, guest int64) (entry, bool) {
		return im.zeroed(old, guest, unmap)
	})
}

// zeroed is the entry of a cluster that reads as zeroes; ok is false if version
// 2 has no such entry.
func (im *Image) zeroed(old entry, guest int64, unmap bool) (e entry, ok bool) {
	nothing := guest >= im.backingSize // below there is nothing but zeroes
	packed := old.word&layout.CompressedL2 != 0
	switch {
	case im.g.Version < 3:
		if !nothing || !unmap && old.word != 0 {
			return old, false
		}
		return entry{}, true
	case im.g.Extended:
		e = entry{bitmap: 0xffffffff << 32}
		if !packed && !unmap {
			e.word = old.word
		}
		if e.word == 0 && nothing && old == (entry{}) {
			return old, true
		}
		return e, true
	case old.word == 0 && nothing:
		return old, true
	case packed || unmap && !im.g.External:
		return entry{word: layout.ZeroFlag}, true
	}
	return entry{word: old.word | layout.ZeroFlag}, true
}

// rawData reports whether others read the data file by itself, so that zeroes
// must stand in it.
func (im *Image) rawData() bool {
	return im.g.External && im.header.Autoclear&layout.RawExternal != 0
}

// change applies f to the entries of whole clusters from off on, as far as a
// slice reaches or to end, and returns how many bytes it did. Where f says no,
// it stops. Host clusters that lose their place are forgotten.
func (im *Image) change(off, end int64, f func(old entry, guest int64) (entry, bool)) (int64, error) {
	s, i, err := im.ownSlice(off)
	if err != nil {
		return 0, err
	}
	defer s.unpin()
	s.mu.Lock()
	defer s.mu.Unlock()
	var done int64
	step := 1 << im.wordShift
	for ; i < len(s.words); i += step {
		guest := off + done
		n := min(im.g.ClusterSize(), im.size-guest)
		if n <= 0 || guest+n > end {
			break
		}
		old := im.entry(s, i)
		if old.word == poison {
			return done, unix.EIO
		}
		e, ok := f(old, guest)
		if !ok {
			break
		}
		if e != old {
			im.store(s, i, e)
			if layout.EntryOffset(e.word) != layout.EntryOffset(old.word) || old.word&layout.CompressedL2 != 0 {
				im.forget(old)
			}
		}
		done += n
	}
	return done, nil
}

// discardRange frees whole clusters. They read as zeroes afterwards, lest the
// backing file show through; parts of clusters are left as they are.
func (im *Image) discardRange(off, end int64) error {
	size := im.g.ClusterSize()
	if im.rawData() {
		return nil
	}
	off = (off + size - 1) &^ (size - 1)
	if end != im.size {
		end &^= size - 1
	}
	for off < end {
		m, err := im.waitLookup(off, end)
		if err != nil {
			return err
		}
		if m.slice == nil {
			off += m.length // no L2 table: nothing to free
			continue
		}
		n, err := im.change(off, end, im.discarded)
		if err != nil {
			return err
		}
		if im.g.External && n > 0 {
			if err := im.waiter.do(im.data, aio.Request{Op: aio.OpDiscard, Offset: off, Length: n}); err != nil {
				return err
			}
		}
		off += max(n, size) // version 2 above a backing file: it stays
	}
	return nil
}

// discarded is the entry of a cluster that was discarded.
func (im *Image) discarded(old entry, guest int64) (entry, bool) {
	if old == (entry{}) {
		return old, true
	}
	return im.zeroed(old, guest, true)
}
