package nbd

import (
	"bytes"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"platter/aio"
	"platter/formats"
	"platter/formats/qcow2"
	"platter/formats/qcow2/create"
	"platter/formats/raw"
	"platter/integration/testenv"
)

// disk is an image on a file, with what the guest should see.
type disk struct {
	t      testing.TB
	path   string
	format string
	data   []byte
	image  *watched
}

// eachDisk runs a test on a raw image and on a qcow2 image that has a chain of two
// backing files, each of which shows through somewhere.
func eachDisk(t *testing.T, size int, test func(t *testing.T, d *disk)) {
	t.Run("raw", func(t *testing.T) {
		d := &disk{t: t, path: filepath.Join(testenv.TmpfsDir(t), "disk.raw"), format: "raw", data: pattern(size, 1)}
		must(t, os.WriteFile(d.path, d.data, 0o644))
		test(t, d)
	})
	t.Run("chain", func(t *testing.T) {
		dir := testenv.TmpfsDir(t)
		d := &disk{t: t, path: filepath.Join(dir, "top"), format: "qcow2", data: make([]byte, size)}
		for i, name := range []string{"base", "middle", "top"} {
			path := filepath.Join(dir, name)
			o, length := create.Options{}, size*3/4 // the last quarter is beyond the backing files
			if name == "top" {
				length = size
			}
			if i > 0 {
				o.BackingFile, o.BackingFormat = []string{"base", "middle"}[i-1], "qcow2"
			}
			must(t, create.Create(path, int64(length), o))
			im, err := qcow2.Open(path, formats.Options{})
			must(t, err)
			from := i * size / 4
			layer := pattern(size/2, uint64(i))
			_, err = im.WriteAt(layer[:size/2-size*i/8], int64(from))
			must(t, err)
			copy(d.data[from:], layer[:size/2-size*i/8])
			must(t, im.Close())
		}
		test(t, d)
	})
}

// open opens the image, on what wrap makes of its file.
func (d *disk) open(wrap func(aio.Storage) aio.Storage) formats.Image {
	d.t.Helper()
	f, err := aio.OpenFile(d.path, aio.FileOptions{})
	must(d.t, err)
	var storage aio.Storage = f
	if wrap != nil {
		storage = wrap(f)
	}
	var image formats.Image
	if d.format == "raw" {
		image, err = raw.New(storage, raw.Options{Path: d.path})
	} else {
		image, err = qcow2.New(storage, qcow2.Options{Path: d.path, OpenBacking: func(name, format string) (formats.Image, error) {
			return formats.Open(filepath.Join(filepath.Dir(d.path), name), formats.Options{ReadOnly: true, Format: format})
		}})
	}
	must(d.t, err)
	d.image = &watched{Image: image, t: d.t, inFlight: map[*aio.Loop]int{}}
	return d.image
}

// finish ends the server, closes the image, and compares what others find in it
// with what should be there. Bytes that are unknown may be anything.
func (d *disk) finish(r *rig, unknown []bool) {
	d.t.Helper()
	_ = r.shutdown(20e9)
	if n := d.image.requests(); n != 0 {
		d.t.Errorf("%d requests are in flight", n)
	}
	must(d.t, d.image.Close())
	out := d.path + ".out"
	if d.format == "qcow2" {
		testenv.Tool(d.t, "qemu-img", "check", "-q", d.path)
	}
	testenv.Tool(d.t, "qemu-img", "convert", "-f", d.format, "-O", "raw", d.path, out)
	got, err := os.ReadFile(out)
	must(d.t, err)
	if unknown == nil && bytes.Equal(got, d.data) {
		return
	}
	if len(got) != len(d.data) {
		d.t.Fatalf("the image has %d bytes", len(got))
	}
	for i := range got {
		if got[i] != d.data[i] && (unknown == nil || !unknown[i]) {
			d.t.Fatalf("byte %d of the image is %#x, want %#x", i, got[i], d.data[i])
		}
	}
}

// watched is an image that knows what it has in flight, and sees to it that no loop
// is left with requests of its own.
type watched struct {
	formats.Image
	t testing.TB

	mu       sync.Mutex
	inFlight map[*aio.Loop]int
	still    bool // nothing may be submitted
	left     int  // calls of Leave
}

func (w *watched) Submit(l *aio.Loop, batch []*aio.Request) {
	w.count(l, len(batch))
	for _, r := range batch {
		done := r.Done
		r.Done = func(r *aio.Request) {
			w.count(l, -1)
			r.Done = done
			done(r)
		}
	}
	w.Image.Submit(l, batch)
}

func (w *watched) count(l *aio.Loop, n int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.inFlight[l] += n
	if w.still && n > 0 {
		w.t.Errorf("%d requests while the export is drained", n)
	}
}

func (w *watched) Leave(l *aio.Loop) {
	w.mu.Lock()
	if n := w.inFlight[l]; n != 0 {
		w.t.Errorf("a loop is left with %d requests in flight", n)
	}
	w.left++
	w.mu.Unlock()
	if below, ok := w.Image.(formats.Leaver); ok {
		below.Leave(l)
	}
}

// requests is how many are in flight.
func (w *watched) requests() (n int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, x := range w.inFlight {
		n += x
	}
	return n
}

// beStill says whether requests may be submitted. When they may not, none may be
// in flight.
func (w *watched) beStill(still bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.still = still
	for _, n := range w.inFlight {
		if still && n != 0 {
			w.t.Errorf("%d requests are in flight on a drained export", n)
		}
	}
}
