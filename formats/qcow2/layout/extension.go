package layout

import (
	"bytes"
	"encoding/binary"
	"fmt"
)

// ExtensionType says what a header extension holds.
type ExtensionType uint32

// The header extensions that are known here. Others are kept as they were found.
const (
	ExtensionEnd           ExtensionType = 0
	ExtensionBackingFormat ExtensionType = 0xe2792aca
	ExtensionFeatureNames  ExtensionType = 0x6803f857
	ExtensionBitmaps       ExtensionType = 0x23852875
	ExtensionEncryption    ExtensionType = 0x0537be77
	ExtensionDataFile      ExtensionType = 0x44415441
)

func (t ExtensionType) String() string {
	switch t {
	case ExtensionBackingFormat:
		return "backing format"
	case ExtensionFeatureNames:
		return "feature name table"
	case ExtensionBitmaps:
		return "bitmaps"
	case ExtensionEncryption:
		return "encryption header"
	case ExtensionDataFile:
		return "data file name"
	}
	return fmt.Sprintf("%#x", uint32(t))
}

// known reports whether the extension is one of those above, of which an image
// has at most one each. What is unknown here may be there more than once.
func (t ExtensionType) known() bool {
	switch t {
	case ExtensionBackingFormat, ExtensionFeatureNames, ExtensionBitmaps, ExtensionEncryption, ExtensionDataFile:
		return true
	}
	return false
}

// Extension is one header extension, without its padding.
type Extension struct {
	Type ExtensionType
	Data []byte
}

// parseExtensions decodes the extension area, which ends with an end mark or
// with b. It returns what comes before an error, too.
func parseExtensions(b []byte) ([]Extension, error) {
	var list []Extension
	for len(b) >= 8 {
		t := ExtensionType(binary.BigEndian.Uint32(b))
		n := binary.BigEndian.Uint32(b[4:])
		if t == ExtensionEnd {
			return list, nil
		}
		if int64(n) > int64(len(b)-8) {
			return list, invalid("length of the "+t.String()+" extension", n, fmt.Sprintf("must be at most the %d bytes that are left for it", len(b)-8))
		}
		list = append(list, Extension{t, bytes.Clone(b[8 : 8+n])})
		b = b[min(8+(int(n)+7)&^7, len(b)):]
	}
	return list, nil
}

// extensionsSize is how many bytes the area takes with its end mark.
func extensionsSize(list []Extension) int {
	n := 8
	for _, x := range list {
		n += 8 + (len(x.Data)+7)&^7
	}
	return n
}

// putExtensions writes into zeroed memory, whose zeroes are the end mark.
func putExtensions(b []byte, list []Extension) {
	for _, x := range list {
		binary.BigEndian.PutUint32(b, uint32(x.Type))
		binary.BigEndian.PutUint32(b[4:], uint32(len(x.Data)))
		copy(b[8:], x.Data)
		b = b[8+(len(x.Data)+7)&^7:]
	}
}

// Extension returns what an extension holds, and whether it is there. The bytes
// are the header's.
func (h *Header) Extension(t ExtensionType) ([]byte, bool) {
	for _, x := range h.Extensions {
		if x.Type == t {
			return x.Data, true
		}
	}
	return nil, false
}

// SetExtension replaces or adds an extension, which keeps data; nil removes it.
func (h *Header) SetExtension(t ExtensionType, data []byte) {
	var list []Extension
	for _, x := range h.Extensions {
		switch {
		case x.Type != t:
			list = append(list, x)
		case data != nil:
			list = append(list, Extension{t, data})
			data = nil
		}
	}
	if data != nil {
		list = append(list, Extension{t, data})
	}
	h.Extensions = list
}

// BackingFormat is the stated format of the backing file, "" if none is.
func (h *Header) BackingFormat() string {
	b, _ := h.Extension(ExtensionBackingFormat)
	return string(b)
}

// DataFile is the name of the external data file, "" if none is stated.
func (h *Header) DataFile() string {
	b, _ := h.Extension(ExtensionDataFile)
	return string(b)
}

// Feature says which set of bits a feature name belongs to.
type Feature uint8

// The sets of feature bits.
const (
	FeatureIncompatible Feature = iota
	FeatureCompatible
	FeatureAutoclear
)

// featureEntry is the size of one entry of the feature name table: the set,
// the bit, and 46 bytes of name.
const featureEntry = 48

// FeatureName looks a feature up in the image's own table of names and returns
// it in quotes; without a name it is "bit 7".
func (h *Header) FeatureName(f Feature, bit int) string {
	table, _ := h.Extension(ExtensionFeatureNames)
	for ; len(table) >= featureEntry; table = table[featureEntry:] {
		if Feature(table[0]) == f && int(table[1]) == bit {
			name, _, _ := bytes.Cut(table[2:featureEntry], []byte{0})
			if len(name) > 0 {
				return fmt.Sprintf("%q", name)
			}
		}
	}
	return fmt.Sprintf("bit %d", bit)
}

// FeatureNames is the table of names that QEMU writes into images of version 3,
// unless their clusters are of 4 KiB or less, where there is little room.
func FeatureNames() []byte {
	var table []byte
	for _, x := range []struct {
		set  Feature
		bit  byte
		name string
	}{
		{FeatureIncompatible, 0, "dirty bit"},
		{FeatureIncompatible, 1, "corrupt bit"},
		{FeatureIncompatible, 2, "external data file"},
		{FeatureIncompatible, 3, "compression type"},
		{FeatureIncompatible, 4, "extended L2 entries"},
		{FeatureCompatible, 0, "lazy refcounts"},
		{FeatureAutoclear, 0, "bitmaps"},
		{FeatureAutoclear, 1, "raw external data"},
	} {
		entry := make([]byte, featureEntry)
		entry[0], entry[1] = byte(x.set), x.bit
		copy(entry[2:], x.name)
		table = append(table, entry...)
	}
	return table
}
