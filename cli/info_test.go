package cli

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"platter/formats/qcow2/create"
	"platter/formats/qcow2/layout"
	"platter/integration/testenv"
)

// info prints what qemu-img prints, field by field.
func TestInfoJSON(t *testing.T) {
	tool := testenv.NeedTool(t, "qemu-img")
	dir := testenv.DiskDir(t)
	for name, size := range map[string]int64{"sparse.raw": 10 << 20, "odd.raw": 1000, "one.raw": 1, "large.raw": 3 << 30} {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte("x"), 0o644); err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(path, size); err != nil {
			t.Fatal(err)
		}
		theirs, err := exec.Command(tool, "info", "--output", "json", "-f", "raw", path).Output()
		if err != nil {
			t.Fatal(err)
		}
		ours, err := command(t, "info", "--output", "json", path)
		if err != nil {
			t.Fatal(err)
		}
		var a, b map[string]any
		if err := json.Unmarshal([]byte(ours), &a); err != nil {
			t.Fatal(err)
		}
		if err := json.Unmarshal(theirs, &b); err != nil {
			t.Fatal(err)
		}
		if _, ok := b["children"]; !ok { // before QEMU 8.2
			delete(a, "children")
		}
		sameFields(t, name, a, b, size)
		human, err := command(t, "info", path)
		if err != nil || !strings.Contains(human, "image: "+path+"\nfile format: raw\nvirtual size: ") || strings.Count(human, "\n") != 9 {
			t.Errorf("%q, %v", human, err)
		}
	}
}

// sameFields wants of each field of qemu-img's the same here. It gives the
// virtual size in whole sectors, platter in bytes.
func sameFields(t *testing.T, where string, ours, theirs map[string]any, size int64) {
	t.Helper()
	for key, want := range theirs {
		if key == "virtual-size" {
			if got := ours[key]; got != float64(size) {
				t.Errorf("%s: %s is %v, want %d", where, key, got, size)
			}
			continue
		}
		if list, ok := want.([]any); ok {
			got, _ := ours[key].([]any)
			if len(got) != len(list) {
				t.Errorf("%s: %s is %v, qemu-img has %v", where, key, got, list)
				continue
			}
			for i := range list {
				g, _ := got[i].(map[string]any)
				w := list[i].(map[string]any)
				if info, ok := w["info"].(map[string]any); ok {
					gotInfo, _ := g["info"].(map[string]any)
					sameFields(t, where+" "+key, gotInfo, info, size)
					delete(w, "info")
					delete(g, "info")
				}
				if !reflect.DeepEqual(g, w) {
					t.Errorf("%s: %s is %v, qemu-img has %v", where, key, g, w)
				}
			}
			continue
		}
		if !reflect.DeepEqual(ours[key], want) {
			t.Errorf("%s: %s is %v, qemu-img has %v", where, key, ours[key], want)
		}
	}
	for key := range ours {
		if _, ok := theirs[key]; !ok {
			t.Errorf("%s: qemu-img has no %s", where, key)
		}
	}
}

// A qcow2 image tells everything, for people and for programs.
func TestInfoQcow2(t *testing.T) {
	dir := t.TempDir()
	t.Chdir(dir)
	if err := os.Mkdir("sub", 0o755); err != nil {
		t.Fatal(err)
	}
	makeQcow2(t, "base.qcow2", 1<<20, "compat=0.10")
	o := "backing_file=../base.qcow2,backing_fmt=qcow2,cluster_size=4k,refcount_bits=1,lazy_refcounts=on,compression_type=zstd"
	if out := must(t, "create", "-f", "qcow2", "-o", o, "sub/disk.qcow2", "3G"); out != "" {
		t.Error(out)
	}
	human := must(t, "info", "sub/disk.qcow2")
	for _, want := range []string{
		"image: sub/disk.qcow2\nfile format: qcow2\nvirtual size: 3 GiB (3221225472 bytes)\ndisk size: ",
		"\ncluster_size: 4096\nbacking file: ../base.qcow2 (actual path: sub/../base.qcow2)\nbacking file format: qcow2\n" +
			"Format specific information:\n    compat: 1.1\n    compression type: zstd\n    lazy refcounts: true\n" +
			"    refcount bits: 1\n    corrupt: false\n    extended l2: false\nChild node '/file':\n    filename: sub/disk.qcow2\n    protocol type: file\n    file length: ",
	} {
		if !strings.Contains(human, want) {
			t.Errorf("no %q in:\n%s", want, human)
		}
	}
	var info imageInfo
	if err := json.Unmarshal([]byte(must(t, "info", "--output", "json", "sub/disk.qcow2")), &info); err != nil {
		t.Fatal(err)
	}
	if info.VirtualSize != 3<<30 || info.BackingFilename != "../base.qcow2" || info.FullBackingFilename != "sub/../base.qcow2" || info.BackingFormat != "qcow2" || info.ClusterSize != 4096 {
		t.Errorf("%+v", info)
	}
	// Of version 2 some fields don't exist.
	if human := must(t, "info", "base.qcow2"); !strings.Contains(human, "    compat: 0.10\n    compression type: zlib\n    refcount bits: 16\nChild") {
		t.Error(human)
	}
}

// The backing chain is printed one image after the other, and every rule for
// files that an image names holds.
func TestInfoBackingChain(t *testing.T) {
	dir := t.TempDir()
	t.Chdir(dir)
	if err := os.Mkdir("below", 0o755); err != nil {
		t.Fatal(err)
	}
	testenv.Image(t, ".", "below/base.raw", 1<<20, nil)
	must(t, "create", "-f", "qcow2", "-b", "base.raw", "-F", "raw", "below/mid.qcow2")
	must(t, "create", "-f", "qcow2", "-b", "below/mid.qcow2", "-F", "qcow2", "top.qcow2", "2M")
	human := must(t, "info", "--backing-chain", "top.qcow2")
	if !strings.HasPrefix(human, "image: top.qcow2\n") || !strings.Contains(human, "\n\nimage: below/mid.qcow2\n") || !strings.Contains(human, "\n\nimage: below/base.raw\n") {
		t.Error(human)
	}
	var list []imageInfo
	if err := json.Unmarshal([]byte(must(t, "info", "--backing-chain", "--output", "json", "top.qcow2")), &list); err != nil {
		t.Fatal(err)
	}
	if len(list) != 3 || list[0].Filename != "top.qcow2" || list[1].VirtualSize != 1<<20 || list[2].Format != "raw" {
		t.Errorf("%+v", list)
	}
	// Without --backing-chain nothing below is opened.
	if err := os.Rename("below", "gone"); err != nil {
		t.Fatal(err)
	}
	must(t, "info", "top.qcow2")
	refused(t, []string{"info", "--backing-chain", "top.qcow2"}, "top.qcow2", "below/mid.qcow2", "no such file")

	for _, c := range []struct {
		name, header string
		words        []string
	}{
		{"loop", "backing_file=loop.qcow2,backing_fmt=qcow2", []string{"loop", "loop.qcow2 -> loop.qcow2"}},
		{"outside", "backing_file=/etc/hostname,backing_fmt=raw", []string{"/etc/hostname", "outside", "--allow-dir"}},
		{"protocol", "backing_file=nbd://x/y,backing_fmt=raw", []string{"nbd://x/y", "not a plain file name"}},
		{"wrong", "backing_file=wrong.raw,backing_fmt=qcow2", []string{"wrong.raw", "not a qcow2 image"}},
	} {
		testenv.Image(t, ".", "wrong.raw", 1<<20, nil)
		path := c.name + ".qcow2"
		// Made under another name, since an image can't be made upon itself.
		makeOverlay(t, "tmp.qcow2", c.header)
		if err := os.Rename("tmp.qcow2", path); err != nil {
			t.Fatal(err)
		}
		must(t, "info", path)
		refused(t, []string{"info", "--backing-chain", path}, c.words...)
	}
	if out := must(t, "info", "--backing-chain", "--allow-dir", "/etc", "outside.qcow2"); !strings.Contains(out, "image: /etc/hostname\nfile format: raw\n") {
		t.Error(out)
	}
}

// makeOverlay makes an image whose backing file is never looked at.
func makeOverlay(t testing.TB, path, options string) {
	t.Helper()
	o, err := create.ParseOptions(options)
	if err != nil {
		t.Fatal(err)
	}
	if err := create.Create(path, 1<<20, o); err != nil {
		t.Fatal(err)
	}
}

// What an image says of itself can't do anything to a terminal.
func TestInfoQuotesControlCharacters(t *testing.T) {
	t.Chdir(t.TempDir())
	makeOverlay(t, "disk.qcow2", "backing_file=\x1b[2Jx,backing_fmt=raw")
	human := must(t, "info", "disk.qcow2")
	if strings.Contains(human, "\x1b") || !strings.Contains(human, `backing file: "\x1b[2Jx"`) {
		t.Errorf("%q", human)
	}
}

// A snapshot that isn't there is refused, with what there is to do.
func TestInfoSnapshotMissing(t *testing.T) {
	dir := t.TempDir()
	path := makeQcow2(t, filepath.Join(dir, "disk.qcow2"), 1<<20, "")
	raw := testenv.Image(t, dir, "disk.raw", 1<<20, nil)
	refused(t, []string{"info", "--snapshot", "one", path}, path, `"one"`, "platter info")
	refused(t, []string{"info", "--snapshot", "one", raw}, raw, "snapshot of a raw image", "--snapshot")
}

func TestDescribeBitmap(t *testing.T) {
	for flags, want := range map[layout.BitmapFlags][]string{
		0: {}, layout.BitmapAuto: {"auto"}, layout.BitmapInUse: {"in-use"}, layout.BitmapInUse | layout.BitmapAuto | layout.BitmapExtraCompatible: {"in-use", "auto"},
	} {
		got := describeBitmap(layout.Bitmap{Name: "b", Flags: flags, GranularityBits: 16})
		if got.Name != "b" || got.Granularity != 65536 || !reflect.DeepEqual(got.Flags, want) {
			t.Errorf("%d: %+v, want %q", flags, got, want)
		}
	}
}

// luksHeader is a LUKS1 header with one key, as QEMU writes it.
func luksHeader() []byte {
	b := make([]byte, luksHeaderSize)
	be := binary.BigEndian
	copy(b, luksMagic)
	be.PutUint16(b[6:], 1)
	copy(b[8:], "aes")
	copy(b[40:], "cbc-essiv:sha256")
	copy(b[72:], "sha1")
	be.PutUint32(b[104:], 4040)
	be.PutUint32(b[108:], 32)
	be.PutUint32(b[164:], 1000)
	copy(b[168:], "87da4395-1da0-481c-8317-cf79925c08ca")
	for i := range luksSlots {
		s := b[luksSlotsAt+i*luksSlotSize:]
		be.PutUint32(s, 0xdead)
		be.PutUint32(s[40:], uint32(8+i))
		if i == 2 {
			be.PutUint32(s, luksActive)
			be.PutUint32(s[4:], 5000)
			be.PutUint32(s[44:], 4000)
		}
	}
	return b
}

func TestReadLUKS(t *testing.T) {
	info, err := readLUKS(bytes.NewReader(append(make([]byte, 100), luksHeader()...)), 100)
	if err != nil {
		t.Fatal(err)
	}
	if info.IVGen != "essiv" || info.IVGenHash != "sha256" || info.CipherMode != "cbc" || info.Cipher != "aes-256" || info.Hash != "sha1" ||
		info.PayloadOffset != 4040*512 || info.MasterKeyIters != 1000 || info.UUID != "87da4395-1da0-481c-8317-cf79925c08ca" || len(info.Slots) != luksSlots {
		t.Errorf("%+v", info)
	}
	for i, s := range info.Slots {
		if s.Active != (i == 2) || s.KeyOffset != int64(8+i)*512 || (s.Iters != nil) != s.Active || s.Active && (*s.Iters != 5000 || *s.Stripes != 4000) {
			t.Errorf("slot %d: %+v", i, s)
		}
	}
	short, other, newer := luksHeader()[:luksHeaderSize-1], luksHeader(), luksHeader()
	other[0], newer[7] = 'M', 2
	for name, b := range map[string][]byte{"cut off": short, "another magic": other, "version 2": newer, "nothing": nil} {
		if info, err := readLUKS(bytes.NewReader(b), 0); err == nil {
			t.Errorf("%s: %+v", name, info)
		}
	}
	for _, off := range []int64{-1, math.MinInt64, math.MaxInt64} {
		if _, err := readLUKS(bytes.NewReader(luksHeader()), off); err == nil {
			t.Errorf("a header at %d was read", off)
		}
	}
}

// Whatever stands in the place of a LUKS header, reading it ends well, and what
// comes of it can be printed.
func FuzzReadLUKS(f *testing.F) {
	f.Add(luksHeader())
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		info, err := readLUKS(bytes.NewReader(b), 0)
		if err == nil && !strings.Contains(tree(info), "format: luks\n") {
			t.Errorf("%+v", info)
		}
	})
}
