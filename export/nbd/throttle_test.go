package nbd

import (
	"sync"
	"testing"
	"time"

	"platter/aio"
	"platter/export"
	"platter/export/nbd/nbdtest"
)

// slow is a throttle under which nothing but the burst goes while a test lasts.
var slow = export.Throttle{IOPS: export.Rates{Total: 1, Burst: 2}}

// throttled is a connection with n writes, nearly all of which wait.
func throttled(t *testing.T, r *rig, n int) *nbdtest.Client {
	t.Helper()
	must(t, r.export.SetThrottle(slow))
	c := r.dial()
	var out []byte
	for i := range n {
		out = append(out, wire(nbdtest.CmdWrite, 0, uint64(i), uint64(i)*512, 512, pattern(512, uint64(i)))...)
	}
	_, err := c.Conn.Write(out)
	must(t, err)
	eventually(t, "the queue", func() bool { return r.export.Stats().Waiting >= uint64(n-3) })
	return c
}

// Whichever way a connection ends, what waits is carried out once, and soon.
func TestThrottledConnectionEnds(t *testing.T) {
	const n = 100
	ends := map[string]func(t *testing.T, r *rig, c *nbdtest.Client){
		"disconnect": func(t *testing.T, _ *rig, c *nbdtest.Client) {
			_, err := c.Conn.Write(wire(nbdtest.CmdDisc, 0, 0, 0, 0, nil))
			must(t, err)
			wantClosed(t, c)
		},
		"close":    func(t *testing.T, _ *rig, c *nbdtest.Client) { must(t, c.Conn.Close()) },
		"breach":   func(t *testing.T, _ *rig, c *nbdtest.Client) { _, err := c.Conn.Write(make([]byte, 64)); must(t, err) },
		"shutdown": func(t *testing.T, r *rig, c *nbdtest.Client) { must(t, r.shutdown(15*time.Second)); wantClosed(t, c) },
	}
	for name, end := range ends {
		t.Run(name, func(t *testing.T) {
			eachEngine(t, func(t *testing.T, engine aio.Engine) {
				image := newFake(t, mib)
				r := newRig(t, image, rigOptions{engine: engine})
				c := throttled(t, r, n)
				end(t, r, c)
				eventually(t, "the end of what waits", func() bool { return r.export.Stats().InFlight == 0 })
				for i := range n {
					if !image.holds(i*512, pattern(512, uint64(i))) {
						t.Fatalf("write %d is lost", i)
					}
				}
				if s := r.export.Stats(); s.Requests[aio.OpWrite] != n || s.Latency[aio.OpWrite].Count() != n || s.Waiting != 0 {
					t.Errorf("%d writes, %d completed, %d wait", s.Requests[aio.OpWrite], s.Latency[aio.OpWrite].Count(), s.Waiting)
				}
			})
		})
	}
}

// A flush is answered while writes wait, and they are answered when the throttle
// goes.
func TestThrottleFlush(t *testing.T) {
	const n = 30
	r := newRig(t, newFake(t, mib), rigOptions{})
	c := throttled(t, r, n)
	_, err := c.Conn.Write(wire(nbdtest.CmdFlush, 0, 1000, 0, 0, nil))
	must(t, err)
	eventually(t, "the flush", func() bool { return r.export.Stats().Latency[aio.OpFlush].Count() == 1 })
	if s := r.export.Stats(); s.Waiting == 0 {
		t.Error("nothing waits")
	}
	must(t, r.export.SetThrottle(export.Throttle{}))
	eventually(t, "the writes", func() bool { return r.export.Stats().InFlight == 0 })
	raw := takeOver(t, c)
	raw.in = make([]byte, (n+1)*simpleSize)
	must(t, raw.round(simpleSize))
}

// What waits for a throttle keeps little of the loop's memory from clients of
// other exports.
func TestThrottledHoldsLittle(t *testing.T) {
	held := export.New(newFake(t, 4*mib), export.Options{Name: "held"})
	free := export.New(newFake(t, 4*mib), export.Options{Name: "free"})
	r := newRig(t, nil, rigOptions{exports: []*export.Export{held, free}})
	must(t, held.SetThrottle(slow))
	var clients []*nbdtest.Client
	for range 4 { // without a bound these would have all of it
		c, err := nbdtest.Dial("unix", r.path, "held")
		must(t, err)
		defer c.Close()
		clients = append(clients, c)
		var out []byte
		for i := range uint64(60) {
			out = append(out, wire(nbdtest.CmdRead, 0, i, 0, mib, nil)...)
		}
		_, err = c.Conn.Write(out)
		must(t, err)
	}
	eventually(t, "all waiting", func() bool {
		s := held.Stats()
		return s.Waiting > 10 && s.Batches >= uint64(len(clients))
	})
	c, err := nbdtest.Dial("unix", r.path, "free")
	must(t, err)
	defer c.Close()
	for range 20 {
		must(t, c.Read(0, make([]byte, 2*mib)))
	}
	lane := r.server.lanes.all[0]
	lane.loop.Call(func() {
		for _, c := range lane.budget.conns {
			if most := int64(maxWaiting + maxSend); c.held > most {
				t.Errorf("a connection holds %d bytes, %d wait", c.held, c.queue.Waiting())
			}
		}
	})
	must(t, held.SetThrottle(export.Throttle{}))
	var readers sync.WaitGroup
	for _, c := range clients {
		raw := takeOver(t, c)
		raw.in = make([]byte, 60*(simpleSize+mib))
		readers.Go(func() {
			if err := raw.round(simpleSize + mib); err != nil {
				t.Error(err)
			}
		})
	}
	readers.Wait()
}

// A throttled export drains and moves as soon as its I/O is done.
func TestThrottledMoves(t *testing.T) {
	eachEngine(t, func(t *testing.T, engine aio.Engine) {
		const n = 50
		image := newFake(t, mib)
		r := newRig(t, image, rigOptions{engine: engine, loops: 2})
		var loops []*aio.Loop
		for _, lane := range r.server.lanes.all {
			loops = append(loops, lane.loop)
		}
		c := throttled(t, r, n)
		must(t, r.export.Drain())
		if s := r.export.Stats(); s.InFlight != 0 || s.Requests[aio.OpWrite] != n {
			t.Errorf("drained: %d in flight of %d", s.InFlight, s.Requests[aio.OpWrite])
		}
		r.export.Resume()
		for i := range 6 {
			before := r.export.Stats().Requests[aio.OpWrite]
			for k := range uint64(n) {
				_, err := c.Conn.Write(wire(nbdtest.CmdWrite, 0, 1000+k, 0, 512, pattern(512, k)))
				must(t, err)
			}
			eventually(t, "the queue", func() bool { return r.export.Stats().Requests[aio.OpWrite] > before+n/2 })
			must(t, r.export.Move([]*aio.Loop{loops[i%2]}))
		}
		must(t, r.export.SetThrottle(export.Throttle{}))
		raw := takeOver(t, c)
		raw.in = make([]byte, 7*n*simpleSize)
		must(t, raw.round(simpleSize))
	})
}
