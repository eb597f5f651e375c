package export_test

import (
	"errors"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"platter/aio"
	"platter/config"
	"platter/export"
	"platter/formats"
)

// leaver is an image that notes which loops were left.
type leaver struct {
	*image
	left chan *aio.Loop
}

func (m leaver) Leave(l *aio.Loop) { m.left <- l }

var _ formats.Leaver = leaver{}

// front is a front end that does as it is told at once, or not at all.
type front struct {
	q      *export.Queue
	refuse bool
	calls  []string // on the queue's loop
}

func (f *front) Drain(done func()) { f.calls = append(f.calls, "drain"); done() }
func (f *front) Resume()           { f.calls = append(f.calls, "resume") }
func (f *front) Move(to *aio.Loop, done func(error)) {
	f.calls = append(f.calls, "move")
	if f.refuse {
		done(export.ErrStays)
		return
	}
	f.q.MoveTo(to, func() { done(nil) })
}

func newLoops(t *testing.T, n int) []*aio.Loop {
	t.Helper()
	loops := make([]*aio.Loop, n)
	for i := range loops {
		l, err := aio.NewLoop(aio.LoopOptions{})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
		loops[i] = l
	}
	return loops
}

// attach opens a queue with a front end.
func attach(t *testing.T, e *export.Export) *front {
	t.Helper()
	q, err := e.OpenQueue()
	if err != nil {
		t.Fatal(err)
	}
	f := &front{q: q}
	on(q, func() { q.Attach(f) })
	return f
}

// on calls f on the queue's loop and waits for it.
func on(q *export.Queue, f func()) {
	done := make(chan struct{})
	q.Post(func() { f(); close(done) })
	<-done
}

// TestPlaces: queues are spread by the mapping, and free places are taken first.
func TestPlaces(t *testing.T) {
	loops := newLoops(t, 3)
	e := export.New(newImage(), export.Options{Queues: 5})
	if _, err := e.OpenQueue(); !errors.Is(err, export.ErrLoops) {
		t.Errorf("without loops: %v", err)
	}
	mapping := []*aio.Loop{loops[0], loops[1], loops[1], loops[2]}
	if err := e.Move(mapping); err != nil {
		t.Fatal(err)
	}
	var queues []*front
	for i := range 5 {
		f := attach(t, e)
		if queues = append(queues, f); f.q.Loop() != mapping[i%4] {
			t.Errorf("queue %d is on another loop", i)
		}
	}
	e.NewQueue(loops[0]) // isn't counted
	if _, err := e.OpenQueue(); !errors.Is(err, export.ErrTooManyQueues) || !strings.Contains(err.Error(), "5") {
		t.Errorf("a sixth queue: %v", err)
	}
	for _, i := range []int{3, 1} {
		on(queues[i].q, queues[i].q.Close)
	}
	for _, i := range []int{1, 3} {
		if f := attach(t, e); f.q.Loop() != mapping[i] {
			t.Errorf("the place of queue %d is not used again", i)
		}
	}
}

func TestMoveRefused(t *testing.T) {
	loops := newLoops(t, 2)
	e := export.New(newImage(), export.Options{Name: "disk"})
	for _, to := range [][]*aio.Loop{nil, {}, {loops[0], nil}, slices.Repeat(loops, config.MaxQueues)} {
		if err := e.Move(to); !errors.Is(err, export.ErrLoops) || !strings.HasPrefix(err.Error(), "move export disk: ") {
			t.Errorf("%d loops: %v", len(to), err)
		}
	}
	if len(e.Loops()) != 0 {
		t.Error("a mapping was taken that was refused")
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(e.Move(loops[:1]))
	stays, goes := attach(t, e), attach(t, e)
	stays.refuse = true
	if err := e.Move(loops[1:]); !errors.Is(err, export.ErrStays) || err.Error() != "move export disk: 1 of 2 queues: a client does nothing" {
		t.Error(err)
	}
	if stays.q.Loop() != loops[0] || goes.q.Loop() != loops[1] {
		t.Error("the wrong one has moved")
	}
	// One that nobody can move stops neither a move to where it is nor others.
	fixed := e.NewQueue(loops[0])
	must(e.Move(loops[:1]))
	if err := e.Move(loops[1:]); !errors.Is(err, export.ErrFixed) {
		t.Error(err)
	}
	if err := e.Drain(); !errors.Is(err, export.ErrFixed) {
		t.Error(err)
	}
	on(fixed, fixed.Close)
	must(e.Drain()) // the one that failed has let go
	e.Resume()
}

// TestMoveBeforeAttach: a queue that its front end hasn't begun to serve moves, and
// what was posted to it goes after it, in order. One that is opened while the
// export is drained is drained from the start.
func TestMoveBeforeAttach(t *testing.T) {
	loops := newLoops(t, 2)
	e := export.New(newImage(), export.Options{})
	if err := e.Move(loops[:1]); err != nil {
		t.Fatal(err)
	}
	q, err := e.OpenQueue()
	if err != nil {
		t.Fatal(err)
	}
	hold := make(chan struct{})
	loops[0].Post(func() { <-hold })
	moved := make(chan error)
	go func() { moved <- e.Move(loops[1:]) }()
	for !slices.Equal(e.Loops(), loops[1:]) {
		time.Sleep(time.Millisecond)
	}
	time.Sleep(5 * time.Millisecond) // for the move to be posted first, as a rule
	var where []*aio.Loop
	over := make(chan struct{})
	for range 3 {
		q.Post(func() {
			if where = append(where, q.Loop()); len(where) == 3 {
				close(over)
			}
		})
	}
	close(hold)
	if err := <-moved; err != nil {
		t.Error(err)
	}
	<-over
	if q.Loop() != loops[1] {
		t.Error("the queue has not moved")
	}
	if err := e.Drain(); err != nil {
		t.Fatal(err)
	}
	f := &front{q: q}
	on(q, func() { q.Attach(f) })
	late := attach(t, e)
	e.Resume()
	for _, f := range []*front{f, late} {
		on(f.q, func() {
			if !slices.Equal(f.calls, []string{"drain", "resume"}) {
				t.Errorf("calls: %v", f.calls)
			}
		})
	}
}

// TestLeave: the image hears of a loop that no queue is on any more, on that
// loop's thread, and not before.
func TestLeave(t *testing.T) {
	loops := newLoops(t, 2)
	m := leaver{newImage(), make(chan *aio.Loop, 10)}
	e := export.New(m, export.Options{})
	if err := e.Move(loops[:1]); err != nil {
		t.Fatal(err)
	}
	a, b := attach(t, e), attach(t, e)
	on(a.q, a.q.Close)
	if len(m.left) != 0 {
		t.Error("left while a queue was there")
	}
	if err := e.Move(loops[1:]); err != nil {
		t.Fatal(err)
	}
	if l := <-m.left; l != loops[0] {
		t.Error("another loop was left")
	}
	done := make(chan struct{})
	b.q.Post(func() { b.q.Close(); b.q.Close(); close(done) })
	<-done
	if l := <-m.left; l != loops[1] || len(m.left) != 0 {
		t.Error("the last queue left wrongly")
	}
}

// TestConcurrentMoves: moves and drains from several goroutines, while queues come
// and go, are carried out one after the other.
func TestConcurrentMoves(t *testing.T) {
	loops := newLoops(t, 3)
	e := export.New(newImage(), export.Options{})
	if err := e.Move(loops); err != nil {
		t.Fatal(err)
	}
	stays := attach(t, e)
	var wg sync.WaitGroup
	for i := range 3 {
		wg.Go(func() {
			for n := range 100 {
				if err := e.Move(loops[(i+n)%3:]); err != nil {
					t.Error(err)
				}
				if n%10 == i {
					if err := e.Drain(); err != nil {
						t.Error(err)
					}
					e.Resume()
				}
			}
		})
		wg.Go(func() {
			for range 100 {
				f := attach(t, e)
				done := make(chan struct{})
				f.q.Post(func() { f.q.Close(); close(done) })
				<-done
			}
		})
	}
	wg.Wait()
	if err := e.Move(loops[2:]); err != nil || stays.q.Loop() != loops[2] {
		t.Errorf("at last: %v", err)
	}
}
