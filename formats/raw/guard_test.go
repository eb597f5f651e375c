package raw_test

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"platter/aio"
	"platter/formats"
	"platter/formats/formattest"
	"platter/formats/raw"
)

const qcow2Header = "QFI\xfb\x00\x00\x00\x03"

// client does one operation at a time on a loop.
type client struct {
	t      testing.TB
	loop   *aio.Loop
	memory *aio.Memory
}

func newClient(t testing.TB) *client {
	t.Helper()
	loop, err := aio.NewLoop(aio.LoopOptions{})
	if err != nil {
		t.Fatal(err)
	}
	memory, err := aio.NewMemory(1 << 20)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		loop.Close()
		memory.Close()
	})
	return &client{t, loop, memory}
}

func (c *client) do(image aio.Storage, op aio.Op, off, length int64, data string) unix.Errno {
	c.t.Helper()
	over := make(chan struct{})
	r := &aio.Request{Op: op, Offset: off, Length: length, Done: func(*aio.Request) { close(over) }}
	if op == aio.OpWrite {
		r.Length = int64(len(data))
		r.Vec = []aio.Iovec{c.memory.Iovec(0, len(data))}
		copy(c.memory.Bytes(), data)
	}
	want := *r
	c.loop.Post(func() { image.Submit(c.loop, []*aio.Request{r}) })
	select {
	case <-over:
	case <-time.After(time.Minute):
		panic(fmt.Sprintf("%v %d+%d is not over after a minute", op, off, length))
	}
	if r.Op != want.Op || r.Offset != want.Offset || r.Length != want.Length {
		c.t.Errorf("request came back as %v %d+%d", r.Op, r.Offset, r.Length)
	}
	return r.Errno
}

func makeImage(t testing.TB, size int64, start string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk.raw")
	if err := os.WriteFile(path, []byte(start), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, size); err != nil {
		t.Fatal(err)
	}
	return path
}

func openImage(t testing.TB, path string, o formats.Options) formats.Image {
	t.Helper()
	image, err := formats.Open(path, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { image.Close() })
	return image
}

func TestGuard(t *testing.T) {
	sector := make([]byte, 4096)
	header := qcow2Header + string(sector[len(qcow2Header):])
	type step struct {
		op    aio.Op
		off   int64
		n     int64
		data  string
		errno unix.Errno
	}
	write := func(off int64, data string, errno unix.Errno) step {
		return step{aio.OpWrite, off, 0, data, errno}
	}
	for _, c := range []struct {
		name  string
		size  int64
		start string
		steps []step
	}{
		{"whole header", 1 << 20, "", []step{write(0, header, unix.EPERM), write(0, string(sector), 0)}},
		{"one sector", 1 << 20, "", []step{write(0, header[:512], unix.EPERM)}},
		{"bare magic", 1 << 20, "", []step{write(0, qcow2Header, unix.EPERM)}},
		{"elsewhere", 1 << 20, "", []step{write(512, header, 0), write(4096, header, 0), write(1, header, 0)}},
		{"in two halves", 1 << 20, "", []step{write(0, "QFI\xfb", 0), write(4, "\x00\x00\x00\x03", unix.EPERM), write(4, "\x00\x00\x00\x00", 0), write(7, "\x02", unix.EPERM)}},
		{"backwards", 1 << 20, "", []step{write(4, "\x00\x00\x00\x02", 0), write(1, "FI\xfb", 0), write(0, "Q", unix.EPERM), write(0, "R", 0)}},
		{"completed by zeroes", 1 << 20, "QEDx", []step{{aio.OpWriteZeroes, 3, 1, "", unix.EPERM}, {aio.OpWriteZeroes, 0, 4, "", 0}}},
		{"completed by a discard", 1 << 20, "QEDx", []step{{aio.OpDiscard, 0, 1 << 20, "", 0}, {aio.OpDiscard, 3, 1, "", 0}, write(0, "QED", 0)}},
		{"vdi", 1 << 20, "", []step{write(0x40, "\x7f\x10\xda\xbe", unix.EPERM)}},
		{"text", 1 << 20, "", []step{write(0, "# Disk\nversion=1\n", unix.EPERM)}},
		{"boot sector", 1 << 20, "", []step{write(0, "\xeb\x63\x90"+string(sector[:507])+"\x55\xaa", 0)}},
		{"tiny image", 8, "", []step{write(0, qcow2Header, unix.EPERM), write(0, "QFI\xfb", 0), write(7, "\x02", unix.EPERM)}},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := makeImage(t, c.size, c.start)
			image, guest := openImage(t, path, formats.Options{}), newClient(t)
			for i, s := range c.steps {
				before, _ := os.ReadFile(path)
				if errno := guest.do(image, s.op, s.off, s.n, s.data); errno != s.errno {
					t.Errorf("step %d: %v, want %v", i, errno, s.errno)
				}
				after, err := os.ReadFile(path)
				if err != nil {
					t.Fatal(err)
				}
				if s.errno != 0 && string(before) != string(after) {
					t.Errorf("step %d was refused but changed the file", i)
				}
				if got := formats.Probe(after); got != "raw" {
					t.Fatalf("step %d: the image looks like %s", i, got)
				}
			}
		})
	}
}

// TestGuardOff: whoever states that an image is raw may write anything.
func TestGuardOff(t *testing.T) {
	image := openImage(t, makeImage(t, 1<<20, ""), formats.Options{Format: "raw"})
	if errno := newClient(t).do(image, aio.OpWrite, 0, 0, qcow2Header); errno != 0 {
		t.Error(errno)
	}
}

// TestGuardStorageFails: an error below ends the turn with that error, and the
// next one goes on.
func TestGuardStorageFails(t *testing.T) {
	file, err := aio.OpenFile(makeImage(t, 1<<20, ""), aio.FileOptions{})
	if err != nil {
		t.Fatal(err)
	}
	faulty := formattest.NewFaulty(file)
	image, guest := newImage(t, faulty, raw.Options{Guard: true}), newClient(t)
	for _, op := range []aio.Op{aio.OpRead, aio.OpWrite} {
		faulty.Inject(formattest.Fault{Errno: unix.EIO, Match: func(r *aio.Request) bool { return r.Op == op }})
		if errno := guest.do(image, aio.OpWrite, 1, 0, "FI"); errno != unix.EIO {
			t.Errorf("%v fails below: %v", op, errno)
		}
		faulty.Heal()
		if errno := guest.do(image, aio.OpWrite, 1, 0, "FI"); errno != 0 {
			t.Errorf("after %v failed below: %v", op, errno)
		}
	}
}

// TestGuardConcurrently has guests on several loops put a header together from
// pieces, while somebody looks whether they ever succeed.
func TestGuardConcurrently(t *testing.T) {
	path := makeImage(t, 1<<20, "")
	image := openImage(t, path, formats.Options{})
	file, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()

	var refused, accepted atomic.Int64
	var guests sync.WaitGroup
	for i := range 3 {
		guest := newClient(t)
		rng := rand.New(rand.NewPCG(7, uint64(i)))
		guests.Go(func() {
			for range 400 {
				from := rng.IntN(len(qcow2Header))
				to := from + 1 + rng.IntN(len(qcow2Header)-from)
				op, data := aio.OpWrite, qcow2Header[from:to]
				if rng.IntN(4) == 0 {
					op = aio.OpWriteZeroes
				}
				switch errno := guest.do(image, op, int64(from), int64(to-from), data); errno {
				case 0:
					accepted.Add(1)
				case unix.EPERM:
					refused.Add(1)
				default:
					t.Error(errno)
				}
			}
		})
	}
	over := make(chan struct{})
	go func() {
		guests.Wait()
		close(over)
	}()
	header := make([]byte, formats.ProbeSize)
	for running := true; running; {
		select {
		case <-over:
			running = false
		default:
		}
		if _, err := file.ReadAt(header, 0); err != nil {
			t.Fatal(err)
		}
		if got := formats.Probe(header); got != "raw" {
			t.Fatalf("the image looks like %s: % x", got, header[:8])
		}
	}
	if refused.Load() == 0 || accepted.Load() == 0 {
		t.Errorf("%d writes refused, %d accepted: proves nothing", refused.Load(), accepted.Load())
	}
}
