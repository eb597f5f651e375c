package qcow2_test

import (
	"path/filepath"
	"testing"

	"platter/aio"
	"platter/formats"
	"platter/integration/testenv"
)

// TestMetadataCache works on an image with far more L2 tables than the cache
// takes.
func TestMetadataCache(t *testing.T) {
	rng := seeded(t)
	path := filepath.Join(testenv.TmpfsDir(t), "image")
	qemuCreate(t, path, 8<<20, "cluster_size=512") // 256 tables of 512 bytes
	im := open(t, path, formats.Options{MetadataCache: 64 << 10})
	want := make([]byte, 8<<20)
	for range 4 {
		scribble(t, im, rng, want)
	}
	sameBytes(t, "with a small cache", readAll(t, im), want)
	s := im.Stats()
	if s.Limit >= 256*512 || s.Cached > s.Limit+64*512 {
		t.Errorf("the cache holds %d bytes, limit %d", s.Cached, s.Limit)
	}
	if s.Misses < 256 || s.HitRate() <= 0 || s.HitRate() >= 1 {
		t.Errorf("counters make no sense: %+v, hit rate %f", s, s.HitRate())
	}
	if err := im.Close(); err != nil {
		t.Fatal(err)
	}
	qemuCheck(t, path)
	sameBytes(t, "as QEMU reads it", rawOf(t, path), want)
}

// TestAdjacentClustersAreOneOperation: what the guest has in one piece, and the
// file too, is read and written at once.
func TestAdjacentClustersAreOneOperation(t *testing.T) {
	path := filepath.Join(testenv.TmpfsDir(t), "image")
	qemuCreate(t, path, 64<<20, "preallocation=metadata,cluster_size=4K")
	var counted *counter
	im := config(variant{}).Open(t, path, false, func(below aio.Storage) aio.Storage {
		counted = &counter{Storage: below}
		return counted
	})
	defer im.Close()
	l, err := aio.NewLoop(aio.LoopOptions{})
	if err != nil {
		testenv.Skip(t, err.Error())
	}
	defer l.Close()
	const size = 1 << 20 // 256 clusters, whose entries fill half a slice
	m, err := aio.NewMemory(size)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	for _, op := range []aio.Op{aio.OpWrite, aio.OpRead} {
		before := counted.ops
		done := make(chan struct{})
		r := &aio.Request{Op: op, Offset: 8192, Length: size, Vec: []aio.Iovec{m.Iovec(0, size)}, Done: func(r *aio.Request) {
			if r.Errno != 0 {
				t.Error(r.Errno)
			}
			close(done)
		}}
		l.Post(func() { im.Submit(l, []*aio.Request{r}) })
		<-done
		// The file has a table of the metadata between some of them.
		if n := counted.ops - before; n < 1 || n > 2 {
			t.Errorf("%v of 256 clusters took %d operations", op, n)
		}
	}
}

// counter counts reads and writes of whole clusters.
type counter struct {
	aio.Storage
	ops int
}

func (c *counter) Submit(l *aio.Loop, batch []*aio.Request) {
	for _, r := range batch {
		if (r.Op == aio.OpRead || r.Op == aio.OpWrite) && r.Length > 4096 {
			c.ops++
		}
	}
	c.Storage.Submit(l, batch)
}

// Truncate passes on.
func (c *counter) Truncate(size int64) error { return c.Storage.(aio.Truncater).Truncate(size) }
