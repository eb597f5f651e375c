package raw

import (
	"sync"

	"golang.org/x/sys/unix"

	"platter/aio"
	"platter/formats"
)

// guard watches the first bytes of an image whose format was probed. Before a
// write to them it works out what they will be, and refuses the write with
// EPERM if a probe would then find something else than raw.
//
// Writes may cover the watched bytes in part, overlap, fail and complete in any
// order, on many loops. So that none of this can add up to a header that no
// single write had, they take turns: one is under way, the others wait, each to
// be continued on its own loop. The turn reads the watched bytes from the
// storage if its write does not cover them all, and so needs to remember
// nothing. A guest seldom writes its first sector, so turns cost nothing worth
// counting.
type guard struct {
	storage aio.Storage
	size    int64 // bytes watched, from 0 on

	mu      sync.Mutex
	busy    bool
	waiting []turn

	// What follows belongs to the turn under way.
	turn     turn
	done     func(*aio.Request) // the request's own Done
	from     int64              // the request's own Offset and Length
	length   int64
	head     *aio.Memory
	read     aio.Request
	batch    [1]*aio.Request
	finished func(*aio.Request) // g.finish, bound once
}

type turn struct {
	loop *aio.Loop
	r    *aio.Request
}

func newGuard(storage aio.Storage) (*guard, error) {
	head, err := aio.NewMemory(formats.ProbeSize)
	if err != nil {
		return nil, err
	}
	g := &guard{storage: storage, head: head, size: min(formats.ProbeSize, storage.Size())}
	g.finished = g.finish
	g.read = aio.Request{Op: aio.OpRead, Length: g.size, Vec: []aio.Iovec{head.Iovec(0, int(g.size))}, Done: g.look}
	return g, nil
}

func (g *guard) close() error { return g.head.Close() }

// submit starts a write, write-zeroes or discard that begins in the watched
// bytes, now or when its turn comes.
func (g *guard) submit(l *aio.Loop, r *aio.Request) {
	g.mu.Lock()
	if g.busy {
		g.waiting = append(g.waiting, turn{l, r})
		g.mu.Unlock()
		return
	}
	g.busy = true
	g.mu.Unlock()
	g.start(turn{l, r})
}

// start begins a turn on its request's loop.
func (g *guard) start(t turn) {
	g.turn, g.done, g.from, g.length = t, t.r.Done, t.r.Offset, t.r.Length
	t.r.Done = g.finished
	switch {
	case t.r.Op == aio.OpDiscard:
		// What discarded bytes become is not known beforehand. A discard may
		// do nothing, and the watched bytes free no space anyhow.
		if t.r.End() <= g.size {
			t.r.Complete(0)
			return
		}
		t.r.Offset, t.r.Length = g.size, t.r.End()-g.size
		g.pass(t.r)
	case t.r.Offset == 0 && t.r.Length >= g.size:
		g.judge()
	default:
		g.pass(&g.read)
	}
}

// look continues when the watched bytes are read.
func (g *guard) look(read *aio.Request) {
	if read.Errno != 0 {
		g.turn.r.Complete(read.Errno)
		return
	}
	g.judge()
}

// judge changes the watched bytes as the request will and decides on it.
func (g *guard) judge() {
	r := g.turn.r
	head := g.head.Bytes()[:g.size]
	changed := head[r.Offset:min(r.End(), g.size)]
	if r.Op == aio.OpWrite {
		aio.CopyOut(changed, r.Vec)
	} else {
		clear(changed)
	}
	if formats.Probe(head) != formats.RawName {
		r.Complete(unix.EPERM)
		return
	}
	g.pass(r)
}

func (g *guard) pass(r *aio.Request) {
	g.batch[0] = r
	g.storage.Submit(g.turn.loop, g.batch[:])
}

// finish ends the turn, lets the next one begin, and completes the request.
func (g *guard) finish(r *aio.Request) {
	r.Done, r.Offset, r.Length = g.done, g.from, g.length
	g.turn, g.done = turn{}, nil
	g.mu.Lock()
	if len(g.waiting) == 0 {
		g.busy = false
		g.mu.Unlock()
	} else {
		next := g.waiting[0]
		g.waiting = append(g.waiting[:0], g.waiting[1:]...)
		g.mu.Unlock()
		next.loop.Post(func() { g.start(next) })
	}
	r.Done(r)
}
