package cli

import (
	"bytes"
	"context"
	"runtime"
	"sync"

	"platter/formats"
)

const (
	// window is how much of the disk a worker copies at a time, in bytes: as
	// much as the largest cluster.
	window = 2 << 20
	// grain is the shortest run of zeroes that is left out, in bytes.
	grain = 4096
)

// job is a window of the disk with the data in it.
type job struct {
	start int64
	data  []stretch
	bytes int64 // by which the work is further when this is done
}

// stretch is a part of the disk.
type stretch struct{ off, length int64 }

// copyDisk copies what is not zero, with a few windows under way at a time. It
// tells progress how many more bytes of the disk are done, from any goroutine.
// It returns the first error, which is ctx's own when that ends.
func copyDisk(ctx context.Context, dst *target, src source, progress func(n int64)) error {
	ctx, fail := context.WithCancelCause(ctx)
	defer fail(nil)
	jobs := make(chan job)
	var workers sync.WaitGroup
	for range min(max(runtime.NumCPU(), 2), 16) {
		workers.Go(func() {
			buf := make([]byte, window)
			for j := range jobs {
				if err := dst.copy(src, j, buf); err != nil {
					fail(err)
				}
				progress(j.bytes)
			}
		})
	}
	if err := findJobs(ctx, src, jobs); err != nil {
		fail(err)
	}
	close(jobs)
	workers.Wait()
	return context.Cause(ctx)
}

// findJobs sends every window that has data, until ctx ends.
func findJobs(ctx context.Context, src source, jobs chan<- job) error {
	var j job
	told := int64(0) // how much of the disk the jobs that were sent account for
	send := func() {
		if len(j.data) == 0 {
			return
		}
		end := min(j.start+window, src.Size())
		j.bytes, told = end-told, end
		select {
		case jobs <- j:
		case <-ctx.Done():
		}
		j = job{}
	}
	var list []formats.Extent
	for off, size := int64(0), src.Size(); off < size && ctx.Err() == nil; {
		var err error
		if list, err = src.Extents(list[:0], off, size-off, extentsAtOnce); err != nil {
			return err
		}
		for _, e := range list {
			off = e.Start + e.Length
			for at := e.Start; at < off && !e.Zero; {
				start := at &^ (window - 1)
				if len(j.data) > 0 && j.start != start {
					send()
				}
				j.start = start
				n := min(off, start+window) - at
				j.data = append(j.data, stretch{at, n})
				at += n
			}
		}
	}
	send()
	return nil
}

// copy copies a window by way of buf.
func (t *target) copy(src source, j job, buf []byte) error {
	if t.compressed != nil {
		clear(buf)
	}
	for _, s := range j.data {
		p := buf[s.off-j.start:][:s.length]
		if _, err := src.ReadAt(p, s.off); err != nil {
			return err
		}
		if t.compressed != nil {
			continue
		}
		if err := t.writeData(p, s.off); err != nil {
			return err
		}
	}
	if t.compressed == nil {
		return nil
	}
	for at := j.start; at < min(j.start+window, t.size); at += t.clusterSize {
		p := buf[at-j.start:][:min(t.clusterSize, t.size-at)]
		if isZero(p) {
			continue
		}
		if err := t.compressed(p, at); err != nil {
			return t.explain(err)
		}
	}
	return nil
}

// writeData writes what is at off on the disk, but for runs of zeroes.
func (t *target) writeData(p []byte, off int64) error {
	for at := 0; at < len(p); {
		n, zero := alike(p[at:], off+int64(at))
		if !zero {
			if _, err := t.WriteAt(p[at:at+n], off+int64(at)); err != nil {
				return err
			}
		}
		at += n
	}
	return nil
}

// alike tells how long p, which is at off on the disk, goes on with blocks that
// are all zero, or all not.
func alike(p []byte, off int64) (n int, zero bool) {
	for n < len(p) {
		next := min(n+int(grain-(off+int64(n))%grain), len(p))
		z := isZero(p[n:next])
		if n > 0 && z != zero {
			break
		}
		n, zero = next, z
	}
	return n, zero
}

var zeroes [grain]byte

func isZero(p []byte) bool {
	for len(p) > grain {
		if !bytes.Equal(p[:grain], zeroes[:]) {
			return false
		}
		p = p[grain:]
	}
	return bytes.Equal(p, zeroes[:len(p)])
}
