//go:build !race

package qcow2_test

import (
	"path/filepath"
	"runtime"
	"testing"

	"platter/aio"
	"platter/formats"
	"platter/formats/qcow2"
	"platter/formats/raw"
	"platter/integration/testenv"
)

// TestHotPathAllocatesNothing shows that requests to mapped clusters, and writes to new
// ones, joined, with gaps, or over a backing file, allocate no memory of Go's heap.
func TestHotPathAllocatesNothing(t *testing.T) {
	t.Run("Plain", func(t *testing.T) { hotPath(t, "compat=1.1", false) })
	t.Run("ExtendedL2", func(t *testing.T) { hotPath(t, "extended_l2=on", false) })
	t.Run("Backing", func(t *testing.T) { hotPath(t, "compat=1.1", true) })
}

func hotPath(t *testing.T, options string, backing bool) {
	const size, blockSize, depth, rounds = 64 << 20, 4096, 32, 2000
	path := filepath.Join(testenv.TmpfsDir(t), "image")
	var more []string
	if backing {
		if err := raw.Create(path+".base", 16<<30, raw.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		more = []string{"-b", path + ".base", "-F", "raw"}
	}
	qemuCreate(t, path, 16<<30, options, more...)
	im, err := qcow2.Open(path, formats.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer im.Close()
	l, err := aio.NewLoop(aio.LoopOptions{})
	if err != nil {
		testenv.Skip(t, err.Error())
	}
	defer l.Close()
	m, err := aio.NewMemory(depth * blockSize)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()

	done := make(chan struct{}, 1)
	pending := 0
	batch := make([]*aio.Request, depth)
	for i := range batch {
		batch[i] = &aio.Request{Length: blockSize, Vec: []aio.Iovec{m.Iovec(i*blockSize, blockSize)}, Done: func(r *aio.Request) {
			if r.Errno != 0 {
				t.Errorf("%v at %d: %v", r.Op, r.Offset, r.Errno)
			}
			if pending--; pending == 0 {
				done <- struct{}{}
			}
		}}
	}
	next := int64(0)
	submit := func() {
		pending = depth
		im.Submit(l, batch)
	}
	// run does rounds of batches and returns what a request allocates.
	run := func(op aio.Op, step, span int64, rounds int) float64 {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		for range rounds {
			for _, r := range batch {
				r.Op, r.Offset = op, next%span
				next += step
			}
			l.Post(submit)
			<-done
		}
		runtime.ReadMemStats(&after)
		return float64(after.Mallocs-before.Mallocs) / float64(rounds*depth)
	}
	run(aio.OpWrite, blockSize, size, size/blockSize/depth) // map what is used below
	for _, c := range []struct {
		name       string
		op         aio.Op
		step, span int64
		most       float64
	}{
		{"read", aio.OpRead, 5 * blockSize, size, 0.001},
		{"overwrite", aio.OpWrite, 7 * blockSize, size, 0.001},
		// A table, a slice, a run of clusters or a commit is for many requests.
		{"write to new clusters", aio.OpWrite, 64 << 10, 8 << 30, 0.1},
		{"write with gaps", aio.OpWrite, 8 << 10, 16 << 30, 0.05},
	} {
		run(c.op, c.step, c.span, 100)
		got := run(c.op, c.step, c.span, rounds/2)
		t.Logf("%s: %.5f allocations per request", c.name, got)
		if got > c.most {
			t.Errorf("%s: %.5f allocations per request, want at most %g", c.name, got, c.most)
		}
	}
	if s := im.Stats(); s.HitRate() < 0.9 || s.Lookups == 0 {
		t.Errorf("stats make no sense: %+v", s)
	}
}
