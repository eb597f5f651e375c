package layout_test

import (
	"bytes"
	"fmt"
	"strings"
	"testing"

	"platter/formats/qcow2/layout"
)

// extension is an extension as it stands in the file.
func extension(t layout.ExtensionType, data string) []byte {
	b := append(be32(uint32(t)), be32(uint32(len(data)))...)
	b = append(b, data...)
	return append(b, make([]byte, -len(data)&7)...)
}

// withExtensions is a first cluster with this extension area.
func withExtensions(t testing.TB, version uint32, parts ...[]byte) []byte {
	t.Helper()
	at := layout.HeaderSizeV2
	if version > 2 {
		at = atExtensions
	}
	return patched(encode(t, newHeader(version)), patch{at, bytes.Join(parts, nil)})
}

func TestExtensionRoundTrip(t *testing.T) {
	list := []layout.Extension{
		{Type: layout.ExtensionBackingFormat, Data: []byte("qcow2")},
		{Type: layout.ExtensionDataFile, Data: []byte(strings.Repeat("d", layout.MaxDataFileName))},
		{Type: layout.ExtensionFeatureNames, Data: layout.FeatureNames()},
		{Type: layout.ExtensionBitmaps, Data: make([]byte, 24)},
		{Type: 0xdeadbeef, Data: []byte("12345678")},
		{Type: 0xdeadbeef, Data: []byte{}},
		{Type: 0xffffffff, Data: []byte{1}},
	}
	for _, version := range []uint32{2, 3} {
		h := newHeader(version)
		h.Extensions = list
		h.BackingFile = "base.qcow2"
		roundTrip(t, fmt.Sprintf("%d extensions", len(list)), h)
		if h.BackingFormat() != "qcow2" || h.DataFile() != string(list[1].Data) {
			t.Errorf("backing format %q, data file %q", h.BackingFormat(), h.DataFile())
		}
	}
	h := newHeader(3)
	if h.BackingFormat() != "" || h.DataFile() != "" {
		t.Error("a header without extensions has names")
	}
	h.Encryption = layout.LUKS
	h.SetExtension(layout.ExtensionEncryption, append(be64(5<<16), be64(4096)...))
	roundTrip(t, "LUKS", h)
}

// TestExtensionsEndWhereTheyMust: at the end mark, at the backing file's name, or
// with the cluster.
func TestExtensionsEndWhereTheyMust(t *testing.T) {
	raw, end := extension(layout.ExtensionBackingFormat, "raw"), extension(layout.ExtensionEnd, "")
	b := withExtensions(t, 3, raw, end, extension(1, "behind the end"))
	if h := parse(t, b); len(h.Extensions) != 1 || h.BackingFormat() != "raw" {
		t.Errorf("end mark: %+v", h.Extensions)
	}
	// No end mark, and the last extension's padding is cut off by the name.
	b = withExtensions(t, 3, raw[:11], []byte("base"))
	b = patched(b, patch{atBackingOffset, be64(atExtensions + 11)}, patch{atBackingSize, be32(4)})
	if h := parse(t, b); h.BackingFormat() != "raw" || h.BackingFile != "base" {
		t.Errorf("name: %+v", h)
	}
	// As the first programs wrote it: the name right behind the header.
	b = withExtensions(t, 2, []byte("0123456789abcdef"))
	b = patched(b, patch{atBackingOffset, be64(layout.HeaderSizeV2)}, patch{atBackingSize, be32(16)})
	if h := parse(t, b); len(h.Extensions) != 0 || h.BackingFile != "0123456789abcdef" {
		t.Errorf("name right behind the header: %+v", h)
	}
	last := extension(0x12345678, strings.Repeat("x", 1<<16-atExtensions-8))
	if h := parse(t, withExtensions(t, 3, last)); len(h.Extensions) != 1 || len(h.Extensions[0].Data) != 1<<16-atExtensions-8 {
		t.Errorf("end of the cluster: %+v", h.Extensions)
	}
}

func TestHostileExtensionsAreRefused(t *testing.T) {
	encryption := string(append(be64(5<<16), be64(4096)...))
	for _, c := range []struct {
		name    string
		parts   [][]byte
		patches []patch
		want    wrong
	}{
		{"extension past its area", [][]byte{be32(0x12345678), be32(1<<16 - atExtensions - 7)}, nil,
			wrong{"length of the 0x12345678 extension", "65417", "65416 bytes", nil}},
		{"extension of 4 GiB", [][]byte{be32(uint32(layout.ExtensionFeatureNames)), be32(1<<32 - 1)}, nil,
			wrong{"length of the feature name table extension", "4294967295", "65416 bytes", nil}},
		{"extension that reaches into the backing name", [][]byte{extension(1, "12345678")},
			[]patch{{atBackingOffset, be64(atExtensions + 15)}, {atBackingSize, be32(1)}},
			wrong{"length of the 0x1 extension", "8", "7 bytes", nil}},
		{"known extension twice", [][]byte{extension(layout.ExtensionBitmaps, strings.Repeat("b", 24)), extension(1, ""), extension(layout.ExtensionBitmaps, strings.Repeat("b", 24))}, nil,
			wrong{"extension type", "0x23852875", "only once (bitmaps)", nil}},
		{"backing format above 15 bytes", [][]byte{extension(layout.ExtensionBackingFormat, "sixteen letters!")}, nil,
			wrong{"length of the backing format", "16", "15", nil}},
		{"backing format with a zero byte", [][]byte{extension(layout.ExtensionBackingFormat, "raw\x00")}, nil,
			wrong{"backing format", `"raw\x00"`, "zero byte", nil}},
		{"data file name above 4095 bytes", [][]byte{extension(layout.ExtensionDataFile, strings.Repeat("d", 4096))}, nil,
			wrong{"length of the data file name", "4096", "4095", nil}},
		{"data file name with a zero byte", [][]byte{extension(layout.ExtensionDataFile, "\x00")}, nil,
			wrong{"data file name", `"\x00"`, "zero byte", nil}},
		{"encryption header without encryption", [][]byte{extension(layout.ExtensionEncryption, encryption)}, nil,
			wrong{"crypt_method", "0", "2 (LUKS)", nil}},
		{"encryption header with AES", [][]byte{extension(layout.ExtensionEncryption, encryption)}, []patch{{atCrypt, be32(1)}},
			wrong{"crypt_method", "1", "2 (LUKS)", nil}},
		{"encryption header of another length", [][]byte{extension(layout.ExtensionEncryption, encryption[:15])}, []patch{{atCrypt, be32(2)}},
			wrong{"length of the encryption header extension", "15", "16", nil}},
		{"encryption header unaligned", [][]byte{extension(layout.ExtensionEncryption, string(be64(5<<16+1))+"12345678")}, []patch{{atCrypt, be32(2)}},
			wrong{"encryption header offset", "0x50001", "multiple of the cluster size 0x10000", nil}},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := layout.ParseHeader(patched(withExtensions(t, 3, c.parts...), c.patches...))
			c.want.check(t, err)
		})
	}
	h := newHeader(3)
	h.Extensions = []layout.Extension{{Type: layout.ExtensionEnd}}
	wrong{"extension type", "0", "end mark", nil}.check(t, h.Validate())
}

func TestSetExtension(t *testing.T) {
	h := newHeader(3)
	show := func() string {
		var s []string
		for _, x := range h.Extensions {
			s = append(s, fmt.Sprintf("%d=%s", uint32(x.Type), x.Data))
		}
		return strings.Join(s, " ")
	}
	for _, step := range []struct {
		t    layout.ExtensionType
		data []byte
		want string
	}{
		{1, []byte("a"), "1=a"},
		{2, []byte("b"), "1=a 2=b"},
		{1, []byte("c"), "1=c 2=b"},
		{3, nil, "1=c 2=b"},
		{1, nil, "2=b"},
		{2, []byte{}, "2="},
		{2, nil, ""},
	} {
		if h.SetExtension(step.t, step.data); show() != step.want {
			t.Errorf("set %d to %q: got %q, want %q", step.t, step.data, show(), step.want)
		}
	}
	h.Extensions = []layout.Extension{{Type: 1, Data: []byte("a")}, {Type: 2, Data: []byte("b")}, {Type: 1, Data: []byte("c")}}
	kept := h.Extensions
	if h.SetExtension(1, []byte("d")); show() != "1=d 2=b" || string(kept[0].Data) != "a" {
		t.Errorf("an extension that was there twice: %s", show())
	}
	if b, ok := h.Extension(1); !ok || string(b) != "d" {
		t.Errorf("got %q, %v", b, ok)
	}
	if b, ok := h.Extension(4); ok || b != nil {
		t.Errorf("got %q, %v", b, ok)
	}
}

func TestFeatureNames(t *testing.T) {
	h := newHeader(3)
	if got := h.FeatureName(layout.FeatureIncompatible, 3); got != "bit 3" {
		t.Errorf("without a table: %s", got)
	}
	full := append([]byte{1, 63}, strings.Repeat("f", 46)...)
	unnamed := append([]byte{2, 5}, make([]byte, 46)...)
	h.SetExtension(layout.ExtensionFeatureNames, append(append(append(layout.FeatureNames(), full...), unnamed...), 0, 9, 'x'))
	for _, c := range []struct {
		set  layout.Feature
		bit  int
		want string
	}{
		{layout.FeatureIncompatible, 0, `"dirty bit"`},
		{layout.FeatureIncompatible, 1, `"corrupt bit"`},
		{layout.FeatureIncompatible, 2, `"external data file"`},
		{layout.FeatureIncompatible, 3, `"compression type"`},
		{layout.FeatureIncompatible, 4, `"extended L2 entries"`},
		{layout.FeatureCompatible, 0, `"lazy refcounts"`},
		{layout.FeatureAutoclear, 0, `"bitmaps"`},
		{layout.FeatureAutoclear, 1, `"raw external data"`},
		{layout.FeatureCompatible, 63, `"` + strings.Repeat("f", 46) + `"`},
		{layout.FeatureAutoclear, 5, "bit 5"},        // an entry without a name
		{layout.FeatureIncompatible, 9, "bit 9"},     // an entry that is cut off
		{layout.FeatureIncompatible, 63, "bit 63"},   // of another set
		{layout.FeatureIncompatible, 200, "bit 200"}, // no such bit
	} {
		if got := h.FeatureName(c.set, c.bit); got != c.want {
			t.Errorf("set %d, bit %d: got %s, want %s", c.set, c.bit, got, c.want)
		}
	}
	h.SetExtension(layout.ExtensionFeatureNames, append(append([]byte{0, 5}, "\x1b[2Jevil\n"...), make([]byte, 37)...))
	if got := h.FeatureName(layout.FeatureIncompatible, 5); got != `"\x1b[2Jevil\n"` {
		t.Errorf("a hostile name is shown as %s", got)
	}
}

func TestExtensionTypesHaveNames(t *testing.T) {
	for x, want := range map[layout.ExtensionType]string{
		layout.ExtensionBackingFormat: "backing format", layout.ExtensionFeatureNames: "feature name table",
		layout.ExtensionBitmaps: "bitmaps", layout.ExtensionEncryption: "encryption header",
		layout.ExtensionDataFile: "data file name", 0xabc: "0xabc",
	} {
		if x.String() != want {
			t.Errorf("%#x is %q, want %q", uint32(x), x, want)
		}
	}
}
