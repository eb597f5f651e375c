package qcow2_test

import (
	"os"
	"os/exec"
	"strconv"
	"testing"

	"platter/aio"
	"platter/formats"
	"platter/formats/formattest"
	"platter/formats/qcow2"
	"platter/formats/qcow2/check"
	"platter/formats/raw"
	"platter/integration/testenv"
)

// variant is a kind of image.
type variant struct {
	name    string
	options string // of qemu-img create
}

// variants are the kinds of images that the conformance suite runs on.
var variants = []variant{
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
	{"Backing", backingVariant},
	{"DataFile", dataVariant},
	{"Direct", directVariant},
}

// Variants that consist of two files.
const (
	backingVariant = "backing"
	dataVariant    = "data"
)

// directVariant is v3, on a disk and past the page cache.
const directVariant = "direct"

func qemuCreate(t testing.TB, path string, size int64, options string, more ...string) {
	t.Helper()
	args := append([]string{"create", "-q", "-f", "qcow2", "-o", options}, more...)
	args = append(args, path, strconv.FormatInt(size, 10))
	if out, err := exec.Command(testenv.NeedTool(t, "qemu-img"), args...).CombinedOutput(); err != nil {
		t.Fatalf("qemu-img %v: %v: %s", args, err, out)
	}
}

// qemuCheck has QEMU's checker and ours find an image clean.
func qemuCheck(t testing.TB, path string) {
	t.Helper()
	if out, err := exec.Command(testenv.NeedTool(t, "qemu-img"), "check", "-U", "-f", "qcow2", path).CombinedOutput(); err != nil {
		t.Errorf("qemu-img check: %v: %s", err, out)
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	report, err := check.Run(osFile{f}, check.Options{Log: func(line string) { t.Log(line) }})
	if err != nil || report.ExitCode() != 0 {
		t.Errorf("our check: %+v, %v", report, err)
	}
}

// osFile is a file for package check.
type osFile struct{ *os.File }

func (f osFile) Size() (int64, error) {
	st, err := f.Stat()
	if err != nil {
		return 0, err
	}
	return st.Size(), nil
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
func config(v variant) formattest.Config {
	c := formattest.Config{
		SizeAlign: 512,
		Dir:       testenv.TmpfsDir,
		Create: func(t testing.TB, path string, size int64) {
			t.Helper()
			switch v.options {
			case backingVariant:
				if err := raw.Create(path+".base", size, raw.CreateOptions{}); err != nil {
					t.Fatal(err)
				}
				qemuCreate(t, path, size, "compat=1.1", "-b", path+".base", "-F", "raw")
			case dataVariant:
				qemuCreate(t, path, size, "data_file="+path+".data")
			case directVariant:
				qemuCreate(t, path, size, "compat=1.1")
				// It leaves an end that O_DIRECT can't write.
				st, err := os.Stat(path)
				if err != nil {
					t.Fatal(err)
				}
				if err := os.Truncate(path, (st.Size()+4095)/4096*4096); err != nil {
					t.Fatal(err)
				}
			default:
				qemuCreate(t, path, size, v.options)
			}
		},
		Open: func(t testing.TB, path string, readOnly bool, wrap func(aio.Storage) aio.Storage) formats.Image {
			t.Helper()
			if wrap == nil {
				wrap = func(below aio.Storage) aio.Storage { return below }
			}
			open := func(path string) aio.Storage {
				f, err := aio.OpenFile(path, aio.FileOptions{ReadOnly: readOnly, Direct: v.options == directVariant})
				if err != nil {
					t.Fatal(err)
				}
				return f
			}
			o := qcow2.Options{Path: path, ReadOnly: readOnly, OpenBacking: func(name, format string) (formats.Image, error) {
				return formats.Open(name, formats.Options{ReadOnly: true, Format: format})
			}}
			storage := open(path)
			if v.options == dataVariant {
				// It is the data that is of interest.
				o.OpenData = func(name string) (aio.Storage, error) { return wrap(open(name)), nil }
			} else {
				storage = wrap(storage)
			}
			image, err := qcow2.New(storage, o)
			if err != nil {
				t.Fatal(err)
			}
			return checked{image, t, path}
		},
	}
	switch v.options {
	case dataVariant:
		c.DataPath = func(path string) string { return path + ".data" }
	case directVariant:
		c.Dir = testenv.DiskDir
	}
	return c
}

func TestConformance(t *testing.T) {
	for _, v := range variants {
		t.Run(v.name, func(t *testing.T) {
			c := config(v)
			if v.name != "v3" {
				// The engine is not what they differ in.
				c.Engines = []aio.Engine{aio.EngineIOUring}
				if v.options == directVariant {
					c.Engines = []aio.Engine{aio.EngineNative} // O_DIRECT is what it is for
				}
				c.Rounds = 25
			}
			formattest.Run(t, c)
		})
	}
}

// TestConformanceMerged is the same with merging before the image.
func TestConformanceMerged(t *testing.T) {
	for _, v := range variants {
		if v.name == "v3" || v.name == "4K" || v.name == "ExtendedL2" || v.name == "Backing" {
			t.Run(v.name, func(t *testing.T) {
				c := config(v)
				c.Engines, c.Merge = []aio.Engine{aio.EngineIOUring}, true
				formattest.Run(t, c)
			})
		}
	}
}

// TestEveryFault fails every operation of the file below an image.
func TestEveryFault(t *testing.T) {
	for _, v := range variants {
		if v.name == "v3" || v.name == "512" || v.name == "ExtendedL2-16K" || v.name == "Backing" { // different ways to the file
			t.Run(v.name, func(t *testing.T) { formattest.EveryFault(t, config(v)) })
		}
	}
}
