package qcow2_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"platter/formats"
	"platter/formats/qcow2"
	"platter/formats/qcow2/layout"
)

// chainOf makes so many images, each the backing file of the one before, and
// returns the path of the first. Each has a cluster of its own, which holds its
// number.
func chainOf(t *testing.T, files int) string {
	t.Helper()
	dir := t.TempDir()
	name := func(i int) string { return fmt.Sprintf("image%03d", i) }
	size := int64(files) * 4096
	qemuCreate(t, filepath.Join(dir, "model"), size, "cluster_size=4K", "-u", "-b", name(0), "-F", "qcow2")
	model, err := os.ReadFile(filepath.Join(dir, "model"))
	if err != nil {
		t.Fatal(err)
	}
	at := bytes.LastIndex(model[:4096], []byte(name(0)))
	for i := range files {
		path := filepath.Join(dir, name(i))
		if i == files-1 {
			qemuCreate(t, path, size, "cluster_size=4K")
		} else {
			copy(model[at:], name(i+1))
			writeFile(t, path, model)
		}
		// By itself, without its backing file.
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		im, m := openMemory(t, data, qcow2.Options{})
		if _, err := im.WriteAt(bytes.Repeat([]byte{byte(i + 1)}, 4096), int64(i)*4096); err != nil {
			t.Fatal(err)
		}
		if err := im.Close(); err != nil {
			t.Fatal(err)
		}
		writeFile(t, path, m.content(t))
	}
	return filepath.Join(dir, name(0))
}

// TestLongChain reads and writes an image of 30 files.
func TestLongChain(t *testing.T) {
	const files = 30
	path := chainOf(t, files)
	last := filepath.Join(filepath.Dir(path), fmt.Sprintf("image%03d", files-1))
	before, err := os.ReadFile(last)
	if err != nil {
		t.Fatal(err)
	}
	want := make([]byte, files*4096)
	for i := range want {
		want[i] = byte(i/4096 + 1)
	}
	im := open(t, path, formats.Options{})
	sameBytes(t, "the disk", readAll(t, im), want)
	list, err := im.Extents(nil, 0, im.Size(), 0)
	if err != nil || len(list) != files {
		t.Errorf("%d extents, %v", len(list), err)
	}
	for i, e := range list {
		if e.Depth != i || !e.Data || e.Length != 4096 {
			t.Errorf("extent %d: %+v", i, e)
		}
	}
	copy(want[100_000:], "written by the guest")
	if _, err := im.WriteAt([]byte("written by the guest"), 100_000); err != nil {
		t.Error(err)
	}
	if err := im.Close(); err != nil {
		t.Error(err)
	}
	qemuCheck(t, path)
	sameBytes(t, "as QEMU reads it", rawOf(t, path), want)
	after, err := os.ReadFile(last)
	if err != nil {
		t.Fatal(err)
	}
	sameBytes(t, "the last file", after, before)
}

// TestChainTooLong: what was opened is closed again, and not locked any more.
func TestChainTooLong(t *testing.T) {
	path := chainOf(t, formats.MaxChain+1)
	refuse := func() {
		t.Helper()
		im, err := qcow2.Open(path, formats.Options{})
		if err == nil {
			im.Close()
			t.Fatal("opened")
		}
		if !errors.Is(err, formats.ErrChainDepth) || !strings.Contains(err.Error(), "open "+path) {
			t.Error(err)
		}
	}
	refuse()
	before := descriptors(t)
	refuse()
	if after := descriptors(t); after > before {
		t.Errorf("%d files are open, %d before", after, before)
	}
	open(t, path, formats.Options{InfoOnly: true, ReadOnly: true}).Close()
}

func descriptors(t *testing.T) int {
	t.Helper()
	list, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(list)
}

// rename makes an image say something else of its backing file.
func rename(t *testing.T, path, backing, format string) {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	h, err := layout.ParseHeader(data)
	if err != nil {
		t.Fatal(err)
	}
	h.BackingFile = backing
	h.SetExtension(layout.ExtensionBackingFormat, nil)
	if format != "" {
		h.SetExtension(layout.ExtensionBackingFormat, []byte(format))
	}
	if err := h.Encode(data[:1<<h.ClusterBits]); err != nil {
		t.Fatal(err)
	}
	writeFile(t, path, data)
}

// TestBackingFormat: what the image states is what the backing file is taken for.
func TestBackingFormat(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "image")
	qemuCreate(t, path, 1<<20, "compat=1.1")
	qemuCreate(t, filepath.Join(dir, "qcow2"), 1<<20, "compat=1.1")
	writeFile(t, filepath.Join(dir, "raw"), make([]byte, 1<<20))
	for _, c := range []struct {
		backing, format string
		is              error
		says            []string
	}{
		{"qcow2", "qcow2", nil, nil},
		{"raw", "raw", nil, nil},
		{"qcow2", "raw", nil, nil}, // its bytes as they are
		{"raw", "qcow2", formats.ErrFormat, []string{"not a qcow2 image", "-b raw -F FORMAT " + path}},
		{"qcow2", "", formats.ErrNoFormat, []string{"not stated", "-b qcow2 -F FORMAT " + path}},
		{"raw", "", formats.ErrNoFormat, []string{"not stated", "-b raw -F FORMAT " + path}},
		{"raw", "vmdk", formats.ErrFormat, []string{`"vmdk"`, "-F FORMAT"}},
		{"raw", "host_device", formats.ErrFormat, []string{`"host_device"`, "-F FORMAT"}},
		{"image", "qcow2", formats.ErrChainLoop, []string{path + " -> " + path, "another backing file"}},
		{"json:{}", "raw", formats.ErrProtocol, []string{"json:", "only files"}},
		{"/etc/passwd", "raw", formats.ErrOutside, []string{"/etc/passwd", "--allow-dir"}},
	} {
		t.Run(c.backing+" as "+c.format, func(t *testing.T) {
			rename(t, path, c.backing, c.format)
			im, err := qcow2.Open(path, formats.Options{})
			if err == nil {
				got := make([]byte, 4)
				if _, err := im.ReadAt(got, 0); err != nil {
					t.Error(err)
				}
				if c.format == "raw" && c.backing == "qcow2" != (string(got) == layout.Magic) {
					t.Errorf("the disk begins with %q", got)
				}
				if err := im.Close(); err != nil {
					t.Error(err)
				}
			}
			if !errors.Is(err, c.is) {
				t.Fatalf("%v, want %v", err, c.is)
			}
			for _, text := range append(c.says, "open "+path) {
				if err != nil && !strings.Contains(err.Error(), text) {
					t.Errorf("%q does not say %q", err, text)
				}
			}
			// Who only looks needs no backing file.
			im = open(t, path, formats.Options{ReadOnly: true, InfoOnly: true})
			info, err := im.Info()
			if err != nil || info.Header.BackingFile != c.backing || info.Header.BackingFormat() != c.format {
				t.Errorf("%+v, %v", info, err)
			}
			if err := im.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestSharedBase: two images have one backing file, and no one writes to it
// meanwhile.
func TestSharedBase(t *testing.T) {
	dir := t.TempDir()
	base := filepath.Join(dir, "base")
	qemuCreate(t, base, 1<<20, "compat=1.1")
	var over [2]*qcow2.Image
	for i := range over {
		path := filepath.Join(dir, fmt.Sprint(i))
		qemuCreate(t, path, 1<<20, "compat=1.1", "-b", "base", "-F", "qcow2")
		over[i] = open(t, path, formats.Options{})
	}
	if im, err := qcow2.Open(base, formats.Options{}); !errors.Is(err, formats.ErrLocked) {
		t.Errorf("the base of open images is opened for writing: %v, %v", im, err)
	}
	for i, im := range over {
		if _, err := im.WriteAt([]byte{byte(i + 1)}, 0); err != nil {
			t.Error(err)
		}
	}
	for i, im := range over {
		if got := readAll(t, im)[0]; got != byte(i+1) {
			t.Errorf("image %d reads %d", i, got)
		}
		if err := im.Close(); err != nil {
			t.Error(err)
		}
	}
	im := open(t, base, formats.Options{})
	if got := readAll(t, im)[0]; got != 0 {
		t.Errorf("the base has become %d", got)
	}
	if _, err := qcow2.Open(filepath.Join(dir, "0"), formats.Options{}); !errors.Is(err, formats.ErrLocked) || !strings.Contains(err.Error(), `backing file "base"`) {
		t.Errorf("opened while its base is written to: %v", err)
	}
	if err := im.Close(); err != nil {
		t.Error(err)
	}
}
