package formats_test

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"platter/formats"
	"platter/integration/testenv"
)

func TestPreallocate(t *testing.T) {
	f, err := os.Create(filepath.Join(testenv.DiskDir(t), "file"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	const from, n = 4096, 1<<20 + 4096
	if err := formats.Preallocate(f, from, n); err != nil {
		t.Fatal(err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		t.Fatal(err)
	}
	if st.Size != from+n || st.Blocks*512 < n {
		t.Errorf("%d bytes long with %d bytes of space, want %d with %d", st.Size, st.Blocks*512, int64(from+n), int64(n))
	}
	if err := formats.Preallocate(f, 0, 1<<60); !errors.Is(err, unix.ENOSPC) && !errors.Is(err, unix.EFBIG) {
		t.Errorf("far too much: %v", err)
	}
	if err := formats.SyncDir(filepath.Dir(f.Name())); err != nil {
		t.Error(err)
	}
}
