package qcow2

import (
	"fmt"

	"golang.org/x/sys/unix"

	"platter/aio"
	"platter/formats/qcow2/layout"
)

// writeCluster writes n bytes from vec, or zeroes if vec is nil, that lie within
// one cluster, whatever the cluster is now: it is copied, unpacked or filled up
// as needed. It is for goroutines.
func (im *Image) writeCluster(vec []aio.Iovec, guest, n int64) error {
	cluster := guest >> im.g.ClusterBits << im.g.ClusterBits
	a := im.enter(cluster)
	defer im.leave(a)
	s, i, err := im.ownSlice(guest)
	if err != nil {
		return err
	}
	defer s.unpin()
	var bufs [2]*aio.Memory // what the guest writes, and what goes to the file
	for i := range bufs {
		if bufs[i], err = im.waiter.memory(); err != nil {
			return err
		}
		defer im.waiter.give(bufs[i])
	}
	content := bufs[0].Bytes()[:n]
	if vec == nil {
		clear(content)
	} else {
		aio.CopyOut(content, vec)
	}
	for len(content) > 0 {
		n, err := im.tryWrite(s, i, bufs[1], content, guest)
		if err != nil {
			return err
		}
		content, guest = content[n:], guest+n
	}
	return nil
}

// entry is an L2 entry as it was at one moment.
type entry struct{ word, bitmap uint64 }

func (im *Image) entry(s *slice, i int) entry {
	if !im.g.Extended {
		return entry{word: s.words[i].Load()}
	}
	word, bitmap := im.loadExtended(s, i)
	return entry{word, bitmap}
}

// tryWrite writes content to guest, or as much of it as can be written at once,
// which is nothing if the entry changes meanwhile.
func (im *Image) tryWrite(s *slice, i int, buf *aio.Memory, content []byte, guest int64) (n int64, err error) {
	old := im.entry(s, i)
	if old.word == poison {
		return 0, unix.EIO
	}
	size := im.g.ClusterSize()
	cluster := guest &^ (size - 1)
	keeps := old.word&layout.CompressedL2 == 0 && old.word&layout.Copied != 0 && (layout.EntryOffset(old.word) != 0 || im.g.External)
	host := layout.EntryOffset(old.word)

	n = int64(len(content))
	inPlace := false
	if keeps {
		// Loops write to what is data already, so that only the guest's own bytes
		// may be written there.
		inPlace, n = im.sameState(old, guest-cluster, n)
	}
	// Of what isn't, whole subclusters are written; all of them if the cluster
	// moves.
	unit := int64(1) << im.g.SubclusterBits()
	from, to := (guest-cluster)&^(unit-1), (guest-cluster+n+unit-1)&^(unit-1)
	if !keeps && im.moves(old) {
		from, to = 0, size
	}
	fresh := old
	if inPlace {
		from, to = guest-cluster, guest-cluster+n
	} else {
		if fresh, err = im.place(old, cluster, from, to); err != nil {
			return 0, err
		}
		if !keeps {
			host = layout.EntryOffset(fresh.word)
		}
	}
	if im.g.External {
		to = min(to, im.size-cluster) // a data file is no longer than the disk
	}
	b := buf.Bytes()[:to-from]
	if err := im.fill(b, content[:n], cluster+from, guest); err != nil {
		im.drop(host, keeps)
		return 0, err
	}
	err = im.waiter.do(im.data, aio.Request{Op: aio.OpWrite, Offset: host + from, Length: to - from, Vec: []aio.Iovec{buf.Iovec(0, int(to-from))}})
	if err != nil {
		im.drop(host, keeps)
		return 0, fmt.Errorf("write %d bytes at %#x: %w", to-from, host+from, err)
	}
	if fresh != old && !im.replace(s, i, old, fresh) {
		im.drop(host, keeps)
		return 0, nil
	}
	if !keeps {
		im.forget(old)
	}
	return n, nil
}

// moves reports whether all of the old cluster is carried over when it gets a
// new host cluster. Subclusters of nothing but zeroes or holes stay what they are.
func (im *Image) moves(old entry) bool {
	return !im.g.Extended || old.word&layout.CompressedL2 != 0 || uint32(old.bitmap) != 0
}

// sameState tells whether what stands at from in a cluster that has a host
// cluster is data, and how far, at most n bytes, that is equally so.
func (im *Image) sameState(e entry, from, n int64) (allocated bool, length int64) {
	if !im.g.Extended {
		return e.word&layout.ZeroFlag == 0, n
	}
	bits := im.g.SubclusterBits()
	sub := from >> bits
	allocated = e.bitmap>>sub&1 != 0
	for sub++; sub<<bits < from+n && (e.bitmap>>sub&1 != 0) == allocated; sub++ {
	}
	return allocated, min(n, sub<<bits-from)
}

// subclusterMask has a bit for each subcluster of a range.
func subclusterMask(g layout.Geometry, from, to int64) uint32 {
	bits := g.SubclusterBits()
	return uint32(uint64(1)<<(to>>bits) - uint64(1)<<(from>>bits))
}

// place says what the entry will be when a range of the cluster has been
// written, taking a host cluster if it has none that may be written.
func (im *Image) place(old entry, cluster, from, to int64) (entry, error) {
	fresh := old
	switch {
	case im.g.External:
		fresh.word = uint64(cluster) | layout.Copied
	case old.word&layout.CompressedL2 != 0 || old.word&layout.Copied == 0 || layout.EntryOffset(old.word) == 0:
		r, err := im.alloc.reserve(1)
		if err != nil {
			return fresh, err
		}
		fresh.word = uint64(r.first)<<im.g.ClusterBits | layout.Copied
	}
	fresh.word &^= layout.ZeroFlag
	if im.g.Extended {
		m := uint64(subclusterMask(im.g, from, to))
		if old.word&layout.CompressedL2 != 0 {
			fresh.bitmap = 0
		}
		fresh.bitmap = fresh.bitmap&^(m<<32) | m
	}
	return fresh, nil
}

// fill composes what is to be written from base on: the guest's bytes where it
// wrote, and around them what was there.
func (im *Image) fill(b, content []byte, base, guest int64) error {
	head := guest - base
	if err := im.readOld(b[:head], base); err != nil {
		return err
	}
	n := int64(copy(b[head:], content))
	return im.readOld(b[head+n:], guest+n)
}

// readOld reads the image as a guest would. Beyond its end there are zeroes.
func (im *Image) readOld(b []byte, off int64) error {
	n := max(min(int64(len(b)), im.size-off), 0)
	clear(b[n:])
	if n == 0 {
		return nil
	}
	return im.waiter.readAt(im, b[:n], off)
}

// drop gives up a host cluster that was taken for a write that came to nothing.
func (im *Image) drop(host int64, kept bool) {
	if !kept && !im.g.External {
		im.alloc.forget(host >> im.g.ClusterBits)
	}
}

// replace changes an entry from old to fresh, unless it has changed.
func (im *Image) replace(s *slice, i int, old, fresh entry) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.gone || im.entry(s, i) != old {
		return false
	}
	im.store(s, i, fresh)
	return true
}

// store sets an entry. The caller holds s.mu. Readers see either state of an
// extended entry: the bitmap is empty while the offset changes.
func (im *Image) store(s *slice, i int, e entry) {
	if im.g.Extended {
		if s.words[i].Load() != e.word {
			s.words[i+1].Store(0)
			s.words[i].Store(e.word)
		}
		s.words[i+1].Store(e.bitmap)
	} else {
		s.words[i].Store(e.word)
	}
	im.cache.markDirty(s)
	im.commits.soon()
}

// forget drops the references that an entry which is no more had to host
// clusters.
func (im *Image) forget(old entry) {
	if im.g.External {
		return
	}
	off, n := layout.EntryOffset(old.word), int64(1)
	if old.word&layout.CompressedL2 != 0 {
		off, n = im.g.CompressedRange(old.word)
	}
	for c := off >> im.g.ClusterBits; off != 0 && c <= (off+n-1)>>im.g.ClusterBits; c++ {
		if im.metadata.at(c).kind != nothing {
			// A wrong refcount has let a table take the place of data.
			_ = im.corrupted(fmt.Errorf("%w: L2 entry is %#x, where metadata is", layout.ErrInvalid, old.word))
			continue
		}
		im.alloc.forget(c)
	}
}
