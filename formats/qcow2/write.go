package qcow2

import (
	"golang.org/x/sys/unix"

	"platter/aio"
)

// write splits a write and reports whether it will be continued.
func (ln *lane) write(o *op) (more bool) {
	im := ln.im
	end := o.r.End()
	for ; o.at < end; ln.lookups.Add(1) {
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
		case !im.writesPlainly(o.at, m):
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

// writesPlainly reports whether a cluster that must be allocated now reads as
// zeroes, so that a write to it needs nothing but the guest's bytes.
func (im *Image) writesPlainly(off int64, m mapping) bool {
	if im.g.External || im.g.Extended {
		return false
	}
	switch m.kind {
	case hole:
		return off>>im.g.ClusterBits<<im.g.ClusterBits >= im.backingSize
	case zero:
		return m.host>>im.g.ClusterBits == 0 // no host cluster is kept for it
	}
	return false
}

// allocate writes up to the end of the cluster, into a cluster of its own that
// will be mapped then. It reports false when the request has to wait.
func (ln *lane) allocate(o *op, m mapping) bool {
	im := ln.im
	cluster := o.at >> im.g.ClusterBits << im.g.ClusterBits
	sh := im.inflight.shard(cluster, im.g.ClusterBits)
	sh.mu.Lock()
	a := sh.get(cluster)
	switch {
	case a == nil:
		if m.slice.words[m.index].Load() != m.word {
			sh.mu.Unlock()
			return true // mapped meanwhile: look again
		}
		if ln.reserved.count == 0 && !ln.turnOver() {
			sh.mu.Unlock()
			ln.starved = append(ln.starved, o)
			ln.refill()
			return false
		}
		if !m.slice.pin() {
			sh.mu.Unlock()
			return true
		}
		a = sh.add(cluster)
		a.slice, a.index = m.slice, m.index
		a.host = ln.reserved.first << im.g.ClusterBits
		ln.reserved.first++
		ln.reserved.count--
		if ln.reserved.count <= ln.chunk/4 && ln.next.count == 0 { // half of what it was
			ln.refill()
		}
	case a.exclusive:
		a.waiting = append(a.waiting, func() { ln.resume(o, nil) })
		sh.mu.Unlock()
		return false
	}
	a.pending++
	host := a.host
	sh.mu.Unlock()
	n := min(m.length, cluster+im.g.ClusterSize()-o.at)
	p := ln.part(o, n, host+o.at-cluster)
	p.alloc = a
	p.req.Flags &^= aio.FlagFUA // the commit that it needs will see to that
	ln.out = append(ln.out, &p.req)
	return true
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
	im, guest := ln.im, o.at
	p := ln.part(o, n, 0)
	o.commit = true
	op := o.r.Op
	ln.apart(im.writers, p, func() unix.Errno {
		if op != aio.OpWrite {
			return errnoOf(im.writeCluster(nil, guest, n))
		}
		return errnoOf(im.writeCluster(p.req.Vec, guest, n))
	})
}
