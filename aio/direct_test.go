package aio

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"platter/integration/testenv"
)

// TestSharedBlocks: writers on several loops, whose pieces share blocks, lose
// nothing of each other.
func TestSharedBlocks(t *testing.T) {
	const loops, piece, rounds, size = 4, 100, 60, 32 << 10
	for _, e := range []Engine{EngineIOUring, EngineNative, EngineThreads} {
		for _, k := range kinds {
			t.Run(e.String()+"/"+k.name, func(t *testing.T) {
				f := openFile(t, newFile(t, k.dir(t), size), k.opts)
				want := pattern(size)
				var writers sync.WaitGroup
				for id := range loops {
					l := newLoop(t, LoopOptions{Engine: e})
					m := newMemory(t, piece*rounds)
					var batch []*Request
					for i := range rounds {
						b := m.Bytes()[i*piece : (i+1)*piece]
						for j := range b {
							b[j] = byte(200 + id)
						}
						off := (i*loops + id) * piece
						copy(want[off:], b)
						batch = append(batch, &Request{Op: OpWrite, Offset: int64(off), Length: piece, Vec: []Iovec{m.Iovec(i*piece, piece)}})
					}
					writers.Go(func() {
						for len(batch) > 0 {
							do(t, l, f, batch[:15]...)
							for _, r := range batch[:15] {
								if r.Errno != 0 {
									t.Errorf("write at %d: %v", r.Offset, r.Errno)
								}
							}
							batch = batch[15:]
						}
					})
				}
				writers.Wait()
				if got := content(t, f); !bytes.Equal(got, want) {
					for i := range got {
						if got[i] != want[i] {
							t.Fatalf("byte %d is %d, want %d", i, got[i], want[i])
						}
					}
				}
				if len(f.locks.held) != 0 || len(f.locks.waiting) != 0 {
					t.Errorf("locks are left: %d held, %d waiting", len(f.locks.held), len(f.locks.waiting))
				}
			})
		}
	}
}

// TestLockOrder: writes of whole blocks go side by side; one of a part of a block
// waits for those before it that share a block, and those after it wait for it.
func TestLockOrder(t *testing.T) {
	eachEngine(t, func(t *testing.T, l *Loop) {
		f := openFile(t, newFile(t, testenv.DiskDir(t), 1<<20), FileOptions{Direct: true})
		m := newMemory(t, 1<<20)
		a := int(f.align)
		write := func(off, n int) *Request {
			return &Request{Op: OpWrite, Offset: int64(off), Length: int64(n), Vec: []Iovec{m.Iovec(off/a*a+off%a, n)}}
		}
		var held []*op
		var started []int64
		intercept(t, l, func(o *op) bool {
			started = append(started, o.req.Offset)
			held = append(held, o)
			return true
		})
		over := begin(l, f,
			write(0, a), write(0, 2*a), // side by side, and over one another
			write(a+1, 5),       // waits for the second
			write(a, a),         // waits for the third, though the first two are over
			write(100*a+1, 5),   // none of theirs
			write(101*a, 3*a),   // beside it
			write(103*a-1, 1),   // waits for the one before
			write(300*a, 100*a)) // beside all
		settle := func() {
			for range 20 {
				l.Call(func() {})
			}
		}
		expect := func(want ...int) {
			t.Helper()
			settle()
			l.Call(func() {
				if len(started) != len(want) {
					t.Errorf("started: %v, want %v", started, want)
					return
				}
				for i := range want {
					if started[i] != int64(want[i]) {
						t.Errorf("started: %v, want %v", started, want)
					}
				}
				started = nil
			})
		}
		release := func() {
			l.Call(func() {
				now := held
				held = nil
				for _, o := range now {
					o.perform()
					o.loop.complete(o)
				}
			})
		}
		expect(0, 0, 100*a+1, 101*a, 300*a)
		release()
		// The reads around the parts come first, then what waited.
		expect(100*a+1, a+1, 103*a-1)
		release()
		expect(a+1, 103*a-1) // the writes
		release()
		expect(a)
		release()
		waitFor(t, over, "writes")
	})
}

// TestShortBlockRead: when the read around a write comes short, what is missing is
// read too before the blocks are written back.
func TestShortBlockRead(t *testing.T) {
	eachEngine(t, func(t *testing.T, l *Loop) {
		f := openFile(t, newFile(t, testenv.DiskDir(t), 1<<20), FileOptions{Direct: true})
		m := newMemory(t, 1<<16)
		reads := 0
		intercept(t, l, func(o *op) bool {
			if o.kind != opReadv {
				return false
			}
			reads++
			whole := o.vec
			o.vec = []Iovec{{Base: whole[0].Base, Len: uint64(f.align)}}
			o.perform()
			o.vec = whole
			l.complete(o)
			return true
		})
		off, n := f.align/2, 2*f.align // parts of three blocks
		must(t, l, f, Request{Op: OpWrite, Offset: off, Length: n, Vec: []Iovec{m.Iovec(0, int(n))}})
		want := pattern(1 << 20)
		clear(want[off : off+n])
		if !bytes.Equal(content(t, f), want) {
			t.Error("the bytes around the write were changed")
		}
		if reads != 3 {
			t.Errorf("%d reads", reads)
		}
	})
}

// TestUnalignedShortRead: O_DIRECT can't go on in the middle of a block; what
// ended there was the file.
func TestUnalignedShortRead(t *testing.T) {
	eachEngine(t, func(t *testing.T, l *Loop) {
		f := openFile(t, newFile(t, testenv.DiskDir(t), 1<<20), FileOptions{Direct: true})
		m := newMemory(t, 1<<16)
		intercept(t, l, func(o *op) bool { return o.off%f.align == 0 && answer(o, 100) })
		for _, r := range []Request{
			{Op: OpRead, Length: 1 << 16, Vec: []Iovec{m.Iovec(0, 1<<16)}},
			{Op: OpRead, Length: 200, Vec: []Iovec{m.Iovec(0, 200)}},
			{Op: OpWrite, Offset: 1, Length: 200, Vec: []Iovec{m.Iovec(0, 200)}},
		} {
			if e := one(t, l, f, r); e != unix.EIO {
				t.Errorf("%v of %d bytes: %v", r.Op, r.Length, e)
			}
		}
	})
}

// TestNoBounceMemory: without memory for the copy the request fails, and its
// lock is given back.
func TestNoBounceMemory(t *testing.T) {
	l := newLoop(t, LoopOptions{Memory: BlockSize})
	f := openFile(t, newFile(t, testenv.DiskDir(t), 8192), FileOptions{Direct: true})
	m := newMemory(t, 4096)
	var b *Block
	l.Call(func() { b = l.Arena().Get() })
	r := Request{Op: OpWrite, Offset: 1, Length: 5, Vec: []Iovec{m.Iovec(0, 5)}}
	if e := one(t, l, f, r); e != unix.ENOMEM {
		t.Errorf("without memory: %v", e)
	}
	l.Call(func() { b.Release() })
	must(t, l, f, r)
}

// TestBlockDevice is the conformance of a loop device, whose discards are an
// ioctl and whose zeroes are written where a sector is covered in part.
func TestBlockDevice(t *testing.T) {
	testenv.NeedRoot(t)
	losetup := testenv.NeedTool(t, "losetup")
	const size = 4 << 20
	path := filepath.Join(testenv.DiskDir(t), "disk")
	if err := os.WriteFile(path, pattern(size), 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(losetup, "--find", "--show", path).CombinedOutput()
	if err != nil {
		testenv.Skip(t, "no loop device to be had: "+string(out))
	}
	device := strings.TrimSpace(string(out))
	t.Cleanup(func() {
		if out, err := exec.Command(losetup, "--detach", device).CombinedOutput(); err != nil {
			t.Errorf("detach: %v: %s", err, out)
		}
	})
	eachEngine(t, func(t *testing.T, l *Loop) {
		for _, opts := range []FileOptions{{}, {Direct: true}, {Sync: true}} {
			f := openFile(t, device, opts)
			if !f.IsBlockDevice() || f.Size() != size || f.sector < 512 || f.inline {
				t.Fatalf("device %v, size %d, sector %d", f.IsBlockDevice(), f.Size(), f.sector)
			}
			m := newMemory(t, size)
			copy(m.Bytes(), pattern(size))
			model := pattern(size)
			must(t, l, f, Request{Op: OpWrite, Flags: FlagFUA, Length: size, Vec: []Iovec{m.Iovec(0, size)}})
			for _, r := range []Request{
				{Op: OpWriteZeroes, Offset: 8192, Length: 65536},
				{Op: OpWriteZeroes, Offset: 100_001, Length: 70_000, Flags: FlagFUA},
				{Op: OpWriteZeroes, Offset: 200_704, Length: 4096, Flags: FlagNoUnmap},
				{Op: OpWriteZeroes, Offset: 300_001, Length: 100, Flags: FlagNoUnmap},
			} {
				clear(model[r.Offset:r.End()])
				must(t, l, f, r)
			}
			must(t, l, f, Request{Op: OpFlush})
			must(t, l, f, Request{Op: OpRead, Offset: 1, Length: size - 1, Vec: []Iovec{m.Iovec(1, size-1)}})
			if !bytes.Equal(m.Bytes()[1:], model[1:]) {
				t.Fatalf("%+v: the device holds something else", opts)
			}
			for _, r := range []Request{
				{Op: OpDiscard, Offset: 1 << 20, Length: 65536, Flags: FlagFUA},
				{Op: OpDiscard, Offset: 2<<20 + 1, Length: 8192},
				{Op: OpDiscard, Offset: 3<<20 + 1, Length: 100},
				{Op: OpCache, Offset: 1, Length: 8192},
			} {
				must(t, l, f, r)
			}
			must(t, l, f, Request{Op: OpRead, Length: size, Vec: []Iovec{m.Iovec(0, size)}})
			for _, untouched := range [][2]int{{0, 1 << 20}, {1<<20 + 65536, 2<<20 + 1}, {2<<20 + 8193, 3<<20 + 1}, {3<<20 + 101, size}} {
				if !bytes.Equal(m.Bytes()[untouched[0]:untouched[1]], model[untouched[0]:untouched[1]]) {
					t.Errorf("%+v: a discard reached outside its range", opts)
				}
			}
			if e := one(t, l, f, Request{Op: OpWrite, Offset: size, Length: 4096, Vec: []Iovec{m.Iovec(0, 4096)}}); e != unix.ENOSPC {
				t.Errorf("%+v: write beyond the end: %v", opts, e)
			}
			if e := one(t, l, f, Request{Op: OpRead, Offset: size, Length: 4096, Vec: []Iovec{m.Iovec(0, 4096)}}); e != unix.EIO {
				t.Errorf("%+v: read beyond the end: %v", opts, e)
			}
		}
	})
}
