package layout

import "fmt"

// Bits of L1 and L2 entries.
const (
	Copied       uint64 = 1 << 63      // the refcount is exactly 1: may be written in place
	CompressedL2 uint64 = 1 << 62      // L2: a compressed cluster
	ZeroFlag     uint64 = 1            // L2: reads as zeroes, whatever the offset
	OffsetMask   uint64 = 1<<56 - 1<<9 // bits 9 to 55
	l1Reserved   uint64 = 0x7f<<56 | 0x1ff
	l2Reserved   uint64 = 0x3f<<56 | 0x1fe
)

// EntryOffset is the offset in an L1, a bitmap table or an L2 entry, unless it is
// a compressed cluster's.
func EntryOffset(word uint64) int64 { return int64(word & OffsetMask) }

// CheckL1 reports what is wrong with an L1 entry.
func (g Geometry) CheckL1(word uint64) error {
	switch {
	case word&l1Reserved != 0:
		return invalid("L1 entry", Hex(word), "must not have reserved bits set")
	case !g.aligned(EntryOffset(word)):
		return invalid("L1 entry", Hex(word), "must name a multiple of the cluster size")
	}
	return nil
}

// Kind is what an L2 entry says of its cluster.
type Kind uint8

// The kinds of clusters. With extended entries Data means that there is a host
// cluster, and the subcluster bitmap tells which parts stand in it; Unallocated,
// that there is none, and the bitmap tells which parts are zeroes.
const (
	Unallocated   Kind = iota // the backing file's, or zeroes
	ZeroPlain                 // reads as zeroes, and has no host cluster
	ZeroAllocated             // reads as zeroes, with a host cluster kept for it
	Data                      // stands at the host offset
	Compressed                // packed somewhere in the file
)

var kindNames = [...]string{"unallocated", "zero", "preallocated zero", "data", "compressed"}

func (k Kind) String() string { return kindNames[k] }

// Kind decodes the first word of an L2 entry. With extended entries there is no
// zero flag.
func (g Geometry) Kind(word uint64) Kind {
	switch {
	case word&CompressedL2 != 0:
		return Compressed
	case !g.Extended && word&ZeroFlag != 0 && g.hasOffset(word):
		return ZeroAllocated
	case !g.Extended && word&ZeroFlag != 0:
		return ZeroPlain
	case g.hasOffset(word):
		return Data
	}
	return Unallocated
}

// hasOffset reports whether the entry names a host cluster. 0 is one only in a
// data file, where the copied bit tells it apart from none.
func (g Geometry) hasOffset(word uint64) bool {
	return word&OffsetMask != 0 || g.External && word&Copied != 0
}

// CheckL2 reports what is wrong with an L2 entry by itself: reserved bits, an
// offset that isn't a cluster's, a state that doesn't exist in this image.
// bitmap is the second word of an extended entry, else 0. guest is the guest
// offset that the entry maps, which a data file's entries must name.
func (g Geometry) CheckL2(word, bitmap uint64, guest int64) error {
	if word&CompressedL2 != 0 {
		return g.checkCompressed(word, bitmap)
	}
	switch {
	case word&l2Reserved != 0 || g.Extended && word&ZeroFlag != 0:
		return invalid("L2 entry", Hex(word), "must not have reserved bits set")
	case g.Version < 3 && word&ZeroFlag != 0:
		return invalid("L2 entry", Hex(word), "must not have the zero flag in version 2")
	case !g.aligned(EntryOffset(word)):
		return invalid("L2 entry", Hex(word), "must name a multiple of the cluster size")
	case g.External && g.hasOffset(word) && EntryOffset(word) != guest:
		return invalid("L2 entry", Hex(word), fmt.Sprintf("must name the guest offset %#x, since the image has a data file", guest))
	case !g.Extended:
		return nil
	}
	allocated, zero := uint32(bitmap), uint32(bitmap>>32)
	switch {
	case allocated&zero != 0:
		return invalid("subcluster bitmap", Hex(bitmap), "must not have a subcluster both allocated and zero")
	case allocated != 0 && !g.hasOffset(word):
		return invalid("subcluster bitmap", Hex(bitmap), "must not have allocated subclusters without a host cluster")
	}
	return nil
}

func (g Geometry) checkCompressed(word, bitmap uint64) error {
	off, _ := g.CompressedRange(word)
	switch {
	case word&Copied != 0:
		return invalid("L2 entry", Hex(word), "must not be both compressed and copied")
	case g.External:
		return invalid("L2 entry", Hex(word), "must not be compressed, since the image has a data file")
	case off >= MaxOffset:
		return invalid("L2 entry", Hex(word), "must name an offset below 64 PiB")
	case bitmap != 0:
		return invalid("subcluster bitmap", Hex(bitmap), "must be 0 with a compressed cluster")
	}
	return nil
}

// CompressedRange is where the data of a compressed cluster stands: from off on
// for at most length bytes, which end at a multiple of 512. That is at most two
// clusters, and may be beyond the end of the file.
func (g Geometry) CompressedRange(word uint64) (off, length int64) {
	x := 62 - (g.ClusterBits - 8)
	off = int64(word & (1<<x - 1))
	sectors := int64(word&(CompressedL2-1)>>x) + 1
	return off, sectors*512 - off&511
}

// CompressedEntry is the L2 entry for compressed data; ok is false when the
// offset or the length doesn't fit into one. With clusters over 16 KiB offsets
// end before 64 PiB: at 512 TiB with clusters of 2 MiB.
func (g Geometry) CompressedEntry(off, length int64) (word uint64, ok bool) {
	x := 62 - (g.ClusterBits - 8)
	more := (off+length-1)>>9 - off>>9
	if length <= 0 || off < 0 || off >= min(int64(1)<<x, MaxOffset) || more >= 1<<(g.ClusterBits-8) {
		return 0, false
	}
	return CompressedL2 | uint64(more)<<x | uint64(off), true
}
