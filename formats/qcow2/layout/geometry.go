package layout

// Geometry is what the header's sizes and features mean for the tables.
type Geometry struct {
	ClusterBits   uint
	RefcountOrder uint
	Version       uint32
	Extended      bool // L2 entries have subclusters
	External      bool // guest clusters stand in a data file, at their guest offset
}

// Geometry derives the geometry. The header must be valid.
func (h *Header) Geometry() Geometry {
	return Geometry{
		ClusterBits:   uint(h.ClusterBits),
		RefcountOrder: uint(h.RefcountOrder),
		Version:       h.Version,
		Extended:      h.Has(ExtendedL2),
		External:      h.Has(ExternalData),
	}
}

// ClusterSize is in bytes.
func (g Geometry) ClusterSize() int64 { return 1 << g.ClusterBits }

// Subclusters is how many parts of a cluster are allocated on their own: 32
// with extended L2 entries, otherwise 1.
func (g Geometry) Subclusters() int {
	if g.Extended {
		return 32
	}
	return 1
}

// SubclusterBits is the binary logarithm of a subcluster's size in bytes.
func (g Geometry) SubclusterBits() uint {
	if g.Extended {
		return g.ClusterBits - 5
	}
	return g.ClusterBits
}

// L2EntrySize is 8 bytes, or 16 with extended entries.
func (g Geometry) L2EntrySize() int {
	if g.Extended {
		return 16
	}
	return 8
}

// L2Bits is the binary logarithm of the number of entries in an L2 table.
func (g Geometry) L2Bits() uint {
	if g.Extended {
		return g.ClusterBits - 4
	}
	return g.ClusterBits - 3
}

// RefcountBlockBits is the binary logarithm of the number of refcounts in a block.
func (g Geometry) RefcountBlockBits() uint { return g.ClusterBits + 3 - g.RefcountOrder }

// MaxRefcount is the largest value of a refcount.
func (g Geometry) MaxRefcount() uint64 { return 1<<(1<<g.RefcountOrder) - 1 }

// MaxSize is the largest disk that an L1 table of the largest size can map.
func (g Geometry) MaxSize() int64 {
	return MaxL1Bytes / 8 << (g.L2Bits() + g.ClusterBits)
}

// L1EntriesFor is how many L1 entries map size bytes; ok is false if that is
// more than an L1 table can have.
func (g Geometry) L1EntriesFor(size int64) (n int64, ok bool) {
	if size < 0 || size > g.MaxSize() {
		return 0, false
	}
	shift := g.L2Bits() + g.ClusterBits
	return (size + 1<<shift - 1) >> shift, true
}

// Clusters is how many clusters cover n bytes.
func (g Geometry) Clusters(n int64) int64 { return (n + g.ClusterSize() - 1) >> g.ClusterBits }

func (g Geometry) aligned(off int64) bool { return off&(1<<g.ClusterBits-1) == 0 }

// validOffset reports whether off can be the start of a cluster.
func (g Geometry) validOffset(off int64) bool {
	return off >= 0 && off < MaxOffset && g.aligned(off)
}
