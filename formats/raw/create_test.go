package raw_test

import (
	"errors"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"platter/formats"
	"platter/formats/raw"
	"platter/integration/testenv"
)

func TestCreate(t *testing.T) {
	for _, size := range []int64{0, 1, 512, 4097, 1 << 30} {
		path := filepath.Join(t.TempDir(), "new.raw")
		if err := raw.Create(path, size, raw.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		var st unix.Stat_t
		if err := unix.Stat(path, &st); err != nil {
			t.Fatal(err)
		}
		if st.Size != size || st.Blocks*512 > 8192 {
			t.Errorf("size %d, want %d, with %d blocks", st.Size, size, st.Blocks)
		}
	}
	path := filepath.Join(t.TempDir(), "full.raw")
	if err := raw.Create(path, 1<<20, raw.CreateOptions{Preallocate: true, Perm: 0o600}); err != nil {
		t.Fatal(err)
	}
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	if st.Blocks*512 < 1<<20 || st.Mode&0o777 != 0o600 {
		t.Errorf("%d blocks, mode %o", st.Blocks, st.Mode)
	}
}

func TestCreateKeepsWhatExists(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "disk.raw")
	if err := os.WriteFile(path, []byte("precious"), 0o644); err != nil {
		t.Fatal(err)
	}
	dangling := filepath.Join(dir, "link")
	if err := os.Symlink(filepath.Join(dir, "nowhere"), dangling); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{path, dir, dangling} {
		err := raw.Create(name, 1<<20, raw.CreateOptions{})
		var typed *formats.Error
		if !errors.Is(err, fs.ErrExist) || !errors.As(err, &typed) || !strings.Contains(err.Error(), "kept as it is") {
			t.Errorf("create %s: %v", name, err)
		}
	}
	if got, err := os.ReadFile(path); err != nil || string(got) != "precious" {
		t.Errorf("the file holds %q, %v", got, err)
	}
	if _, err := os.Lstat(filepath.Join(dir, "nowhere")); err == nil {
		t.Error("a file was made through a dangling link")
	}
}

// TestCreateLeavesNothing: what cannot be finished is taken away again.
func TestCreateLeavesNothing(t *testing.T) {
	tmpfs := filepath.Join(testenv.TmpfsDir(t), "disk.raw")
	disk := filepath.Join(testenv.DiskDir(t), "disk.raw")
	for _, c := range []struct {
		name, path string
		size       int64
		o          raw.CreateOptions
		is         error
	}{
		{"too large for the file system", disk, math.MaxInt64, raw.CreateOptions{}, unix.EFBIG},
		{"too large for the memory", tmpfs, 1 << 50, raw.CreateOptions{Preallocate: true}, unix.ENOSPC},
		{"negative", disk, -1, raw.CreateOptions{}, formats.ErrBadOptions},
		{"no such directory", filepath.Join(t.TempDir(), "none", "disk.raw"), 1, raw.CreateOptions{}, fs.ErrNotExist},
	} {
		err := raw.Create(c.path, c.size, c.o)
		var typed *formats.Error
		if !errors.Is(err, c.is) || !errors.As(err, &typed) || strings.Count(err.Error(), c.path) != 1 {
			t.Errorf("%s: %v, want %v", c.name, err, c.is)
		}
		if _, err := os.Lstat(c.path); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: left behind: %v", c.name, err)
		}
	}
}
