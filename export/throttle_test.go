package export_test

import (
	"errors"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"platter/aio"
	"platter/export"
)

func newLoop(t testing.TB) *aio.Loop {
	t.Helper()
	l, err := aio.NewLoop(aio.LoopOptions{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// eventually waits until ok.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s does not come true", what)
		}
	}
}

// client keeps a queue's requests in flight, as a front end would, and counts
// how often each completes.
type client struct {
	loop      *aio.Loop
	queue     *export.Queue
	requests  []*aio.Request
	over      []*aio.Request
	report    aio.Task
	again     bool // submit what has completed again
	completed atomic.Int64
}

func newClient(e *export.Export, l *aio.Loop, depth int) *client {
	c := &client{loop: l, queue: e.NewQueue(l)}
	c.report.Run = func() {
		c.queue.Completed(c.over)
		batch := c.over
		c.over = nil
		if c.again {
			c.queue.Submit(batch)
		}
	}
	for i := range depth {
		r := write(int64(i)*4096, 512)
		if i%2 == 0 {
			r.Op = aio.OpRead
		}
		r.Done = func(r *aio.Request) {
			c.completed.Add(1)
			c.over = append(c.over, r)
			l.Defer(&c.report)
		}
		c.requests = append(c.requests, r)
	}
	return c
}

func (c *client) start() {
	c.loop.Post(func() { c.queue.Submit(append([]*aio.Request(nil), c.requests...)) })
}

// stop has nothing submitted again.
func (c *client) stop() { c.loop.Call(func() { c.again = false }) }

// slow is a throttle under which nothing but the burst goes while a test lasts.
var slow = export.Throttle{IOPS: export.Rates{Total: 1, Burst: 3}}

// Requests that wait go when the throttle is taken away, each once.
func TestThrottleTakenAway(t *testing.T) {
	e := export.New(silent{newImage()}, export.Options{})
	if err := e.SetThrottle(slow); err != nil || e.Throttle() != slow {
		t.Fatal(err, e.Throttle())
	}
	a, b := newClient(e, newLoop(t), 100), newClient(e, newLoop(t), 7)
	a.start()
	b.start()
	eventually(t, "waiting", func() bool { return e.Stats().InFlight == e.Stats().Waiting && e.Stats().Waiting > 100 })
	if s := e.Stats(); s.Throttled < 100 {
		t.Errorf("%d were throttled", s.Throttled)
	}
	if err := e.SetThrottle(export.Throttle{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the end", func() bool { return e.Stats().InFlight == 0 })
	if a.completed.Load() != 100 || b.completed.Load() != 7 {
		t.Errorf("%d and %d completed", a.completed.Load(), b.completed.Load())
	}
	before := e.Stats().Throttled
	a.start()
	eventually(t, "the end", func() bool { return a.completed.Load() == 200 })
	if s := e.Stats(); s.Throttled != before || s.Waiting != 0 {
		t.Errorf("without a throttle %d wait", s.Throttled-before)
	}
}

// A flush is answered while writes before it wait.
func TestFlushPassesThrottled(t *testing.T) {
	e := export.New(silent{newImage()}, export.Options{})
	if err := e.SetThrottle(slow); err != nil {
		t.Fatal(err)
	}
	c := newClient(e, newLoop(t), 50)
	flushed := make(chan struct{})
	c.requests = append(c.requests, &aio.Request{Op: aio.OpFlush, Done: func(*aio.Request) { close(flushed) }})
	c.start()
	select {
	case <-flushed:
	case <-time.After(20 * time.Second):
		t.Fatal("the flush waits")
	}
	if n := c.queue.Waiting(); n < 40 {
		t.Errorf("%d wait", n)
	}
	c.loop.Call(c.queue.Expedite)
	if n := c.completed.Load(); n != 50 || c.queue.Waiting() != 0 {
		t.Errorf("%d completed, %d wait", n, c.queue.Waiting())
	}
	c.loop.Call(c.queue.Expedite)
}

// A queue on whose timer others rely may close.
func TestThrottledQueueCloses(t *testing.T) {
	for range 20 {
		e := export.New(silent{newImage()}, export.Options{})
		if err := e.SetThrottle(export.Throttle{IOPS: export.Rates{Total: 1000, Burst: 2}}); err != nil {
			t.Fatal(err)
		}
		first, second := newClient(e, newLoop(t), 30), newClient(e, newLoop(t), 30)
		first.start()
		// A test that is slow may find that all have gone.
		eventually(t, "waiting", func() bool { return first.queue.Waiting() > 0 || first.completed.Load() == 30 })
		second.start()
		eventually(t, "waiting", func() bool { return second.queue.Stats().Requests[aio.OpRead] > 0 })
		first.loop.Call(func() {
			first.queue.Expedite()
			first.queue.Close()
		})
		if n := first.completed.Load(); n != 30 {
			t.Errorf("%d completed", n)
		}
		eventually(t, "the end", func() bool { return second.completed.Load() == 30 })
	}
}

// Whatever becomes of the throttle while queues serve, every request completes
// once, and in the end none waits.
func TestThrottleChanges(t *testing.T) {
	e := export.New(silent{newImage()}, export.Options{})
	var clients []*client
	loops := []*aio.Loop{newLoop(t), newLoop(t)}
	for i, depth := range []int{1, 64, 3, 128} {
		c := newClient(e, loops[i%2], depth)
		c.again = true
		clients = append(clients, c)
	}
	if err := e.SetThrottle(slow); err != nil {
		t.Fatal(err)
	}
	for _, c := range clients {
		c.start()
	}
	for i := range 200 {
		to := []export.Throttle{slow, {IOPS: export.Rates{Total: 20_000}}, {BPS: export.Rates{Read: 10 << 20, Write: 5 << 20, Total: 12 << 20}}, {}}[i%4]
		if err := e.SetThrottle(to); err != nil {
			t.Fatal(err)
		}
		time.Sleep(200 * time.Microsecond)
	}
	for _, c := range clients {
		c.stop()
	}
	if err := e.SetThrottle(export.Throttle{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the end", func() bool { return e.Stats().InFlight == 0 })
	var completed int64
	for _, c := range clients {
		completed += c.completed.Load()
		c.loop.Call(c.queue.Close)
	}
	s := e.Stats()
	if n := s.Requests[aio.OpRead] + s.Requests[aio.OpWrite]; int64(n) != completed || s.Throttled == 0 || s.Waiting != 0 {
		t.Errorf("%d submitted, %d completed: %+v", n, completed, s)
	}
}

// What can't be is refused, the value and its limits named, and changes nothing.
func TestThrottleImpossible(t *testing.T) {
	e := export.New(newImage(), export.Options{Name: "disk"})
	was := export.Throttle{IOPS: export.Rates{Read: 7}}
	if err := e.SetThrottle(was); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		to    export.Throttle
		words string
	}{
		{export.Throttle{IOPS: export.Rates{Total: -1}}, "iops -1: 1 1000000000"},
		{export.Throttle{IOPS: export.Rates{Read: 1_000_000_001}}, "iops-read 1000000001: 1000000000"},
		{export.Throttle{IOPS: export.Rates{Write: -1 << 63}}, "iops-write"},
		{export.Throttle{IOPS: export.Rates{Total: 5, Burst: -2}}, "iops-burst -2: 1"},
		{export.Throttle{IOPS: export.Rates{Burst: 5}}, "iops-burst 5: iops-read"},
		{export.Throttle{IOPS: export.Rates{Total: 5}, BPS: export.Rates{Burst: 5000}}, "bps-burst 5000: bps-write"},
		{export.Throttle{BPS: export.Rates{Total: 1<<50 + 1}}, "bps 1125899906842625: 1125899906842624"},
		{export.Throttle{BPS: export.Rates{Total: 1 << 20, Burst: 511}}, "bps-burst 511: 512"},
		{export.Throttle{BPS: export.Rates{Read: -5}}, "bps-read -5:"},
		{export.Throttle{BPS: export.Rates{Write: -5}}, "bps-write -5:"},
	} {
		err := e.SetThrottle(c.to)
		if !errors.Is(err, export.ErrThrottle) || e.Throttle() != was {
			t.Errorf("%+v: %v; the throttle is %+v", c.to, err, e.Throttle())
			continue
		}
		for _, word := range append(strings.Fields(c.words), "disk", "throttle") {
			if !strings.Contains(err.Error(), word) {
				t.Errorf("%+v: %q isn't in %v", c.to, word, err)
			}
		}
	}
}

// Nothing is allocated for requests that wait, nor for the timer that they wait
// for.
func TestNoAllocationsThrottled(t *testing.T) {
	e := export.New(silent{newImage()}, export.Options{})
	if err := e.SetThrottle(slow); err != nil {
		t.Fatal(err)
	}
	l := newLoop(t)
	l.Call(func() {
		q := e.NewQueue(l)
		defer q.Close()
		requests := []*aio.Request{read(0, 4096), write(4096, 4096), read(1<<19, 4096), {Op: aio.OpFlush}}
		for _, r := range requests {
			r.Done = func(*aio.Request) {}
		}
		batch := make([]*aio.Request, len(requests))
		if n := testing.AllocsPerRun(1000, func() {
			copy(batch, requests)
			q.Submit(batch)
			q.Expedite()
			q.Completed(requests)
		}); n != 0 {
			t.Errorf("%v allocations", n)
		}
		if s := q.Stats(); s.InFlight != 0 || s.Throttled < 2900 {
			t.Errorf("%+v", s)
		}
	})
}
