package formattest

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"platter/aio"
	"platter/integration/testenv"
)

// recorded submits a request to a recorder, with memory for its bytes.
func recorded(t *testing.T, rec *Recorder, r aio.Request, data string) (*aio.Request, *aio.Memory) {
	t.Helper()
	memory, err := aio.NewMemory(4096)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { memory.Close() })
	copy(memory.Bytes(), data)
	if r.Op == aio.OpRead || r.Op == aio.OpWrite {
		r.Vec = []aio.Iovec{memory.Iovec(0, 2), memory.Iovec(2, int(r.Length)-2)}
	}
	r.Done = func(*aio.Request) {}
	rec.Submit(nil, []*aio.Request{&r})
	return &r, memory
}

func TestRecorderRecords(t *testing.T) {
	below := &held{}
	rec := NewRecorder(below, new(Clock), []byte("before"))
	_, memory := recorded(t, rec, aio.Request{Op: aio.OpWrite, Offset: 100, Length: 5}, "hello")
	copy(memory.Bytes(), "later")
	recorded(t, rec, aio.Request{Op: aio.OpWriteZeroes, Flags: aio.FlagFUA, Offset: 3, Length: 4096}, "")
	recorded(t, rec, aio.Request{Op: aio.OpRead, Offset: 7, Length: 5}, "")
	recorded(t, rec, aio.Request{Op: aio.OpCache, Offset: 7, Length: 5}, "")
	below.release(0)
	recorded(t, rec, aio.Request{Op: aio.OpFlush}, "")
	recorded(t, rec, aio.Request{Op: aio.OpDiscard, Offset: 1, Length: 2}, "")
	below.release(unix.EIO)
	below.release(0) // the read
	below.release(0) // the hint
	below.release(0)
	want := Recording{
		Initial: []byte("before"),
		Records: []Record{
			{Op: aio.OpWrite, Offset: 100, Length: 5, Data: []byte("hello"), Submitted: 1, Completed: 3},
			{Op: aio.OpWriteZeroes, Flags: aio.FlagFUA, Offset: 3, Length: 4096, Submitted: 2, Completed: 6, Failed: true},
			{Op: aio.OpFlush, Submitted: 4, Completed: 7},
			{Op: aio.OpDiscard, Offset: 1, Length: 2, Submitted: 5},
		},
		Moments: 7,
	}
	got := rec.Recording()
	if !reflect.DeepEqual(*got, want) {
		t.Errorf("recorded\n%+v, want\n%+v", *got, want)
	}
	below.release(0)
	if got.Records[3].Completed != 0 || rec.Recording().Records[3].Completed != 8 {
		t.Error("a recording changes when it has been taken, or does not go on")
	}
}

// TestRecorderOutcome: who submitted the request learns what became of it, once,
// and has it back as it was.
func TestRecorderOutcome(t *testing.T) {
	below := &held{}
	rec := NewRecorder(below, new(Clock), nil)
	for _, errno := range []unix.Errno{0, unix.ENOSPC} {
		calls := 0
		done := func(*aio.Request) { calls++ }
		r := &aio.Request{Op: aio.OpFlush, Done: done}
		for range 2 {
			rec.Submit(nil, []*aio.Request{r})
			below.release(errno)
		}
		if calls != 2 || r.Errno != errno || reflect.ValueOf(r.Done).Pointer() != reflect.ValueOf(done).Pointer() {
			t.Errorf("%d calls, errno %v, want %v", calls, r.Errno, errno)
		}
	}
}

func TestRecorderReads(t *testing.T) {
	below := &held{}
	rec := NewRecorder(below, new(Clock), nil)
	rec.Reads()
	_, memory := recorded(t, rec, aio.Request{Op: aio.OpRead, Offset: 9, Length: 4}, "no")
	copy(memory.Bytes(), "yes!")
	below.release(0)
	recorded(t, rec, aio.Request{Op: aio.OpRead, Offset: 9, Length: 4}, "no")
	below.release(unix.EIO)
	want := []Record{
		{Op: aio.OpRead, Offset: 9, Length: 4, Data: []byte("yes!"), Submitted: 1, Completed: 2},
		{Op: aio.OpRead, Offset: 9, Length: 4, Submitted: 3, Completed: 4, Failed: true},
	}
	if got := rec.Recording().Records; !reflect.DeepEqual(got, want) {
		t.Errorf("recorded %+v, want %+v", got, want)
	}
}

// resizable is a storage whose length can be set, but for one.
type resizable struct {
	held
	lengths []int64
}

func (s *resizable) Fd() int { return 77 }
func (s *resizable) Truncate(size int64) error {
	if size == 13 {
		return unix.EFBIG
	}
	s.lengths = append(s.lengths, size)
	return nil
}

func TestRecorderTruncates(t *testing.T) {
	below := &resizable{}
	rec := NewRecorder(below, new(Clock), nil)
	if err := rec.Truncate(4096); err != nil {
		t.Error(err)
	}
	if err := rec.Truncate(13); !errors.Is(err, unix.EFBIG) {
		t.Errorf("%v, want EFBIG", err)
	}
	if !slices.Equal(below.lengths, []int64{4096}) {
		t.Errorf("truncated to %v", below.lengths)
	}
	want := []Record{
		{Op: OpTruncate, Offset: 4096, Submitted: 1, Completed: 2},
		{Op: OpTruncate, Offset: 13, Submitted: 3, Completed: 4, Failed: true},
	}
	if got := rec.Recording().Records; !reflect.DeepEqual(got, want) {
		t.Errorf("recorded %+v, want %+v", got, want)
	}
	fixed := NewRecorder(&held{}, new(Clock), nil)
	if err := fixed.Truncate(4096); !errors.Is(err, unix.EOPNOTSUPP) {
		t.Errorf("a storage of fixed length: %v, want EOPNOTSUPP", err)
	}
	if n := len(fixed.Recording().Records); n != 0 {
		t.Errorf("%d records of what can't be done", n)
	}
}

func TestRecorderFd(t *testing.T) {
	if fd := NewRecorder(&resizable{}, new(Clock), nil).Fd(); fd != 77 {
		t.Errorf("descriptor %d, want that of the file below", fd)
	}
	if fd := NewRecorder(&held{}, new(Clock), nil).Fd(); fd != -1 {
		t.Errorf("descriptor %d, want -1", fd)
	}
}

// TestRecorderSharesClock: what two recorders see has one order, and goes on when
// the file is opened again.
func TestRecorderSharesClock(t *testing.T) {
	clock, below := new(Clock), &held{}
	lower := NewRecorder(below, clock, nil)
	upper := NewRecorder(lower, clock, nil)
	recorded(t, upper, aio.Request{Op: aio.OpFlush}, "")
	below.release(0)
	again := &held{}
	lower.Reopen(again)
	recorded(t, upper, aio.Request{Op: aio.OpFlush}, "")
	again.release(0)
	got := [][]Record{upper.Recording().Records, lower.Recording().Records}
	want := [][]Record{
		{{Op: aio.OpFlush, Submitted: 1, Completed: 4}, {Op: aio.OpFlush, Submitted: 5, Completed: 8}},
		{{Op: aio.OpFlush, Submitted: 2, Completed: 3}, {Op: aio.OpFlush, Submitted: 6, Completed: 7}},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("recorded %+v, want %+v", got, want)
	}
}

func TestRecordString(t *testing.T) {
	for want, r := range map[string]Record{
		"write with FUA 5+6 at 7..8":      {Op: aio.OpWrite, Flags: aio.FlagFUA, Offset: 5, Length: 6, Submitted: 7, Completed: 8},
		"truncate 9+0 at 1..in flight":    {Op: OpTruncate, Offset: 9, Submitted: 1},
		"discard 0+512 at 2..5, failed":   {Op: aio.OpDiscard, Length: 512, Submitted: 2, Completed: 5, Failed: true},
		"write-zeroes 512+512 at 10..200": {Op: aio.OpWriteZeroes, Offset: 512, Length: 512, Submitted: 10, Completed: 200},
	} {
		if got := r.String(); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}

// TestRecorderLag: completions come late and out of order, each once, and not
// before they are recorded.
func TestRecorderLag(t *testing.T) {
	path := filepath.Join(testenv.TmpfsDir(t), "file")
	if err := WriteImage(path, make([]byte, 4096)); err != nil {
		t.Fatal(err)
	}
	f, err := aio.OpenFile(path, aio.FileOptions{})
	if err != nil {
		t.Fatal(err)
	}
	clock := new(Clock)
	lower, ln := NewRecorder(f, clock, nil), newLanes(t, aio.EngineThreads, 1, rand.New(rand.NewPCG(1, 2)))[0]
	lower.Lag(rand.New(rand.NewPCG(3, 4)))
	upper := NewRecorder(lower, clock, nil)
	batch := make([]*aio.Request, 100)
	for i := range batch {
		batch[i] = &aio.Request{Op: aio.OpWrite, Length: 1, Vec: ln.vec(1, 1)}
	}
	ln.submit(upper, batch...)
	if err := lower.Close(); err != nil {
		t.Fatal(err)
	}
	late, early := lower.Recording().Records, upper.Recording().Records
	if slices.IsSortedFunc(late, func(a, b Record) int { return a.Completed - b.Completed }) {
		t.Error("100 completions come in order")
	}
	for i := range batch {
		if late[i].Completed == 0 || early[i].Completed < late[i].Completed {
			t.Fatalf("write %d completes at %d, and is recorded at %d", i, early[i].Completed, late[i].Completed)
		}
	}
}

// TestRecorderManyLoops has several loops write to their parts of a real file at
// a time, on a recorder that holds completions back. Everything that was
// recorded, done again, makes the file as it is.
func TestRecorderManyLoops(t *testing.T) {
	const loops, share = 4, 128 << 10
	seed := newSeed(t)
	path := filepath.Join(testenv.TmpfsDir(t), "file")
	initial := bytes.Repeat([]byte("initial "), loops*share/8)
	if err := os.WriteFile(path, initial, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := aio.OpenFile(path, aio.FileOptions{})
	if err != nil {
		t.Fatal(err)
	}
	rec := NewRecorder(f, new(Clock), initial)
	rec.Lag(rand.New(rand.NewPCG(seed, 1)))
	var over sync.WaitGroup
	for i, ln := range newLanes(t, aio.EngineThreads, loops, rand.New(rand.NewPCG(seed, 2))) {
		over.Go(func() {
			for range 40 {
				for at := int64(i * share); at < int64(i+1)*share; at += share / 8 {
					from := ln.rng.Int64N(share / 8)
					length := 1 + ln.rng.Int64N(share/8-from)
					var errno unix.Errno
					switch ln.rng.IntN(4) {
					case 0:
						errno = ln.do(rec, aio.OpWriteZeroes, 0, at+from, length)
					case 1:
						errno = ln.do(rec, aio.OpFlush, 0, 0, 0)
					default:
						errno = ln.write(rec, 0, at+from, ln.bytes(length))
					}
					if errno != 0 {
						t.Error(errno)
					}
				}
			}
		})
	}
	over.Wait()
	if err := rec.Close(); err != nil {
		t.Fatal(err)
	}
	recording := rec.Recording()
	last := 0
	for i := range recording.Records {
		r := &recording.Records[i]
		if r.Submitted <= last || r.Completed <= r.Submitted {
			t.Fatalf("%v comes after moment %d", r, last)
		}
		last = r.Submitted
	}
	compareFile(t, path, recording, seed)
}

// TestRecorderLengths changes the length of a real file in every way.
func TestRecorderLengths(t *testing.T) {
	seed := newSeed(t)
	rng := rand.New(rand.NewPCG(seed, 0))
	ln := newLanes(t, aio.EngineThreads, 1, rng)[0]
	for range 30 {
		path := filepath.Join(testenv.TmpfsDir(t), "file")
		initial := ln.bytes(rng.Int64N(10_000))
		if err := os.WriteFile(path, initial, 0o600); err != nil {
			t.Fatal(err)
		}
		f, err := aio.OpenFile(path, aio.FileOptions{})
		if err != nil {
			t.Fatal(err)
		}
		rec := NewRecorder(f, new(Clock), initial)
		for range 20 {
			off, length := rng.Int64N(20_000), 1+rng.Int64N(5000)
			switch rng.IntN(4) {
			case 0:
				if err := rec.Truncate(off); err != nil {
					t.Fatal(err)
				}
			case 1:
				ln.must(ln.do(rec, aio.OpWriteZeroes, 0, off, length), "zero")
			case 2:
				ln.must(ln.write(rec, 0, off, ln.bytes(length)), "write")
			default:
				ln.must(ln.do(rec, aio.OpFlush, 0, 0, 0), "flush")
			}
		}
		if err := rec.Close(); err != nil {
			t.Fatal(err)
		}
		compareFile(t, path, rec.Recording(), seed)
	}
}

// compareFile builds the image of a cut after everything, in which all was done.
func compareFile(t *testing.T, path string, recording *Recording, seed uint64) {
	t.Helper()
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	p := NewReplayer(recording)
	cut := Cut{Moment: recording.Moments, Strategy: AllKept}
	if got := p.Build(cut); !bytes.Equal(got, want) {
		at := 0
		for at < min(len(got), len(want)) && got[at] == want[at] {
			at++
		}
		t.Fatalf("what was recorded makes another file: %d bytes, want %d; the first that differs is %d (PLATTER_TEST_SEED=%d)\n%s",
			len(got), len(want), at, seed, p.Describe(cut, 20))
	}
}
