package qcow2_test

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"platter/aio"
	"platter/formats"
	"platter/formats/formattest"
	"platter/formats/qcow2"
	"platter/formats/qcow2/check"
	"platter/integration/testenv"
)

// leaksOnly has our checker and QEMU's look at an image, which may have leaks and
// nothing worse.
func leaksOnly(path string) error {
	im, err := qcow2.Open(path, formats.Options{ReadOnly: true, AllowDirs: []string{os.TempDir()}})
	if err != nil {
		return err
	}
	report, err := check.Run(im.CheckFile(), check.Options{})
	dirty := im.Dirty()
	if err := errors.Join(err, im.Close()); err != nil {
		return err
	}
	theirCheck := exec.Command("qemu-img", "check", "-f", "qcow2", "--output", "json", path)
	theirCheck.Dir = filepath.Dir(path) // where it looks for data files
	out, err := theirCheck.CombinedOutput()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		return err
	}
	theirs := 0
	if exit != nil {
		theirs = exit.ExitCode()
	}
	switch ours := report.ExitCode(); {
	case dirty: // lazy refcounts may be wrong while the image says so
		return nil
	case ours != 0 && ours != 3, theirs != 0 && theirs != 3:
		return fmt.Errorf("our check: %+v, qemu-img check: exit status %d: %s", report, theirs, out)
	}
	return nil
}

// closed is leaksOnly for an image that was closed: it must not say any more that
// its refcounts may be wrong.
func closed(path string) error {
	im, err := qcow2.Open(path, formats.Options{ReadOnly: true, AllowDirs: []string{os.TempDir()}})
	if err != nil {
		return err
	}
	if im.Dirty() {
		err = errors.New("the dirty bit is set")
	}
	return errors.Join(err, im.Close(), leaksOnly(path))
}

// TestPowerCut cuts the power in the middle of everything.
func TestPowerCut(t *testing.T) {
	testenv.NeedTool(t, "qemu-img")
	ring := []aio.Engine{aio.EngineIOUring}
	for _, v := range []struct {
		name, options string
		size          int64
		engines       []aio.Engine
	}{
		{"v3", "compat=1.1", 1 << 20, nil},
		{"512", "cluster_size=512", 256 << 10, ring},
		{"4K", "cluster_size=4K,refcount_bits=64", 1 << 20, ring},
		{"v2", "compat=0.10,cluster_size=4K", 512 << 10, ring},
		{"ExtendedL2", "extended_l2=on,cluster_size=16K", 1 << 20, ring},
		{"Lazy", "lazy_refcounts=on,cluster_size=4K", 512 << 10, ring},
		{"DataFile", dataVariant, 512 << 10, ring},
		{"Backing", "cluster_size=16K", 1 << 20, ring},
		{"BackingExtendedL2", "extended_l2=on,cluster_size=32K", 1 << 20, ring},
		{"Merged", "compat=1.1", 1 << 20, ring},
		{"BackingMerged", "cluster_size=16K", 1 << 20, ring},
	} {
		t.Run(v.name, func(t *testing.T) {
			var dataPath func(string) string
			if v.options == dataVariant {
				dataPath = func(path string) string { return path + ".data" }
			}
			// It is all zeroes, but an image doesn't know that.
			var base []string
			if strings.HasPrefix(v.name, "Backing") {
				path := filepath.Join(t.TempDir(), "base")
				writeFile(t, path, make([]byte, v.size-40<<10))
				base = []string{"-b", path, "-F", "raw"}
			}
			formattest.PowerCut(t, formattest.PowerCutConfig{
				DataPath: dataPath,
				Size:     v.size,
				Engines:  v.engines,
				Cuts:     cuts(t),
				Create: func(path string, size int64) error {
					options := v.options
					if options == dataVariant {
						options = "cluster_size=4K,data_file=image.data"
					}
					args := append([]string{"create", "-q", "-f", "qcow2", "-o", options}, base...)
					create := exec.Command("qemu-img", append(args, filepath.Base(path), strconv.FormatInt(size, 10))...)
					create.Dir = filepath.Dir(path) // so that the name of the data file is relative
					out, err := create.CombinedOutput()
					if err != nil {
						return fmt.Errorf("qemu-img create: %w: %s", err, out)
					}
					return nil
				},
				Open: func(path string, readOnly bool, wrap func(aio.Storage) aio.Storage) (formats.Image, error) {
					im, err := openCut(path, readOnly, wrap)
					if err == nil && strings.HasSuffix(v.name, "Merged") {
						im = formattest.Merged(im)
					}
					return im, err
				},
				Check:      leaksOnly,
				CheckClean: closed,
			})
		})
	}
}

// cuts is how many power cuts are tried on each kind of image.
func cuts(t testing.TB) int {
	t.Helper()
	text := os.Getenv("PLATTER_TEST_CUTS")
	if text == "" {
		return 40 // make powercut tries many more
	}
	n, err := strconv.Atoi(text)
	if err != nil || n < 1 {
		t.Fatalf("PLATTER_TEST_CUTS is %q, want a number", text)
	}
	return n
}

func openCut(path string, readOnly bool, wrap func(aio.Storage) aio.Storage) (formats.Image, error) {
	open := func(path string) (aio.Storage, error) {
		f, err := aio.OpenFile(path, aio.FileOptions{ReadOnly: readOnly})
		if err != nil || wrap == nil {
			return f, err
		}
		return wrap(f), nil
	}
	storage, err := open(path)
	if err != nil {
		return nil, err
	}
	im, err := qcow2.New(storage, qcow2.Options{Path: path, ReadOnly: readOnly,
		OpenBacking: func(name, format string) (formats.Image, error) {
			return formats.Open(name, formats.Options{ReadOnly: true, Format: format})
		},
		OpenData: func(name string) (aio.Storage, error) { return open(formats.Beside(path, name)) }})
	if err != nil {
		return nil, err
	}
	return im, nil
}
