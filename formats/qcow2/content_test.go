package qcow2_test

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"platter/formats"
	"platter/formats/qcow2"
	"platter/integration/testenv"
)

// qemuImg runs qemu-img.
func qemuImg(t testing.TB, args ...string) {
	t.Helper()
	if out, err := exec.Command(testenv.NeedTool(t, "qemu-img"), args...).CombinedOutput(); err != nil {
		t.Fatalf("qemu-img %v: %v: %s", args, err, out)
	}
}

// content makes a disk that is partly random, partly compressible and partly
// zeroes.
func content(rng *rand.Rand, size int) []byte {
	b := make([]byte, size)
	for at := 0; at < size; {
		n := min(1+rng.IntN(200_000), size-at)
		switch rng.IntN(3) {
		case 0:
			for i := range b[at : at+n] {
				b[at+i] = byte(rng.Uint32())
			}
		case 1:
			copy(b[at:at+n], bytes.Repeat([]byte(fmt.Sprintf("sector %d of something ", at)), n/10+1))
		}
		at += n
	}
	return b
}

func writeFile(t testing.TB, path string, b []byte) {
	t.Helper()
	if err := os.WriteFile(path, b, 0o644); err != nil {
		t.Fatal(err)
	}
}

// rawOf is what QEMU reads in an image. It takes no lock, since a test beside this
// one that starts a program holds a copy of every descriptor for a moment.
func rawOf(t testing.TB, path string) []byte {
	t.Helper()
	out := filepath.Join(testenv.TmpfsDir(t), "raw")
	qemuImg(t, "convert", "-U", "-f", "qcow2", "-O", "raw", path, out)
	b, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	os.Remove(out)
	return b
}

func readAll(t testing.TB, im *qcow2.Image) []byte {
	t.Helper()
	b := make([]byte, im.Size())
	if _, err := im.ReadAt(b, 0); err != nil && im.Size() > 0 {
		t.Fatal(err)
	}
	return b
}

func open(t testing.TB, path string, o formats.Options) *qcow2.Image {
	t.Helper()
	im, err := qcow2.Open(path, o)
	// A test beside this one that starts a program holds a copy of every
	// descriptor for a moment, locks and all.
	for end := time.Now().Add(10 * time.Second); errors.Is(err, formats.ErrLocked) && time.Now().Before(end); {
		time.Sleep(time.Millisecond)
		im, err = qcow2.Open(path, o)
	}
	if err != nil {
		t.Fatal(err)
	}
	return im
}

func seeded(t testing.TB) *rand.Rand {
	t.Helper()
	seed := uint64(time.Now().UnixNano())
	if text := os.Getenv("PLATTER_TEST_SEED"); text != "" {
		var err error
		if seed, err = strconv.ParseUint(text, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("to repeat: PLATTER_TEST_SEED=%d", seed)
		}
	})
	return rand.New(rand.NewPCG(seed, 0))
}

func sameBytes(t testing.TB, what string, got, want []byte) {
	t.Helper()
	if len(got) != len(want) {
		t.Fatalf("%s: %d bytes, want %d", what, len(got), len(want))
	}
	for i := range got {
		if got[i] != want[i] {
			t.Fatalf("%s: byte %d (%#x) is %#x, want %#x", what, i, i, got[i], want[i])
		}
	}
}

// sources are ways in which QEMU makes an image with given content at path.
var sources = []struct {
	name string
	make func(t testing.TB, rng *rand.Rand, path, options string, size int) []byte
}{
	{"Allocated", func(t testing.TB, rng *rand.Rand, path, options string, size int) []byte {
		b := content(rng, size)
		writeFile(t, path+".raw", b)
		qemuImg(t, "convert", "-f", "raw", "-O", "qcow2", "-o", options, path+".raw", path)
		return b
	}},
	{"Compressed", func(t testing.TB, rng *rand.Rand, path, options string, size int) []byte {
		b := content(rng, size)
		writeFile(t, path+".raw", b)
		qemuImg(t, "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, path+".raw", path)
		return b
	}},
	{"BackingRawShorter", func(t testing.TB, rng *rand.Rand, path, options string, size int) []byte {
		b := content(rng, size/2+512)
		writeFile(t, path+".base", b)
		qemuCreate(t, path, int64(size), options, "-b", filepath.Base(path)+".base", "-F", "raw")
		return append(b, make([]byte, size-len(b))...)
	}},
	{"BackingQcow2Longer", func(t testing.TB, rng *rand.Rand, path, options string, size int) []byte {
		b := content(rng, size+300*1024)
		writeFile(t, path+".raw", b)
		qemuImg(t, "convert", "-c", "-f", "raw", "-O", "qcow2", path+".raw", path+".base")
		qemuCreate(t, path, int64(size), options, "-b", path+".base", "-F", "qcow2")
		return b[:size]
	}},
	{"DataFile", dataFile("off")},
	{"DataFileRaw", dataFile("on")},
	{"Snapshot", func(t testing.TB, rng *rand.Rand, path, options string, size int) []byte {
		b := content(rng, size)
		writeFile(t, path+".raw", b)
		qemuImg(t, "convert", "-f", "raw", "-O", "qcow2", "-o", options, path+".raw", path)
		qemuImg(t, "snapshot", "-c", "before", path)
		return b
	}},
}

func dataFile(raw string) func(t testing.TB, rng *rand.Rand, path, options string, size int) []byte {
	return func(t testing.TB, rng *rand.Rand, path, options string, size int) []byte {
		b := content(rng, size)
		writeFile(t, path+".raw", b)
		options += ",data_file=" + path + ".data,data_file_raw=" + raw
		qemuImg(t, "create", "-q", "-f", "qcow2", "-o", options, path, strconv.Itoa(size))
		qemuImg(t, "convert", "-n", "-f", "raw", "-O", "qcow2", path+".raw", path)
		return b
	}
}

// matrix are all kinds of images: versions, cluster sizes and features.
func matrix() []variant {
	list := []variant{{"Refcount1", "refcount_bits=1"}, {"Refcount64", "refcount_bits=64,cluster_size=4K"}, {"ExtendedL2-16K", "extended_l2=on,cluster_size=16K"}}
	for _, size := range []string{"512", "4K", "64K", "2M"} {
		list = append(list,
			variant{"v2-" + size, "compat=0.10,cluster_size=" + size},
			variant{"v3-" + size, "compat=1.1,cluster_size=" + size},
			variant{"Lazy-" + size, "lazy_refcounts=on,cluster_size=" + size},
			variant{"Zstd-" + size, "compression_type=zstd,cluster_size=" + size})
		if size == "64K" || size == "2M" {
			list = append(list, variant{"ExtendedL2-" + size, "extended_l2=on,cluster_size=" + size})
		}
	}
	return list
}

// TestContent opens what QEMU made, reads it, writes to it with many goroutines
// at a time, and has QEMU read it again.
func TestContent(t *testing.T) {
	for _, v := range matrix() {
		for _, source := range sources {
			if v.name == "Refcount1" && source.name == "Snapshot" || strings.HasPrefix(v.name, "v2") && strings.HasPrefix(source.name, "DataFile") {
				continue // what the format doesn't have
			}
			t.Run(v.name+"/"+source.name, func(t *testing.T) {
				t.Parallel()
				rng := seeded(t)
				path := filepath.Join(testenv.TmpfsDir(t), "image")
				want := source.make(t, rng, path, v.options, 3<<20+512*rng.IntN(1000))
				im := open(t, path, formats.Options{ReadOnly: true})
				sameBytes(t, "at first", readAll(t, im), want)
				if err := im.Close(); err != nil {
					t.Fatal(err)
				}
				before := bytes.Clone(want)
				for range 2 {
					im = open(t, path, formats.Options{})
					scribble(t, im, rng, want)
					sameBytes(t, "after writing", readAll(t, im), want)
					if err := im.Close(); err != nil {
						t.Fatal(err)
					}
					qemuCheck(t, path)
					sameBytes(t, "as QEMU reads it", rawOf(t, path), want)
				}
				if source.name == "DataFileRaw" {
					b, err := os.ReadFile(path + ".data")
					if err != nil {
						t.Fatal(err)
					}
					// QEMU made it as long as whole clusters.
					sameBytes(t, "the data file", b[:len(want)], want)
				}
				if source.name == "Snapshot" {
					im := open(t, path, formats.Options{ReadOnly: true, Snapshot: "before"})
					sameBytes(t, "the snapshot", readAll(t, im), before)
					if err := im.Close(); err != nil {
						t.Fatal(err)
					}
				}
			})
		}
	}
}

// scribble does random operations on the image and on the model, with several
// goroutines that share clusters but no bytes.
func scribble(t testing.TB, im *qcow2.Image, rng *rand.Rand, model []byte) {
	t.Helper()
	const workers, stripe = 4, 24 << 10
	var wg sync.WaitGroup
	errs := make(chan error, workers)
	for w := range workers {
		rng := rand.New(rand.NewPCG(rng.Uint64(), rng.Uint64()))
		wg.Add(1)
		go func() {
			defer wg.Done()
			for range 60 {
				chunk := rng.IntN(len(model)/stripe/workers+1)*workers + w
				from := min(chunk*stripe+rng.IntN(stripe), len(model))
				to := min(from+1+rng.IntN(stripe), (chunk+1)*stripe, len(model))
				if from >= to {
					continue
				}
				if err := operation(im, rng, model[from:to], int64(from)); err != nil {
					errs <- err
					return
				}
			}
		}()
	}
	wg.Wait()
	select {
	case err := <-errs:
		t.Fatal(err)
	default:
	}
	// Large ones, by one at a time.
	for range 6 {
		from := rng.IntN(len(model))
		to := min(from+rng.IntN(1<<20), len(model))
		if err := operation(im, rng, model[from:to], int64(from)); err != nil {
			t.Fatal(err)
		}
	}
}

func operation(im *qcow2.Image, rng *rand.Rand, model []byte, off int64) error {
	switch rng.IntN(8) {
	case 0:
		got := make([]byte, len(model))
		if _, err := im.ReadAt(got, off); err != nil {
			return err
		}
		if !bytes.Equal(got, model) {
			return fmt.Errorf("read %d+%d: not what was written", off, len(model))
		}
	case 1:
		if err := im.Flush(); err != nil {
			return err
		}
	case 2, 3:
		clear(model)
		return im.Zero(off, int64(len(model)))
	default:
		for i := range model {
			model[i] = byte(rng.Uint32())
		}
		_, err := im.WriteAt(model, off)
		return err
	}
	return nil
}

// TestShortLastCluster writes to a cluster of which the file has only a part, as
// other programs leave it.
func TestShortLastCluster(t *testing.T) {
	path := filepath.Join(testenv.TmpfsDir(t), "image")
	qemuCreate(t, path, 64<<10, "compat=1.1")
	im := open(t, path, formats.Options{})
	if _, err := im.WriteAt([]byte("begin"), 0); err != nil {
		t.Fatal(err)
	}
	if err := im.Close(); err != nil {
		t.Fatal(err)
	}
	st, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	// The cluster that was allocated last is the L2 table or the data.
	if list := mustExtents(t, path); list[len(list)-1].Offset+list[len(list)-1].Length != st.Size() {
		t.Fatalf("the data is not at the end: %+v of %d", list, st.Size())
	}
	if err := os.Truncate(path, st.Size()-60<<10); err != nil {
		t.Fatal(err)
	}
	want := make([]byte, 64<<10)
	copy(want, "begin")
	copy(want[50<<10:], "end")
	im = open(t, path, formats.Options{})
	sameBytes(t, "cut short", readAll(t, im)[:50<<10], want[:50<<10])
	if _, err := im.WriteAt([]byte("end"), 50<<10); err != nil {
		t.Fatal(err)
	}
	sameBytes(t, "written", readAll(t, im), want)
	if err := im.Close(); err != nil {
		t.Fatal(err)
	}
	qemuCheck(t, path)
	sameBytes(t, "as QEMU reads it", rawOf(t, path), want)
}

func mustExtents(t testing.TB, path string) []formats.Extent {
	t.Helper()
	im := open(t, path, formats.Options{ReadOnly: true})
	defer im.Close()
	list, err := im.Extents(nil, 0, im.Size(), 0)
	if err != nil {
		t.Fatal(err)
	}
	return list
}
