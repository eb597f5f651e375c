package qcow2

import (
	"errors"
	"fmt"
	"slices"
	"sync"

	"golang.org/x/sys/unix"

	"platter/formats/qcow2/layout"
)

// allocator hands out host clusters and keeps the refcounts.
//
// What it hands out reads as zeroes: it lies beyond everything that the file
// ever held (the frontier; virgin clusters), or has been punched. Refcounts
// change in memory at once and are written by the next commit; until then
// nothing on the disk refers to the cluster, so that a crash can only leak it.
// Lowering goes the other way round: see release.
//
// Its methods read and write metadata and wait for it: they are for goroutines,
// never for loops.
type allocator struct {
	im *Image

	mu        sync.Mutex
	refs      refcounts
	frontier  int64 // first cluster that was never used
	fileEnd   int64 // length of the file in bytes
	free      []run // punched, durably free
	dropped   []run // punched, with a refcount of 0 that isn't durable yet
	settling  []run // the same, in the hands of a commit
	scan      int64 // where looking for free clusters goes on
	scanned   bool  // there is nothing free but what free holds
	forgotten bool  // free overflowed: look again

	pendingMu   sync.Mutex // never held for long: loops take it
	pendingFree []int64    // lost a reference
}

// run is a number of neighbouring clusters.
type run struct{ first, count int64 }

// maxFreeRuns bounds the memory of the free list. What doesn't fit is found
// again by the scan.
const maxFreeRuns = 64 << 10

// errNoSpace: the file can't have more clusters.
var errNoSpace = fmt.Errorf("no space for more clusters: %w", unix.ENOSPC)

// reserve hands out at least 1 and at most n neighbouring clusters, with a
// refcount of 1 each.
func (a *allocator) reserve(n int64) (run, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if err := a.refs.pay(); err != nil {
		return run{}, err
	}
	if r, ok, err := a.reuse(n); ok || err != nil {
		return r, err
	}
	return a.grow(n)
}

// contiguous hands out exactly n neighbouring clusters at the frontier.
func (a *allocator) contiguous(n int64) (run, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if err := a.refs.pay(); err != nil {
		return run{}, err
	}
	return a.grow(n)
}

// reuse takes clusters that are free within the file.
func (a *allocator) reuse(n int64) (r run, ok bool, err error) {
	if len(a.free) == 0 {
		if err := a.find(n); err != nil {
			return r, false, err
		}
	}
	if len(a.free) == 0 {
		return r, false, nil
	}
	r = a.free[0]
	if r.count > n {
		r.count = n
		a.free[0].first += n
		a.free[0].count -= n
	} else {
		a.free = a.free[1:]
	}
	if err := a.refs.addRange(r, 1); err != nil {
		return r, false, err
	}
	return r, true, nil
}

// find looks for clusters with a refcount of 0 among those of the file and
// punches them, since nobody knows what they hold. It looks at one refcount
// block a call, so that nobody waits for long.
func (a *allocator) find(n int64) error {
	if a.scanned {
		if !a.forgotten {
			return nil
		}
		a.scan, a.scanned, a.forgotten = 0, false, false
	}
	per := int64(1) << a.refs.g.RefcountBlockBits()
	end := min((a.scan/per+1)*per, a.frontier)
	var found []run
	for a.scan < end && len(found) == 0 {
		r := run{first: a.scan}
		for a.scan < end && r.count < n {
			v, err := a.refs.get(a.scan)
			if err != nil {
				return err
			}
			if v == 0 && a.im.metadata.at(a.scan).kind != nothing {
				return a.im.corrupted(fmt.Errorf("%w: cluster %#x holds metadata but has a refcount of 0", layout.ErrInvalid, a.scan<<a.refs.g.ClusterBits))
			}
			if v != 0 || a.isDropped(a.scan) {
				if r.count > 0 {
					break
				}
				r.first = a.scan + 1
			} else {
				r.count++
			}
			a.scan++
		}
		if r.count > 0 {
			found = append(found, r)
		}
	}
	a.scanned = a.scan >= a.frontier
	if len(found) == 0 {
		return nil
	}
	for _, r := range found {
		if err := a.im.waiter.zero(a.im.file, r.first<<a.refs.g.ClusterBits, r.count<<a.refs.g.ClusterBits); err != nil {
			return err
		}
	}
	if err := a.im.waiter.flush(a.im.file); err != nil {
		return err
	}
	a.free = append(a.free, found...)
	return nil
}

// isDropped reports whether a cluster's new refcount of 0 isn't durable yet.
func (a *allocator) isDropped(cluster int64) bool {
	within := func(r run) bool { return cluster >= r.first && cluster-r.first < r.count }
	return slices.ContainsFunc(a.dropped, within) || slices.ContainsFunc(a.settling, within)
}

// grow reserves n clusters beyond the end of the file. Refcount blocks that
// they need come to stand behind them.
func (a *allocator) grow(n int64) (run, error) {
	r, err := a.take(n)
	if err != nil {
		return r, err
	}
	if err := a.refs.addRange(r, 1); err != nil {
		return r, err
	}
	return r, nil
}

// take moves the frontier beyond n clusters, whose refcounts are still 0. After a
// power cut there may be some beyond the end of the file that aren't: they were
// reserved before the file became longer. They stay leaked.
func (a *allocator) take(n int64) (run, error) {
	for c := a.frontier; c < a.frontier+n; c++ {
		v, err := a.refs.get(c)
		if err != nil {
			return run{}, err
		}
		if v != 0 {
			a.frontier = c + 1
		}
	}
	r := run{a.frontier, n}
	if n > a.im.hostLimit()>>a.refs.g.ClusterBits-a.frontier {
		return r, errNoSpace
	}
	if err := a.extend((a.frontier + n) << a.refs.g.ClusterBits); err != nil {
		return r, err
	}
	a.frontier += n
	return r, nil
}

// extend makes the file at least so long, so that all of its clusters can be
// read.
func (a *allocator) extend(end int64) error {
	if end <= a.fileEnd {
		return nil
	}
	if err := a.im.truncate(end); err != nil {
		return err
	}
	a.fileEnd = end
	a.im.fileEnd.Store(end)
	return nil
}

// share counts one more reference to a cluster.
func (a *allocator) share(cluster int64) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.refs.add(cluster, 1)
}

// giveBack takes back what was reserved and never mapped nor written to.
func (a *allocator) giveBack(r run) error {
	if r.count == 0 {
		return nil
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if err := a.refs.addRange(r, -1); err != nil {
		return err
	}
	a.addFree(r)
	return nil
}

// forget notes that a cluster has lost a reference. The reference is on the
// disk still, so that nothing happens to the cluster before the next commit has
// made the change of the mapping durable.
func (a *allocator) forget(cluster int64) {
	a.pendingMu.Lock()
	a.pendingFree = append(a.pendingFree, cluster)
	a.pendingMu.Unlock()
}

// takePending takes over the clusters that lost references before now.
func (a *allocator) takePending() []int64 {
	a.pendingMu.Lock()
	defer a.pendingMu.Unlock()
	list := a.pendingFree
	a.pendingFree = nil
	return list
}

// release drops references whose removal is durable. Clusters without any left
// are punched. They become free for use when the commit after this has made
// the drop durable. No request that found them mapped may be in flight. What
// fails is tried again by the next commit.
func (a *allocator) release(clusters []int64) error {
	slices.Sort(clusters)
	var errs []error
	for len(clusters) > 0 {
		r := run{clusters[0], 1}
		n := 1
		for n < len(clusters) && clusters[n] == r.first+r.count {
			n, r.count = n+1, r.count+1
		}
		clusters = clusters[n:]
		if err := a.releaseRun(&r); err != nil {
			errs = append(errs, err)
			for c := r.first; c < r.first+r.count; c++ {
				a.forget(c)
			}
		}
	}
	return errors.Join(errs...)
}

// releaseRun drops a reference of each cluster. When it fails, r is what is
// left.
func (a *allocator) releaseRun(r *run) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	for r.count > 0 {
		// A stretch that is freed as a whole is punched as a whole.
		free := run{first: r.first}
		for free.count < r.count {
			v, err := a.refs.get(r.first + free.count)
			if err != nil {
				return err
			}
			if v != 1 {
				break
			}
			free.count++
		}
		dropped := free
		if free.count > 0 {
			if err := a.im.waiter.zero(a.im.file, free.first<<a.refs.g.ClusterBits, free.count<<a.refs.g.ClusterBits); err != nil {
				return err
			}
		} else {
			dropped.count = 1 // others refer to it still
		}
		if err := a.refs.addRange(dropped, -1); err != nil {
			return err
		}
		if free.count > 0 {
			a.im.metadata.remove(free)
			a.dropped = append(a.dropped, free)
		}
		r.first, r.count = r.first+dropped.count, r.count-dropped.count
	}
	return nil
}

// settle makes those clusters free for use whose drop has become durable.
func (a *allocator) settle(b refBatch) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, x := range b.blocks {
		x.writing = false
	}
	for _, r := range a.settling {
		a.addFree(r)
	}
	a.settling = nil
}

// addFree makes a run free for use. At the end of the file, it becomes virgin
// again.
func (a *allocator) addFree(r run) {
	virgin := func(r run) bool {
		return r.first+r.count == a.frontier && r.first<<a.refs.g.ClusterBits >= a.im.virgin
	}
	switch n := len(a.free); {
	case virgin(r):
		a.frontier = r.first
		for i := slices.IndexFunc(a.free, virgin); i >= 0; i = slices.IndexFunc(a.free, virgin) {
			a.frontier = a.free[i].first
			a.free = slices.Delete(a.free, i, i+1)
		}
	case n > 0 && a.free[n-1].first+a.free[n-1].count == r.first:
		a.free[n-1].count += r.count
	case n < maxFreeRuns:
		a.free = append(a.free, r)
	default:
		a.forgotten = true
	}
}

// trim cuts off what is free at the end of the file when it is closed.
func (a *allocator) trim() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	end := a.frontier << a.refs.g.ClusterBits
	if end >= a.fileEnd {
		return nil
	}
	if err := a.im.truncate(end); err != nil {
		return err
	}
	a.fileEnd = end
	a.im.fileEnd.Store(end)
	return a.im.waiter.flush(a.im.file)
}
