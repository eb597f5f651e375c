package check

import "fmt"

// Report is what `qemu-img check --output json` prints, with the same names. Of
// the fields that qemu-img leaves out when they are 0, JSON leaves out the same.
type Report struct {
	// CheckErrors counts what kept parts of the image from being checked.
	CheckErrors int64 `json:"check-errors"`
	// Corruptions counts what endangers data, or has damaged it already.
	Corruptions int64 `json:"corruptions,omitempty"`
	// Leaks counts clusters with a refcount that is too high.
	Leaks int64 `json:"leaks,omitempty"`
	// CorruptionsFixed and LeaksFixed are what a repair has corrected. One finding
	// may take several corrections, or go with another's.
	CorruptionsFixed int64 `json:"corruptions-fixed,omitempty"`
	LeaksFixed       int64 `json:"leaks-fixed,omitempty"`
	// ImageEndOffset is where the last cluster in use ends, in bytes.
	ImageEndOffset int64 `json:"image-end-offset,omitempty"`
	// TotalClusters is how many clusters the guest's disk has.
	TotalClusters int64 `json:"total-clusters,omitempty"`
	// AllocatedClusters is how many of them have a place in the file.
	AllocatedClusters int64 `json:"allocated-clusters,omitempty"`
	// FragmentedClusters is how many of these don't follow their predecessor.
	FragmentedClusters int64 `json:"fragmented-clusters,omitempty"`
	// CompressedClusters is how many of them are compressed.
	CompressedClusters int64 `json:"compressed-clusters,omitempty"`
}

// ExitCode is that of `qemu-img check`: 0 for a clean image, 1 when the check
// was incomplete, 2 for corruptions, 3 for leaks only.
func (r *Report) ExitCode() int {
	switch {
	case r.CheckErrors > 0:
		return 1
	case r.Corruptions > 0:
		return 2
	case r.Leaks > 0:
		return 3
	}
	return 0
}

// corrupt counts n corruptions that have one cause.
func (c *checker) corrupt(n int64, format string, args ...any) {
	c.report.Corruptions += n
	c.logf("ERROR "+format, args...)
}

// logf builds the line only if somebody will read it.
func (c *checker) logf(format string, args ...any) {
	if c.options.Log == nil || c.logged > MaxLog {
		return
	}
	if c.logged++; c.logged > MaxLog {
		c.options.Log(fmt.Sprintf("more than %d findings: the rest is counted, but not listed", MaxLog))
		return
	}
	c.options.Log(fmt.Sprintf(format, args...))
}
