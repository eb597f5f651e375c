package nbd

import (
	"runtime"
	"strings"
	"sync"
	"testing"

	"platter/aio"
	"platter/export"
	"platter/export/nbd/nbdtest"
)

// batches is an image that keeps account of the batches that it gets.
type batches struct {
	*fakeImage
	got func(batch []*aio.Request)
}

func (b *batches) Submit(l *aio.Loop, batch []*aio.Request) {
	b.got(batch)
	b.fakeImage.Submit(l, batch)
}

func newBatchRig(t *testing.T, engine aio.Engine, got func(batch []*aio.Request)) *rig {
	image := &batches{fakeImage: newFake(t, 4*mib), got: got}
	return newRig(t, nil, rigOptions{engine: engine, exports: []*export.Export{export.New(image, export.Options{NoMerge: true})}})
}

// burst sends n reads at a time and takes their replies.
func burst(t *testing.T, c *nbdtest.Client, n int, length uint32) {
	t.Helper()
	var out []byte
	for i := range n {
		out = append(out, wire(nbdtest.CmdRead, 0, uint64(i), 0, length, nil)...)
	}
	raw := takeOver(t, c)
	raw.out = out
	raw.in = make([]byte, n*(simpleSize+int(length)))
	must(t, raw.round(simpleSize+int(length)))
}

// What stands in the socket when the server looks is one batch.
func TestPipelinedBurstIsOneBatch(t *testing.T) {
	eachEngine(t, func(t *testing.T, engine aio.Engine) {
		const n = 100
		var sizes []int
		r := newBatchRig(t, engine, func(batch []*aio.Request) { sizes = append(sizes, len(batch)) })
		burst(t, r.dial(), n, 512)
		if s := r.export.Stats(); s.Batches != 1 || s.BatchSizes[6] != 1 || len(sizes) != 1 || sizes[0] != n {
			t.Errorf("%d batches, by size %v; the image got %v", s.Batches, s.BatchSizes, sizes)
		}
	})
}

// A single request is submitted by the very receive that completes it: no timer
// and no other turn comes in between, however many came before.
func TestSingleRequestIsSubmittedAtOnce(t *testing.T) {
	eachEngine(t, func(t *testing.T, engine aio.Engine) {
		const n = 50
		var mu sync.Mutex
		var wrong []string
		r := newBatchRig(t, engine, func(batch []*aio.Request) {
			pcs := make([]uintptr, 64)
			frames := runtime.CallersFrames(pcs[:runtime.Callers(0, pcs)])
			var stack strings.Builder
			for more := true; more; {
				var f runtime.Frame
				f, more = frames.Next()
				stack.WriteString(f.Function + "\n")
			}
			if s := stack.String(); len(batch) != 1 || !strings.Contains(s, "(*conn).received") || strings.Contains(s, "(*timers)") {
				mu.Lock()
				wrong = append(wrong, s)
				mu.Unlock()
			}
		})
		c := r.dial()
		for range n {
			must(t, c.Read(0, make([]byte, 512)))
		}
		mu.Lock()
		defer mu.Unlock()
		if s := r.export.Stats(); s.Batches != n || s.BatchSizes[0] != n || len(wrong) > 0 {
			t.Errorf("%d batches, by size %v; submitted by\n%s", s.Batches, s.BatchSizes, strings.Join(wrong, "\n"))
		}
	})
}

// No batch is larger than the bounds, in requests and in bytes, and what is left
// over is served all the same.
func TestBatchIsBounded(t *testing.T) {
	eachEngine(t, func(t *testing.T, engine aio.Engine) {
		for _, load := range []struct {
			n      int
			length uint32
			least  int // batches
		}{{900, 1, 4}, {3*maxBatch + 1, 16, 4}, {20, mib, 5}, {3, 4 * mib, 3}} {
			var mu sync.Mutex
			count := 0
			r := newBatchRig(t, engine, func(batch []*aio.Request) {
				bytes, last := int64(0), int64(0)
				for _, r := range batch {
					last = r.Length
					bytes += last
				}
				mu.Lock()
				defer mu.Unlock()
				count++
				if len(batch) > maxBatch || bytes-last >= maxSend {
					t.Errorf("a batch of %d requests, %d bytes", len(batch), bytes)
				}
			})
			burst(t, r.dial(), load.n, load.length)
			mu.Lock()
			if count < load.least {
				t.Errorf("%d requests of %d bytes in %d batches", load.n, load.length, count)
			}
			mu.Unlock()
		}
	})
}
