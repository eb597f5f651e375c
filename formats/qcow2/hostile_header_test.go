package qcow2_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"platter/formats"
	"platter/formats/qcow2"
	"platter/formats/qcow2/layout"
	"platter/integration/testenv"
)

// refusal wants an error to be of a kind and to tell the user the file, the cause
// and the remedy.
func refusal(t testing.TB, err, kind error, says ...string) {
	t.Helper()
	var typed *formats.Error
	if !errors.Is(err, kind) || !errors.As(err, &typed) || typed.Remedy == "" {
		t.Errorf("%#v, want %v with a remedy", err, kind)
		return
	}
	for _, text := range append(says, "open image: ") {
		if !strings.Contains(err.Error(), text) {
			t.Errorf("%q does not say %q", err, text)
		}
	}
}

// TestCorruptBit: what is marked as corrupt can be read and not be written.
func TestCorruptBit(t *testing.T) {
	v := small(t)
	v.data[79] |= byte(layout.Corrupt)
	refusal(t, v.refused(qcow2.Options{}), qcow2.ErrCorrupt, "marked as corrupt", "read-only", "platter check --repair all")
	im, m := v.open(qcow2.Options{ReadOnly: true})
	sameBytes(t, "the disk", readAll(t, im), v.disk)
	if _, err := im.WriteAt([]byte{1}, 0); !errors.Is(err, unix.EPERM) {
		t.Errorf("write: %v", err)
	}
	if err := im.Close(); err != nil {
		t.Error(err)
	}
	v.same(m, false)
}

// TestDirtyBit: refcounts that were left behind are made right before anything is
// written, and don't matter to who reads.
func TestDirtyBit(t *testing.T) {
	v := newVictim(t, "cluster_size=1K,lazy_refcounts=on", 512<<10, "snapshot")
	v.data[79] |= byte(layout.Dirty)
	host := layout.EntryOffset(v.word(v.l2(bad)))
	v.setRefcount(host, 0)

	im, m := v.open(qcow2.Options{ReadOnly: true})
	sameBytes(t, "the disk, read-only", readAll(t, im), v.disk)
	if err := im.Close(); err != nil {
		t.Error(err)
	}
	v.same(m, false)

	log := captureLog(t)
	im, m = v.open(qcow2.Options{})
	log.says(t, "not closed cleanly", "image=image")
	if _, err := im.WriteAt(v.disk[:64<<10], hole); err != nil {
		t.Errorf("write: %v", err)
	}
	copy(v.disk[hole:], v.disk[:64<<10])
	sameBytes(t, "the disk", readAll(t, im), v.disk)
	if err := im.Close(); err != nil {
		t.Error(err)
	}
	path := filepath.Join(t.TempDir(), "image")
	writeFile(t, path, m.content(t))
	qemuCheck(t, path)
	if m.content(t)[79] != 0 {
		t.Error("the dirty bit is set still")
	}
}

// TestDirtyBeyondRepair: an image that has lost data besides is not written to.
func TestDirtyBeyondRepair(t *testing.T) {
	v := small(t)
	v.data[79] |= byte(layout.Dirty)
	v.set(v.l2(bad), uint64(v.end()+1<<30)|layout.Copied)
	m := newMemory(bytes.Clone(v.data))
	im, err := qcow2.New(m, qcow2.Options{Path: "image"})
	if err == nil {
		im.Close()
		t.Fatal("opened")
	}
	refusal(t, err, qcow2.ErrDirty, "can't be repaired", "read-only", "platter check")
	v.data = m.content(t)
	im, m = v.open(qcow2.Options{ReadOnly: true})
	v.reads(t, im, 0, 480<<10)
	if err := im.Close(); err != nil {
		t.Error(err)
	}
	v.same(m, false)
}

// TestUnknownIncompatibleFeatures are refused, also for reading, by the names
// that the image gives them.
func TestUnknownIncompatibleFeatures(t *testing.T) {
	v := newVictim(t, "cluster_size=64K", 512<<10)
	names := layout.FeatureNames()
	at := bytes.Index(v.data, names)
	if at < 0 {
		t.Fatal("the image has no feature names")
	}
	v.data[at+1] = 63 // instead of the dirty bit
	copy(v.data[at+2:at+48], append([]byte("quantum clusters"), make([]byte, 30)...))
	v.set(72, 1<<63|1<<9)
	for _, o := range []qcow2.Options{{}, {ReadOnly: true}, {ReadOnly: true, InfoOnly: true}} {
		refusal(t, v.refused(o), layout.ErrUnsupported, "incompatible_features is 0x8000000000000200", `"quantum clusters"`, "bit 9")
	}
}

// TestAutoclearFeatures: who writes clears what it doesn't keep up to date; who
// reads leaves it.
func TestAutoclearFeatures(t *testing.T) {
	path := filepath.Join(t.TempDir(), "image")
	qemuCreate(t, path, 1<<20, "cluster_size=64K")
	qemuImg(t, "bitmap", "--add", path, "marks")
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	const unknown = 1 << 40
	binary.BigEndian.PutUint64(data[88:], layout.BitmapsValid|unknown)
	v := &victim{t: t, data: data, disk: make([]byte, 1<<20)}
	v.parse()

	im, m := v.open(qcow2.Options{ReadOnly: true})
	info, err := im.Info()
	if err != nil || len(info.Bitmaps) != 1 || info.Bitmaps[0].Name != "marks" {
		t.Errorf("%+v, %v", info, err)
	}
	if err := im.Close(); err != nil {
		t.Error(err)
	}
	v.same(m, false)

	log := captureLog(t)
	im, m = v.open(qcow2.Options{})
	// It is cleared before anything else is written.
	binary.BigEndian.PutUint64(v.data[88:], 0)
	sameBytes(t, "the file after opening", m.content(t)[:v.end()], v.data)
	log.says(t, "clearing autoclear features", "bitmaps", "image=image")
	if info, err := im.Info(); err != nil || len(info.Bitmaps) != 0 {
		t.Errorf("bitmaps that are out of date: %+v, %v", info, err)
	}
	if _, err := im.WriteAt([]byte{1}, 0); err != nil {
		t.Error(err)
	}
	if err := im.Close(); err != nil {
		t.Error(err)
	}
	if got := binary.BigEndian.Uint64(m.content(t)[88:]); got != 0 {
		t.Errorf("autoclear features %#x", got)
	}
	writeFile(t, path, m.content(t))
	// QEMU takes what the bitmap has for leaks.
	out, err := exec.Command(testenv.NeedTool(t, "qemu-img"), "check", path).CombinedOutput()
	var exit *exec.ExitError
	if err != nil && (!errors.As(err, &exit) || exit.ExitCode() != 3) {
		t.Errorf("qemu-img check: %v: %s", err, out)
	}
}

// TestRawDataFileBitIsKept: this autoclear feature is one that writing keeps.
func TestRawDataFileBitIsKept(t *testing.T) {
	v := newVictim(t, "data_file_raw=on", 512<<10, "data file")
	im, m := v.open(qcow2.Options{})
	if _, err := im.WriteAt([]byte{1}, 0); err != nil {
		t.Error(err)
	}
	if err := im.Close(); err != nil {
		t.Error(err)
	}
	if got := binary.BigEndian.Uint64(m.content(t)[88:]); got != layout.RawExternal {
		t.Errorf("autoclear features %#x", got)
	}
}

// TestUnknownHeaderParts: extensions that nobody here knows, a longer header, and
// compatible features stay what they are, though the header is written.
func TestUnknownHeaderParts(t *testing.T) {
	v := newVictim(t, "cluster_size=512,refcount_bits=64,lazy_refcounts=on", 4<<20)
	h := *v.h
	h.Extra = append(make([]byte, 7), "what comes after the compression type."...)
	h.Extra = append(h.Extra, make([]byte, -(len(h.Extra)+1)&7)...)
	h.Extensions = append(h.Extensions, layout.Extension{Type: 0x12345678, Data: []byte("the first")},
		layout.Extension{Type: 0x12345678, Data: []byte("the second of its kind, 8n+1 long")})
	h.Compatible |= 1 << 50
	if err := h.Encode(v.data[:512]); err != nil {
		t.Fatal(err)
	}
	im, m := v.open(qcow2.Options{})
	if _, err := im.WriteAt(v.disk[:1<<20], 2<<20); err != nil {
		t.Error(err)
	}
	if err := im.Flush(); err != nil { // sets the dirty bit
		t.Error(err)
	}
	if m.content(t)[79] != byte(layout.Dirty) {
		t.Error("the dirty bit is not set")
	}
	if err := im.Close(); err != nil {
		t.Error(err)
	}
	got := m.content(t)
	if bytes.Equal(got[48:60], v.data[48:60]) {
		t.Error("the refcount table has not moved: the header need not have been written")
	}
	copy(got[48:60], v.data[48:60])
	sameBytes(t, "the header but for the refcount table", got[:512], v.data[:512])
}

// TestEncrypted: an image that takes a key is refused, and tells what it is.
func TestEncrypted(t *testing.T) {
	aes := small(t)
	aes.set32(32, uint32(layout.AES))
	for name, v := range map[string]*victim{"aes": aes, "luks": luks(t)} {
		t.Run(name, func(t *testing.T) {
			v.t = t
			for _, o := range []qcow2.Options{{}, {ReadOnly: true}} {
				refusal(t, v.refused(o), qcow2.ErrEncrypted, "image is encrypted ("+name+")", "qemu-img convert")
			}
			im, m := v.open(qcow2.Options{ReadOnly: true, InfoOnly: true})
			info, err := im.Info()
			if err != nil || info.Header.Encryption.String() != name || info.Header.Size != 512<<10 || im.Size() != 512<<10 {
				t.Errorf("%+v, %v", info, err)
			}
			if _, err := im.ReadAt(make([]byte, 10), 0); !errors.Is(err, unix.EIO) {
				t.Errorf("read: %v, want EIO", err)
			}
			if err := im.Close(); err != nil {
				t.Error(err)
			}
			v.same(m, false)
		})
	}
}

func luks(t *testing.T) *victim {
	t.Helper()
	path := filepath.Join(t.TempDir(), "image")
	out, err := exec.Command(testenv.NeedTool(t, "qemu-img"), "create", "-q", "-f", "qcow2", "--object", "secret,id=key,data=sesame",
		"-o", "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10", path, "512K").CombinedOutput()
	if err != nil {
		testenv.Skip(t, fmt.Sprintf("qemu-img makes no encrypted images: %s", out))
	}
	v := &victim{t: t}
	if v.data, err = os.ReadFile(path); err != nil {
		t.Fatal(err)
	}
	v.parse()
	return v
}

// TestInfoOnlyWrites: who looks at an image never changes it.
func TestInfoOnlyWrites(t *testing.T) {
	v := small(t)
	v.set(88, 1<<5) // an autoclear feature, which would be cleared
	v.data[79] |= byte(layout.Dirty)
	for _, readOnly := range []bool{true, false} {
		im, m := v.open(qcow2.Options{InfoOnly: true, ReadOnly: readOnly})
		for _, err := range []error{second(im.ReadAt([]byte{1}, 0)), second(im.WriteAt([]byte{1}, 0)), im.Zero(0, 512)} {
			if !errors.Is(err, unix.EIO) {
				t.Errorf("%v, want EIO", err)
			}
		}
		if err := errors.Join(im.Flush(), im.Close()); err != nil {
			t.Error(err)
		}
		v.same(m, false)
	}
}
