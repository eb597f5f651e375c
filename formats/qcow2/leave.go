package qcow2

import (
	"log/slog"
	"maps"

	"platter/aio"
	"platter/formats"
)

var _ formats.Leaver = (*Image)(nil)

// Leave gives up the lane of a loop, here and in the backing files: clusters that
// it reserved are free again. A lane with requests under way stays: they are
// somebody else's, who will leave too.
func (im *Image) Leave(l *aio.Loop) {
	if below, ok := im.backing.(formats.Leaver); ok {
		below.Leave(l)
	}
	ln := im.removeLane(l)
	if ln == nil {
		return
	}
	ln.memory.drop()
	left := ln.closeReserve()
	if left[0].count+left[1].count+left[2].count == 0 {
		return
	}
	im.background.Add(1)
	go func() {
		defer im.background.Done()
		for _, r := range left {
			im.giveBack(r)
		}
	}()
}

// removeLane takes an idle lane out of the table. A request that waits for a
// commit only may still be in it; it uses no mapping, so that a grace needn't see
// its lane.
func (im *Image) removeLane(l *aio.Loop) *lane {
	im.laneMu.Lock()
	defer im.laneMu.Unlock()
	old := im.lanes.Load()
	if old == nil {
		return nil
	}
	ln := (*old)[l]
	if ln == nil || ln.epochs[0].Load()+ln.epochs[1].Load() > 0 {
		return nil
	}
	im.past.add(&ln.counts)
	lanes := maps.Clone(*old)
	delete(lanes, l)
	im.lanes.Store(&lanes)
	return ln
}

// closeReserve takes over what a lane has reserved. What is on its way will be
// given back when it arrives.
func (ln *lane) closeReserve() (left [3]run) {
	ln.inbox.Lock()
	defer ln.inbox.Unlock()
	left = [3]run{ln.reserved, ln.next, ln.arrived}
	ln.reserved, ln.next, ln.arrived = run{}, run{}, run{}
	ln.closed = true
	return left
}

// giveBack frees clusters that a lane reserved and will not use. When it fails
// they stay allocated, which a check finds.
func (im *Image) giveBack(r run) {
	if err := im.alloc.giveBack(r); err != nil {
		slog.Warn("reserved clusters can't be freed: platter check --repair leaks will do it", "image", im.path, "clusters", r.count, "error", err)
		return
	}
	im.commits.soon()
}
