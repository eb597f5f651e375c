package qcow2_test

import (
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"testing"

	"platter/aio"
	"platter/formats"
	"platter/formats/qcow2"
	"platter/formats/raw"
	"platter/integration/testenv"
)

// BenchmarkMapped shows what a mapped image costs beside a raw one, without a
// front end: batches of 32 random requests of 4 KiB.
func BenchmarkMapped(b *testing.B) {
	const size, blockSize, depth = 256 << 20, 4096, 32
	dir := testenv.TmpfsDir(b)
	paths := map[string]string{"raw": filepath.Join(dir, "raw"), "qcow2": filepath.Join(dir, "qcow2")}
	if err := raw.Create(paths["raw"], size, raw.CreateOptions{}); err != nil {
		b.Fatal(err)
	}
	qemuCreate(b, paths["qcow2"], size, "preallocation=falloc")
	l, err := aio.NewLoop(aio.LoopOptions{})
	if err != nil {
		testenv.Skip(b, err.Error())
	}
	defer l.Close()
	m, err := aio.NewMemory(1 << 20) // larger requests all use the same
	if err != nil {
		b.Fatal(err)
	}
	defer m.Close()
	var failed error
	pending, done := 0, make(chan struct{}, 1)
	batch := make([]*aio.Request, depth)
	for i := range batch {
		batch[i] = &aio.Request{Done: func(r *aio.Request) {
			if r.Errno != 0 {
				failed = fmt.Errorf("%v at %d: %w", r.Op, r.Offset, r.Errno)
			}
			if pending--; pending == 0 {
				done <- struct{}{}
			}
		}}
	}
	for _, format := range []string{"raw", "qcow2"} {
		im, err := formats.Open(paths[format], formats.Options{Format: format})
		if err != nil {
			b.Fatal(err)
		}
		defer im.Close()
		run := func(op aio.Op, length int, at func() int64) {
			for i, r := range batch {
				r.Op, r.Offset, r.Length = op, at(), int64(length)
				r.Vec = []aio.Iovec{m.Iovec(i*length%len(m.Bytes()), length)}
			}
			pending = len(batch)
			l.Post(func() { im.Submit(l, batch) })
			<-done
			if failed != nil {
				b.Fatal(failed)
			}
		}
		next := int64(0)
		for range size >> 20 / depth {
			run(aio.OpWrite, 1<<20, func() int64 { next += 1 << 20; return next - 1<<20 })
		}
		for _, op := range []aio.Op{aio.OpRead, aio.OpWrite} {
			b.Run(fmt.Sprint(op, "/", format), func(b *testing.B) {
				rng := rand.New(rand.NewPCG(1, 2))
				for b.Loop() {
					run(op, blockSize, func() int64 { return rng.Int64N(size/blockSize) * blockSize })
				}
			})
		}
	}
}

// BenchmarkMergeGap shows from which length on it is cheaper to write twice than
// to fill a gap: writes of 4 KiB with gaps between them to new clusters, in
// batches of 64, and a flush in the end. An operation is one guest write.
func BenchmarkMergeGap(b *testing.B) {
	const writes, blockSize, depth = 8192, 4096, 64
	l, err := aio.NewLoop(aio.LoopOptions{})
	if err != nil {
		testenv.Skip(b, err.Error())
	}
	defer l.Close()
	m, err := aio.NewMemory(depth * blockSize)
	if err != nil {
		b.Fatal(err)
	}
	defer m.Close()
	for name, dir := range map[string]string{"memory": testenv.TmpfsDir(b), "disk": b.TempDir()} {
		for _, gap := range []int64{4 << 10, 8 << 10, 16 << 10, 28 << 10, 60 << 10} {
			for _, fill := range []int64{-1, qcow2.MaxMergeGap} {
				how := "filled"
				if fill < 0 {
					how = "apart"
				}
				b.Run(fmt.Sprintf("%s/%dK/%s", name, gap>>10, how), func(b *testing.B) {
					size := writes * (blockSize + gap)
					for b.Loop() {
						b.StopTimer()
						path := filepath.Join(dir, "image")
						qemuCreate(b, path, size, "compat=1.1")
						im, err := qcow2.Open(path, formats.Options{MergeGap: fill})
						if err != nil {
							b.Fatal(err)
						}
						b.StartTimer()
						for off := int64(0); off < size; {
							batch := make([]*aio.Request, depth)
							for i := range batch {
								batch[i] = &aio.Request{Op: aio.OpWrite, Offset: off, Length: blockSize, Vec: []aio.Iovec{m.Iovec(i*blockSize, blockSize)}}
								off += blockSize + gap
							}
							submitAll(b, l, im, batch)
						}
						submitAll(b, l, im, []*aio.Request{{Op: aio.OpFlush}})
						b.StopTimer()
						if err := im.Close(); err != nil {
							b.Fatal(err)
						}
						b.StartTimer()
					}
					b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*writes), "ns/write")
				})
			}
		}
	}
}

// submitAll submits a batch and waits for it.
func submitAll(b *testing.B, l *aio.Loop, im *qcow2.Image, batch []*aio.Request) {
	b.Helper()
	pending, done := len(batch), make(chan error, 1)
	var failed error
	for _, r := range batch {
		r.Done = func(r *aio.Request) {
			if r.Errno != 0 {
				failed = r.Errno
			}
			if pending--; pending == 0 {
				done <- failed
			}
		}
	}
	l.Post(func() { im.Submit(l, batch) })
	if err := <-done; err != nil {
		b.Fatal(err)
	}
}
