package aio

import (
	"bytes"
	"testing"

	"golang.org/x/sys/unix"

	"platter/integration/testenv"
)

// allocated is the space that a file takes up, in bytes.
func allocated(t *testing.T, f *File) int64 {
	t.Helper()
	if err := unix.Fdatasync(f.Fd()); err != nil {
		t.Fatal(err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(f.Fd(), &st); err != nil {
		t.Fatal(err)
	}
	return st.Blocks * 512
}

// TestWriteZeroes: a range reads as zeroes, what is around it doesn't, and the
// space is kept or given up as it was asked for.
func TestWriteZeroes(t *testing.T) {
	const size = 4 << 20
	for _, flags := range []Flags{0, FlagNoUnmap | FlagFUA} {
		eachKind(t, size, func(t *testing.T, l *Loop, f *File) {
			model := pattern(size)
			for _, tc := range []struct{ off, length int }{
				{0, 4096}, {8192, 65536}, {100_001, 1}, {100_003, 5000}, {204_799, 4098}, {1 << 20, 2 << 20}, {size - 3, 3},
			} {
				before := allocated(t, f)
				must(t, l, f, Request{Op: OpWriteZeroes, Flags: flags, Offset: int64(tc.off), Length: int64(tc.length)})
				clear(model[tc.off : tc.off+tc.length])
				if !bytes.Equal(content(t, f), model) {
					t.Fatalf("flags %d, %+v: the file holds something else", flags, tc)
				}
				after := allocated(t, f)
				if flags&FlagNoUnmap != 0 && after < before {
					t.Errorf("flags %d, %+v: space was given up", flags, tc)
				}
				// A file system may need a block for its own books.
				if flags&FlagNoUnmap == 0 && tc.length == 2<<20 && after > before-1<<20 {
					t.Errorf("flags %d, %+v: space was kept", flags, tc)
				}
			}
		})
	}
}

// TestDiscard: a discard leaves everything outside its range alone, and gives the
// space up.
func TestDiscard(t *testing.T) {
	const size = 4 << 20
	eachKind(t, size, func(t *testing.T, l *Loop, f *File) {
		want := pattern(size)
		for _, tc := range []struct{ off, length int }{{4096, 65536}, {100_001, 70_000}, {1 << 20, 2 << 20}} {
			before := allocated(t, f)
			must(t, l, f, Request{Op: OpDiscard, Flags: FlagFUA, Offset: int64(tc.off), Length: int64(tc.length)})
			got := content(t, f)
			copy(want[tc.off:tc.off+tc.length], got[tc.off:])
			if !bytes.Equal(got, want) {
				t.Errorf("%+v: a discard reached outside its range", tc)
			}
			if tc.length == 2<<20 && allocated(t, f) > before-1<<20 {
				t.Errorf("%+v: space was kept", tc)
			}
		}
	})
}

// TestZeroFallback: a way that the file turns out not to have is tried once, and
// the next one taken; in the end zeroes are written. A discard just ends.
func TestZeroFallback(t *testing.T) {
	for _, refusal := range []unix.Errno{unix.EOPNOTSUPP, unix.ENODEV, unix.ENOSYS} {
		eachEngine(t, func(t *testing.T, l *Loop) {
			for _, direct := range []bool{false, true} {
				f := openFile(t, newFile(t, testenv.DiskDir(t), 1<<20), FileOptions{Direct: direct})
				model := pattern(1 << 20)
				var modes []uint32
				intercept(t, l, func(o *op) bool {
					if o.kind != opFallocate {
						return false
					}
					modes = append(modes, o.flags)
					return answer(o, -int32(refusal))
				})
				for _, r := range []Request{
					{Op: OpWriteZeroes, Offset: 4096, Length: 300_000},
					{Op: OpWriteZeroes, Offset: 500_001, Length: 100_000, Flags: FlagFUA},
					{Op: OpWriteZeroes, Offset: 700_000, Length: 4096, Flags: FlagNoUnmap},
					{Op: OpWriteZeroes, Offset: 720_896, Length: 65536},
				} {
					clear(model[r.Offset:r.End()])
					must(t, l, f, r)
				}
				must(t, l, f, Request{Op: OpDiscard, Offset: 0, Length: 4096})
				if !bytes.Equal(content(t, f), model) {
					t.Errorf("direct %v: the file holds something else", direct)
				}
				if len(modes) != 2 || modes[0] != unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE || modes[1] != unix.FALLOC_FL_ZERO_RANGE|unix.FALLOC_FL_KEEP_SIZE {
					t.Errorf("direct %v: modes %#x were tried", direct, modes)
				}
			}
		})
	}
}

// TestLargeFill: zeroes that one vector can't hold are written in several, each
// where the one before ended.
func TestLargeFill(t *testing.T) {
	const off, length = 1 << 20, 3*maxSegments*BlockSize + 8192
	for _, direct := range []bool{false, true} {
		l := newLoop(t, LoopOptions{})
		f := openFile(t, newFile(t, testenv.DiskDir(t), 1<<20), FileOptions{Direct: direct})
		f.noPunch.Store(true)
		f.noZeroRange.Store(true)
		at := int64(off)
		intercept(t, l, func(o *op) bool { // a file that takes everything
			n := int64(0)
			for _, v := range o.vec {
				if v.Base != Zeroes(1).Base {
					t.Error("something else than zeroes is written")
				}
				n += int64(v.Len)
			}
			n = min(n, 100<<20) // less than asked for
			if o.kind != opWritev || o.off != at {
				t.Errorf("operation %d at %d, want %d", o.kind, o.off, at)
			}
			at += n
			return answer(o, int32(n))
		})
		must(t, l, f, Request{Op: OpWriteZeroes, Offset: off, Length: length})
		if at != off+length {
			t.Errorf("written up to %d", at)
		}
	}
}

// TestZeroErrors: what isn't a refusal fails the request.
func TestZeroErrors(t *testing.T) {
	eachEngine(t, func(t *testing.T, l *Loop) {
		f := openFile(t, newFile(t, testenv.DiskDir(t), 1<<20), FileOptions{})
		failing, failure := opFallocate, unix.ENOSPC
		intercept(t, l, func(o *op) bool { return o.kind == failing && answer(o, -int32(failure)) })
		for _, op := range []Op{OpDiscard, OpWriteZeroes} {
			if e := one(t, l, f, Request{Op: op, Length: 4096}); e != unix.ENOSPC {
				t.Errorf("%v: %v", op, e)
			}
		}
		if f.noPunch.Load() || f.noZeroRange.Load() {
			t.Error("a failure was taken for a refusal")
		}
		f.noPunch.Store(true)
		f.noZeroRange.Store(true)
		l.Call(func() { failing = opWritev })
		if e := one(t, l, f, Request{Op: OpWriteZeroes, Length: 4096}); e != unix.ENOSPC {
			t.Errorf("fill: %v", e)
		}
		l.Call(func() { failure = 0 })
		if e := one(t, l, f, Request{Op: OpWriteZeroes, Length: 4096}); e != unix.EIO {
			t.Errorf("fill that writes nothing: %v", e)
		}
	})
}
