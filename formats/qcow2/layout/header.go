package layout

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
)

// Magic is the first four bytes of every qcow2 file.
const Magic = "QFI\xfb"

// Sizes of the header in bytes.
const (
	HeaderSizeV2  = 72
	HeaderSizeV3  = 104 // the least that version 3 may have
	HeaderSizeNew = 112 // with the compression type
)

// Incompatible features: who doesn't know one can't open the image.
const (
	Dirty             uint64 = 1 << iota // refcounts may be too low
	Corrupt                              // must not be written to
	ExternalData                         // guest clusters stand in a file of their own
	Compression                          // the compression type isn't zlib
	ExtendedL2                           // L2 entries have subclusters
	incompatibleKnown = 1<<iota - 1
)

// LazyRefcounts is the one compatible feature: refcounts may be left behind
// while Dirty is set.
const LazyRefcounts uint64 = 1

// Autoclear features: whoever writes without knowing one clears it.
const (
	BitmapsValid   uint64 = 1 << iota // the bitmaps extension is consistent
	RawExternal                       // the data file is a raw image by itself
	autoclearKnown = 1<<iota - 1
)

// Encryption is the value of crypt_method.
type Encryption uint32

// What crypt_method can be.
const (
	Plain Encryption = iota
	AES
	LUKS
)

func (e Encryption) String() string {
	switch e {
	case Plain:
		return "none"
	case AES:
		return "aes"
	case LUKS:
		return "luks"
	}
	return fmt.Sprintf("method %d", uint32(e))
}

// CompressionType is how an image's compressed clusters are packed.
type CompressionType uint8

// The compression types. Zlib is raw deflate data, without zlib's header.
const (
	Zlib CompressionType = iota
	Zstd
)

func (c CompressionType) String() string {
	switch c {
	case Zlib:
		return "zlib"
	case Zstd:
		return "zstd"
	}
	return fmt.Sprintf("type %d", uint8(c))
}

// Header is the header of an image with everything in its first cluster: the
// extensions and the name of the backing file.
type Header struct {
	Version               uint32
	BackingFile           string // as written in the image; "" when it has none
	ClusterBits           uint32
	Size                  int64 // of the guest's disk, in bytes
	Encryption            Encryption
	L1Entries             uint32
	L1Offset              int64
	RefcountTableOffset   int64
	RefcountTableClusters uint32
	Snapshots             uint32
	SnapshotsOffset       int64
	Incompatible          uint64 // 0 in version 2, as are the next two
	Compatible            uint64
	Autoclear             uint64
	RefcountOrder         uint32 // 4 in version 2
	CompressionType       CompressionType
	Extra                 []byte // the rest of a longer header, unknown here, kept
	Extensions            []Extension

	// short tells that the header was read from an image where it ends before
	// the compression type. It stays so: longer, it may not fit into the cluster.
	short bool
}

// ReadHeader reads and validates the header. size is the length of the file. It
// allocates less than 64 MiB, whatever the file holds; the header of an image
// that QEMU made takes as much as its first cluster.
func ReadHeader(r io.ReaderAt, size int64) (*Header, error) {
	head := make([]byte, min(size, 1<<MinClusterBits))
	n, err := r.ReadAt(head, 0)
	if err != nil && err != io.EOF {
		return nil, fmt.Errorf("read header: %w", err)
	}
	if head = head[:n]; len(head) < HeaderSizeV2 || !validClusterBits(binary.BigEndian.Uint32(head[20:])) {
		return ParseHeader(head) // which says what is wrong
	}
	// The header and all that goes with it stand in the first cluster, which may
	// be the file's last and short.
	cluster := make([]byte, min(size, 1<<binary.BigEndian.Uint32(head[20:])))
	if n, err = r.ReadAt(cluster, 0); err != nil && err != io.EOF {
		return nil, fmt.Errorf("read header: %w", err)
	}
	return ParseHeader(cluster[:n])
}

func validClusterBits(bits uint32) bool { return bits >= MinClusterBits && bits <= MaxClusterBits }

// ParseHeader decodes and validates the first cluster of a file, which may be cut
// off where the file ends. The header keeps nothing of b.
func ParseHeader(b []byte) (*Header, error) {
	if len(b) < HeaderSizeV2 || string(b[:4]) != Magic {
		return nil, fmt.Errorf("%w: no qcow2 header", ErrNotQcow2)
	}
	be := binary.BigEndian
	h := &Header{
		Version:               be.Uint32(b[4:]),
		ClusterBits:           be.Uint32(b[20:]),
		Size:                  int64(be.Uint64(b[24:])),
		Encryption:            Encryption(be.Uint32(b[32:])),
		L1Entries:             be.Uint32(b[36:]),
		L1Offset:              int64(be.Uint64(b[40:])),
		RefcountTableOffset:   int64(be.Uint64(b[48:])),
		RefcountTableClusters: be.Uint32(b[56:]),
		Snapshots:             be.Uint32(b[60:]),
		SnapshotsOffset:       int64(be.Uint64(b[64:])),
		RefcountOrder:         4,
	}
	if err := h.checkVersion(); err != nil {
		return nil, err
	}
	if !validClusterBits(h.ClusterBits) {
		return nil, invalid("cluster_bits", h.ClusterBits, "must be 9 to 21")
	}
	b = b[:min(len(b), 1<<h.ClusterBits)]
	length := HeaderSizeV2
	if h.Version >= 3 {
		var err error
		if length, err = h.parseV3(b); err != nil {
			return nil, err
		}
	}
	end, err := h.parseBackingFile(b, length)
	if err != nil {
		return nil, err
	}
	// A feature that is unknown here may well be why the extensions look wrong.
	if h.Extensions, err = parseExtensions(b[length:end]); err != nil && h.Incompatible&^incompatibleKnown == 0 {
		return nil, err
	}
	if err := h.Validate(); err != nil {
		return nil, err
	}
	return h, nil
}

// parseBackingFile decodes the name of the backing file, which stands behind the
// extensions, and returns where these end.
func (h *Header) parseBackingFile(b []byte, length int) (end int, err error) {
	off, n := int64(binary.BigEndian.Uint64(b[8:])), binary.BigEndian.Uint32(b[16:])
	switch {
	case off == 0:
		return len(b), nil
	case n > MaxBackingName:
		return 0, invalid("backing_file_size", n, "must be at most 1023")
	case off < int64(length) || off > int64(len(b)):
		return 0, invalid("backing_file_offset", Hex(off), fmt.Sprintf("must be %#x to %#x, behind the header in the first cluster", length, len(b)))
	case int64(n) > int64(len(b))-off:
		return 0, invalid("backing_file_size", n, fmt.Sprintf("must be at most the %d bytes that are left in the first cluster", int64(len(b))-off))
	}
	h.BackingFile = string(b[off : off+int64(n)])
	return int(off), nil
}

// parseV3 decodes what version 3 added and returns the length of the header.
func (h *Header) parseV3(b []byte) (length int, err error) {
	if len(b) < HeaderSizeV3 {
		return 0, invalid("file length", len(b), "must be at least 104 for version 3")
	}
	be := binary.BigEndian
	h.Incompatible, h.Compatible, h.Autoclear = be.Uint64(b[72:]), be.Uint64(b[80:]), be.Uint64(b[88:])
	h.RefcountOrder = be.Uint32(b[96:])
	n := be.Uint32(b[100:])
	switch {
	case n < HeaderSizeV3:
		return 0, invalid("header_length", n, "must be at least 104")
	case n%8 != 0:
		return 0, invalid("header_length", n, "must be a multiple of 8")
	case int64(n) > int64(len(b)):
		return 0, invalid("header_length", n, fmt.Sprintf("must be at most the %d bytes of the first cluster", len(b)))
	}
	if h.short = n == HeaderSizeV3; !h.short {
		h.CompressionType = CompressionType(b[HeaderSizeV3])
		h.Extra = bytes.Clone(b[HeaderSizeV3+1 : n])
	}
	return int(n), nil
}

// Has reports whether all of the given incompatible features are set.
func (h *Header) Has(features uint64) bool { return h.Incompatible&features == features }

// ClearUnknown clears the autoclear features that are unknown here, as whoever
// writes to the image must do first, and reports whether there were any.
func (h *Header) ClearUnknown() bool {
	before := h.Autoclear
	h.Autoclear &= autoclearKnown
	return h.Autoclear != before
}

// length is that of the encoded header in bytes.
func (h *Header) length() int {
	switch {
	case h.Version < 3:
		return HeaderSizeV2
	case h.short && h.CompressionType == Zlib && len(h.Extra) == 0:
		return HeaderSizeV3
	}
	return max(HeaderSizeNew, (HeaderSizeV3+1+len(h.Extra)+7)&^7)
}

// Encode lays the header, its extensions and the backing file's name out in the
// image's first cluster, the rest of which it zeroes. It fails when the header
// isn't valid, or they don't fit; the cluster is then as it was.
func (h *Header) Encode(cluster []byte) error {
	if err := h.Validate(); err != nil {
		return err
	}
	n, limit := h.length(), min(len(cluster), 1<<h.ClusterBits)
	area := extensionsSize(h.Extensions)
	if need := n + area + len(h.BackingFile); need > limit {
		return invalid("length of header, extensions and backing file name", need,
			fmt.Sprintf("must be at most the %d bytes of a cluster: choose larger clusters or a shorter name", limit))
	}
	clear(cluster)
	be := binary.BigEndian
	copy(cluster, Magic)
	be.PutUint32(cluster[4:], h.Version)
	be.PutUint32(cluster[20:], h.ClusterBits)
	be.PutUint64(cluster[24:], uint64(h.Size))
	be.PutUint32(cluster[32:], uint32(h.Encryption))
	be.PutUint32(cluster[36:], h.L1Entries)
	be.PutUint64(cluster[40:], uint64(h.L1Offset))
	be.PutUint64(cluster[48:], uint64(h.RefcountTableOffset))
	be.PutUint32(cluster[56:], h.RefcountTableClusters)
	be.PutUint32(cluster[60:], h.Snapshots)
	be.PutUint64(cluster[64:], uint64(h.SnapshotsOffset))
	if h.Version >= 3 {
		be.PutUint64(cluster[72:], h.Incompatible)
		be.PutUint64(cluster[80:], h.Compatible)
		be.PutUint64(cluster[88:], h.Autoclear)
		be.PutUint32(cluster[96:], h.RefcountOrder)
		be.PutUint32(cluster[100:], uint32(n))
	}
	if n > HeaderSizeV3 {
		cluster[HeaderSizeV3] = byte(h.CompressionType)
		copy(cluster[HeaderSizeV3+1:], h.Extra)
	}
	putExtensions(cluster[n:], h.Extensions)
	if h.BackingFile != "" {
		at := n + area
		be.PutUint64(cluster[8:], uint64(at))
		be.PutUint32(cluster[16:], uint32(len(h.BackingFile)))
		copy(cluster[at:], h.BackingFile)
	}
	return nil
}
