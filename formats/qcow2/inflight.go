package qcow2

import (
	"sync"

	"platter/formats/qcow2/layout"
)

// inflight holds the guest clusters that are being allocated, so that all
// writes to one go to the same host cluster.
type inflight struct {
	shards [64]inflightShard
}

type inflightShard struct {
	mu   sync.Mutex
	m    map[int64]*allocation
	free *allocation
	_    [32]byte // a cache line of its own
}

// allocation is a guest cluster with a host cluster that it isn't mapped to
// yet. The shard's lock guards it.
//
// Loops may write to the host cluster, any number at a time: it reads as zeroes,
// as the guest's did, so that nothing needs to be filled in, and it is mapped
// when the first of them is done. Or it is exclusive, and others wait: because a
// loop writes more than the guest's own bytes, zeroes between them (see joint)
// or what the backing file holds around them (see copying), or because a
// goroutine does anything else with the cluster.
type allocation struct {
	cluster   int64 // guest offset
	host      int64
	slice     *slice // pinned
	index     int
	pending   int // writes under way
	mapped    bool
	exclusive bool
	copying   *copying // that the writes of one loop may join
	waiting   []func()
	next      *allocation
}

func (t *inflight) shard(cluster int64, bits uint) *inflightShard {
	return &t.shards[cluster>>bits%int64(len(t.shards))]
}

// get finds the allocation of a cluster, nil if there is none. The caller holds
// the lock.
func (sh *inflightShard) get(cluster int64) *allocation { return sh.m[cluster] }

// add makes one. The caller holds the lock.
func (sh *inflightShard) add(cluster int64) *allocation {
	a := sh.free
	if a == nil {
		a = &allocation{}
	} else {
		sh.free = a.next
	}
	*a = allocation{cluster: cluster, waiting: a.waiting[:0]}
	if sh.m == nil {
		sh.m = make(map[int64]*allocation)
	}
	sh.m[cluster] = a
	return a
}

// remove takes an allocation out of the table and returns who waits for that.
// The caller holds the lock.
func (sh *inflightShard) remove(a *allocation) []func() {
	delete(sh.m, a.cluster)
	w := a.waiting
	a.waiting = nil
	return w
}

// recycle makes an allocation that nobody uses any more available again. The
// caller holds the lock.
func (sh *inflightShard) recycle(a *allocation) {
	a.slice = nil
	a.next, sh.free = sh.free, a
}

// written ends one write to a cluster that is being allocated.
func (im *Image) written(a *allocation, ok bool) {
	sh := im.inflight.shard(a.cluster, im.g.ClusterBits)
	var wake []func()
	sh.mu.Lock()
	a.pending--
	if ok && !a.mapped {
		im.mapNew(a)
		a.mapped = true
		wake = sh.remove(a)
	}
	if a.pending == 0 {
		if !a.mapped {
			wake = sh.remove(a)
			// What was written before it failed is nobody's to see.
			im.alloc.forget(a.host >> im.g.ClusterBits)
			im.commits.soon()
		}
		a.slice.unpin()
		sh.recycle(a)
	}
	sh.mu.Unlock()
	for _, f := range wake {
		f()
	}
}

// mapNew maps a cluster that a loop has written to. Meanwhile it may have been
// made to read as zeroes, which changes nothing, but not have been mapped
// otherwise: whoever maps goes through the table.
func (im *Image) mapNew(a *allocation) {
	s := a.slice
	s.mu.Lock()
	s.words[a.index].Store(uint64(a.host) | layout.Copied)
	im.cache.markDirty(s)
	s.mu.Unlock()
	im.commits.soon()
}

// enter takes a cluster for a goroutine of its own, waiting until nobody else
// allocates it.
func (im *Image) enter(cluster int64) *allocation {
	sh := im.inflight.shard(cluster, im.g.ClusterBits)
	for {
		sh.mu.Lock()
		a := sh.get(cluster)
		if a == nil {
			a = sh.add(cluster)
			a.exclusive = true
			sh.mu.Unlock()
			return a
		}
		done := make(chan struct{})
		a.waiting = append(a.waiting, func() { close(done) })
		sh.mu.Unlock()
		<-done
	}
}

// leave gives a cluster back that enter took.
func (im *Image) leave(a *allocation) {
	sh := im.inflight.shard(a.cluster, im.g.ClusterBits)
	sh.mu.Lock()
	wake := sh.remove(a)
	sh.recycle(a)
	sh.mu.Unlock()
	for _, f := range wake {
		f()
	}
}
