package create

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"platter/formats/qcow2/layout"
)

// operation is one that was asked of a recording.
type operation struct {
	kind string // "write", "truncate", "allocate", "sync"
	off  int64  // or the new size
	data []byte
}

// recording is a file that keeps what was done to it, and that can fail.
type recording struct {
	operations []operation
	failAt     int   // the operation that fails, counted from 1
	allocate   error // what Allocate returns
}

var errInjected = errors.New("injected")

func (r *recording) add(op operation) error {
	r.operations = append(r.operations, op)
	if len(r.operations) == r.failAt {
		return errInjected
	}
	return nil
}

func (r *recording) WriteAt(b []byte, off int64) (int, error) {
	if err := r.add(operation{"write", off, bytes.Clone(b)}); err != nil {
		return 0, err
	}
	return len(b), nil
}

func (r *recording) Truncate(size int64) error { return r.add(operation{"truncate", size, nil}) }
func (r *recording) Sync() error               { return r.add(operation{"sync", 0, nil}) }

func (r *recording) Allocate(off, n int64) error {
	if err := r.add(operation{"allocate", off + n, nil}); err != nil {
		return err
	}
	return r.allocate
}

// image is a file as a power cut leaves it.
type image []byte

func (m *image) grow(size int64) {
	if n := size - int64(len(*m)); n > 0 {
		*m = append(*m, make([]byte, n)...)
	}
}

// apply does an operation. Of a write, only the sectors that keep says are
// there.
func (m *image) apply(op operation, keep func() bool) {
	switch op.kind {
	case "truncate", "allocate":
		if keep() {
			m.grow(op.off)
		}
	case "write":
		for data, off := op.data, op.off; len(data) > 0; {
			n := min(sector-int(off%sector), len(data))
			if keep() {
				m.grow(off + int64(n))
				copy((*m)[off:], data[:n])
			}
			data, off = data[n:], off+int64(n)
		}
	}
}

func always() bool { return true }

// testPlan is a small image with a long header.
func testPlan(t *testing.T, o Options) *plan {
	t.Helper()
	o = o.withDefaults()
	if err := o.check("disk.qcow2"); err != nil {
		t.Fatal(err)
	}
	p, err := newPlan("disk.qcow2", 1<<20, &o)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// variants are images that are written in different ways. Each has a header
// that is longer than a sector, or tables that are, or both.
var variants = []Options{
	{BackingFile: strings.Repeat("long/", 200), BackingFormat: "raw"},
	{ClusterSize: 512, RefcountBits: 64, Preallocation: PreallocateMetadata},
	{ClusterSize: 16 << 10, ExtendedL2: true, Preallocation: PreallocateFalloc},
	{ClusterSize: 4 << 10, Version: 2, Preallocation: PreallocateFull},
	{DataFile: strings.Repeat("./", 300) + "d", DataFileRaw: true, ClusterSize: 4 << 10},
}

// TestPowerCut cuts the power after every operation. What was synced is there;
// of the rest any sector may be or not. Once the header is durable, and before
// there is anything else, the file is an image that is refused until it is whole.
func TestPowerCut(t *testing.T) {
	const seed, tries = 7, 20
	random := rand.New(rand.NewPCG(seed, 0))
	for i, o := range variants {
		t.Run(fmt.Sprint(i), func(t *testing.T) {
			p := testPlan(t, o)
			r := &recording{}
			if err := p.write(r, o.Preallocation); err != nil {
				t.Fatal(err)
			}
			var whole image
			for _, op := range r.operations {
				whole.apply(op, always)
			}
			if _, err := layout.ParseHeader(whole); err != nil {
				t.Fatalf("the finished image: %v", err)
			}
			var synced image
			firstUnsynced, images := 0, 0
			for cut := range len(r.operations) + 1 {
				for range tries {
					found := append(image(nil), synced...)
					likely := random.Float64()
					for _, op := range r.operations[firstUnsynced:cut] {
						found.apply(op, func() bool { return random.Float64() < likely })
					}
					_, err := layout.ParseHeader(found)
					switch {
					case err == nil && !bytes.Equal(found, whole):
						t.Fatalf("seed %d: after %d operations the image opens but is not whole", seed, cut)
					case err == nil:
						images++
					case (len(found) > len(p.head) || len(synced) > 0) && !errors.Is(err, layout.ErrUnsupported):
						t.Fatalf("seed %d: after %d operations the file is not refused as unsupported but: %v", seed, cut, err)
					}
				}
				if cut < len(r.operations) && r.operations[cut].kind == "sync" {
					for _, op := range r.operations[firstUnsynced:cut] {
						synced.apply(op, always)
					}
					firstUnsynced = cut + 1
				}
			}
			if firstUnsynced != len(r.operations) || !bytes.Equal(synced, whole) {
				t.Error("the finished image is not durable")
			}
			if images < tries {
				t.Errorf("seed %d: %d images were finished, want at least %d", seed, images, tries)
			}
		})
	}
}

// TestEveryFailure: an error of any operation is returned, and nothing is done
// after it.
func TestEveryFailure(t *testing.T) {
	for i, o := range variants {
		p := testPlan(t, o)
		for name, write := range map[string]func(file, Preallocation) error{"image": p.write, "data file": p.writeData} {
			good := &recording{}
			if err := write(good, o.Preallocation); err != nil {
				t.Fatal(err)
			}
			for at := range good.operations {
				r := &recording{failAt: at + 1}
				if err := write(r, o.Preallocation); !errors.Is(err, errInjected) || len(r.operations) != at+1 {
					t.Errorf("%s %d: operation %d (%s) fails: %v after %d", name, i, at, good.operations[at].kind, err, len(r.operations))
				}
			}
		}
	}
}

// TestReserve: falloc writes only where space cannot be had otherwise, full
// always does, and other modes take none.
func TestReserve(t *testing.T) {
	const from, end = 4096, 4096 + 2*chunk + 100
	for _, c := range []struct {
		mode           Preallocation
		allocate, want error
		calls          int
		written        int64
	}{
		{PreallocateOff, nil, nil, 0, 0},
		{PreallocateMetadata, nil, nil, 0, 0},
		{PreallocateFalloc, nil, nil, 1, 0},
		{PreallocateFalloc, unix.EOPNOTSUPP, nil, 1, end - from},
		{PreallocateFalloc, unix.ENOSPC, unix.ENOSPC, 1, 0},
		{PreallocateFull, nil, nil, 1, end - from},
		{PreallocateFull, unix.EOPNOTSUPP, nil, 1, end - from},
		{PreallocateFull, unix.ENOSPC, unix.ENOSPC, 1, 0},
	} {
		r := &recording{allocate: c.allocate}
		if err := reserve(r, from, end, c.mode); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", c.mode, err, c.want)
		}
		calls, next := 0, int64(from)
		for _, op := range r.operations {
			if op.kind == "allocate" {
				calls++
				continue
			}
			if op.off != next || len(bytes.Trim(op.data, "\x00")) > 0 {
				t.Errorf("%s: %s at %d, want zeroes at %d", c.mode, op.kind, op.off, next)
			}
			next += int64(len(op.data))
		}
		if calls != c.calls || next-from != c.written {
			t.Errorf("%s, %v: %d calls and %d bytes, want %d and %d", c.mode, c.allocate, calls, next-from, c.calls, c.written)
		}
	}
	r := &recording{}
	if err := reserve(r, 10, 10, PreallocateFull); err != nil || r.operations != nil {
		t.Errorf("nothing to reserve: %v, %v", err, r.operations)
	}
}

// TestRefcounts: exactly the clusters of the file have a refcount.
func TestRefcounts(t *testing.T) {
	for order := range layout.MaxRefcountOrder + 1 {
		p := testPlan(t, Options{ClusterSize: 512, RefcountBits: 1 << order, Preallocation: PreallocateMetadata})
		r := &recording{}
		if err := p.writeTables(r); err != nil {
			t.Fatal(err)
		}
		var file image
		for _, op := range r.operations {
			file.apply(op, always)
		}
		file.grow(p.length)
		clusters := p.length / 512
		for i := range p.refcountBlocks.count << p.RefcountBlockBits() {
			entry := p.offset(p.refcountTable) + 8*(i>>p.RefcountBlockBits())
			block := int64(binary.BigEndian.Uint64(file[entry:]))
			got := p.Refcount(file[block:block+512], int(i&(1<<p.RefcountBlockBits()-1)))
			if want := i < clusters; got != map[bool]uint64{true: 1}[want] {
				t.Fatalf("%d bits: the refcount of cluster %d of %d is %d", 1<<order, i, clusters, got)
			}
		}
	}
}

// TestPlanTouches: the tables follow each other without a gap, and are as small
// as can be.
func TestPlanTouches(t *testing.T) {
	for clusterBits := layout.MinClusterBits; clusterBits <= layout.MaxClusterBits; clusterBits++ {
		for order := range layout.MaxRefcountOrder + 1 {
			for _, size := range []int64{0, 512, 1 << 30, 20 << 30} {
				o := Options{ClusterSize: 1 << clusterBits, RefcountBits: 1 << order, Preallocation: PreallocateMetadata}.withDefaults()
				p, err := newPlan("disk.qcow2", size, &o)
				if err != nil {
					t.Fatal(err)
				}
				next := int64(1)
				for _, r := range []region{p.refcountTable, p.refcountBlocks, p.l1, p.l2, p.data} {
					if r.first != next {
						t.Errorf("%d, %d bits, %d bytes: %+v does not begin at cluster %d", o.ClusterSize, o.RefcountBits, size, r, next)
					}
					next = r.end()
				}
				covers := func(blocks int64) int64 { return blocks << p.RefcountBlockBits() }
				if n := p.refcountBlocks.count; covers(n) < next || covers(n-1) >= next {
					t.Errorf("%d, %d bits, %d bytes: %d refcount blocks for %d clusters", o.ClusterSize, o.RefcountBits, size, n, next)
				}
				if n := p.refcountTable.count; n != p.Clusters(8*p.refcountBlocks.count) || n == 0 {
					t.Errorf("%d, %d bits, %d bytes: a refcount table of %d clusters", o.ClusterSize, o.RefcountBits, size, n)
				}
				if p.length != next*o.ClusterSize && size > 0 {
					t.Errorf("%d, %d bits, %d bytes: the file has %d bytes, want %d", o.ClusterSize, o.RefcountBits, size, p.length, next*o.ClusterSize)
				}
			}
		}
	}
}

// TestLimit: metadata can be preallocated until the refcount table is full.
func TestLimit(t *testing.T) {
	o := Options{ClusterSize: 512, RefcountBits: 64, Preallocation: PreallocateMetadata}.withDefaults()
	var largest *plan
	for low, high := int64(0), int64(64<<30); high-low > sector; {
		middle := (low + high) / 2 &^ (sector - 1)
		p, err := newPlan("disk.qcow2", middle, &o)
		if err != nil {
			high = middle
		} else {
			low, largest = middle, p
		}
	}
	if n := largest.refcountTable.count * 512; n != layout.MaxRefcountTableBytes {
		t.Errorf("the largest disk has %d bytes, with a refcount table of %d", largest.header.Size, n)
	}
}

// TestNoCOW: the file system is asked, and does it or says that it can't.
func TestNoCOW(t *testing.T) {
	f, err := os.Create(filepath.Join(t.TempDir(), "file"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	err = setNoCOW(f)
	if err != nil {
		if !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.ENOTTY) && !errors.Is(err, unix.EINVAL) {
			t.Error(err)
		}
		return
	}
	if flags, err := unix.IoctlGetInt(int(f.Fd()), unix.FS_IOC_GETFLAGS); err != nil || flags&noCOW == 0 {
		t.Errorf("the file's flags are %#x, %v", flags, err)
	}
}
