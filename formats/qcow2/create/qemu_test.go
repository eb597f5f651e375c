package create_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strconv"
	"strings"
	"testing"
	"time"

	"platter/formats/qcow2/create"
	"platter/formats/qcow2/layout"
	"platter/integration/testenv"
)

// pair is an image made by Create and one made by qemu-img with the same
// options, both called disk.qcow2, in folders of their own.
type pair struct {
	t            *testing.T
	ours, theirs string
}

// newPair makes the images below dir. Names of other files are relative to the folders;
// ../base.raw and ../base.qcow2 exist and have data.
func newPair(t *testing.T, dir, list string, size int64) *pair {
	t.Helper()
	qemuImg := testenv.NeedTool(t, "qemu-img")
	p := &pair{t, filepath.Join(dir, "ours"), filepath.Join(dir, "qemu")}
	for _, d := range []string{p.ours, p.theirs} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	base := testenv.Image(t, dir, "base.raw", 1<<20, testenv.Pattern(200<<10, 1))
	if strings.Contains(list, "base.qcow2") {
		p.run(dir, qemuImg, "convert", "-f", "raw", "-O", "qcow2", base, "base.qcow2")
	}
	o, err := create.ParseOptions(list)
	if err != nil {
		t.Fatal(err)
	}
	if err := create.Create(filepath.Join(p.ours, "disk.qcow2"), size, o); err != nil {
		t.Fatal(err)
	}
	p.run(p.theirs, qemuImg, "create", "-q", "-f", "qcow2", "-o", list, "disk.qcow2", strconv.FormatInt(size, 10))
	return p
}

// run runs a program in a folder; it must succeed.
func (p *pair) run(dir, name string, args ...string) []byte {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(p.t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = dir
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		p.t.Fatalf("%s %q in %s: %v\n%s%s", name, args, dir, err, out, &stderr)
	}
	return out
}

// info is what qemu-img info says of the image itself.
func (p *pair) info(dir string) map[string]any {
	p.t.Helper()
	var info map[string]any
	if err := json.Unmarshal(p.run(dir, "qemu-img", "info", "--output", "json", "disk.qcow2"), &info); err != nil {
		p.t.Fatal(err)
	}
	delete(info, "actual-size")
	delete(info, "children") // the files, with their sizes
	return info
}

// extent is a stretch of qemu-img map. Where it stands is left out: QEMU puts
// tables between data. Zero is left out of data: it then tells whether the file
// system has a hole there.
type extent struct {
	Start, Length                   int64
	Depth                           int
	Present, Zero, Data, Compressed bool
}

// extents is what qemu-img map says, with like neighbours joined.
func (p *pair) extents(dir string) []extent {
	p.t.Helper()
	var all, joined []extent
	if err := json.Unmarshal(p.run(dir, "qemu-img", "map", "--output", "json", "disk.qcow2"), &all); err != nil {
		p.t.Fatal(err)
	}
	for _, e := range all {
		e.Zero = e.Zero && !e.Data
		if n := len(joined) - 1; n >= 0 {
			last := joined[n]
			last.Start, last.Length = e.Start, e.Length
			if last == e {
				joined[n].Length += e.Length
				continue
			}
		}
		joined = append(joined, e)
	}
	return joined
}

// length is that of a file in bytes.
func (p *pair) length(dir, name string) int64 {
	p.t.Helper()
	st, err := os.Stat(filepath.Join(dir, name))
	if err != nil {
		p.t.Fatal(err)
	}
	return st.Size()
}

// alike compares the images with each other.
func (p *pair) alike() {
	p.t.Helper()
	if ours, theirs := p.info(p.ours), p.info(p.theirs); !reflect.DeepEqual(ours, theirs) {
		p.t.Errorf("info is\n%v, want\n%v", ours, theirs)
	}
	if ours, theirs := p.extents(p.ours), p.extents(p.theirs); !reflect.DeepEqual(ours, theirs) {
		p.t.Errorf("map has %d extents, want %d:\n%v\n%v", len(ours), len(theirs), ours[:min(len(ours), 5)], theirs[:min(len(theirs), 5)])
	}
	p.clean()
	p.run(p.ours, "qemu-img", "compare", "disk.qcow2", filepath.Join(p.theirs, "disk.qcow2"))
}

// clean checks our image, which exits with 3 if clusters are leaked.
func (p *pair) clean() {
	p.t.Helper()
	p.run(p.ours, "qemu-img", "check", "disk.qcow2")
}

// writable lets QEMU write to both ends of our image and read that back.
func (p *pair) writable(size int64) {
	p.t.Helper()
	if size == 0 {
		return
	}
	first, last := min(size, 200<<10), (size-1)/512*512
	p.run(p.ours, "qemu-io", "-f", "qcow2",
		"-c", fmt.Sprintf("write -P 1 0 %d", first), "-c", fmt.Sprintf("write -P 2 %d 512", last),
		"-c", fmt.Sprintf("read -P 1 0 %d", min(first, last)), "-c", fmt.Sprintf("read -P 2 %d 512", last), "disk.qcow2")
	p.clean()
}

// header reads our image's header, which validates it.
func (p *pair) header() *layout.Header {
	p.t.Helper()
	f, err := os.Open(filepath.Join(p.ours, "disk.qcow2"))
	if err != nil {
		p.t.Fatal(err)
	}
	defer f.Close()
	h, err := layout.ReadHeader(f, p.length(p.ours, "disk.qcow2"))
	if err != nil {
		p.t.Fatal(err)
	}
	return h
}

// TestGeometryLikeQEMU makes images of every cluster size and refcount width.
func TestGeometryLikeQEMU(t *testing.T) {
	t.Parallel()
	for _, clusterSize := range []string{"512", "4k", "64k", "2M"} {
		geometries := []string{"compat=0.10,cluster_size=" + clusterSize}
		for order := range 7 {
			geometries = append(geometries, fmt.Sprintf("compat=1.1,cluster_size=%s,refcount_bits=%d", clusterSize, 1<<order))
		}
		for _, geometry := range geometries {
			for _, preallocation := range []string{"off", "metadata"} {
				list := geometry + ",preallocation=" + preallocation
				t.Run(list, func(t *testing.T) {
					t.Parallel()
					const size = 3<<20 + 512
					p := newPair(t, testenv.TmpfsDir(t), list, size)
					p.header()
					p.alike()
					if ours, theirs := p.length(p.ours, "disk.qcow2"), p.length(p.theirs, "disk.qcow2"); ours > theirs {
						t.Errorf("%d bytes long, qemu-img needs %d", ours, theirs)
					}
					p.writable(size)
				})
			}
		}
	}
}

// TestFeaturesLikeQEMU makes images with everything else that there is.
func TestFeaturesLikeQEMU(t *testing.T) {
	t.Parallel()
	const size = 5<<20 + 1536
	for _, list := range []string{
		"lazy_refcounts=on",
		"lazy_refcounts=on,preallocation=metadata",
		"compression_type=zstd",
		"compression_type=zlib,compat=v2",
		"extended_l2=on",
		"extended_l2=on,cluster_size=16k,refcount_bits=1",
		"extended_l2=on,cluster_size=16k,preallocation=metadata",
		"extended_l2=on,cluster_size=2M,preallocation=metadata",
		"extended_l2=on,preallocation=falloc",
		"extended_l2=on,preallocation=full",
		"preallocation=falloc",
		"preallocation=falloc,cluster_size=512,refcount_bits=64",
		"preallocation=falloc,compat=0.10",
		"preallocation=full",
		"preallocation=full,cluster_size=4k",
		"nocow=on",
		"encryption=off",
		"backing_file=../base.raw,backing_fmt=raw",
		"backing_file=../base.raw,backing_fmt=raw,compat=0.10,cluster_size=512",
		"backing_file=../base.qcow2,backing_fmt=qcow2,cluster_size=2M",
		"backing_file=../base.qcow2,backing_fmt=qcow2,extended_l2=on,preallocation=metadata",
		"backing_file=../base.raw,backing_fmt=raw,extended_l2=on,preallocation=full",
		"backing_file=../base.raw,backing_fmt=raw,data_file=data.raw",
		"data_file=data.raw",
		"data_file=data.raw,cluster_size=512",
		"data_file=data.raw,preallocation=metadata",
		"data_file=data.raw,preallocation=metadata,extended_l2=on",
		"data_file=data.raw,preallocation=falloc",
		"data_file=data.raw,preallocation=full,lazy_refcounts=on",
		"data_file=data.raw,data_file_raw=on",
		"data_file=data.raw,data_file_raw=on,cluster_size=4k,refcount_bits=2",
		"data_file=data.raw,data_file_raw=on,extended_l2=on",
		"data_file=file:data.raw,data_file_raw=on,preallocation=full",
	} {
		t.Run(list, func(t *testing.T) {
			t.Parallel()
			p := newPair(t, t.TempDir(), list, size)
			h := p.header()
			p.alike()
			if h.Has(layout.ExternalData) {
				if n := p.length(p.ours, "data.raw"); n != size {
					t.Errorf("the data file is %d bytes long, want %d", n, size)
				}
			}
			p.writable(size)
		})
	}
}

// TestSizesLikeQEMU makes images from nothing to the largest that there can be.
func TestSizesLikeQEMU(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		clusterSize string
		sizes       []int64
	}{
		{"512", []int64{0, 1, 511, 512, 64<<10 + 512, 1 << 30, 128 << 30}},
		{"64k", []int64{0, 1, 511, 512, 513, 64<<10 + 512, 1 << 30, 10 << 40, 2 << 50}},
		{"2M", []int64{0, 1, 64<<10 + 512, 10 << 40, 2 << 60}},
	} {
		for _, size := range c.sizes {
			t.Run(fmt.Sprintf("%s/%d", c.clusterSize, size), func(t *testing.T) {
				t.Parallel()
				p := newPair(t, testenv.TmpfsDir(t), "cluster_size="+c.clusterSize, size)
				h := p.header()
				rounded := (size + 511) / 512 * 512
				if h.Size != rounded {
					t.Errorf("the disk has %d bytes, want %d", h.Size, rounded)
				}
				if h.L1Entries > 1<<20 {
					// QEMU's map and compare take ages for these.
					if ours, theirs := p.info(p.ours), p.info(p.theirs); !reflect.DeepEqual(ours, theirs) {
						t.Errorf("info is\n%v, want\n%v", ours, theirs)
					}
					p.clean()
				} else {
					p.alike()
				}
				p.writable(rounded)
			})
		}
	}
}

// TestSameBytesAsQEMU: where nothing forces QEMU to move its tables, the files
// are the same to the last byte.
func TestSameBytesAsQEMU(t *testing.T) {
	t.Parallel()
	for _, list := range []string{
		"cluster_size=64k",
		"compat=0.10",
		"cluster_size=4k,refcount_bits=8",
		"cluster_size=512,compat=0.10,backing_file=../base.raw,backing_fmt=raw",
		"refcount_bits=1,lazy_refcounts=on,compression_type=zstd,extended_l2=on",
		"refcount_bits=2,backing_file=../base.raw,backing_fmt=raw",
		"refcount_bits=64,preallocation=metadata",
		"cluster_size=2M,preallocation=metadata,extended_l2=on,refcount_bits=4",
		"data_file=data.raw,data_file_raw=on",
		"data_file=data.raw,backing_file=../base.raw,backing_fmt=raw",
	} {
		for _, size := range []int64{0, 2 << 20, 6 << 20} {
			if size == 0 && strings.Contains(list, "backing_file") {
				continue // then it is the backing file's
			}
			t.Run(fmt.Sprintf("%s/%d", list, size), func(t *testing.T) {
				t.Parallel()
				p := newPair(t, testenv.TmpfsDir(t), list, size)
				ours, err := os.ReadFile(filepath.Join(p.ours, "disk.qcow2"))
				if err != nil {
					t.Fatal(err)
				}
				theirs, err := os.ReadFile(filepath.Join(p.theirs, "disk.qcow2"))
				if err != nil {
					t.Fatal(err)
				}
				if len(ours) != len(theirs) {
					t.Fatalf("%d bytes long, want %d", len(ours), len(theirs))
				}
				for i := range ours {
					if ours[i] != theirs[i] {
						t.Fatalf("byte %d is %#x, want %#x", i, ours[i], theirs[i])
					}
				}
			})
		}
	}
}

// TestManyClusters maps more clusters than one write's worth of L2 entries.
func TestManyClusters(t *testing.T) {
	t.Parallel()
	testenv.NeedTool(t, "qemu-img")
	p := &pair{t: t, ours: t.TempDir()}
	const size = 200 << 20
	o := create.Options{ClusterSize: 512, RefcountBits: 64, Preallocation: create.PreallocateMetadata}
	if err := create.Create(filepath.Join(p.ours, "disk.qcow2"), size, o); err != nil {
		t.Fatal(err)
	}
	p.clean()
	want := []extent{{Length: size, Present: true, Data: true}}
	if got := p.extents(p.ours); !reflect.DeepEqual(got, want) {
		t.Errorf("map is %v, want %v", got, want)
	}
	p.writable(size)
}
