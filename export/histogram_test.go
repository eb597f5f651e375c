package export

import (
	"testing"
	"time"

	"pgregory.net/rapid"
)

// Buckets follow each other without gaps, each duration is in the one that ends
// at or after it, and none is wider than a quarter of where it starts.
func TestBuckets(t *testing.T) {
	start := int64(0)
	for i := range latencyBuckets {
		end := int64(bucketEnd(i))
		if end < start || bucketOf(start) != i || bucketOf(end) != i {
			t.Fatalf("bucket %d is from %d to %d: those are in %d and %d", i, start, end, bucketOf(start), bucketOf(end))
		}
		if width := end - start + 1; width > 1 && width*4 > start {
			t.Errorf("bucket %d, from %d, is %d wide", i, start, width)
		}
		start = end + 1
	}
	if longest := time.Duration(start); longest < 2*time.Minute {
		t.Errorf("the last bucket begins before %v", longest)
	}
	for _, d := range []int64{start, 1 << 62, 1<<63 - 1} {
		if bucketOf(d) != latencyBuckets-1 {
			t.Errorf("%d is in bucket %d", d, bucketOf(d))
		}
	}
	if bucketOf(-1) != 0 {
		t.Error("a clock that goes back")
	}
}

func TestQuantile(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		durations := rapid.SliceOfN(rapid.Int64Range(0, 1<<36), 1, 50).Draw(t, "durations")
		q := rapid.Float64Range(0, 1).Draw(t, "q")
		var h, half Histogram
		for i, d := range durations {
			if i%2 == 0 {
				half[bucketOf(d)]++
			} else {
				h[bucketOf(d)]++
			}
		}
		h.add(&half)
		if int(h.Count()) != len(durations) {
			t.Fatalf("%d counted", h.Count())
		}
		got := h.Quantile(q)
		within := 0
		for _, d := range durations {
			if time.Duration(d) <= got {
				within++
			}
		}
		if float64(within) < q*float64(len(durations)) {
			t.Errorf("%d of %d are within the quantile %v", within, len(durations), q)
		}
		// A shorter bucket would not do.
		if b := bucketOf(int64(got)); b > 0 && within > 0 {
			shorter := 0
			for _, d := range durations {
				if time.Duration(d) <= bucketEnd(b-1) {
					shorter++
				}
			}
			if shorter > 0 && float64(shorter) >= q*float64(len(durations)) {
				t.Errorf("%v is longer than it need be", got)
			}
		}
	})
	if d := (&Histogram{}).Quantile(0.5); d != 0 {
		t.Errorf("nothing took %v", d)
	}
}
