package qcow2

import (
	"golang.org/x/sys/unix"

	"platter/aio"
	"platter/formats/qcow2/layout"
)

// write splits a write and reports whether it will be continued.
func (ln *lane) write(o *op) (more bool) {
	im := ln.im
	end := o.r.End()
	for ; o.at < end; ln.lookups.Add(1) {
		if host, copied, ok := im.plain(o.at, end); ok && copied {
			ln.out = append(ln.out, &ln.part(o, end-o.at, host).req)
			continue
		}
		m := im.lookup(o.at, end)
		switch {
		case m.kind == data && m.copied:
			for o.at+m.length < end {
				n := im.lookup(o.at+m.length, end)
				if n.kind != data || !n.copied || n.host != m.host+m.length {
					break
				}
				m.length += n.length
			}
			ln.out = append(ln.out, &ln.part(o, m.length, m.host).req)
		case m.kind == missing:
			ln.load(o)
			return true
		case m.kind == broken:
			o.fail(unix.EIO)
		case !im.allocates(o.at, m):
			ln.writeSlowly(o, min(m.length, im.clusterEnd(o.at)-o.at))
		case !im.l1[o.at>>im.tableShift].owned():
			index := int(o.at >> im.tableShift)
			ln.ownTable(o, index)
			return true
		case m.slice == nil:
			ln.load(o) // the table has just been made
			return true
		default:
			if !ln.allocate(o, m) {
				return true
			}
		}
	}
	return false
}

// clusterEnd is the guest offset at which the cluster of off ends.
func (im *Image) clusterEnd(off int64) int64 { return (off>>im.g.ClusterBits + 1) << im.g.ClusterBits }

// allocates reports whether a loop can write what isn't data yet by itself: a
// cluster without a host cluster, or subclusters of one that has no other owner.
func (im *Image) allocates(off int64, m mapping) bool {
	if im.g.External || m.kind != hole && m.kind != zero || im.copies(off, m) && im.g.ClusterSize() > aio.BlockSize {
		return false // there is no memory to copy so much
	}
	return layout.EntryOffset(m.word) == 0 || im.g.Extended && m.copied
}

// copies reports whether more than the guest's own bytes must be written.
func (im *Image) copies(off int64, m mapping) bool {
	return im.g.Extended || m.kind == hole && im.shows(off)
}

// shows reports whether the backing file has bytes for the cluster of off.
func (im *Image) shows(off int64) bool { return off&^(im.g.ClusterSize()-1) < im.backingSize }

// allocate writes up to the end of the cluster, into a cluster of its own that
// will be mapped then. It reports false when the request has to wait.
func (ln *lane) allocate(o *op, m mapping) bool {
	im := ln.im
	cluster := o.at &^ (im.g.ClusterSize() - 1)
	n := min(m.length, cluster+im.g.ClusterSize()-o.at)
	m.length = n
	sh := im.inflight.shard(cluster, im.g.ClusterBits)
	sh.mu.Lock()
	a := sh.get(cluster)
	switch {
	case a == nil:
		old := im.entry(m.slice, m.index)
		if im.lookup(o.at, o.at+n) != m {
			sh.mu.Unlock()
			return true // mapped meanwhile: look again
		}
		host := layout.EntryOffset(old.word)
		taken := host == 0
		if taken && ln.reserved.count == 0 && !ln.turnOver() {
			sh.mu.Unlock()
			ln.starved = append(ln.starved, o)
			ln.refill()
			return false
		}
		if !m.slice.pin() {
			sh.mu.Unlock()
			return true
		}
		if taken {
			host = ln.take()
		}
		a = sh.add(cluster)
		a.slice, a.index, a.host = m.slice, m.index, host
		if im.copies(cluster, m) {
			ln.copy(a, old, m.kind, taken)
		}
	case a.exclusive && (a.copying == nil || !a.copying.admits(ln, a.host+o.at-cluster, n)):
		a.waiting = append(a.waiting, func() { ln.resume(o, nil) })
		sh.mu.Unlock()
		return false
	}
	a.pending++
	copying := a.copying
	sh.mu.Unlock()
	p := ln.part(o, n, a.host+o.at-cluster)
	p.req.Flags &^= aio.FlagFUA // the commit that it needs will see to that
	o.commit = true
	if copying != nil {
		copying.join(p)
	} else {
		p.alloc = a
		ln.fresh = append(ln.fresh, p)
	}
	return true
}

// take uses a cluster that is reserved, and returns its offset.
func (ln *lane) take() int64 {
	host := ln.reserved.first << ln.im.g.ClusterBits
	ln.reserved.first++
	ln.reserved.count--
	if ln.reserved.count <= ln.chunk/4 && ln.next.count == 0 { // half of what it was
		ln.refill()
	}
	return host
}

// turnOver begins to use the next run of clusters.
func (ln *lane) turnOver() bool {
	ln.reserved, ln.next = ln.next, run{}
	return ln.reserved.count > 0
}

// refill has a run of clusters reserved.
func (ln *lane) refill() {
	if ln.refilling {
		return
	}
	ln.refilling = true
	n := min(ln.chunk, max(1, ln.im.longestChunk()))
	ln.chunk = min(2*n, max(1, ln.im.longestChunk()))
	ln.im.background.Add(1)
	go func() {
		defer ln.im.background.Done()
		r, err := ln.im.alloc.reserve(n)
		if err != nil {
			r = run{}
		}
		ln.inbox.Lock()
		closed := ln.closed
		if !closed {
			ln.arrived, ln.arrivedErr = r, err
		}
		ln.inbox.Unlock()
		if closed { // nobody is left on the loop
			ln.im.giveBack(r)
			return
		}
		ln.loop.Post(ln.refilled)
	}()
}

// longestChunk bounds what a loop reserves at a time, in clusters: what isn't
// used when the power goes is lost until a repair.
func (im *Image) longestChunk() int64 { return min(lastChunk, int64(64<<20)>>im.g.ClusterBits) }

// refilled takes the clusters that were reserved and goes on with the requests
// that wait for them.
func (ln *lane) refilled() {
	ln.inbox.Lock()
	if ln.closed {
		ln.inbox.Unlock()
		return // they have been given back
	}
	var err error
	ln.next, err = ln.arrived, ln.arrivedErr
	ln.arrived, ln.arrivedErr = run{}, nil
	ln.refilling = false
	if ln.reserved.count == 0 {
		ln.turnOver()
	}
	ln.inbox.Unlock()
	starved := ln.starved
	ln.starved = nil
	for _, o := range starved {
		if err != nil {
			o.fail(errnoOf(err))
		}
		ln.split(o)
	}
	ln.submit()
}

// ownTable has an L2 table made that may be changed, and the request continued.
func (ln *lane) ownTable(o *op, index int) {
	ln.im.background.Add(1)
	go func() {
		defer ln.im.background.Done()
		ln.resume(o, ln.im.ownTable(index))
	}()
}

// writeSlowly has the next n bytes, which lie in one cluster, written by a
// goroutine.
func (ln *lane) writeSlowly(o *op, n int64) {
	guest := o.at
	o.commit = true
	ln.writeApart(ln.part(o, n, 0), guest)
}

// writeApart has a part, which lies in one cluster, written by a goroutine.
func (ln *lane) writeApart(p *part, guest int64) {
	vec, n := p.req.Vec, p.req.Length
	if p.req.Op != aio.OpWrite {
		vec = nil // zeroes
	}
	ln.apart(ln.im.writers, p, func() unix.Errno { return errnoOf(ln.im.writeCluster(vec, guest, n)) })
}
