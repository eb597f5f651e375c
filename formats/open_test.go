package formats_test

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"platter/aio"
	"platter/formats"
	"platter/integration/testenv"
)

// makeFile makes a file in a fresh directory and returns its path.
func makeFile(t *testing.T, size int64, start string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk.img")
	if err := os.WriteFile(path, []byte(start), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, size); err != nil {
		t.Fatal(err)
	}
	return path
}

// diskFile is makeFile on a disk's file system.
func diskFile(t *testing.T, size int64) string {
	t.Helper()
	path := filepath.Join(testenv.DiskDir(t), "disk.img")
	if err := os.WriteFile(path, make([]byte, size), 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestOpen(t *testing.T) {
	for _, o := range []formats.Options{
		{}, {Format: "auto"}, {Format: "raw"}, {ReadOnly: true}, {Sync: true}, {NoFlush: true}, {ReadOnly: true, ForceShare: true},
		{NotEmpty: true}, {Direct: true}, {Direct: true, ReadOnly: true},
	} {
		size := int64(1234)
		if o.Direct && !o.ReadOnly {
			size = 8192
		}
		path := diskFile(t, size)
		image, err := formats.Open(path, o)
		if err != nil {
			t.Errorf("%+v: %v", o, err)
			continue
		}
		if image.Size() != size || image.Format() != "raw" || image.ReadOnly() != o.ReadOnly {
			t.Errorf("%+v: size %d, format %s, read-only %v", o, image.Size(), image.Format(), image.ReadOnly())
		}
		if err := image.Close(); err != nil {
			t.Error(err)
		}
	}
}

// TestOpenErrors wants of every error its kind, and that its message names the
// file, the cause and the remedy.
func TestOpenErrors(t *testing.T) {
	fifo := filepath.Join(t.TempDir(), "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name, path string
		o          formats.Options
		is         error
		says       []string
	}{
		{"missing", filepath.Join(t.TempDir(), "none"), formats.Options{}, fs.ErrNotExist, []string{"no such file", "--create"}},
		{"directory", t.TempDir(), formats.Options{}, formats.ErrIsDirectory, []string{"directory", "name the image"}},
		{"directory, read-only", t.TempDir(), formats.Options{ReadOnly: true}, formats.ErrIsDirectory, []string{"directory"}},
		{"fifo", fifo, formats.Options{ReadOnly: true}, formats.ErrNotImage, []string{"neither a regular file"}},
		{"character device", "/dev/null", formats.Options{}, formats.ErrNotImage, []string{"neither a regular file"}},
		{"empty", makeFile(t, 0, ""), formats.Options{NotEmpty: true}, formats.ErrEmpty, []string{"empty", "truncate"}},
		{"qcow2", makeFile(t, 4096, "QFI\xfb\x00\x00\x00\x03"), formats.Options{}, formats.ErrFormat, []string{"qcow2", "--format raw"}},
		{"luks", makeFile(t, 4096, "LUKS\xba\xbe\x00\x01"), formats.Options{Format: "auto"}, formats.ErrFormat, []string{"luks", "--format raw"}},
		{"unknown format", makeFile(t, 4096, ""), formats.Options{Format: "floppy"}, formats.ErrFormat, []string{`"floppy"`, "raw"}},
		{"odd size past the cache", diskFile(t, 1234), formats.Options{Direct: true}, aio.ErrUnalignedSize, []string{"multiple of", "--cache"}},
		{"force-share for writing", makeFile(t, 4096, ""), formats.Options{ForceShare: true}, formats.ErrBadOptions, []string{"read-only"}},
	} {
		image, err := formats.Open(c.path, c.o)
		if err == nil {
			image.Close()
			t.Errorf("%s: opened", c.name)
			continue
		}
		var typed *formats.Error
		if !errors.Is(err, c.is) || !errors.As(err, &typed) || typed.Path != c.path {
			t.Errorf("%s: %#v, want %v", c.name, err, c.is)
		}
		for _, text := range append(c.says, c.path) {
			if strings.Count(err.Error(), text) == 0 {
				t.Errorf("%s: %q does not say %q", c.name, err, text)
			}
		}
		if strings.Count(err.Error(), c.path) != 1 {
			t.Errorf("%s: the path stands in the message more than once: %q", c.name, err)
		}
	}
}

// TestOpenEmpty: an empty file is an image of size 0 for those who want it.
func TestOpenEmpty(t *testing.T) {
	image, err := formats.Open(makeFile(t, 0, ""), formats.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer image.Close()
	if image.Size() != 0 {
		t.Errorf("size %d", image.Size())
	}
}

// TestOpenForeignAsRaw: stating raw opens anything.
func TestOpenForeignAsRaw(t *testing.T) {
	image, err := formats.Open(makeFile(t, 4096, "QFI\xfb\x00\x00\x00\x03"), formats.Options{Format: "raw"})
	if err != nil {
		t.Fatal(err)
	}
	image.Close()
}

// TestOpenUnreadable needs another user than root, whom nothing stops.
func TestOpenUnreadable(t *testing.T) {
	path := makeFile(t, 512, "")
	if err := os.Chmod(path, 0); err != nil {
		t.Fatal(err)
	}
	if os.Geteuid() == 0 {
		// Root is stopped by an immutable file or a read-only mount only, so the
		// message is checked by itself.
		err := formats.Explain("open", path, &fs.PathError{Op: "open", Path: path, Err: unix.EACCES})
		if !errors.Is(err, fs.ErrPermission) || !strings.Contains(err.Error(), "permission denied (change the file's permissions") {
			t.Error(err)
		}
		return
	}
	_, err := formats.Open(path, formats.Options{})
	if !errors.Is(err, fs.ErrPermission) || !strings.Contains(err.Error(), "permission denied (change the file's permissions") {
		t.Error(err)
	}
}

func TestRegister(t *testing.T) {
	open := func(formats.Source) (formats.Image, error) { return nil, errors.New("unused") }
	for _, d := range []formats.Driver{{}, {Name: "x"}, {Name: "raw", Open: open}, {Name: "auto", Open: open}, {Open: open}} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("driver %q was registered", d.Name)
				}
			}()
			formats.Register(d)
		}()
	}
	if names := formats.Names(); len(names) == 0 || names[0] != "raw" {
		t.Error(names)
	}
}
