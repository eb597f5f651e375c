package qcow2_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime/metrics"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"platter/aio"
	"platter/formats"
	"platter/formats/qcow2"
	"platter/formats/qcow2/layout"
)

// patience is far longer than an image of a few kilobytes takes for anything.
const patience = time.Minute

// player carries out requests on images, many at a time.
type player struct {
	loop *aio.Loop
	mem  *aio.Memory
}

// pieceSize is how much memory a request gets, in bytes.
const pieceSize, pieces = 64 << 10, 4

func newPlayer(f *testing.F) *player {
	f.Helper()
	l, err := aio.NewLoop(aio.LoopOptions{})
	if err != nil {
		f.Fatal(err)
	}
	m, err := aio.NewMemory(pieceSize * pieces)
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() {
		if err := errors.Join(l.Close(), m.Close()); err != nil {
			f.Error(err)
		}
	})
	return &player{l, m}
}

// piece is the memory of a request of a batch.
func (p *player) piece(i int) []byte { return p.mem.Bytes()[i*pieceSize:][:pieceSize] }

// submit carries out a batch and returns when all of it is over.
func (p *player) submit(im formats.Image, batch []aio.Request) {
	done := make(chan struct{}, len(batch))
	list := make([]*aio.Request, len(batch))
	for i := range batch {
		r := &batch[i]
		if r.Op == aio.OpRead || r.Op == aio.OpWrite {
			r.Vec = []aio.Iovec{p.mem.Iovec(i*pieceSize, int(r.Length))}
		}
		r.Done = func(*aio.Request) { done <- struct{}{} }
		list[i] = r
	}
	p.loop.Post(func() { im.Submit(p.loop, list) })
	for range list {
		<-done
	}
}

// limits has the program end with the stacks of all goroutines when f takes too
// long, and the test fail when it takes too much memory.
func limits(t *testing.T, bound uint64, f func()) {
	t.Helper()
	guard := time.AfterFunc(patience, func() { panic("this should have been over long ago") })
	defer guard.Stop()
	before := heapAllocated()
	f()
	if took := heapAllocated() - before; took > bound {
		t.Errorf("it took %d MiB of memory, more than %d MiB", took>>20, bound>>20)
	}
}

// heapAllocated is how much was ever allocated, in bytes.
func heapAllocated() uint64 {
	sample := []metrics.Sample{{Name: "/gc/heap/allocs:bytes"}}
	metrics.Read(sample)
	return sample[0].Value.Uint64()
}

// front is how much of an image's start is used: tables may be small and the disk
// large.
const front = 256 << 10

// roam does a little of everything anywhere in the image. Whatever fails has to
// do so with an error of the kind that a guest or a user gets.
func (p *player) roam(t *testing.T, im *qcow2.Image, rng *rand.Rand) {
	t.Helper()
	size := im.Size()
	if info, err := im.Info(); err != nil {
		explained(t, "info", err)
	} else if info.Header.Validate() != nil {
		t.Errorf("the image was opened although its header is invalid: %v", info.Header.Validate())
	}
	if _, err := im.Extents(nil, 0, size, 1000); err != nil {
		explained(t, "map", err)
	}
	for off := int64(0); off < min(size, front); {
		var batch []aio.Request
		for ; len(batch) < pieces && off < size; off += pieceSize {
			batch = append(batch, aio.Request{Op: aio.OpRead, Offset: off, Length: min(pieceSize, size-off)})
		}
		p.submit(im, batch)
	}
	for range 6 {
		batch := make([]aio.Request, 1+rng.IntN(pieces))
		for i := range batch {
			r := &batch[i]
			r.Op = aio.Op(rng.IntN(aio.OpCount))
			if r.Op == aio.OpFlush {
				continue
			}
			r.Flags = aio.Flags(rng.IntN(4))
			r.Length = min(1+rng.Int64N(int64(1)<<rng.IntN(17)), pieceSize, size)
			r.Offset = min(rng.Int64N(front), size-r.Length)
			if rng.IntN(4) == 0 {
				r.Offset = size - r.Length
			}
		}
		p.submit(im, batch)
		for _, r := range batch {
			switch r.Errno {
			case 0, unix.EIO, unix.ENOSPC, unix.EPERM:
			default:
				t.Errorf("%v %d+%d of %d: %v", r.Op, r.Offset, r.Length, size, r.Errno)
			}
		}
	}
	if info, err := im.Info(); err == nil {
		cluster := int64(1) << info.Header.ClusterBits
		off := min(rng.Int64N(front), size) &^ (cluster - 1)
		if err := im.WriteCompressed(make([]byte, min(cluster, size-off)), off); err != nil {
			explained(t, "compressed write", err)
		}
	}
}

// explained wants an error that tells more than that something failed.
func explained(t *testing.T, what string, err error) {
	t.Helper()
	var typed *formats.Error
	var errno unix.Errno
	if !errors.As(err, &typed) && !errors.As(err, &errno) && !errors.Is(err, qcow2.ErrNoCompression) {
		t.Errorf("%s: %#v", what, err)
	}
}

// openFuzzed opens an image with all that it may want.
func openFuzzed(t *testing.T, data []byte, readOnly bool) (*qcow2.Image, *memory) {
	t.Helper()
	m := newMemory(bytes.Clone(data))
	m.limit, m.readOnly = m.opened+16<<20, readOnly
	im, err := qcow2.New(m, qcow2.Options{Path: "image", ReadOnly: readOnly, MetadataCache: 1, OpenData: func(string) (aio.Storage, error) {
		d := newMemory(make([]byte, 10_000))
		d.limit, d.readOnly = 4<<20, readOnly
		return d, nil
	}})
	if err != nil {
		var typed *formats.Error
		if !errors.As(err, &typed) || typed.Path != "image" {
			t.Errorf("open: %#v", err)
		}
		_ = m.content(t)
		return nil, m
	}
	return im, m
}

// FuzzImage changes bytes anywhere in images of all kinds, cuts them off, opens
// what comes of it for reading and for writing, and uses it. An edit takes four
// bytes: an offset and what is written there.
func FuzzImage(f *testing.F) {
	images := smallImages(f)
	for i := range images {
		f.Add(byte(i), uint16(0), []byte{})
		f.Add(byte(i), uint16(5000), []byte("\x00\x18\x00\x00\x00\x4f\x01\x80"))
	}
	p := newPlayer(f)
	f.Fuzz(func(t *testing.T, image byte, cut uint16, edits []byte) {
		quiet(t)
		data := bytes.Clone(images[int(image)%len(images)])
		sum := fnv.New64a()
		for sum.Write(edits[:min(len(edits), 4*32)]); len(edits) >= 4; edits = edits[4:] {
			copy(data[int(binary.BigEndian.Uint16(edits))%len(data):], edits[2:4])
		}
		if cut > 0 {
			data = data[:min(int(cut), len(data))]
		}
		limits(t, 192<<20, func() {
			for _, readOnly := range []bool{true, false} {
				im, m := openFuzzed(t, data, readOnly)
				if im == nil {
					continue
				}
				p.roam(t, im, rand.New(rand.NewPCG(sum.Sum64(), 0)))
				if err := im.Close(); err != nil {
					explained(t, "close", err)
				}
				after := m.content(t)
				if readOnly {
					sameBytes(t, "a file that was only read", after, data)
					continue
				}
				if data[7] == 2 || data[79]&byte(layout.Dirty) == 0 { // and so it was not repaired
					sameHeader(t, after, data)
				}
				if im, _ = openFuzzed(t, after, true); im == nil {
					t.Error("it can't be opened again")
				} else if err := im.Close(); err != nil {
					t.Errorf("close again: %v", err)
				}
			}
		})
	})
}

// quiet keeps what is logged from the output.
func quiet(t *testing.T) {
	t.Helper()
	captureLog(t)
}

// sameHeader wants the first sector to be what it was, but for what changes while
// an image is open: where the refcount table stands, and features.
func sameHeader(t testing.TB, got, want []byte) {
	t.Helper()
	got, want = bytes.Clone(got[:min(512, len(want))]), bytes.Clone(want[:min(512, len(want))])
	for _, r := range [][2]int{{48, 60}, {72, 80}, {88, 96}} {
		if r[0] < 72 || want[7] >= 3 {
			clear(got[r[0]:r[1]])
			clear(want[r[0]:r[1]])
		}
	}
	sameBytes(t, "the header", got, want)
}

// smallImages are images of all kinds, a few kilobytes each.
func smallImages(f *testing.F) [][]byte {
	f.Helper()
	var list [][]byte
	dir := f.TempDir()
	for i, c := range []struct {
		options string
		ways    []string
	}{
		{"cluster_size=512", nil},
		{"cluster_size=512,compat=0.10", []string{"snapshot"}},
		{"cluster_size=512,refcount_bits=1", nil},
		{"cluster_size=512,refcount_bits=64", []string{"snapshot"}},
		{"cluster_size=512,lazy_refcounts=on", nil},
		{"cluster_size=4K", []string{"compressed", "snapshot"}},
		{"cluster_size=4K,compression_type=zstd", []string{"compressed"}},
		{"extended_l2=on,cluster_size=16K", nil},
		{"cluster_size=512", []string{"data file"}},
	} {
		v := newVictim(f, c.options, 48<<10, c.ways...)
		list = append(list, v.data)
		if c.options == "cluster_size=512,lazy_refcounts=on" {
			dirty := bytes.Clone(v.data)
			dirty[79] |= byte(layout.Dirty)
			list = append(list, dirty)
		}
		path := filepath.Join(dir, fmt.Sprint(i))
		if i == 0 {
			writeFile(f, path, v.data)
			qemuImg(f, "bitmap", "--add", path, "marks")
			qemuImg(f, "rebase", "-u", "-f", "qcow2", "-b", "base", "-F", "raw", path)
			data, err := os.ReadFile(path)
			if err != nil {
				f.Fatal(err)
			}
			list = append(list, data)
		}
	}
	return list
}
