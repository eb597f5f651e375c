package nbd

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"platter/aio"
	"platter/export"
	"platter/export/nbd/nbdtest"
	"platter/formats/formattest"
)

// newLoops starts loops, which end with the test.
func newLoops(t testing.TB, engine aio.Engine, n int) []*aio.Loop {
	t.Helper()
	loops := make([]*aio.Loop, n)
	for i := range loops {
		l, err := aio.NewLoop(aio.LoopOptions{Engine: engine, Poll: aio.DefaultPoll})
		must(t, err)
		t.Cleanup(func() { l.Close() })
		loops[i] = l
	}
	return loops
}

// placed fails the test unless every connection is on one of the loops; one that
// is ending may still be known for a moment.
func (r *rig) placed(loops []*aio.Loop) {
	r.t.Helper()
	eventually(r.t, "every connection is on one of the loops", func() bool {
		r.server.mu.Lock()
		defer r.server.mu.Unlock()
		for c := range r.server.conns {
			if !slices.Contains(loops, c.queue.Loop()) {
				return false
			}
		}
		return true
	})
}

// wander moves the export between the loops, and drains it now and then, until
// stop, and returns how often it has moved.
func (r *rig) wander(loops []*aio.Loop, image *watched, stop func() bool) (moves int) {
	r.t.Helper()
	for ; !stop(); moves++ {
		to := make([]*aio.Loop, 1+rand.IntN(4))
		for i := range to {
			to[i] = loops[rand.IntN(len(loops))]
		}
		if err := r.export.Move(to); err != nil {
			r.t.Error(err)
			return moves
		}
		r.placed(to)
		if rand.IntN(4) == 0 {
			must(r.t, r.export.Drain())
			image.beStill(true)
			time.Sleep(time.Millisecond)
			image.beStill(false)
			r.export.Resume()
		}
		time.Sleep(time.Duration(rand.IntN(2000)) * time.Microsecond)
	}
	return moves
}

// TestMove: an export moves between loops, some of which the server never heard
// of, and is drained, while clients keep it busy at several depths. Nothing is
// lost, answered twice or mixed up.
func TestMove(t *testing.T) {
	eachEngine(t, func(t *testing.T, engine aio.Engine) {
		depths := []int{1, 4, 16, 32}
		eachDisk(t, 64*slotSize, func(t *testing.T, d *disk) {
			r := newRig(t, d.open(nil), rigOptions{engine: engine, loops: 2})
			loops := append(newLoops(t, engine, 2), r.server.opts.Loops...)
			var wg sync.WaitGroup
			var busy atomic.Int32
			first := 0
			for _, depth := range depths {
				h := newHammer(r, d, first, depth, nil)
				first += depth
				busy.Add(1)
				wg.Go(func() {
					defer busy.Add(-1)
					if err := h.run(80*min(depth, 8), nil); err != nil {
						t.Errorf("depth %d, after %d answers: %v", depth, h.answers, err)
						return
					}
					if err := h.c.Disc(); err != nil { // also if anything is answered twice
						t.Errorf("depth %d: %v", depth, err)
					}
				})
			}
			moves := r.wander(loops, d.image, func() bool { return busy.Load() == 0 })
			wg.Wait()
			if t.Logf("%d moves", moves); moves < 5 {
				t.Error("too few")
			}
			d.finish(r, nil)
			r.server.lanes.mu.Lock()
			defer r.server.lanes.mu.Unlock()
			if n := len(r.server.lanes.all); n != 2 {
				t.Errorf("the server keeps %d lanes", n)
			}
		})
	})
}

// TestMoveWhileClientsLeave: clients that vanish with requests in flight, or in the
// middle of one, and others that come, while the export moves. Each has slots of
// its own, since what the one before had in flight may still be carried out.
func TestMoveWhileClientsLeave(t *testing.T) {
	const clients, rounds, depth = 4, 5, 4
	eachDisk(t, clients*rounds*depth*slotSize, func(t *testing.T, d *disk) {
		r := newRig(t, d.open(nil), rigOptions{loops: 2})
		loops := append(newLoops(t, aio.EngineAuto, 2), r.server.opts.Loops...)
		unknown := make([]bool, len(d.data))
		var wg sync.WaitGroup
		var busy atomic.Int32
		for client := range clients {
			busy.Add(1)
			wg.Go(func() {
				defer busy.Add(-1)
				for round := range rounds {
					h := newHammer(r, d, (client*rounds+round)*depth, depth, unknown)
					if err := h.run(20+h.rng.IntN(40), nil); err != nil || h.failed > 0 {
						t.Errorf("%v; %d failed", err, h.failed)
						return
					}
					for slot := range depth { // not waited for
						if err := h.send(slot); err != nil {
							t.Error(err)
						}
					}
					if round%2 == 0 { // and one that isn't whole
						_, _ = h.c.Conn.Write(wire(nbdtest.CmdWrite, 0, 99, uint64(h.base), slotSize, pattern(slotSize, 9))[:20+h.rng.IntN(slotSize)])
					}
					h.vanish()
				}
			})
		}
		r.wander(loops, d.image, func() bool { return busy.Load() == 0 })
		wg.Wait()
		d.finish(r, unknown)
	})
}

// TestMoveWhileStorageFails: requests that fail below the image, with EIO or
// because there is no space, fail for the client, once, and nothing else does;
// the image is whole afterwards.
func TestMoveWhileStorageFails(t *testing.T) {
	for _, errno := range []unix.Errno{unix.EIO, unix.ENOSPC} {
		t.Run(errno.Error(), func(t *testing.T) {
			eachDisk(t, 32*slotSize, func(t *testing.T, d *disk) {
				var faulty *formattest.Faulty
				r := newRig(t, d.open(func(below aio.Storage) aio.Storage {
					faulty = formattest.NewFaulty(below)
					return faulty
				}), rigOptions{loops: 2})
				loops := append(newLoops(t, aio.EngineAuto, 2), r.server.opts.Loops...)
				unknown := make([]bool, len(d.data))
				var wg sync.WaitGroup
				var busy atomic.Int32
				failed := make([]int, 4)
				for client := range failed {
					h := newHammer(r, d, client*8, 8, unknown)
					busy.Add(1)
					wg.Go(func() {
						defer busy.Add(-1)
						if err := h.run(150, nil); err != nil {
							t.Error(err)
							return
						}
						if failed[client] = h.failed; h.failed == h.answers {
							t.Error("everything has failed")
						}
						faulty.Heal()
						if err := h.run(h.answers+50, nil); err != nil {
							t.Error(err)
						} else if err := h.c.Disc(); err != nil {
							t.Error(err)
						}
					})
				}
				for range 3 { // of metadata too
					faulty.Inject(formattest.Fault{Errno: errno, After: 40, Times: 25, Match: func(r *aio.Request) bool {
						return r.Op.Writes() || r.Op == aio.OpFlush || r.Op == aio.OpRead && errno == unix.EIO
					}})
				}
				r.wander(loops, d.image, func() bool { return busy.Load() == 0 })
				wg.Wait()
				faulty.Heal()
				if slices.Max(failed) == 0 {
					t.Error("nothing has failed")
				}
				d.finish(r, unknown)
			})
		})
	}
}

// TestClosedLoop: a loop can be closed when an export has left it, and a qcow2
// image goes on without it.
func TestClosedLoop(t *testing.T) {
	eachDisk(t, 8*slotSize, func(t *testing.T, d *disk) {
		r := newRig(t, d.open(nil), rigOptions{})
		h := newHammer(r, d, 0, 8, nil)
		for range 5 {
			l, err := aio.NewLoop(aio.LoopOptions{})
			must(t, err)
			must(t, r.export.Move([]*aio.Loop{l}))
			must(t, h.run(h.answers+100, nil))
			must(t, r.export.Move(r.server.opts.Loops))
			must(t, h.run(h.answers+20, nil))
			must(t, l.Close())
		}
		must(t, h.c.Disc())
		d.finish(r, nil)
		if d.image.left != 11 {
			t.Errorf("the image was told %d times that a loop was left", d.image.left)
		}
	})
}

// TestMoveWaitsForClient: a client that takes no replies, or sends but half of a
// write, keeps its connection where it is, and loses nothing; others move.
func TestMoveWaitsForClient(t *testing.T) {
	eachEngine(t, func(t *testing.T, engine aio.Engine) {
		image := newFake(t, 16*mib)
		r := newRig(t, image, rigOptions{engine: engine, prepare: func(b *budget) { b.patience = 100 * time.Millisecond }})
		deaf, mute, good := r.dial(), r.dial(), r.dial()
		for i := range uint64(20) {
			must(t, deaf.Send(nbdtest.CmdRead, 0, i, 0, 4*mib, nil))
		}
		half := wire(nbdtest.CmdWrite, 0, 1, mib, mib, pattern(mib, 1))
		_, err := mute.Conn.Write(half[:mib/2])
		must(t, err)
		eventually(t, "all that goes on without the clients", func() bool { return image.count(aio.OpRead) > 0 && r.held() > 2*mib })
		other := newLoops(t, engine, 1)
		err = r.export.Move(other)
		if !errors.Is(err, export.ErrStays) || err.Error() != "move export: 2 of 3 queues: a client does nothing" {
			t.Fatalf("%v", err)
		}
		must(t, good.Flush())
		_, err = mute.Conn.Write(half[mib/2:])
		must(t, err)
		if cookie, errno, _, err := mute.Recv(); err != nil || errno != 0 || cookie != 1 {
			t.Error(cookie, errno, err)
		}
		for range 20 {
			if _, errno, data, err := deaf.Recv(); err != nil || errno != 0 || len(data) != 4*mib {
				t.Fatal(errno, err)
			}
		}
		must(t, r.export.Move(other))
		r.placed(other)
		if !image.holds(mib, pattern(mib, 1)) {
			t.Error("the write is lost")
		}
		for _, c := range []*nbdtest.Client{deaf, mute, good} {
			must(t, c.Disc())
		}
	})
}

// held is what the connections have of the first loop's budget.
func (r *rig) held() (n int64) {
	lane := r.server.lanes.all[0]
	lane.loop.Call(func() { n = r.budget - lane.budget.left })
	return n
}

// TestMoveHalfWrite: a write of which a part has come is finished where it began,
// and what stands behind it is not forgotten.
func TestMoveHalfWrite(t *testing.T) {
	eachEngine(t, func(t *testing.T, engine aio.Engine) {
		image := newFake(t, 4*mib)
		r := newRig(t, image, rigOptions{engine: engine})
		other := newLoops(t, engine, 1)
		c := r.dial()
		stream := slices.Concat(wire(nbdtest.CmdFlush, 0, 1, 0, 0, nil), wire(nbdtest.CmdWrite, 0, 2, 5, mib, pattern(mib, 1)),
			wire(nbdtest.CmdCache, 0, 3, 2*mib, 512, nil), wire(nbdtest.CmdFlush, 0, 4, 0, 0, nil)[:7])
		_, err := c.Conn.Write(stream[:400*kib])
		must(t, err)
		eventually(t, "half of the write", func() bool { return image.count(aio.OpFlush) == 1 && r.held() == mib })
		moved := make(chan error, 1)
		go func() { moved <- r.export.Move(other) }()
		eventually(t, "the move", func() bool { return slices.Equal(r.export.Loops(), other) })
		_, err = c.Conn.Write(stream[400*kib:])
		must(t, err)
		must(t, <-moved)
		r.placed(other)
		_, err = c.Conn.Write(wire(nbdtest.CmdFlush, 0, 4, 0, 0, nil)[7:])
		must(t, err)
		seen := map[uint64]bool{}
		for range 4 {
			cookie, errno, _, err := c.Recv()
			if err != nil || errno != 0 || seen[cookie] {
				t.Fatal(cookie, errno, err)
			}
			seen[cookie] = true
		}
		must(t, c.Disc())
		if !image.holds(5, pattern(mib, 1)) {
			t.Error("the write is lost")
		}
	})
}

// TestDrain: a drained export has nothing in flight and takes nothing, on
// connections that are there and on those that come; Move waits until it goes on.
func TestDrain(t *testing.T) {
	eachEngine(t, func(t *testing.T, engine aio.Engine) {
		var g gate
		image := newFake(t, 4*mib)
		image.later = g.later
		w := &watched{Image: image, t: t, inFlight: map[*aio.Loop]int{}}
		r := newRig(t, w, rigOptions{engine: engine, loops: 2})
		a, b := r.dial(), r.dial()
		must(t, a.Send(nbdtest.CmdRead, 0, 1, 0, 512, nil))
		eventually(t, "a read", func() bool { return g.waiting() == 1 })
		drained := make(chan error, 1)
		go func() { drained <- r.export.Drain() }()
		select {
		case err := <-drained:
			t.Fatalf("drained with a request in flight: %v", err)
		case <-time.After(20 * time.Millisecond):
		}
		g.release()
		must(t, <-drained)
		w.beStill(true)
		if _, errno, _, err := a.Recv(); err != nil || errno != 0 {
			t.Error(errno, err)
		}
		late := r.dial()
		for _, c := range []*nbdtest.Client{a, b, late} {
			go func() { // all of it isn't taken before the export goes on
				_ = c.Send(nbdtest.CmdWrite, 0, 2, 0, 2*mib, bytes.Repeat([]byte{7}, 2*mib))
			}()
		}
		moved := make(chan error, 1)
		go func() { moved <- r.export.Move(r.server.opts.Loops[1:]) }()
		leaver := r.dial()
		must(t, leaver.Send(nbdtest.CmdWrite, 0, 2, 0, 3, []byte("bye")))
		leaver.Close()
		time.Sleep(20 * time.Millisecond)
		select {
		case err := <-moved:
			t.Errorf("moved while drained: %v", err)
		default:
		}
		w.beStill(false)
		r.export.Resume()
		must(t, <-moved)
		r.placed(r.server.opts.Loops[1:])
		for _, c := range []*nbdtest.Client{a, b, late} {
			if cookie, errno, _, err := c.Recv(); err != nil || errno != 0 || cookie != 2 {
				t.Error(cookie, errno, err)
			}
			must(t, c.Disc())
		}
	})
}

// TestDrainLetsOthersGoOn: connections of a drained export neither keep others from
// the loop's memory by waiting in front of them, nor are cut off because they do
// nothing with what they hold.
func TestDrainLetsOthersGoOn(t *testing.T) {
	var g gate
	one, two := newFake(t, 8*mib), newFake(t, 8*mib)
	two.later = g.later
	e1, e2 := export.New(one, export.Options{Name: "one"}), export.New(two, export.Options{Name: "two"})
	r := newRig(t, nil, rigOptions{exports: []*export.Export{e1, e2}, budget: 8 * mib,
		prepare: func(b *budget) { b.patience = time.Second }})
	dial := func(name string) *nbdtest.Client {
		c, err := nbdtest.Dial("unix", r.path, name)
		must(t, err)
		t.Cleanup(func() { c.Close() })
		return c
	}
	holder, half, waiter, other := dial("two"), dial("one"), dial("one"), dial("two")
	write := wire(nbdtest.CmdWrite, 0, 1, 0, mib, pattern(mib, 1))
	_, err := half.Conn.Write(write[:1000])
	must(t, err)
	eventually(t, "half a write", func() bool { return r.held() == mib })
	must(t, holder.Send(nbdtest.CmdRead, 0, 1, 0, 4*mib, nil))
	eventually(t, "a read", func() bool { return g.waiting() == 1 })
	lane := r.server.lanes.all[0]
	queued := func() (n int) {
		lane.loop.Call(func() { n = len(lane.budget.waiting) })
		return n
	}
	must(t, waiter.Send(nbdtest.CmdRead, 0, 1, 0, 4*mib, nil))
	eventually(t, "one that waits", func() bool { return queued() == 1 })
	must(t, other.Send(nbdtest.CmdRead, 0, 1, 0, 3*mib, nil))
	eventually(t, "two that wait", func() bool { return queued() == 2 })
	must(t, e1.Drain())
	eventually(t, "the second read", func() bool { return g.waiting() == 2 })
	must(t, other.Send(nbdtest.CmdRead, 0, 2, 0, 3*mib, nil))
	eventually(t, "one that waits", func() bool { return queued() == 1 })
	time.Sleep(2500 * time.Millisecond) // more than twice the patience with clients that do nothing
	var wg sync.WaitGroup
	for c, replies := range map[*nbdtest.Client]int{half: 1, waiter: 1, holder: 1, other: 2} {
		wg.Go(func() { // all at a time: who doesn't read now is cut off
			for range replies {
				if _, errno, _, err := c.Recv(); err != nil || errno != 0 {
					t.Errorf("%v, %v", errno, err)
				}
			}
		})
	}
	wg.Go(func() {
		if _, err := half.Conn.Write(write[1000:]); err != nil {
			t.Error(err)
		}
	})
	e1.Resume()
	g.release()
	wg.Wait()
	if !one.holds(0, pattern(mib, 1)) {
		t.Error("the write is lost")
	}
}

// TestShutdownWhileMoving: the server ends though its connections are on the move,
// or drained.
func TestShutdownWhileMoving(t *testing.T) {
	for round := range 6 {
		image := newFake(t, mib)
		image.later = shuffle()
		r := newRig(t, image, rigOptions{loops: 3})
		for range 6 {
			c := r.dial()
			for i := range uint64(30) {
				must(t, c.Send(nbdtest.CmdRead, 0, i, i*4096, 4096, nil))
			}
		}
		stop := make(chan struct{})
		over := make(chan struct{})
		go func() {
			defer close(over)
			for i := 0; ; i++ {
				select {
				case <-stop:
					return
				default:
				}
				if err := r.export.Move(r.server.opts.Loops[i%3:][:1]); err != nil {
					t.Error(err)
				}
			}
		}()
		if round%2 == 0 {
			must(t, r.export.Drain())
		}
		if err := r.shutdown(10 * time.Second); err != nil {
			t.Error(err)
		}
		if round%2 == 0 {
			r.export.Resume()
		}
		close(stop)
		<-over
	}
}

// TestQueues: an export takes as many connections as it offers queues, spread over
// its loops, and their places are used again.
func TestQueues(t *testing.T) {
	loops := newLoops(t, aio.EngineAuto, 2)
	e := export.New(newFake(t, mib), export.Options{Queues: 3})
	must(t, e.Move([]*aio.Loop{loops[0], loops[1], loops[1]}))
	r := newRig(t, nil, rigOptions{exports: []*export.Export{e}})
	on := func(l *aio.Loop) (n int) {
		r.server.mu.Lock()
		defer r.server.mu.Unlock()
		for c := range r.server.conns {
			if c.queue.Loop() == l {
				n++
			}
		}
		return n
	}
	dial := func() *nbdtest.Client {
		c := r.dial()
		must(t, c.Flush()) // it has its queue now
		return c
	}
	a, b, c := dial(), dial(), dial()
	if on(loops[0]) != 1 || on(loops[1]) != 2 {
		t.Errorf("%d and %d connections", on(loops[0]), on(loops[1]))
	}
	for range 3 {
		d := r.dial()
		wantClosed(t, d)
	}
	must(t, a.Disc())
	eventually(t, "room", func() bool { return on(loops[0]) == 0 })
	d := dial()
	if on(loops[0]) != 1 {
		t.Error("the free place is not used")
	}
	for _, c := range []*nbdtest.Client{b, c, d} {
		must(t, c.Flush())
		if c.Flags&nbdtest.CanMultiConn == 0 {
			t.Error("several connections are not announced")
		}
	}
}

// TestOneQueue: with room for one connection, clients aren't told that several
// would do.
func TestOneQueue(t *testing.T) {
	e := export.New(newFake(t, mib), export.Options{Queues: 1})
	c := newRig(t, nil, rigOptions{exports: []*export.Export{e}}).dial()
	if c.Flags&nbdtest.CanMultiConn != 0 {
		t.Error("several connections are announced")
	}
	must(t, c.Flush())
}
