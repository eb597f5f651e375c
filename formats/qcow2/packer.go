package qcow2

import (
	"errors"
	"fmt"
	"sync"

	"golang.org/x/sys/unix"

	"platter/aio"
	"platter/formats/qcow2/codec"
)

// ErrNoCompression is returned for compressed writes to an image that can't hold
// them.
var ErrNoCompression = errors.New("image can't hold compressed clusters")

// WriteCompressed writes the cluster at guest offset off in compressed form, or
// plainly when that isn't smaller. p is the whole cluster, or what the image has
// of the last one. What was there is replaced; writes to the same cluster at the
// same time are in no order. It waits until it is done, and may be called by many
// goroutines at a time, but not on a loop. A flush makes it durable.
func (im *Image) WriteCompressed(p []byte, off int64) error {
	size := im.g.ClusterSize()
	switch {
	case im.readOnly:
		return unix.EPERM
	case im.broken.Load() != nil:
		return unix.EIO
	case im.g.External:
		return fmt.Errorf("%w: it has an external data file", ErrNoCompression)
	case off < 0 || off&(size-1) != 0 || int64(len(p)) != min(size, im.size-off):
		return fmt.Errorf("write %d compressed bytes at %d: not a whole cluster: %w", len(p), off, unix.EINVAL)
	}
	im.writers <- struct{}{}
	defer func() { <-im.writers }()
	var bufs [2]*aio.Memory
	for i := range bufs {
		m, err := im.waiter.memory()
		if err != nil {
			return err
		}
		defer im.waiter.give(m)
		bufs[i] = m
	}
	plain, packed := bufs[0].Bytes()[:size], bufs[1]
	clear(plain[copy(plain, p):])
	n, ok, err := codec.Pack(im.header.CompressionType, packed.Bytes()[:size-1], plain)
	if err != nil {
		return fmt.Errorf("compress cluster: %w", err)
	}
	if !ok {
		return im.writeCluster([]aio.Iovec{bufs[0].Iovec(0, len(p))}, off, int64(len(p)))
	}
	return im.storePacked(off, packed, int64(n))
}

// storePacked writes compressed data and maps it.
func (im *Image) storePacked(guest int64, packed *aio.Memory, n int64) error {
	a := im.enter(guest)
	defer im.leave(a)
	s, i, err := im.ownSlice(guest)
	if err != nil {
		return err
	}
	defer s.unpin()
	at, err := im.packer.take(im, n)
	if err != nil {
		return err
	}
	word, ok := im.g.CompressedEntry(at, n)
	if !ok {
		return fmt.Errorf("compressed data at %#x is beyond what an L2 entry can name: %w", at, unix.ENOSPC)
	}
	fresh := entry{word: word}
	err = im.waiter.do(im.file, aio.Request{Op: aio.OpWrite, Offset: at, Length: n, Vec: []aio.Iovec{packed.Iovec(0, int(n))}})
	if err != nil {
		im.forget(fresh)
		im.commits.soon()
		return fmt.Errorf("write %d compressed bytes at %#x: %w", n, at, err)
	}
	for {
		old := im.entry(s, i)
		if old.word == poison {
			im.forget(fresh)
			return unix.EIO
		}
		if im.replace(s, i, old, fresh) {
			im.forget(old)
			return nil
		}
	}
}

// packer lays compressed clusters out one behind the other, so that several
// share a host cluster: each that touches it counts as a reference.
type packer struct {
	mu  sync.Mutex
	run run   // clusters reserved for compressed data
	at  int64 // offset in the file where the next one goes
}

// take finds a place for n bytes, and counts a reference to each cluster that
// they touch. Reserved clusters have one, which is the packer's own until it is
// through with them, lest they be freed and used by others meanwhile; what is
// written last takes it over.
func (k *packer) take(im *Image, n int64) (int64, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	size := im.g.ClusterSize()
	if k.at+n > (k.run.first+k.run.count)<<im.g.ClusterBits {
		if err := k.refill(im); err != nil {
			return 0, err
		}
	}
	at, next := k.at, k.at+n
	if next&(size-1) != 0 {
		err := im.alloc.share(next >> im.g.ClusterBits)
		if err != nil && !errors.Is(err, unix.ENOSPC) {
			return 0, err
		}
		if err != nil {
			next = (next + size - 1) &^ (size - 1) // as many share it as can
		}
	}
	k.at = next
	return at, nil
}

// refill begins a new run, in the place of one that is nearly used up.
func (k *packer) refill(im *Image) error {
	if err := k.giveBack(im); err != nil {
		return err
	}
	r, err := im.alloc.contiguous(max(2, min(lastChunk, int64(4<<20)>>im.g.ClusterBits)))
	if err != nil {
		return err
	}
	k.run, k.at = r, r.first<<im.g.ClusterBits
	return nil
}

// giveBack gives back the clusters of the run that nothing was written to, and
// the packer's own reference to the one that it was about to go on with.
func (k *packer) giveBack(im *Image) error {
	size := im.g.ClusterSize()
	if k.at&(size-1) != 0 {
		im.alloc.forget(k.at >> im.g.ClusterBits)
		im.commits.soon()
	}
	next := (k.at + size - 1) >> im.g.ClusterBits
	left := run{next, k.run.first + k.run.count - next}
	k.run, k.at = run{}, 0
	return im.alloc.giveBack(left)
}
