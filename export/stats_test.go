package export_test

import (
	"strings"
	"sync"
	"testing"
	"time"

	"platter/aio"
	"platter/export"
	"platter/formats"
)

// Statistics outlive the queue, and Close may be called again.
func TestStats(t *testing.T) {
	e := export.New(newImage(), export.Options{Name: "disk", Description: "a disk"})
	a, b := e.NewQueue(nil), e.NewQueue(nil)
	submit(a, read(0, 100))
	submit(b, read(0, 11), &aio.Request{Op: aio.OpFlush})
	a.Close()
	a.Close()
	if s := e.Stats(); s.Requests[aio.OpRead] != 2 || s.Bytes[aio.OpRead] != 111 || s.Requests[aio.OpFlush] != 1 || s.Batches != 2 {
		t.Errorf("%+v", s)
	}
	if e.Name() != "disk" || e.Description() != "a disk" || e.Size() != 1<<20 || e.ReadOnly() || e.Limits().PreferredSize != 4096 {
		t.Error("the export forgot what it is")
	}
	if !export.New(&image{readOnly: true}, export.Options{}).ReadOnly() {
		t.Error("a read-only image is exported for writing")
	}
}

// holding is an image that keeps requests until it is told to complete them.
type holding struct {
	*image
	held []*aio.Request
}

func (h *holding) Submit(_ *aio.Loop, batch []*aio.Request) { h.held = append(h.held, batch...) }

func (h *holding) release() {
	for _, r := range h.held {
		r.Complete(0)
	}
	h.held = nil
}

func (h *holding) GapStats() formats.GapStats { return formats.GapStats{Writes: 3, Bytes: 1536} }

// write is a request of its own memory, with a Done that does nothing.
func write(off, length int64) *aio.Request {
	r := read(off, length)
	r.Op, r.Done = aio.OpWrite, func(*aio.Request) {}
	return r
}

// What is in flight is what was submitted and not reported, once; batches are
// counted by size; the time that a request took is at least what passed.
func TestStatsInFlight(t *testing.T) {
	m := &holding{image: newImage()}
	e := export.New(m, export.Options{NoMerge: true})
	q := e.NewQueue(nil)
	flush := &aio.Request{Op: aio.OpFlush, Done: func(*aio.Request) {}}
	beyond := write(1<<20, 1)
	all := []*aio.Request{write(0, 512), write(8192, 512), write(32768, 512), flush, beyond}
	q.Submit([]*aio.Request{all[0]})
	q.Submit(append([]*aio.Request(nil), all[1:]...))
	if s := e.Stats(); s.InFlight != 4 || s.Refused != 1 || s.BatchSizes[0] != 1 || s.BatchSizes[1] != 1 || s.Batches != 2 {
		t.Errorf("in flight: %+v", s)
	}
	const wait = 5 * time.Millisecond
	time.Sleep(wait)
	m.release()
	for range 3 { // reporting again counts nothing
		q.Completed(all)
	}
	q.Completed(nil)
	s := q.Stats()
	if s.InFlight != 0 || s.Latency[aio.OpWrite].Count() != 3 || s.Latency[aio.OpFlush].Count() != 1 || s.Latency[aio.OpRead].Count() != 0 {
		t.Errorf("completed: %+v", s)
	}
	if h := &s.Latency[aio.OpWrite]; h.Quantile(0.5) < wait || h.Quantile(1) < wait || !strings.Contains(h.String(), "ms") {
		t.Errorf("after %v the latencies are %v", wait, h)
	}
	if g := e.Stats().Gaps; g != (formats.GapStats{Writes: 3, Bytes: 1536}) || s.Gaps != (formats.GapStats{}) {
		t.Errorf("gaps: %+v of the export, %+v of the queue", g, s.Gaps)
	}
	q.Submit([]*aio.Request{all[0]})
	q.Close()
	if s := e.Stats(); s.InFlight != 0 || s.Requests[aio.OpWrite] != 4 {
		t.Errorf("closed: %+v", s)
	}
}

// Anyone may read while a queue counts, and never sees fewer than no requests in
// flight, nor more than there are.
func TestStatsWhileServing(t *testing.T) {
	const depth = 4
	e := export.New(silent{newImage()}, export.Options{})
	q := e.NewQueue(nil)
	stop := make(chan struct{})
	var readers sync.WaitGroup
	for range 2 {
		readers.Go(func() {
			for {
				if n := e.Stats().InFlight; n > 1<<32 { // below zero
					t.Errorf("%d in flight", int64(n))
					return
				}
				select {
				case <-stop:
					return
				default:
				}
			}
		})
	}
	requests := make([]*aio.Request, depth)
	for i := range requests {
		requests[i] = write(int64(i)*4096, 4096)
	}
	batch := make([]*aio.Request, depth)
	for range 20_000 {
		copy(batch, requests)
		q.Submit(batch)
		q.Completed(requests)
	}
	close(stop)
	readers.Wait()
	if s := e.Stats(); s.InFlight != 0 || s.Latency[aio.OpWrite].Count() != 20_000*depth {
		t.Errorf("%+v", s)
	}
}
