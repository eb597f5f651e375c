package export

import (
	"fmt"
	"math/bits"
	"time"
)

// Histogram counts durations in buckets: four to each power of two of
// nanoseconds, so that a bucket is at most a quarter of its start wide. The last
// one takes all that are longer than two minutes.
type Histogram [latencyBuckets]uint64

const (
	bucketBits     = 2 // of a duration, behind the first, that choose its bucket
	latencyBuckets = (38 - bucketBits) << bucketBits
)

// bucketOf is the bucket of a duration in nanoseconds.
func bucketOf(d int64) int {
	v := uint64(max(d, 0))
	if v < 1<<bucketBits {
		return int(v)
	}
	shift := bits.Len64(v) - 1 - bucketBits
	return min(shift<<bucketBits+int(v>>shift), latencyBuckets-1)
}

// bucketEnd is the longest duration in a bucket.
func bucketEnd(i int) time.Duration {
	const first = 1 << bucketBits
	if i < first {
		return time.Duration(i)
	}
	shift := i>>bucketBits - 1
	return time.Duration((first+i%first+1)<<shift - 1)
}

// Count is how many durations were counted.
func (h Histogram) Count() uint64 {
	var n uint64
	for _, c := range h {
		n += c
	}
	return n
}

// Quantile is the duration that the fraction q of those counted did not exceed,
// up to the width of a bucket; 0 when nothing was counted. Quantile(1) is the
// longest.
func (h Histogram) Quantile(q float64) time.Duration {
	want := q * float64(h.Count())
	var seen uint64
	for i, n := range h {
		if seen += n; n > 0 && float64(seen) >= want {
			return bucketEnd(i)
		}
	}
	return 0
}

// String is the median, the 99th percentile and the longest.
func (h Histogram) String() string {
	return fmt.Sprintf("%v/%v/%v", h.Quantile(0.5), h.Quantile(0.99), h.Quantile(1))
}

func (h *Histogram) add(o *Histogram) {
	for i, n := range o {
		h[i] += n
	}
}
