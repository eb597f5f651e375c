package layout

import (
	"encoding/binary"
	"fmt"
	"slices"
	"strings"
)

// Validate reports the first field that the specification or a limit forbids.
// A header that passes can be turned into a Geometry, and the tables that it
// names are aligned and of bounded size; whether they lie within the file is
// for whoever reads them to see.
func (h *Header) Validate() error {
	if unknown := h.Incompatible &^ incompatibleKnown; unknown != 0 {
		return h.unknownFeature(unknown)
	}
	for _, check := range []func() error{
		h.checkVersion, h.checkEncryption, h.checkCompression, h.checkClusters, h.checkDataFile,
		h.checkL1, h.checkRefcountTable, h.checkSnapshots, h.checkNames, h.checkExtensions,
	} {
		if err := check(); err != nil {
			return err
		}
	}
	return nil
}

// unknownFeature names the features, as the image's own table calls them.
func (h *Header) unknownFeature(bits uint64) error {
	var names []string
	for bit := range 64 {
		if bits>>bit&1 != 0 {
			names = append(names, h.FeatureName(FeatureIncompatible, bit))
		}
	}
	return &FieldError{"incompatible_features", Hex(h.Incompatible),
		"has features that are unknown here: " + strings.Join(names, ", "), ErrUnsupported}
}

// checkVersion sees to it that version 2 has nothing that it has no place for.
func (h *Header) checkVersion() error {
	switch h.Version {
	case 2:
	case 3:
		return nil
	default:
		return &FieldError{"version", h.Version, "only 2 and 3 are known", ErrUnsupported}
	}
	for _, f := range []struct {
		name        string
		value, want uint64
	}{
		{"incompatible_features", h.Incompatible, 0},
		{"compatible_features", h.Compatible, 0},
		{"autoclear_features", h.Autoclear, 0},
		{"refcount_order", uint64(h.RefcountOrder), 4},
		{"compression_type", uint64(h.CompressionType), 0},
		{"header_length", uint64(HeaderSizeV2 + len(h.Extra)), HeaderSizeV2},
	} {
		if f.value != f.want {
			return invalid(f.name, f.value, fmt.Sprintf("must be %d in version 2", f.want))
		}
	}
	return nil
}

func (h *Header) checkEncryption() error {
	if h.Encryption > LUKS {
		return &FieldError{"crypt_method", uint32(h.Encryption), "only 0 (none), 1 (AES) and 2 (LUKS) are known", ErrUnsupported}
	}
	return nil
}

func (h *Header) checkCompression() error {
	switch {
	case h.Has(Compression) && h.CompressionType == Zlib:
		return invalid("compression_type", uint8(0), "must not be 0 (zlib) when the compression type bit is set")
	case !h.Has(Compression) && h.CompressionType != Zlib:
		return invalid("compression_type", uint8(h.CompressionType), "must be 0 (zlib) when the compression type bit is clear")
	case h.CompressionType > Zstd:
		return &FieldError{"compression_type", uint8(h.CompressionType), "only 0 (zlib) and 1 (zstd) are known", ErrUnsupported}
	}
	return nil
}

func (h *Header) checkClusters() error {
	switch {
	case !validClusterBits(h.ClusterBits):
		return invalid("cluster_bits", h.ClusterBits, "must be 9 to 21")
	case h.Has(ExtendedL2) && h.ClusterBits < MinExtendedClusterBits:
		return invalid("cluster_bits", h.ClusterBits, "must be 14 to 21 with extended L2 entries")
	case h.RefcountOrder > MaxRefcountOrder:
		return invalid("refcount_order", h.RefcountOrder, "must be at most 6")
	}
	return nil
}

func (h *Header) checkDataFile() error {
	raw := h.Autoclear&RawExternal != 0
	switch {
	case raw && !h.Has(ExternalData):
		return invalid("autoclear_features", Hex(h.Autoclear), "must not have the raw external data bit without an external data file")
	case raw && h.BackingFile != "":
		return invalid("backing_file", h.BackingFile, "must not be there with a raw external data file")
	case h.Has(ExternalData) && h.Snapshots > 0:
		return invalid("nb_snapshots", h.Snapshots, "must be 0 with an external data file")
	}
	return nil
}

func (h *Header) checkL1() error {
	g := h.Geometry()
	need, ok := g.L1EntriesFor(h.Size)
	switch {
	case !ok:
		return invalid("size", uint64(h.Size), fmt.Sprintf("must be at most %d with clusters of %d bytes", g.MaxSize(), g.ClusterSize()))
	case int64(h.L1Entries)*8 > MaxL1Bytes:
		return invalid("l1_size", h.L1Entries, "must be at most 4194304 (32 MiB)")
	case int64(h.L1Entries) < need:
		return invalid("l1_size", h.L1Entries, fmt.Sprintf("must be at least %d for a disk of %d bytes", need, h.Size))
	case h.L1Entries > 0:
		return g.checkTableOffset("l1_table_offset", h.L1Offset)
	}
	return nil
}

func (h *Header) checkRefcountTable() error {
	limit := uint32(MaxRefcountTableBytes >> h.ClusterBits)
	if h.RefcountTableClusters == 0 || h.RefcountTableClusters > limit {
		return invalid("refcount_table_clusters", h.RefcountTableClusters, fmt.Sprintf("must be 1 to %d (8 MiB)", limit))
	}
	return h.Geometry().checkTableOffset("refcount_table_offset", h.RefcountTableOffset)
}

func (h *Header) checkSnapshots() error {
	switch {
	case h.Snapshots > MaxSnapshots:
		return invalid("nb_snapshots", h.Snapshots, "must be at most 65536")
	case h.Snapshots > 0:
		return h.Geometry().checkTableOffset("snapshots_offset", h.SnapshotsOffset)
	}
	return nil
}

// checkTableOffset checks where a table stands that has entries: not in the
// header's cluster.
func (g Geometry) checkTableOffset(field string, off int64) error {
	if off == 0 || !g.validOffset(off) {
		return invalid(field, Hex(off), fmt.Sprintf("must be a multiple of the cluster size %#x, above 0 and below 64 PiB", g.ClusterSize()))
	}
	return nil
}

// checkNames checks the strings that name files and formats. QEMU ends them at a
// zero byte, so that one image would name two files.
func (h *Header) checkNames() error {
	format, dataFile := h.BackingFormat(), h.DataFile()
	for _, s := range []struct {
		field, value string
		limit        int
	}{
		{"backing_file", h.BackingFile, MaxBackingName},
		{"backing format", format, MaxBackingFormat},
		{"data file name", dataFile, MaxDataFileName},
	} {
		switch {
		case len(s.value) > s.limit:
			return invalid("length of the "+s.field, len(s.value), fmt.Sprintf("must be at most %d", s.limit))
		case strings.Contains(s.value, "\x00"):
			return invalid(s.field, s.value, "must not contain a zero byte")
		}
	}
	return nil
}

func (h *Header) checkExtensions() error {
	var seen []ExtensionType
	for _, x := range h.Extensions {
		switch {
		case x.Type == ExtensionEnd:
			return invalid("extension type", uint32(x.Type), "must not be the end mark's")
		case !x.Type.known():
			continue
		}
		if slices.Contains(seen, x.Type) {
			return invalid("extension type", Hex(x.Type), fmt.Sprintf("must be there only once (%s)", x.Type))
		}
		seen = append(seen, x.Type)
	}
	return h.checkEncryptionHeader()
}

// checkEncryptionHeader checks the extension that says where the LUKS header is.
// Whoever has a key needs it; without one the image can still be looked at.
func (h *Header) checkEncryptionHeader() error {
	b, ok := h.Extension(ExtensionEncryption)
	switch {
	case !ok:
		return nil
	case h.Encryption != LUKS:
		return invalid("crypt_method", uint32(h.Encryption), "must be 2 (LUKS) with an encryption header extension")
	case len(b) != 16:
		return invalid("length of the encryption header extension", len(b), "must be 16")
	}
	return h.Geometry().checkTableOffset("encryption header offset", int64(binary.BigEndian.Uint64(b)))
}
