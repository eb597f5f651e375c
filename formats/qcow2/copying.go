package qcow2

import (
	"slices"

	"golang.org/x/sys/unix"

	"platter/aio"
	"platter/formats/qcow2/layout"
)

// copying is copy on write by a loop: a cluster over bytes of the backing file,
// or subclusters of one, over bytes or zeroes. What the guest doesn't write is
// read, and then all of it written at once. Until then further writes of the
// loop may join; if they cover everything, nothing is read.
//
// Its fields belong to the lane's thread.
type copying struct {
	lane     *lane
	alloc    *allocation
	old      entry   // which the new one replaces
	kind     kind    // of what is replaced: hole or zero
	taken    bool    // the host cluster is new
	from, to int64   // what will be written, in whole (sub)clusters of the file
	members  []*part // what the guest writes of it, by offset, without overlap
	segments int     // of them all
	begun    bool    // being read: it can't grow any more
	sealed   bool    // being written: nobody may join any more
	block    *aio.Block
	at       int // the place of from in block
	read     aio.Request
	readVec  [1]aio.Iovec
	write    aio.Request
	vec      []aio.Iovec
	next     *copying
}

// copySegments bounds the pieces of memory that a copied cluster is written from.
const copySegments = 256

// plugTurns is for how many turns of its loop, none of which waits, a cluster that
// the guest has written in part stays open for what comes next: a few microseconds.
const plugTurns = 16

// copyMemory is where a lane's clusters are copied: several to a block.
type copyMemory struct {
	block *aio.Block
	used  int
}

// copy makes an allocation one that is copied, in place of what is of kind k in
// the entry old. The caller holds the shard's lock.
func (ln *lane) copy(a *allocation, old entry, k kind, taken bool) {
	c := ln.copiers
	if c == nil {
		c = &copying{lane: ln}
		c.read.Op, c.read.Done = aio.OpRead, c.readDone
		c.write.Op, c.write.Done = aio.OpWrite, c.writeDone
	} else {
		ln.copiers = c.next
	}
	c.alloc, c.old, c.kind, c.taken = a, old, k, taken
	c.from, c.to, c.segments, c.begun, c.sealed = 0, 0, 0, false, false
	a.exclusive, a.copying = true, c
	ln.copies = append(ln.copies, c)
}

// admits reports whether a write of a lane to n bytes of the host cluster may
// join. Any lane may ask, holding the shard's lock; but what it asks of another
// it doesn't look at.
func (c *copying) admits(ln *lane, host, n int64) bool {
	if c.lane != ln || c.sealed || ln.im.noMerge || c.segments >= copySegments/2 {
		return false
	}
	from, to := ln.im.widened(host, n)
	if (from < c.from || to > c.to) && (c.begun || !c.uniform(min(from, c.from), max(to, c.to))) {
		return false
	}
	for _, p := range c.members {
		if host < p.req.End() && p.req.Offset < host+n {
			return false
		}
	}
	return true
}

// widened is a range in whole subclusters, or clusters where there are none.
func (im *Image) widened(host, n int64) (from, to int64) {
	unit := int64(1) << im.g.SubclusterBits()
	return host &^ (unit - 1), (host + n + unit - 1) &^ (unit - 1)
}

// uniform reports whether all of a range is of the kind that is replaced.
func (c *copying) uniform(from, to int64) bool {
	im := c.lane.im
	if !im.g.Extended {
		return true
	}
	bits := im.g.SubclusterBits()
	for sub := (from - c.alloc.host) >> bits; sub < (to-c.alloc.host)>>bits; sub++ {
		if subclusterKind(c.old.bitmap, uint(sub)) != c.kind {
			return false
		}
	}
	return true
}

// join adds a write that was admitted, or is the first.
func (c *copying) join(p *part) {
	from, to := c.lane.im.widened(p.req.Offset, p.req.Length)
	if len(c.members) > 0 {
		from, to = min(from, c.from), max(to, c.to)
	}
	c.from, c.to = from, to
	c.segments += len(p.req.Vec)
	i := len(c.members)
	for i > 0 && c.members[i-1].req.Offset > p.req.Offset {
		i--
	}
	c.members = slices.Insert(c.members, i, p)
}

// beginCopies begins with the clusters that a batch brought. Those for which the
// backing file would have to be read wait until the loop has looked for what is
// there already, without waiting itself: of writes in order, the next batch often
// begins within the cluster in which this one ends. A request that is alone never
// waits.
func (ln *lane) beginCopies() {
	ln.plugged = slices.DeleteFunc(ln.plugged, func(c *copying) bool {
		if !c.covered() {
			return false
		}
		c.begin()
		return true
	})
	idle := len(ln.plugged) == 0
	few := ln.epochs[0].Load()+ln.epochs[1].Load() == 1
	for i := 0; i < len(ln.copies); i++ { // there may come more meanwhile
		c := ln.copies[i]
		alone := few && c.members[0].op.r.Flags&aio.FlagJoined == 0
		if alone || c.kind == zero || c.covered() {
			c.begin()
		} else {
			ln.plugged = append(ln.plugged, c)
		}
	}
	clear(ln.copies)
	ln.copies = ln.copies[:0]
	if idle && len(ln.plugged) > 0 { // who comes later waits the shorter
		ln.plug.rest = plugTurns
		ln.loop.Defer(&ln.plug.task)
	}
}

// unplug is called at the end of a turn of the loop, and in the last of plugTurns
// begins with what still waits.
func (ln *lane) unplug() {
	if ln.plug.rest--; ln.plug.rest > 0 && len(ln.plugged) > 0 {
		ln.loop.Defer(&ln.plug.task)
		return
	}
	for _, c := range ln.plugged {
		c.begin()
	}
	clear(ln.plugged)
	ln.plugged = ln.plugged[:0]
	ln.submit()
}

// covered reports whether the guest writes everything.
func (c *copying) covered() bool {
	from, to := c.missing()
	return from == to
}

// begin reads what the guest doesn't write.
func (c *copying) begin() {
	c.begun = true
	c.split()
	ln, a := c.lane, c.alloc
	from, to := c.missing()
	// Beyond the backing file, and the disk, there are zeroes.
	shown := min(to, a.host+min(ln.im.backingSize, ln.im.size)-a.cluster)
	if c.kind == zero || shown <= from {
		c.compose() // all of it is zeroes
		return
	}
	if !c.memory() {
		c.end(unix.ENOMEM)
		return
	}
	within := func(off int64) int { return c.at + int(off-c.from) }
	clear(c.block.Bytes()[within(shown):within(to)])
	c.readVec[0] = c.block.Iovec(within(from), int(shown-from))
	c.read.Offset, c.read.Length, c.read.Vec = a.cluster+from-a.host, shown-from, c.readVec[:]
	ln.outBelow = append(ln.outBelow, &c.read)
}

// split leaves to goroutines what is far from the first members: between those
// that are written as one, whole subclusters are filled up.
func (c *copying) split() {
	ln, end := c.lane, c.from
	for i, p := range c.members {
		from, to := ln.im.widened(p.req.Offset, p.req.Length)
		if from-end <= max(ln.im.mergeGap, 0) {
			end = max(end, to)
			continue
		}
		rest := c.members[i:]
		for _, p := range rest {
			ln.writeApart(p, c.alloc.cluster+p.req.Offset-c.alloc.host)
		}
		clear(rest)
		c.members, c.to = c.members[:i], end
		return
	}
}

// missing is a range outside of which the guest writes everything.
func (c *copying) missing() (from, to int64) {
	from, to = c.from, c.to
	for _, p := range c.members {
		if p.req.Offset == from {
			from = p.req.End()
		}
	}
	for i := len(c.members) - 1; i >= 0 && from < to; i-- {
		if p := c.members[i]; p.req.End() == to {
			to = p.req.Offset
		}
	}
	return from, to
}

// memory finds room for what is written.
func (c *copying) memory() bool {
	m, size := &c.lane.memory, int(c.to-c.from)
	if m.used+size > aio.BlockSize {
		m.drop()
	}
	if m.block == nil {
		if m.block, m.used = c.lane.loop.Arena().Get(), 0; m.block == nil {
			return false
		}
	}
	m.block.Hold()
	c.block, c.at = m.block, m.used
	m.used += size
	return true
}

// drop gives the block up; those who use it keep it.
func (m *copyMemory) drop() {
	if m.block != nil {
		m.block.Release()
		m.block = nil
	}
}

func (c *copying) readDone(r *aio.Request) {
	if r.Errno != 0 {
		c.end(r.Errno)
	} else {
		c.compose()
	}
	c.lane.submit()
}

// compose writes what the guest writes, and what belongs around it.
func (c *copying) compose() {
	c.sealed = true
	end, zeroes := c.from, int64(0)
	c.vec = c.vec[:0]
	fill := func(to int64) {
		switch {
		case to <= end:
		case c.block != nil:
			c.vec = append(c.vec, c.block.Iovec(c.at+int(end-c.from), int(to-end)))
		default:
			c.vec = append(c.vec, aio.Zeroes(to-end))
			zeroes += to - end
		}
	}
	for _, p := range c.members {
		fill(p.req.Offset)
		c.vec = append(c.vec, p.req.Vec...)
		end = p.req.End()
	}
	fill(c.to)
	c.write.Offset, c.write.Length, c.write.Vec = c.from, c.to-c.from, c.vec
	c.lane.joined.Add(int64(len(c.members) - 1))
	c.lane.filled(zeroes)
	c.lane.out = append(c.lane.out, &c.write)
}

func (c *copying) writeDone(r *aio.Request) {
	c.end(r.Errno)
	c.lane.submit()
}

// end maps the cluster and ends the members. When something failed nothing is
// known of any one of them, and when the mapping has changed meanwhile what was
// read is out of date: then each is written by itself, by a goroutine.
func (c *copying) end(errno unix.Errno) {
	ln, a := c.lane, c.alloc
	again := errno != 0 && (len(c.members) > 1 || errno == unix.ENOMEM)
	if errno == 0 && !c.remap() {
		again = true
	}
	if c.taken && (errno != 0 || again) {
		ln.im.alloc.forget(a.host >> ln.im.g.ClusterBits)
		ln.im.commits.soon()
	}
	guest, host := a.cluster, a.host
	sh := ln.im.inflight.shard(a.cluster, ln.im.g.ClusterBits)
	sh.mu.Lock()
	a.slice.unpin()
	wake := sh.remove(a)
	sh.recycle(a)
	sh.mu.Unlock()
	if c.block != nil {
		c.block.Release()
		c.block = nil
	}
	members := c.members
	for _, p := range members {
		if again {
			ln.writeApart(p, guest+p.req.Offset-host)
		} else {
			ln.ended(p, errno)
		}
	}
	clear(members)
	c.members = members[:0]
	c.alloc, c.read.Vec, c.write.Vec = nil, nil, nil
	c.next, ln.copiers = ln.copiers, c
	for _, f := range wake {
		f()
	}
}

// remap maps what was written, unless the entry has changed: the cluster may have
// been made to read as zeroes meanwhile.
func (c *copying) remap() bool {
	im, a := c.lane.im, c.alloc
	fresh := entry{word: uint64(a.host) | layout.Copied}
	if im.g.Extended {
		m := uint64(subclusterMask(im.g, c.from-a.host, c.to-a.host))
		fresh.bitmap = c.old.bitmap&^(m<<32) | m
	}
	return im.replace(a.slice, a.index, c.old, fresh)
}
