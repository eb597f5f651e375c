package merge

import (
	"math/rand/v2"
	"testing"

	"platter/aio"
)

// batchSize is a usual depth of a queue.
const batchSize = 64

// newBatch returns requests of 4 KiB at the given multiples of 4 KiB, each with
// memory of its own.
func newBatch(op aio.Op, blocks []int) []*aio.Request {
	batch := make([]*aio.Request, len(blocks))
	for i, b := range blocks {
		batch[i] = &aio.Request{
			Op: op, Offset: int64(b) * 4096, Length: 4096,
			Vec:  []aio.Iovec{{Base: uintptr(i) * 4096, Len: 4096}},
			Done: func(*aio.Request) {},
		}
	}
	return batch
}

// randomBatches returns batches at random places of 1 GiB; several, so that the
// processor can't learn one by heart.
func randomBatches(op aio.Op, size int) [][]*aio.Request {
	rng := rand.New(rand.NewPCG(1, 2))
	batches := make([][]*aio.Request, 64)
	for i := range batches {
		blocks := make([]int, size)
		for j := range blocks {
			blocks[j] = rng.IntN(1 << 18)
		}
		batches[i] = newBatch(op, blocks)
	}
	return batches
}

func benchmark(b *testing.B, batches [][]*aio.Request) {
	m := New(Limits{}, func([]*aio.Request) { b.Fatal("nothing has failed") })
	out := make([]*aio.Request, 0, sectionMax)
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		batch := batches[i%len(batches)]
		out = m.Merge(out[:0], batch)
		if len(out) < len(batch) {
			for _, r := range out {
				r.Complete(0)
			}
		}
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*len(batches[0])), "ns/request")
}

// BenchmarkRandom64 is the price of merging where there is nothing to merge.
func BenchmarkRandom64(b *testing.B) {
	b.Run("read", func(b *testing.B) { benchmark(b, randomBatches(aio.OpRead, batchSize)) })
	b.Run("write", func(b *testing.B) { benchmark(b, randomBatches(aio.OpWrite, batchSize)) })
	b.Run("mixed", func(b *testing.B) {
		batches := randomBatches(aio.OpRead, batchSize)
		for _, batch := range batches {
			for i := 0; i < len(batch); i += 3 {
				batch[i].Op = aio.OpWrite
			}
		}
		benchmark(b, batches)
	})
}

// BenchmarkRandom8 is a shallow queue.
func BenchmarkRandom8(b *testing.B) { benchmark(b, randomBatches(aio.OpRead, 8)) }

// BenchmarkRandom32 is a queue of middling depth.
func BenchmarkRandom32(b *testing.B) { benchmark(b, randomBatches(aio.OpRead, 32)) }

// BenchmarkSequential64 joins a whole batch, and completes it.
func BenchmarkSequential64(b *testing.B) {
	blocks := make([]int, batchSize)
	for i := range blocks {
		blocks[i] = i
	}
	b.Run("ascending", func(b *testing.B) { benchmark(b, [][]*aio.Request{newBatch(aio.OpRead, blocks)}) })
	rand.New(rand.NewPCG(1, 2)).Shuffle(len(blocks), func(i, j int) { blocks[i], blocks[j] = blocks[j], blocks[i] })
	b.Run("shuffled", func(b *testing.B) { benchmark(b, [][]*aio.Request{newBatch(aio.OpRead, blocks)}) })
}

// BenchmarkHostile64 is the dearest batch: reads and writes of one block in
// turn, each in the way of the one before.
func BenchmarkHostile64(b *testing.B) {
	batch := newBatch(aio.OpRead, make([]int, batchSize))
	for i := 0; i < len(batch); i += 2 {
		batch[i].Op = aio.OpWrite
	}
	benchmark(b, [][]*aio.Request{batch})
}
