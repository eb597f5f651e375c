package loadgen

import (
	"math/bits"
	"time"
)

// Histogram counts durations in buckets whose width is at most 1/16 of their
// value. The zero value is empty and ready for use; it never allocates.
type Histogram struct {
	counts [64 * histSteps]uint64
	total  uint64
}

// histSteps is the number of buckets per power of two.
const histSteps = 16

func (h *Histogram) record(d time.Duration) {
	h.counts[bucketOf(uint64(max(d, 0)))]++
	h.total++
}

func (h *Histogram) add(o *Histogram) {
	for i, n := range o.counts {
		h.counts[i] += n
	}
	h.total += o.total
}

// Count is the number of durations recorded.
func (h *Histogram) Count() uint64 { return h.total }

// Quantile returns the duration that the fraction q of all records do not
// exceed, rounded up to its bucket's end; 0 when nothing was recorded.
func (h *Histogram) Quantile(q float64) time.Duration {
	want := uint64(q * float64(h.total))
	var seen uint64
	for i, n := range h.counts {
		if seen += n; n > 0 && seen >= want {
			return time.Duration(bucketEnd(i))
		}
	}
	return 0
}

// bucketOf maps values below 16 to themselves; above, the four bits after the
// leading one choose among the steps of a power of two.
func bucketOf(v uint64) int {
	if v < histSteps {
		return int(v)
	}
	exp := bits.Len64(v) - 5 // v>>exp is in [16, 32)
	return exp*histSteps + int(v>>exp)
}

// bucketEnd is the largest value of bucket i.
func bucketEnd(i int) uint64 {
	if i < 2*histSteps {
		return uint64(i)
	}
	exp := i/histSteps - 1
	return (uint64(histSteps+i%histSteps)+1)<<exp - 1
}
