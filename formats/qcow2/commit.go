package qcow2

import (
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"platter/formats/qcow2/layout"
)

// dirtyAge is how long changed metadata stays unwritten at most.
const dirtyAge = 5 * time.Second

// committer runs commits, one at a time. Whoever asks while one runs waits for
// the next, so that any number of flushes costs one commit.
type committer struct {
	im *Image

	mu      sync.Mutex
	running bool
	closed  bool // nothing starts by itself any more
	again   bool
	waiting []flushing
	timer   *time.Timer // a commit to come by itself

	// unwritten: there may be metadata that no commit has taken yet. It is set
	// after the metadata was changed and cleared before a commit takes it.
	unwritten atomic.Bool
}

// flushing is who waits for a commit.
type flushing struct {
	ln *lane
	o  *op
}

// request has a commit run that begins after now, and o completed after it.
func (c *committer) request(ln *lane, o *op) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.waiting = append(c.waiting, flushing{ln, o})
	c.start()
}

// kick has a commit run that nobody waits for.
func (c *committer) kick() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.again = true
	c.start()
}

// start begins to commit unless it is under way. The caller holds mu.
func (c *committer) start() {
	if c.running || c.closed {
		return
	}
	c.running = true
	c.im.background.Add(1)
	go c.run()
}

// soon has a commit run within dirtyAge.
func (c *committer) soon() {
	if c.unwritten.Load() || c.unwritten.Swap(true) {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.timer == nil {
		c.timer = time.AfterFunc(dirtyAge, func() {
			c.mu.Lock()
			c.timer = nil
			c.again = true
			c.start()
			c.mu.Unlock()
		})
	}
}

// stop has no more commits start by themselves.
func (c *committer) stop() {
	c.mu.Lock()
	c.closed = true
	if c.timer != nil {
		c.timer.Stop()
	}
	c.mu.Unlock()
}

// done reports whether all metadata that was changed before is durable: no
// commit needs to take it, and none is about to write it.
func (c *committer) done() bool {
	if c.unwritten.Load() {
		return false
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return !c.running
}

func (c *committer) run() {
	defer c.im.background.Done()
	for {
		c.mu.Lock()
		waiting := c.waiting
		if len(waiting) == 0 && !c.again {
			c.running = false
			c.mu.Unlock()
			return
		}
		c.waiting, c.again = nil, false
		if c.timer != nil && c.timer.Stop() {
			c.timer = nil
		}
		c.mu.Unlock()
		err := c.im.commit()
		for _, f := range waiting {
			f.end(err)
		}
	}
}

func (f flushing) end(err error) {
	f.ln.loop.Post(func() {
		if err != nil && f.o.errno == 0 {
			f.o.errno = errnoOf(err)
		}
		f.ln.complete(f.o)
		f.ln.submit()
	})
}

// flush makes what was completed before durable.
func (ln *lane) flush(o *op) {
	im := ln.im
	ln.leave(o) // a commit waits for those who are under way
	switch {
	case im.readOnly:
		ln.release(o)
	case im.data == im.file && im.commits.done():
		p := ln.part(o, 0, 0)
		ln.out = append(ln.out, &p.req)
		ln.release(o)
	default:
		im.commits.request(ln, o)
	}
}

// changed reports whether there is metadata to write.
func (im *Image) changed() bool {
	if im.cache.dirtyCount() > 0 {
		return true
	}
	im.metaMu.Lock()
	l1 := len(im.l1Dirty)
	im.metaMu.Unlock()
	return l1 > 0 || im.alloc.changed()
}

// batch is what one commit writes: metadata as it was when the commit began.
// What changes meanwhile is for the next one, since its data may not be durable.
type batch struct {
	slices  []*slice
	content [][]byte // of slices
	l1      map[int]uint64
	frees   []int64 // clusters that lost a reference
	refs    refBatch
	lazy    bool // refcounts wait until the image is closed
}

func (b *batch) empty() bool {
	return len(b.slices) == 0 && len(b.l1) == 0 && len(b.frees) == 0 && b.refs.empty()
}

// collect takes a batch. References that are dropped come first and refcounts
// last: so the slices lack every dropped reference, and the refcounts cover all
// that slices and L1 entries refer to.
func (im *Image) collect() (*batch, error) {
	im.commits.unwritten.Store(false)
	b := &batch{frees: im.alloc.takePending()}
	b.slices = im.cache.takeDirty()
	for _, s := range b.slices {
		s.mu.Lock()
		b.content = append(b.content, s.encode(nil))
		s.dirty, s.writing = false, true
		s.mu.Unlock()
	}
	im.metaMu.Lock()
	if len(im.l1Dirty) > 0 {
		b.l1 = make(map[int]uint64, len(im.l1Dirty))
		for i := range im.l1Dirty {
			b.l1[i] = im.l1[i].word.Load()
		}
		clear(im.l1Dirty)
	}
	im.metaMu.Unlock()
	var err error
	b.lazy = im.lazy.Load()
	if b.lazy {
		im.alloc.collectFree()
		return b, nil
	}
	b.refs, err = im.alloc.collect()
	return b, err
}

// commit writes the metadata that has changed, so that at every moment what is
// on the disk is whole. When it returns, all that was completed before it began
// is durable.
func (im *Image) commit() error {
	b, err := im.collect()
	if err == nil && b.empty() {
		return im.sync()
	}
	if err == nil {
		err = im.write(b)
	}
	if err != nil {
		im.putBack(b)
		return err
	}
	for _, r := range b.refs.old { // of a refcount table that moved
		for c := r.first; c < r.first+r.count; c++ {
			b.frees = append(b.frees, c)
		}
	}
	for _, s := range b.slices {
		s.mu.Lock()
		s.writing = false
		s.mu.Unlock()
	}
	im.alloc.settle(b.refs)
	if len(b.frees) > 0 {
		im.grace()
		if err := im.alloc.release(b.frees); err != nil {
			// They stay allocated until a later commit can punch them.
			slog.Debug("clusters can't be freed yet", "image", im.path, "error", err)
		}
		im.commits.soon()
	}
	return nil
}

// sync makes data and metadata that were written durable.
func (im *Image) sync() error {
	if im.data != im.file {
		if err := im.waiter.flush(im.data); err != nil {
			return err
		}
	}
	return im.waiter.flush(im.file)
}

func (im *Image) write(b *batch) error {
	// 1. Refcounts, with the guest's data. If they are left behind, the image
	// must say so before anything refers to a new cluster.
	if b.lazy {
		if err := im.setFeature(layout.Dirty, true); err != nil {
			return err
		}
	} else if err := im.writeRefcounts(b.refs); err != nil {
		return err
	}
	if err := im.sync(); err != nil {
		return err
	}
	// 2. L2 tables, which point to data.
	for i, s := range b.slices {
		if err := im.waiter.writeAt(im.file, b.content[i], im.l1[s.table].offset()+s.off); err != nil {
			return fmt.Errorf("write L2 table: %w", err)
		}
	}
	if len(b.slices) > 0 {
		if err := im.waiter.flush(im.file); err != nil {
			return err
		}
	}
	// 3. L1 entries, which point to L2 tables.
	if len(b.l1) == 0 {
		return nil
	}
	if err := im.writeL1(b.l1); err != nil {
		return err
	}
	return im.waiter.flush(im.file)
}

// writeL1 writes the sectors of the L1 table that hold the given entries. Others
// in the same sector are written as they are on the disk: they may point to
// tables that aren't durable yet.
func (im *Image) writeL1(entries map[int]uint64) error {
	const perSector = 512 / 8
	im.metaMu.Lock()
	next := slices.Clone(im.l1Durable)
	at := im.header.L1Offset
	im.metaMu.Unlock()
	for i, word := range entries {
		next[i] = word
	}
	indices := slices.Sorted(maps.Keys(entries))
	for len(indices) > 0 {
		first := indices[0] / perSector * perSector
		last := min(first+perSector, len(next))
		b := make([]byte, 0, 512)
		for _, word := range next[first:last] {
			b = binary.BigEndian.AppendUint64(b, word)
		}
		if err := im.waiter.writeAt(im.file, b, at+int64(first)*8); err != nil {
			return fmt.Errorf("write L1 table: %w", err)
		}
		for len(indices) > 0 && indices[0] < last {
			indices = indices[1:]
		}
	}
	im.metaMu.Lock()
	im.l1Durable = next
	im.metaMu.Unlock()
	return nil
}

// putBack makes everything of a batch dirty again after a commit failed.
func (im *Image) putBack(b *batch) {
	for _, s := range b.slices {
		s.mu.Lock()
		s.writing = false
		im.cache.markDirty(s)
		s.mu.Unlock()
	}
	im.metaMu.Lock()
	for i := range b.l1 {
		im.l1Dirty[i] = struct{}{}
	}
	im.metaMu.Unlock()
	im.alloc.putBack(b.refs, b.frees)
	im.commits.soon()
}

// errnoOf is the errno that a guest gets for an error.
func errnoOf(err error) unix.Errno {
	if err == nil {
		return 0
	}
	var errno unix.Errno
	if errors.As(err, &errno) {
		return errno
	}
	return unix.EIO
}
