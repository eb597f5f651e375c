package create

import (
	"bytes"
	"fmt"
	"math/bits"
	"strconv"
	"strings"

	"platter/formats/qcow2/layout"
)

// plan is where everything of a new image stands. One follows the other: the
// header, the refcount table, the refcount blocks, the L1 table and, when the
// image is preallocated, all L2 tables and the clusters that they map.
//
// So the blocks are one long array of refcounts, of which the first are 1 and
// the rest 0, and the L2 tables one long array of entries.
type plan struct {
	layout.Geometry
	header layout.Header
	head   []byte // the header encoded, in as many bytes as it needs but whole sectors

	refcountTable, refcountBlocks, l1, l2, data region

	mapped   int64 // guest clusters that the L2 tables map
	length   int64 // of the file, in bytes
	dataPath string
}

// region is a run of clusters.
type region struct{ first, count int64 }

// end is the first cluster behind it.
func (r region) end() int64 { return r.first + r.count }

// newPlan checks the options, which have their defaults filled in, and lays an
// image of size bytes out.
func newPlan(path string, size int64, o *Options) (*plan, error) {
	p := &plan{header: layout.Header{
		Version:       uint32(o.Version),
		ClusterBits:   uint32(bits.TrailingZeros64(uint64(o.ClusterSize))),
		RefcountOrder: uint32(bits.TrailingZeros(uint(o.RefcountBits))),
		BackingFile:   o.BackingFile,
	}}
	p.setFeatures(o)
	p.Geometry = p.header.Geometry()
	if size < 0 || size > p.MaxSize() {
		return nil, p.sizeError(size, p.MaxSize(), "more would take an L1 table of over 32 MiB")
	}
	if p.External && size > layout.MaxOffset {
		return nil, p.sizeError(size, layout.MaxOffset, "a data_file has its clusters below 64 PiB")
	}
	p.header.Size = (size + sector - 1) &^ (sector - 1)
	if o.DataFile != "" {
		p.dataPath = beside(p.header.DataFile(), path)
	}
	// The data file is a raw image at any time only if reading it and reading
	// through the tables is the same from the start.
	if o.Preallocation != PreallocateOff || o.DataFileRaw {
		p.mapped = p.Clusters(p.header.Size)
	}
	if err := p.place(); err != nil {
		return nil, err
	}
	return p, p.encode()
}

// sector is what sizes of disks are multiples of, and what a disk writes whole
// or not at all.
const sector = 512

func (p *plan) sizeError(size, limit int64, why string) error {
	e := &OptionError{"size", strconv.FormatInt(size, 10), fmt.Sprintf("must be from 0 to %d with clusters of %d bytes: %s", limit, p.ClusterSize(), why), ""}
	if size > limit && p.ClusterBits < layout.MaxClusterBits {
		e.Remedy = "use a larger cluster_size, or make a smaller image"
	}
	return e
}

func (p *plan) setFeatures(o *Options) {
	h := &p.header
	if o.LazyRefcounts {
		h.Compatible |= layout.LazyRefcounts
	}
	if o.ExtendedL2 {
		h.Incompatible |= layout.ExtendedL2
	}
	if o.Compression != layout.Zlib {
		h.Incompatible |= layout.Compression
		h.CompressionType = o.Compression
	}
	if o.DataFileRaw {
		h.Autoclear |= layout.RawExternal
	}
	if o.BackingFormat != "" {
		h.SetExtension(layout.ExtensionBackingFormat, []byte(o.BackingFormat))
	}
	if o.DataFile != "" {
		h.Incompatible |= layout.ExternalData
		h.SetExtension(layout.ExtensionDataFile, []byte(strings.TrimPrefix(o.DataFile, "file:")))
	}
	// The table takes most of 512 bytes, so that smaller clusters have no room
	// for it beside a backing file's name. QEMU draws the line here, too.
	if h.Version >= 3 && h.ClusterBits > 12 {
		h.SetExtension(layout.ExtensionFeatureNames, layout.FeatureNames())
	}
}

// place finds the place of every table. Refcounts count their own clusters too,
// so their number is found by trying until it is enough.
func (p *plan) place() error {
	entries, _ := p.L1EntriesFor(p.header.Size)
	p.l1.count = p.Clusters(8 * entries)
	p.l2.count = p.Clusters(int64(p.L2EntrySize()) * p.mapped)
	if !p.External {
		p.data.count = p.mapped
	}
	rest := 1 + p.l1.count + p.l2.count + p.data.count
	for total := int64(-1); total != p.data.end(); {
		total = rest + p.refcountTable.count + p.refcountBlocks.count
		p.refcountBlocks.count = (total + 1<<p.RefcountBlockBits() - 1) >> p.RefcountBlockBits()
		p.refcountTable.count = p.Clusters(8 * p.refcountBlocks.count)
		p.refcountTable.first = 1
		p.refcountBlocks.first = p.refcountTable.end()
		p.l1.first = p.refcountBlocks.end()
		p.l2.first = p.l1.end()
		p.data.first = p.l2.end()
	}
	switch {
	case p.refcountTable.count<<p.ClusterBits > layout.MaxRefcountTableBytes:
		return p.tooMuch("a refcount table of over 8 MiB")
	case p.data.end() > layout.MaxOffset>>p.ClusterBits:
		return p.tooMuch("a file of over 64 PiB")
	}
	p.length = p.data.end() << p.ClusterBits
	if p.mapped == 0 {
		p.length = p.l1.first<<p.ClusterBits + 8*entries // like QEMU's, which ends with the table
	}
	p.header.L1Entries = uint32(entries)
	if entries > 0 {
		p.header.L1Offset = p.offset(p.l1)
	}
	p.header.RefcountTableOffset = p.offset(p.refcountTable)
	p.header.RefcountTableClusters = uint32(p.refcountTable.count)
	return nil
}

func (p *plan) tooMuch(what string) error {
	return &OptionError{"preallocation", "", fmt.Sprintf("of %d bytes in clusters of %d would take %s", p.header.Size, p.ClusterSize(), what),
		"leave preallocation off, use a larger cluster_size or a smaller refcount_bits"}
}

// offset is where a region begins in the file, in bytes.
func (p *plan) offset(r region) int64 { return r.first << p.ClusterBits }

func (p *plan) encode() error {
	cluster := make([]byte, p.ClusterSize())
	if err := p.header.Encode(cluster); err != nil {
		option, name := "backing_file", p.header.BackingFile
		if p.External && len(p.header.DataFile()) > len(name) {
			option, name = "data_file", p.header.DataFile()
		}
		return &OptionError{option, "", fmt.Sprintf("has %d bytes, too many for the header, which must fit in a cluster of %d", len(name), p.ClusterSize()),
			"choose a shorter name or a larger cluster_size"}
	}
	used := len(bytes.TrimRight(cluster, "\x00"))
	p.head = cluster[:(used+sector-1)&^(sector-1)]
	return nil
}
