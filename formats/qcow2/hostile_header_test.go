package qcow2_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
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

// TestDiskSizes opens images whose size isn't what programs make.
func TestDiskSizes(t *testing.T) {
	for _, c := range []struct {
		name   string
		change func(v *victim)
		size   int64
	}{
		{"no multiple of a sector", func(v *victim) { v.set(24, 512<<10-300) }, 512<<10 - 512},
		{"less than a sector", func(v *victim) { v.set(24, 300) }, 0},
		{"one sector", func(v *victim) { v.set(24, 512) }, 512},
		{"nothing", func(v *victim) { v.set(24, 0) }, 0},
		{"nothing, and no L1 table", func(v *victim) {
			v.set(24, 0)
			v.set32(36, 0)
			v.set(40, 1<<63-1) // means nothing then
		}, 0},
		{"an L1 table that is larger than needed", func(v *victim) { v.set32(36, 128) }, 512 << 10},
		{"an L1 table that is much larger than needed", func(v *victim) { v.set(24, 10<<10) }, 10 << 10},
	} {
		t.Run(c.name, func(t *testing.T) {
			v := newVictim(t, "cluster_size=1K", 512<<10)
			c.change(v)
			im, m := v.open(qcow2.Options{})
			if im.Size() != c.size {
				t.Fatalf("%d bytes, want %d", im.Size(), c.size)
			}
			want := bytes.Clone(v.disk[:c.size])
			sameBytes(t, "the disk", readAll(t, im), want)
			if _, err := im.ReadAt(make([]byte, 1), c.size); !errors.Is(err, io.EOF) {
				t.Errorf("read at the end: %v", err)
			}
			if _, err := im.WriteAt([]byte{1}, c.size); !errors.Is(err, unix.ENOSPC) {
				t.Errorf("write at the end: %v", err)
			}
			n := min(1500, c.size)
			for i := range want[c.size-n:] {
				want[c.size-n:][i] = 77
			}
			if _, err := im.WriteAt(want[c.size-n:], c.size-n); err != nil {
				t.Errorf("write: %v", err)
			}
			if c.size > 256<<10 {
				clear(want[c.size-200<<10 : c.size-4096])
				if err := im.Zero(c.size-200<<10, 200<<10-4096); err != nil {
					t.Errorf("zero: %v", err)
				}
			}
			if _, err := im.Extents(nil, 0, c.size, 0); err != nil {
				t.Errorf("map: %v", err)
			}
			sameBytes(t, "the disk after writing", readAll(t, im), want)
			if err := errors.Join(im.Flush(), im.Close()); err != nil {
				t.Error(err)
			}
			v.data = m.content(t)
			im, _ = v.open(qcow2.Options{ReadOnly: true})
			sameBytes(t, "the disk when opened again", readAll(t, im), want)
			if err := im.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestFileTooShort cuts images off.
func TestFileTooShort(t *testing.T) {
	make := func(t *testing.T) *victim { return newVictim(t, "cluster_size=4K", 4<<20) }
	for _, c := range []struct {
		name     string
		change   func(v *victim)
		readOnly bool // can be read all the same
		kind     error
		says     []string
	}{
		{"nothing", func(v *victim) { v.data = nil }, false, layout.ErrNotQcow2, []string{"not a qcow2 image"}},
		{"in the header", func(v *victim) { v.data = v.data[:71] }, false, layout.ErrNotQcow2, []string{"not a qcow2 image"}},
		{"in what version 3 added", func(v *victim) { v.data = v.data[:103] }, false, layout.ErrInvalid, []string{"file length is 103, must be at least 104"}},
		{"before the L1 table", func(v *victim) { v.data = v.data[:v.h.L1Offset] }, false, layout.ErrInvalid,
			[]string{"l1_table_offset is 0x3000, must lie within the file with all 2 entries"}},
		{"in the L1 table", func(v *victim) { v.data = v.data[:v.h.L1Offset+8] }, false, layout.ErrInvalid, []string{"l1_table_offset is 0x3000, must lie within the file"}},
		{"L1 table far behind", func(v *victim) { v.set(40, 1<<55) }, false, layout.ErrInvalid, []string{"l1_table_offset is 0x80000000000000, must lie within the file"}},
		{"refcount table far behind", func(v *victim) { v.set(48, 1<<55) }, true, layout.ErrInvalid,
			[]string{"refcount_table_offset is 0x80000000000000, must lie within the file with all 1 clusters"}},
		{"refcount table partly", func(v *victim) { v.set(48, uint64(v.end()-4096)); v.set32(56, 2) }, true, layout.ErrInvalid,
			[]string{"refcount_table_offset is", "must lie within the file with all 2 clusters"}},
		{"snapshot table", func(v *victim) { v.set32(60, 1); v.set(64, 1<<50) }, true, layout.ErrInvalid, []string{"snapshot 0: end of the entry", "must lie within the file"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			v := make(t)
			c.change(v)
			refusal(t, v.refused(qcow2.Options{}), c.kind, c.says...)
			if !c.readOnly {
				refusal(t, v.refused(qcow2.Options{ReadOnly: true}), c.kind, c.says...)
				return
			}
			im, m := v.open(qcow2.Options{ReadOnly: true})
			sameBytes(t, "read-only", readAll(t, im), v.disk)
			if err := im.Close(); err != nil {
				t.Error(err)
			}
			v.same(m, false)
		})
	}
}

// TestOverlappingTables: what is written at two places must not be one.
func TestOverlappingTables(t *testing.T) {
	for _, c := range []struct {
		name   string
		change func(v *victim)
		says   string
	}{
		{"refcount table in the L1 table", func(v *victim) { v.set(48, uint64(v.h.L1Offset)) }, "refcount_table_offset"},
		{"L1 table in the refcount table", func(v *victim) { v.set(40, uint64(v.h.RefcountTableOffset)) }, "l1_table_offset"},
		{"snapshot table in the L1 table", func(v *victim) { v.set(40, uint64(v.h.SnapshotsOffset)) }, "snapshots_offset"},
		{"L1 table that reaches into the refcount table", func(v *victim) {
			v.set(40, 1024)
			v.set(48, 2048)
			v.set32(36, 129)
		}, "refcount_table_offset is 0x800, must not lie within what is at l1_table_offset"},
		{"a snapshot's L1 table", func(v *victim) { v.set(40, uint64(v.snapshot().L1Offset)) }, "l1_table_offset of snapshot 0"},
	} {
		t.Run(c.name, func(t *testing.T) {
			v := small(t)
			c.change(v)
			refusal(t, v.refused(qcow2.Options{}), layout.ErrInvalid, c.says, "must not lie within", "platter check")
			im, m := v.open(qcow2.Options{ReadOnly: true})
			_, _ = im.ReadAt(make([]byte, im.Size()), 0) // whatever it is
			if err := im.Close(); err != nil {
				t.Error(err)
			}
			v.same(m, false)
		})
	}
}

// TestLastClusterCutOff: behind the end of the file are zeroes, and what is
// written there is read again.
func TestLastClusterCutOff(t *testing.T) {
	v := newVictim(t, "cluster_size=4K", 512<<10)
	last := v.end() - 4096
	off := int64(-1)
	for guest := int64(0); guest < 512<<10; guest += 4096 {
		if layout.EntryOffset(v.word(v.l2(guest))) == last {
			off = guest
		}
	}
	if off < 0 {
		t.Fatal("the file ends with no data")
	}
	v.data = v.data[:last+1000]
	clear(v.disk[off+1000 : off+4096])
	im, m := v.open(qcow2.Options{ReadOnly: true})
	sameBytes(t, "read-only", readAll(t, im), v.disk)
	if err := im.Close(); err != nil {
		t.Error(err)
	}
	v.same(m, false)

	im, _ = v.open(qcow2.Options{})
	copy(v.disk[off+2000:], "there again")
	if _, err := im.WriteAt([]byte("there again"), off+2000); err != nil {
		t.Error(err)
	}
	sameBytes(t, "after writing", readAll(t, im), v.disk)
	if err := im.Close(); err != nil {
		t.Error(err)
	}
}

// TestSnapshotBomb: a small file that claims to have large tables takes no more
// memory than its own length allows.
func TestSnapshotBomb(t *testing.T) {
	v := newVictim(t, "cluster_size=512", 64<<10)
	list := make([]layout.Snapshot, 2000)
	for i := range list {
		list[i] = layout.Snapshot{L1Offset: 1<<40 + int64(i)<<26, L1Entries: layout.MaxL1Bytes / 8, Size: 512, ID: fmt.Sprint(i)}
	}
	v.set32(60, uint32(len(list)))
	v.set(64, uint64(v.end()))
	v.data = layout.AppendSnapshots(v.data, list)
	allocated := allocates(func() {
		im, _ := v.open(qcow2.Options{})
		v.reads(t, im, 0)
		if err := im.Close(); err != nil {
			t.Error(err)
		}
	})
	if allocated > 64<<20 {
		t.Errorf("%d MiB for a file of %d KiB", allocated>>20, v.end()>>10)
	}
}

// allocates is how many bytes of Go's heap f takes, given back or not.
func allocates(f func()) uint64 {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	f()
	runtime.ReadMemStats(&after)
	return after.TotalAlloc - before.TotalAlloc
}
