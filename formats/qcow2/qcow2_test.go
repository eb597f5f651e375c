package qcow2_test

import (
	"os/exec"
	"strconv"
	"testing"

	"platter/aio"
	"platter/formats"
	"platter/formats/formattest"
	"platter/formats/qcow2"
	"platter/integration/testenv"
)

// variants are the kinds of images that the conformance suite runs on.
var variants = []struct {
	name    string
	options string // of qemu-img create
}{
	{"v3", "compat=1.1"},
	{"v2", "compat=0.10"},
	{"512", "cluster_size=512"},
	{"4K", "cluster_size=4K"},
	{"2M", "cluster_size=2M"},
	{"ExtendedL2", "extended_l2=on"},
	{"ExtendedL2-16K", "extended_l2=on,cluster_size=16K"},
	{"Refcount1", "refcount_bits=1"},
	{"Refcount64", "refcount_bits=64,cluster_size=4K"},
	{"Lazy", "lazy_refcounts=on"},
}

func qemuCreate(t testing.TB, path string, size int64, options string, more ...string) {
	t.Helper()
	args := append([]string{"create", "-q", "-f", "qcow2", "-o", options}, more...)
	args = append(args, path, strconv.FormatInt(size, 10))
	if out, err := exec.Command(testenv.NeedTool(t, "qemu-img"), args...).CombinedOutput(); err != nil {
		t.Fatalf("qemu-img %v: %v: %s", args, err, out)
	}
}

func qemuCheck(t testing.TB, path string) {
	t.Helper()
	if out, err := exec.Command(testenv.NeedTool(t, "qemu-img"), "check", "-f", "qcow2", path).CombinedOutput(); err != nil {
		t.Errorf("qemu-img check: %v: %s", err, out)
	}
}

// checked is an image that qemu-img checks when it is closed.
type checked struct {
	*qcow2.Image
	t    testing.TB
	path string
}

func (c checked) Close() error {
	err := c.Image.Close()
	qemuCheck(c.t, c.path)
	return err
}

// config is how the suites get an image of a kind.
func config(options string) formattest.Config {
	return formattest.Config{
		SizeAlign: 512,
		Create: func(t testing.TB, path string, size int64) {
			t.Helper()
			qemuCreate(t, path, size, options)
		},
		Open: func(t testing.TB, path string, readOnly bool, wrap func(aio.Storage) aio.Storage) formats.Image {
			t.Helper()
			f, err := aio.OpenFile(path, aio.FileOptions{ReadOnly: readOnly})
			if err != nil {
				t.Fatal(err)
			}
			var storage aio.Storage = f
			if wrap != nil {
				storage = wrap(f)
			}
			image, err := qcow2.New(storage, qcow2.Options{Path: path, ReadOnly: readOnly})
			if err != nil {
				t.Fatal(err)
			}
			return checked{image, t, path}
		},
	}
}

func TestConformance(t *testing.T) {
	for _, v := range variants {
		t.Run(v.name, func(t *testing.T) { formattest.Run(t, config(v.options)) })
	}
}

// TestEveryFault fails every operation of the file below an image.
func TestEveryFault(t *testing.T) {
	for _, v := range variants {
		t.Run(v.name, func(t *testing.T) { formattest.EveryFault(t, config(v.options)) })
	}
}
