package gonbd

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/pojntfx/go-nbd/pkg/backend"
	"golang.org/x/sys/unix"

	"platter/aio"
	"platter/formats"
)

func newLoop(t testing.TB) *aio.Loop {
	t.Helper()
	l, err := aio.NewLoop(aio.LoopOptions{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	return l
}

func newImage(t testing.TB, b backend.Backend, o Options) formats.Image {
	t.Helper()
	img, err := Image(b, o)
	if err != nil {
		t.Fatal(err)
	}
	return img
}

func newDisk(t testing.TB, img formats.Image) *Disk {
	t.Helper()
	d := Backend(img, newLoop(t))
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
	return d
}

// fake is a backend that counts, and fails on demand.
type fake struct {
	backend.Backend
	err    error // of reads, writes and syncs
	short  bool  // reads and writes do half of it
	syncs  atomic.Int32
	sizing error
}

func newFake(size int) *fake {
	return &fake{Backend: backend.NewMemoryBackend(make([]byte, size))}
}

func (f *fake) Size() (int64, error) {
	if f.sizing != nil {
		return -1, f.sizing
	}
	return f.Backend.Size()
}

func (f *fake) ReadAt(p []byte, off int64) (int, error) {
	if f.err != nil {
		return 0, f.err
	}
	if f.short {
		p = p[:len(p)/2]
	}
	return f.Backend.ReadAt(p, off)
}

func (f *fake) WriteAt(p []byte, off int64) (int, error) {
	if f.err != nil {
		return 0, f.err
	}
	if f.short {
		p = p[:len(p)/2]
	}
	return f.Backend.WriteAt(p, off)
}

func (f *fake) Sync() error {
	f.syncs.Add(1)
	return f.err
}

// do has one request carried out.
func do(t *testing.T, l *aio.Loop, img formats.Image, op aio.Op, flags aio.Flags, off, length int64, vec ...aio.Iovec) unix.Errno {
	t.Helper()
	done := make(chan unix.Errno, 1)
	r := &aio.Request{Op: op, Flags: flags, Offset: off, Length: length, Vec: vec, Done: func(r *aio.Request) { done <- r.Errno }}
	l.Post(func() { img.Submit(l, []*aio.Request{r}) })
	return <-done
}

// Both ways at once: goroutines write and read ranges of their own, at any byte,
// through a Disk on an Image on a backend, beside an array of bytes.
func TestRoundTrip(t *testing.T) {
	for _, block := range []uint32{1, 512, 4096} {
		t.Run(fmt.Sprint(block), func(t *testing.T) {
			const size, workers = 2 << 20, 6
			store := make([]byte, size)
			d := newDisk(t, newImage(t, backend.NewMemoryBackend(store), Options{BlockSize: block}))
			if got, err := d.Size(); got != size || err != nil {
				t.Fatalf("size is %d, %v", got, err)
			}
			model := make([]byte, size)
			var wg sync.WaitGroup
			for w := range workers {
				wg.Go(func() {
					rng := rand.New(rand.NewPCG(uint64(block), uint64(w)))
					noise := rand.NewChaCha8([32]byte{byte(w)})
					// Neighbours share a block: the ranges are of odd length.
					low := size / workers * w
					own := model[low : low+size/workers]
					for range 60 {
						off := rng.IntN(len(own))
						n := 1 + rng.IntN(min(len(own)-off, 2*slotSize))
						if rng.IntN(2) == 0 {
							_, _ = noise.Read(own[off : off+n])
							if got, err := d.WriteAt(own[off:off+n], int64(low+off)); got != n || err != nil {
								t.Errorf("write %d at %d: %d, %v", n, low+off, got, err)
							}
							continue
						}
						p := make([]byte, n)
						if got, err := d.ReadAt(p, int64(low+off)); got != n || err != nil {
							t.Errorf("read %d at %d: %d, %v", n, low+off, got, err)
						}
						if !bytes.Equal(p, own[off:off+n]) {
							t.Errorf("read %d at %d differs", n, low+off)
						}
					}
				})
			}
			wg.Wait()
			if err := d.Sync(); err != nil {
				t.Error(err)
			}
			if !bytes.Equal(store, model) {
				t.Error("the backend differs from the model")
			}
		})
	}
}

func TestDiskEnds(t *testing.T) {
	const size = 10_000
	for _, block := range []uint32{1, 16} {
		store := bytes.Repeat([]byte{7}, size)
		d := newDisk(t, newImage(t, backend.NewMemoryBackend(store), Options{BlockSize: block}))
		p := make([]byte, 100)
		for _, tc := range []struct {
			off  int64
			n    int
			want error
		}{
			{size - 100, 100, nil},
			{size - 99, 99, io.EOF},
			{size, 0, io.EOF},
			{1 << 62, 0, io.EOF},
			{-1, 0, unix.EINVAL},
		} {
			if n, err := d.ReadAt(p, tc.off); n != tc.n || !errors.Is(err, tc.want) {
				t.Errorf("read at %d gave %d, %v, want %d, %v", tc.off, n, err, tc.n, tc.want)
			}
			want := tc.want
			if errors.Is(want, io.EOF) {
				want = io.ErrShortWrite
			}
			if n, err := d.WriteAt(p, tc.off); n != tc.n || !errors.Is(err, want) {
				t.Errorf("write at %d gave %d, %v, want %d, %v", tc.off, n, err, tc.n, want)
			}
		}
		if n, err := d.ReadAt(nil, size); n != 0 || err != nil {
			t.Errorf("read of nothing gave %d, %v", n, err)
		}
	}
}

func TestDiskErrors(t *testing.T) {
	f := newFake(4096)
	f.err = fmt.Errorf("backend: %w", unix.ENOSPC)
	d := newDisk(t, newImage(t, f, Options{}))
	_, readErr := d.ReadAt(make([]byte, 1), 0)
	_, writeErr := d.WriteAt(make([]byte, 1), 0)
	for op, err := range map[string]error{"read": readErr, "write": writeErr, "flush": d.Sync()} {
		var typed *Error
		if !errors.As(err, &typed) || typed.Op != op || !errors.Is(err, unix.ENOSPC) {
			t.Errorf("%s gave %v", op, err)
		}
	}
}

func TestBackendErrors(t *testing.T) {
	for _, tc := range []struct {
		err  error
		want unix.Errno
	}{
		{nil, 0},
		{fmt.Errorf("wrapped: %w", unix.EDQUOT), unix.EDQUOT},
		{&fs.PathError{Op: "read", Err: unix.EIO}, unix.EIO},
		{fs.ErrPermission, unix.EPERM},
		{errors.ErrUnsupported, unix.EOPNOTSUPP},
		{errors.New("anything"), unix.EIO},
		{io.EOF, unix.EIO},
		{fmt.Errorf("no error: %w", unix.Errno(0)), unix.EIO},
	} {
		if got := errnoOf(tc.err); got != tc.want {
			t.Errorf("errno of %v is %d, want %d", tc.err, got, tc.want)
		}
	}
}

func TestImageRequests(t *testing.T) {
	const size = 1 << 20
	l, f := newLoop(t), newFake(size)
	img := newImage(t, f, Options{})
	memory, err := aio.NewMemory(size)
	if err != nil {
		t.Fatal(err)
	}
	defer memory.Close()
	want := func(errno unix.Errno, op aio.Op, flags aio.Flags, off, length int64, vec ...aio.Iovec) {
		t.Helper()
		if got := do(t, l, img, op, flags, off, length, vec...); got != errno {
			t.Errorf("%s %d at %d gave %v, want %v", op, length, off, got, errno)
		}
	}
	synced := func(n int32) {
		t.Helper()
		if got := f.syncs.Swap(0); got != n {
			t.Errorf("%d syncs, want %d", got, n)
		}
	}

	// A write in two pieces, zeroes in its middle, and a read in other pieces.
	copy(memory.Bytes(), bytes.Repeat([]byte{1}, 300_000))
	want(0, aio.OpWrite, 0, 0, 300_000, memory.Iovec(0, 100_000), memory.Iovec(100_000, 200_000))
	want(0, aio.OpWriteZeroes, 0, 1000, 200_000)
	synced(0)
	want(0, aio.OpRead, 0, 0, 300_000, memory.Iovec(500_000, 1), memory.Iovec(500_001, 299_999))
	got := memory.Bytes()[500_000:800_000]
	if bytes.Count(got, []byte{1}) != 100_000 || bytes.Count(got[1000:201_000], []byte{0}) != 200_000 {
		t.Error("what was written does not read back")
	}

	want(0, aio.OpFlush, 0, 0, 0)
	synced(1)
	want(0, aio.OpWrite, aio.FlagFUA, 0, 10, memory.Iovec(0, 10))
	want(0, aio.OpWriteZeroes, aio.FlagFUA, 0, 10)
	want(0, aio.OpDiscard, aio.FlagFUA, 0, 10)
	synced(3)
	want(0, aio.OpRead, aio.FlagFUA, 0, 10, memory.Iovec(0, 10))
	want(0, aio.OpDiscard, 0, 0, size)
	want(0, aio.OpCache, 0, 0, size)
	want(0, aio.OpRead, 0, size, 0)
	want(0, aio.OpWrite, 0, size, 0)
	synced(0)

	for _, op := range []aio.Op{aio.OpRead, aio.OpWrite, aio.OpDiscard, aio.OpWriteZeroes, aio.OpCache} {
		beyond := unix.EINVAL
		if op == aio.OpWrite || op == aio.OpWriteZeroes {
			beyond = unix.ENOSPC
		}
		want(beyond, op, 0, size-9, 10, memory.Iovec(0, 10))
		want(beyond, op, 0, 1<<62, 1<<62, memory.Iovec(0, 10))
		want(unix.EINVAL, op, 0, -1, 10, memory.Iovec(0, 10))
	}
	want(unix.EINVAL, aio.Op(aio.OpCount), 0, 0, 0)

	f.short = true
	want(unix.EIO, aio.OpRead, 0, 0, 10, memory.Iovec(0, 10))
	want(unix.EIO, aio.OpWrite, 0, 0, 10, memory.Iovec(0, 10))
	want(unix.EIO, aio.OpWriteZeroes, 0, 0, 10)
}

func TestReadOnlyImage(t *testing.T) {
	l, f := newLoop(t), newFake(4096)
	img := newImage(t, f, Options{ReadOnly: true})
	if !img.ReadOnly() {
		t.Error("the image is not read-only")
	}
	for _, op := range []aio.Op{aio.OpWrite, aio.OpDiscard, aio.OpWriteZeroes} {
		if got := do(t, l, img, op, aio.FlagFUA, 0, 0); got != unix.EPERM {
			t.Errorf("%s gave %v", op, got)
		}
	}
	if got := do(t, l, img, aio.OpFlush, 0, 0, 0); got != 0 {
		t.Errorf("flush gave %v", got)
	}
	if n := f.syncs.Load(); n != 0 {
		t.Errorf("%d syncs of a backend that nobody may write to", n)
	}
}

func TestImageOptions(t *testing.T) {
	for _, tc := range []struct {
		size int
		o    Options
		ok   bool
	}{
		{0, Options{}, true},
		{1, Options{}, true},
		{1 << 20, Options{BlockSize: 64 << 10}, true},
		{1 << 20, Options{BlockSize: 128 << 10}, false},
		{1 << 20, Options{BlockSize: 513}, false},
		{1000, Options{BlockSize: 512}, false},
		{1 << 20, Options{BlockSize: 4096, PreferredSize: 512}, false},
		{1 << 20, Options{PreferredSize: 5000}, false},
	} {
		img, err := Image(newFake(tc.size), tc.o)
		if (err == nil) != tc.ok || err != nil && !errors.Is(err, ErrBackend) {
			t.Errorf("size %d, %+v gave %v", tc.size, tc.o, err)
		}
		if err != nil {
			continue
		}
		if lim := img.Limits(); lim.PreferredSize < lim.BlockSize || img.Size() != int64(tc.size) {
			t.Errorf("size %d, limits %+v", img.Size(), lim)
		}
	}
	f := newFake(1)
	f.sizing = unix.ENODEV
	if _, err := Image(f, Options{}); !errors.Is(err, ErrBackend) || !errors.Is(err, unix.ENODEV) {
		t.Errorf("a backend without a size gave %v", err)
	}
}
