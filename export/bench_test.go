package export_test

import (
	"fmt"
	"testing"

	"platter/aio"
	"platter/export"
)

// BenchmarkQueue is what a queue costs for each request, on an image that does
// nothing.
func BenchmarkQueue(b *testing.B) {
	for _, depth := range []int{1, 64} {
		b.Run(fmt.Sprintf("depth %d", depth), func(b *testing.B) {
			q := export.New(silent{newImage()}, export.Options{NoMerge: true}).NewQueue(nil)
			requests := make([]*aio.Request, depth)
			for i := range requests {
				requests[i] = read(int64(i)*8192, 4096)
				requests[i].Done = func(*aio.Request) {}
			}
			batch := make([]*aio.Request, depth)
			b.ReportAllocs()
			for b.Loop() {
				copy(batch, requests)
				q.Submit(batch)
				q.Completed(requests)
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*depth), "ns/request")
		})
	}
}
