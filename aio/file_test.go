package aio

import (
	"bytes"
	"errors"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"platter/integration/testenv"
)

// TestVectors writes and reads back through vectors of few and of many pieces,
// also more than one system call takes, at aligned and unaligned places.
func TestVectors(t *testing.T) {
	const size = 2 << 20
	rng := rand.New(rand.NewPCG(1, 1))
	eachKind(t, size, func(t *testing.T, l *Loop, f *File) {
		m := newMemory(t, 2*size)
		model := pattern(size)
		for _, tc := range []struct{ off, length, pieces int }{
			{0, 4096, 1},
			{8192, 65536, 1},
			{4096, 1 << 20, 7},
			{1, 1, 1},
			{4095, 2, 2},
			{511, 4097, 3},
			{12345, 300000, 1023},
			{12345, 300000, 1024},
			{777, 300000, 1025},
			{4096, 1 << 20, 2500}, // aligned range, unaligned memory
			{3, size - 5, 5000},
			{size - 1, 1, 1},
			{0, size, 1},
		} {
			b := m.Bytes()[:tc.length]
			copy(b, wholePattern()[rng.IntN(size):])
			copy(model[tc.off:], b)
			must(t, l, f, Request{Op: OpWrite, Offset: int64(tc.off), Length: int64(tc.length), Vec: split(m, 0, tc.length, tc.pieces, rng)})
			if got := content(t, f); !bytes.Equal(got, model) {
				t.Fatalf("%+v: the file holds something else", tc)
			}
			back := split(m, size, tc.length, tc.pieces, rng)
			must(t, l, f, Request{Op: OpRead, Offset: int64(tc.off), Length: int64(tc.length), Vec: back})
			if !bytes.Equal(m.Bytes()[size:size+tc.length], b) {
				t.Fatalf("%+v: something else was read", tc)
			}
		}
	})
}

// TestAlignedPieces: page-sized pieces, more than one system call takes, go to
// an O_DIRECT file without a copy.
func TestAlignedPieces(t *testing.T) {
	const pieces, size = 1030, 1030 * 4096
	eachKind(t, size, func(t *testing.T, l *Loop, f *File) {
		m := newMemory(t, size)
		var vec []Iovec
		for i := range pieces {
			vec = append(vec, m.Iovec((pieces-1-i)*4096, 4096))
		}
		must(t, l, f, Request{Op: OpRead, Length: size, Vec: vec})
		want := pattern(size)
		for i := range pieces {
			if !bytes.Equal(m.Bytes()[(pieces-1-i)*4096:][:4096], want[i*4096:][:4096]) {
				t.Fatalf("piece %d is wrong", i)
			}
		}
		clear(want)
		copy(m.Bytes(), want)
		must(t, l, f, Request{Op: OpWrite, Length: size, Vec: vec})
		if !bytes.Equal(content(t, f), want) {
			t.Error("the file holds something else")
		}
		if vec[0] != m.Iovec((pieces-1)*4096, 4096) || len(vec) != pieces {
			t.Error("the request's vector was changed")
		}
	})
}

// TestModel runs random requests, several at a time in neighbouring ranges that
// share blocks, beside a byte array; once as the system calls go, and once with
// operations interrupted, refused for now, and cut short.
func TestModel(t *testing.T) {
	const lanes, lane = 6, 100_003
	const size = 608 << 10 // a little more, and a multiple of 4096
	eachKind(t, size, func(t *testing.T, l *Loop, f *File) {
		for _, nasty := range []bool{false, true} {
			if nasty {
				intercept(t, l, nastily(rand.New(rand.NewPCG(3, 3))))
			}
			rng := rand.New(rand.NewPCG(2, 2))
			m := newMemory(t, lanes*lane)
			model := content(t, f)
			for range 30 {
				var batch []*Request
				for i := range lanes {
					n := 1 + rng.IntN(lane)
					if rng.IntN(2) == 0 {
						n = 1 + rng.IntN(5000)
					}
					off := i*lane + rng.IntN(lane-n+1)
					r := &Request{Op: Op(rng.IntN(OpCount)), Flags: Flags(rng.IntN(4)), Offset: int64(off), Length: int64(n)}
					switch r.Op {
					case OpRead:
						r.Vec = split(m, i*lane, n, 1+rng.IntN(5), rng)
					case OpWrite:
						b := m.Bytes()[i*lane:][:n]
						copy(b, wholePattern()[rng.IntN(1<<20):])
						copy(model[off:], b)
						r.Vec = split(m, i*lane, n, 1+rng.IntN(5), rng)
					case OpFlush:
						r.Offset, r.Length = 0, 0
					case OpWriteZeroes:
						clear(model[off : off+n])
					}
					batch = append(batch, r)
				}
				do(t, l, f, batch...)
				got := content(t, f)
				for i, r := range batch {
					if r.Errno != 0 {
						t.Fatalf("%v of %d bytes at %d: %v", r.Op, r.Length, r.Offset, r.Errno)
					}
					switch r.Op {
					case OpRead:
						if !bytes.Equal(m.Bytes()[i*lane:][:r.Length], model[r.Offset:r.End()]) {
							t.Fatalf("%d bytes at %d were read wrong", r.Length, r.Offset)
						}
					case OpDiscard: // whatever they read as now
						copy(model[r.Offset:r.End()], got[r.Offset:r.End()])
					}
				}
				if !bytes.Equal(got, model) {
					for i := range got {
						if got[i] != model[i] {
							t.Fatalf("nasty %v: byte %d is wrong", nasty, i)
						}
					}
				}
			}
		}
	})
}

// nastily has operations fail for now, or do less than they were asked for.
func nastily(rng *rand.Rand) func(o *op) bool {
	return func(o *op) bool {
		switch rng.IntN(6) {
		case 0:
			return answer(o, -int32(unix.EINTR))
		case 1:
			return answer(o, -int32(unix.EAGAIN))
		case 2:
			if (o.kind != opReadv && o.kind != opWritev) || len(o.vec) == 0 {
				return false
			}
			whole := o.vec
			n := o.vec[0].Len
			if part := n / 2 / uint64(o.file.align) * uint64(o.file.align); part > 0 {
				n = part
			}
			o.vec = []Iovec{{Base: whole[0].Base, Len: n}}
			o.perform()
			o.vec = whole
			o.loop.complete(o)
			return true
		}
		return false
	}
}

func TestFlushAndHints(t *testing.T) {
	eachKind(t, 1<<20, func(t *testing.T, l *Loop, f *File) {
		m := newMemory(t, 4096)
		for _, r := range []Request{
			{Op: OpFlush},
			{Op: OpCache, Offset: 100, Length: 1 << 19},
			{Op: OpRead, Offset: 5},
			{Op: OpWrite, Offset: 1 << 40},
			{Op: OpWriteZeroes, Flags: FlagFUA},
			{Op: OpDiscard},
			{Op: OpCache},
			{Op: OpRead, Offset: 5, Vec: []Iovec{}},
			{Op: OpWrite, Flags: FlagFUA, Offset: 5000, Length: 9, Vec: []Iovec{m.Iovec(0, 9)}},
			{Op: OpWrite, Flags: FlagFUA, Offset: 8192, Length: 4096, Vec: []Iovec{m.Iovec(0, 4096)}},
		} {
			must(t, l, f, r)
		}
		if e := one(t, l, f, Request{Op: Op(OpCount), Length: 1}); e != unix.EINVAL {
			t.Errorf("an unknown operation: %v", e)
		}
		if len(content(t, f)) != 1<<20 || f.Size() != 1<<20 || f.IsBlockDevice() {
			t.Error("the file has another size now")
		}
	})
}

// TestShrunkFile: what a file lost behind our back is an error, not zeroes.
func TestShrunkFile(t *testing.T) {
	const size, left = 1 << 20, 300_100
	eachKind(t, size, func(t *testing.T, l *Loop, f *File) {
		if err := os.Truncate(f.f.Name(), left); err != nil {
			t.Fatal(err)
		}
		m := newMemory(t, size)
		for _, tc := range []struct {
			off, length int
			want        unix.Errno
		}{
			{0, 4096, 0},
			{left - 10, 10, 0},
			{left - 10, 11, unix.EIO},
			{left, 1, unix.EIO},
			{left + 1000, 5, unix.EIO},
			{left / 4096 * 4096, 4096, unix.EIO},
			{left / 4096 * 4096, 8192, unix.EIO},
			{524288, 4096, unix.EIO},
			{0, size, unix.EIO},
			{1, size - 1, unix.EIO},
		} {
			e := one(t, l, f, Request{Op: OpRead, Offset: int64(tc.off), Length: int64(tc.length), Vec: []Iovec{m.Iovec(0, tc.length)}})
			if e != tc.want {
				t.Errorf("read of %d bytes at %d: %v", tc.length, tc.off, e)
			}
		}
		if f.align > 1 { // not all of the bytes around the write are known
			for _, off := range []int64{524289, 300_033} {
				e := one(t, l, f, Request{Op: OpWrite, Offset: off, Length: 5, Vec: []Iovec{m.Iovec(0, 5)}})
				if e != unix.EIO {
					t.Errorf("write at %d, in a block of which bytes are lost: %v", off, e)
				}
			}
			if n := len(content(t, f)); n != left {
				t.Errorf("the file has %d bytes now", n)
			}
		}
	})
}

// TestKernelErrors: what the kernel refuses, the request fails with.
func TestKernelErrors(t *testing.T) {
	eachEngine(t, func(t *testing.T, l *Loop) {
		for _, k := range kinds {
			k.opts.ReadOnly = true
			f := openFile(t, newFile(t, k.dir(t), 1<<20), k.opts)
			m := newMemory(t, 4096)
			vec := []Iovec{m.Iovec(0, 4096)}
			for _, op := range []Op{OpWrite, OpWriteZeroes, OpDiscard} {
				r := Request{Op: op, Length: 4096}
				if op == OpWrite {
					r.Vec = vec
				}
				if e := one(t, l, f, r); e != unix.EBADF {
					t.Errorf("%s: %v of a file opened for reading: %v", k.name, op, e)
				}
			}
			if e := one(t, l, f, Request{Op: OpRead, Length: 4096, Vec: []Iovec{{Base: 4096, Len: 4096}}}); e != unix.EFAULT {
				t.Errorf("%s: read to where no memory is: %v", k.name, e)
			}
			must(t, l, f, Request{Op: OpFlush})
			must(t, l, f, Request{Op: OpRead, Length: 4096, Vec: vec})
		}
	})
}

// TestNoSpace fills a small file system.
func TestNoSpace(t *testing.T) {
	testenv.NeedRoot(t)
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=1m"); err != nil {
		testenv.Skip(t, "no file system can be mounted: "+err.Error())
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	eachEngine(t, func(t *testing.T, l *Loop) {
		path := filepath.Join(dir, "image")
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(path, 4<<20); err != nil {
			t.Fatal(err)
		}
		f := openFile(t, path, FileOptions{})
		m := newMemory(t, 2<<20)
		write := func(n int) unix.Errno {
			return one(t, l, f, Request{Op: OpWrite, Length: int64(n), Vec: []Iovec{m.Iovec(0, n)}})
		}
		if e := write(2 << 20); e != unix.ENOSPC {
			t.Errorf("write: %v", e)
		}
		if e := one(t, l, f, Request{Op: OpWriteZeroes, Flags: FlagNoUnmap, Length: 4 << 20}); e != unix.ENOSPC {
			t.Errorf("write-zeroes: %v", e)
		}
		must(t, l, f, Request{Op: OpFlush}) // what was written is there
		must(t, l, f, Request{Op: OpDiscard, Length: 4 << 20})
		if e := write(512 << 10); e != 0 {
			t.Errorf("write when there is room again: %v", e)
		}
	})
}

func TestOpenErrors(t *testing.T) {
	dir := testenv.DiskDir(t)
	if err := unix.Mkfifo(filepath.Join(dir, "fifo"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "odd"), make([]byte, 5000), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name string
		opts FileOptions
		want error
	}{
		{"missing", FileOptions{}, fs.ErrNotExist},
		{".", FileOptions{}, unix.EISDIR},
		{".", FileOptions{ReadOnly: true}, ErrNotBlocks},
		{"fifo", FileOptions{}, ErrNotBlocks},
		{"fifo", FileOptions{ReadOnly: true}, ErrNotBlocks},
		{"odd", FileOptions{Direct: true}, ErrUnalignedSize},
	} {
		f, err := OpenFile(filepath.Join(dir, tc.name), tc.opts)
		var path *fs.PathError
		if !errors.Is(err, tc.want) || !errors.As(err, &path) {
			t.Errorf("%s: %v, %v", tc.name, f, err)
		}
	}
	if _, err := OpenFile("/dev/null", FileOptions{}); !errors.Is(err, ErrNotBlocks) {
		t.Errorf("/dev/null: %v", err)
	}
	f := openFile(t, filepath.Join(dir, "odd"), FileOptions{Direct: true, ReadOnly: true})
	m := newMemory(t, 5000)
	must(t, newLoop(t, LoopOptions{}), f, Request{Op: OpRead, Offset: 1, Length: 4999, Vec: []Iovec{m.Iovec(0, 4999)}})
}

// TestRegisteredSlots: a file's slot is free again when it is closed, and files
// that get none are used by descriptor.
func TestRegisteredSlots(t *testing.T) {
	l := newLoop(t, LoopOptions{Engine: EngineIOUring})
	path := newFile(t, testenv.DiskDir(t), 4096)
	m := newMemory(t, 4096)
	free := func() (n int) {
		l.Call(func() { n = len(l.driver.(*ringDriver).slots) })
		return n
	}
	all := free()
	for range registeredFiles + 10 {
		f, err := OpenFile(path, FileOptions{})
		if err != nil {
			t.Fatal(err)
		}
		must(t, l, f, Request{Op: OpRead, Length: 4096, Vec: []Iovec{m.Iovec(0, 4096)}})
		if n := free(); n != all-1 {
			t.Fatalf("%d slots of %d are free", n, all)
		}
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if n := free(); n != all {
		t.Errorf("%d slots of %d are free", n, all)
	}

	var saved []int32
	l.Call(func() {
		d := l.driver.(*ringDriver)
		saved, d.slots = d.slots[2:], d.slots[:2]
	})
	for range 5 {
		f := openFile(t, path, FileOptions{})
		must(t, l, f, Request{Op: OpRead, Length: 4096, Vec: []Iovec{m.Iovec(0, 4096)}})
	}
	if n := free(); n != 0 {
		t.Errorf("%d slots are free", n)
	}
	l.Call(func() {
		d := l.driver.(*ringDriver)
		d.slots = append(d.slots, saved...)
	})
}

// TestCloseFileAndLoop closes files while loops that used them are being closed.
func TestCloseFileAndLoop(t *testing.T) {
	path := newFile(t, testenv.DiskDir(t), 4096)
	for range 30 {
		l := newLoop(t, LoopOptions{})
		f := openFile(t, path, FileOptions{})
		must(t, l, f, Request{Op: OpFlush})
		over := make(chan struct{})
		go func() {
			defer close(over)
			l.Close()
		}()
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
		waitFor(t, over, "close")
	}
}
