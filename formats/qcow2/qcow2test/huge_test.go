package qcow2test_test

import (
	"os/exec"
	"path/filepath"
	"testing"

	"platter/formats"
	"platter/formats/qcow2"
	"platter/formats/qcow2/check"
	"platter/formats/qcow2/qcow2test"
	"platter/integration/testenv"
)

func huge(t testing.TB) string {
	t.Helper()
	path := filepath.Join(testenv.TmpfsDir(t), "huge.qcow2")
	if err := qcow2test.Huge(path); err != nil {
		t.Fatal(err)
	}
	return path
}

// TestHuge shows that the image is what it says.
func TestHuge(t *testing.T) {
	path := huge(t)
	if out, err := exec.Command(testenv.NeedTool(t, "qemu-img"), "check", path).CombinedOutput(); err != nil {
		t.Errorf("qemu-img check: %v: %s", err, out)
	}
	im, err := qcow2.Open(path, formats.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer im.Close()
	p := make([]byte, 4096)
	for _, off := range []int64{0, 50 << 16, 51 << 16, 5 << 40, 10<<40 - 4096} {
		if _, err := im.ReadAt(p, off); err != nil {
			t.Errorf("read at %d: %v", off, err)
		}
	}
	report, err := check.Run(im.CheckFile(), check.Options{})
	if err != nil || report.ExitCode() != 0 || report.AllocatedClusters != 20480*51 {
		t.Errorf("check: %+v, %v", report, err)
	}
}

// BenchmarkOpen opens and closes an image of 10 TiB.
func BenchmarkOpen(b *testing.B) {
	path := huge(b)
	for b.Loop() {
		im, err := qcow2.Open(path, formats.Options{})
		if err != nil {
			b.Fatal(err)
		}
		if err := im.Close(); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkCheck checks an image with 1.3 GiB of metadata.
func BenchmarkCheck(b *testing.B) {
	im, err := qcow2.Open(huge(b), formats.Options{ReadOnly: true})
	if err != nil {
		b.Fatal(err)
	}
	defer im.Close()
	var read int64
	for b.Loop() {
		_, err := check.Run(im.CheckFile(), check.Options{Progress: func(done, _ int64) { read = done }})
		if err != nil {
			b.Fatal(err)
		}
	}
	b.SetBytes(read)
}
