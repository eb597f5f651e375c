package formats

// GapStats is what an image has written to join requests that do not touch:
// the bytes between them, which hold what they held before, or zeroes where
// nothing was.
type GapStats struct {
	Writes uint64 // writes to a file that filled at least one gap
	Bytes  uint64 // that only filled gaps
}

// GapFiller is the ability of an image to join across gaps.
type GapFiller interface {
	// GapStats is what has been filled since the image was opened. It may be
	// called from any goroutine.
	GapStats() GapStats
}
