package formats

import "platter/aio"

// Image is an open disk image: a guest disk of Size bytes, whatever the file
// below it looks like. It is an aio.Storage whose offsets are the guest's.
//
// Submit may be called from many loops at a time, each on its own thread; it
// never blocks a loop. Nothing is durable until an OpFlush that was submitted
// after the write completed has itself completed, or the write had FlagFUA.
// OpDiscard may do nothing. OpWriteZeroes always reads back as zeroes. Requests
// are within Size, aligned to Limits.BlockSize and no longer than the limits
// (package export sees to that). An error that only a caller's mistake can
// cause is EINVAL, but a write or write-zeroes beyond Size is ENOSPC; an image
// never grows by itself. Any write to a read-only image is EPERM. After an error
// of the file below, what a failed write's range holds is not defined, and the
// image goes on working.
type Image interface {
	aio.Storage
	// ReadOnly reports whether writes are refused.
	ReadOnly() bool
	// Limits tells what requests the image takes and likes. It does not change
	// while the image is open.
	Limits() Limits
	// Format is the name of the format, as in --format: "raw", "qcow2".
	Format() string
}

// Leaver is an image that keeps something for each loop that submits to it.
type Leaver interface {
	// Leave tells that the caller submits nothing more on the loop and has
	// nothing in flight there: what the image keeps for the loop is given back,
	// unless others still use it. It is called on the loop's thread, and not
	// while the image is being closed. The loop may be used again.
	Leave(l *aio.Loop)
}

// Limits describes the requests that an image takes. All but MaxSegments are
// bytes.
type Limits struct {
	BlockSize          uint32 // smallest unit of reads and writes, a power of two; 1 when any range is fine
	PreferredSize      uint32 // requests aligned to this are cheapest, a power of two ≥ BlockSize
	MaxTransfer        int64  // longest read or write
	MaxSegments        int    // longest Vec
	DiscardGranularity uint32 // smallest range that a discard can free
	MultiConn          bool   // a flush on one loop covers writes completed on every loop
	FUA                bool   // FlagFUA costs less than a write and a flush
	FastZero           bool   // OpWriteZeroes is cheaper than writing zeroes
	Rotational         bool   // the disk below seeks
}

// Extent is a run of guest bytes of one kind, as `qemu-img map` shows it.
type Extent struct {
	Start   int64
	Length  int64
	Depth   int   // 0: this image; n: the nth file of its backing chain
	Present bool  // allocated somewhere in the chain
	Zero    bool  // reads as zeroes
	Data    bool  // has bytes of its own in a file
	Packed  bool  // those are compressed
	Offset  int64 // where Data stands in its file; -1 when it has no plain place
	File    string
}

// Mapper is the ability to tell data from holes.
type Mapper interface {
	// Extents appends to dst the extents that cover [off, off+length), in
	// order and without gaps, neighbours of one kind joined, and returns it.
	// It stops after max extents when max > 0. It reads metadata and may block:
	// never call it on a loop.
	Extents(dst []Extent, off, length int64, max int) ([]Extent, error)
}
