package cli

import (
	"encoding/binary"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"platter/formats"
	"platter/formats/qcow2"
	"platter/formats/qcow2/create"
	"platter/integration/testenv"
)

// piece is what stands at an offset of a disk.
type piece struct {
	off  int64
	data []byte
}

// makeQcow2 makes a qcow2 image with the options of qemu-img and data in it.
func makeQcow2(t testing.TB, path string, size int64, options string, pieces ...piece) string {
	t.Helper()
	var o create.Options
	var err error
	if options != "" {
		o, err = create.ParseOptions(options)
	}
	if err != nil {
		t.Fatal(err)
	}
	if err := create.Create(path, size, o); err != nil {
		t.Fatal(err)
	}
	image, err := qcow2.Open(path, formats.Options{})
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range pieces {
		if _, err := image.WriteAt(p.data, p.off); err != nil {
			t.Error(err)
		}
	}
	if err := image.Close(); err != nil {
		t.Fatal(err)
	}
	return path
}

// disk is what a disk of size bytes holds with the pieces in it.
func disk(size int64, pieces ...piece) []byte {
	b := make([]byte, size)
	for _, p := range pieces {
		copy(b[p.off:], p.data)
	}
	return b
}

// readQcow2 reads the whole disk of an image.
func readQcow2(t testing.TB, path string) []byte {
	t.Helper()
	image, err := qcow2.Open(path, formats.Options{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	defer image.Close()
	b := make([]byte, image.Size())
	if _, err := image.ReadAt(b, 0); err != nil {
		t.Fatal(err)
	}
	return b
}

// The tables of a new image with clusters of 64 KiB and a refcount block of one
// cluster stand in its first clusters in this order.
const (
	refcountBlockAt = 2 << 16
	l1Cluster       = 3
)

// setRefcount changes a refcount of 16 bits in a new image.
func setRefcount(t testing.TB, path string, cluster int64, n uint16) {
	t.Helper()
	patch(t, path, refcountBlockAt+2*cluster, binary.BigEndian.AppendUint16(nil, n))
}

// patch changes bytes of a file.
func patch(t testing.TB, path string, off int64, b []byte) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(b, off); err != nil {
		t.Fatal(err)
	}
}

// missing fails the test if any of the files exists.
func missing(t testing.TB, paths ...string) {
	t.Helper()
	for _, path := range paths {
		if _, err := os.Lstat(path); !os.IsNotExist(err) {
			t.Errorf("%s is left behind: %v", path, err)
		}
	}
}

// smallDir is a folder on a file system of its own, which has 4 MiB.
func smallDir(t testing.TB) string {
	t.Helper()
	testenv.NeedRoot(t)
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=4M"); err != nil {
		testenv.Skip(t, "no file system can be mounted: "+err.Error())
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Errorf("unmount: %v", err)
		}
	})
	return dir
}

// lock holds an image as somebody who writes to it does, until the test ends.
func lock(t testing.TB, path string) {
	t.Helper()
	image, err := formats.Open(path, formats.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { image.Close() })
}

// Every verb that looks at an image refuses what is none, and what is in use.
func TestImagesThatCannotBeRead(t *testing.T) {
	dir := t.TempDir()
	used := makeQcow2(t, filepath.Join(dir, "used.qcow2"), 1<<20, "")
	lock(t, used)
	vmdk := testenv.Image(t, dir, "disk.vmdk", 1<<20, []byte("KDMV\x01\x00\x00\x00"))
	raw := testenv.Image(t, dir, "disk.raw", 1<<20, nil)
	newer := makeQcow2(t, filepath.Join(dir, "newer.qcow2"), 1<<20, "")
	patch(t, newer, 72, []byte{0, 0, 0, 0, 0, 0, 1, 0}) // an incompatible feature
	broken := makeQcow2(t, filepath.Join(dir, "broken.qcow2"), 1<<20, "")
	patch(t, broken, 40, []byte{0, 0, 0, 0, 0, 0, 0, 1}) // l1_table_offset
	for _, verb := range [][]string{{"info"}, {"map"}, {"check"}, {"convert"}} {
		for _, c := range []struct {
			args  []string
			words []string
		}{
			{[]string{filepath.Join(dir, "none")}, []string{"none", "no such file", "check the path"}},
			{[]string{dir}, []string{dir, "directory"}},
			{[]string{"/dev/null"}, []string{"/dev/null", "neither a regular file"}},
			{[]string{used}, []string{used, "in use", "--force-share"}},
			{[]string{vmdk}, []string{vmdk, "vmdk"}},
			{[]string{"-f", "qcow2", raw}, []string{raw, "not a qcow2 image", "--format auto"}},
			{[]string{"-f", "vmdk", raw}, []string{raw, `"vmdk"`, "formats: auto, qcow2, raw"}},
			{[]string{newer}, []string{newer, "bit 8"}},
			{[]string{broken}, []string{broken, "l1_table_offset", "0x1"}},
		} {
			out := filepath.Join(dir, "out")
			args := append(append([]string{}, verb...), c.args...)
			if verb[0] == "convert" {
				args = append(args, out)
			}
			refused(t, args, c.words...)
			missing(t, out)
		}
		args := append(append([]string{}, verb...), "-U", used)
		if verb[0] == "convert" {
			args = append(args, filepath.Join(dir, "shared.raw"))
		}
		must(t, args...)
	}
	if st, err := os.Stat(filepath.Join(dir, "shared.raw")); err != nil || st.Size() != 1<<20 {
		t.Errorf("converted with --force-share: %v, %v", st, err)
	}
}
