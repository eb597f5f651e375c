package raw_test

import (
	"testing"

	"golang.org/x/sys/unix"

	"platter/aio"
	"platter/formats"
	"platter/formats/formattest"
	"platter/formats/raw"
	"platter/integration/testenv"
)

// TestConformance runs the suite on every kind of file that raw images stand on.
func TestConformance(t *testing.T) {
	for _, c := range []struct {
		name  string
		file  aio.FileOptions
		o     raw.Options
		dir   func(testing.TB) string
		align int64 // O_DIRECT takes whole blocks only

		engines []aio.Engine
		rounds  int
		merge   bool
	}{
		{name: "Buffered", dir: testenv.DiskDir},
		{name: "Direct", dir: testenv.DiskDir, file: aio.FileOptions{Direct: true}, align: 4096},
		{name: "Memory", dir: testenv.TmpfsDir},
		{name: "Merged", dir: testenv.TmpfsDir, engines: []aio.Engine{aio.EngineIOUring}, merge: true},
		{name: "Guarded", dir: testenv.DiskDir, o: raw.Options{Guard: true}, engines: []aio.Engine{aio.EngineThreads}, rounds: 15},
	} {
		t.Run(c.name, func(t *testing.T) {
			formattest.Run(t, formattest.Config{
				Dir:       c.dir,
				SizeAlign: c.align,
				Engines:   c.engines,
				Rounds:    c.rounds,
				Merge:     c.merge,
				Create: func(t testing.TB, path string, size int64) {
					t.Helper()
					if err := raw.Create(path, size, raw.CreateOptions{}); err != nil {
						t.Fatal(err)
					}
				},
				Open: func(t testing.TB, path string, readOnly bool, wrap func(aio.Storage) aio.Storage) formats.Image {
					t.Helper()
					file, o := c.file, c.o
					file.ReadOnly, o.ReadOnly, o.Path = readOnly, readOnly, path
					f, err := aio.OpenFile(path, file)
					if err != nil {
						t.Fatal(err)
					}
					var storage aio.Storage = f
					if wrap != nil {
						storage = wrap(f)
					}
					image, err := raw.New(storage, o)
					if err != nil {
						t.Fatal(err)
					}
					return image
				},
			})
		})
	}
}

// instant is a storage that succeeds at once, for what happens above it.
type instant struct {
	size    int64
	batches int
	seen    int
}

func (s *instant) Size() int64  { return s.size }
func (s *instant) Close() error { return nil }
func (s *instant) Submit(_ *aio.Loop, batch []*aio.Request) {
	s.batches++
	s.seen += len(batch)
	for _, r := range batch {
		r.Complete(0)
	}
}

func newImage(t testing.TB, s aio.Storage, o raw.Options) *raw.Image {
	t.Helper()
	image, err := raw.New(s, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { image.Close() })
	return image
}

// TestSubmitAllocatesNothing submits batches of all operations, also ones that
// are refused, and with the guard.
func TestSubmitAllocatesNothing(t *testing.T) {
	for _, guard := range []bool{false, true} {
		image := newImage(t, &instant{size: 1 << 20}, raw.Options{Guard: guard})
		memory, err := aio.NewMemory(4096)
		if err != nil {
			t.Fatal(err)
		}
		defer memory.Close()
		vec := []aio.Iovec{memory.Iovec(0, 4096)}
		over := 0
		var batch []*aio.Request
		for op := aio.OpRead; int(op) < aio.OpCount; op++ {
			for _, off := range []int64{0, 4096, 1<<20 - 4095} {
				r := &aio.Request{Op: op, Offset: off, Length: 4096, Done: func(*aio.Request) { over++ }}
				if op == aio.OpRead || op == aio.OpWrite {
					r.Vec = vec
				}
				batch = append(batch, r)
			}
		}
		if n := testing.AllocsPerRun(100, func() { image.Submit(nil, batch) }); n != 0 {
			t.Errorf("guard %v: %v allocations per batch", guard, n)
		}
		if over == 0 || over%len(batch) != 0 {
			t.Errorf("%d completions of batches of %d", over, len(batch))
		}
	}
}

// TestSubmitOneToOne: a batch of good requests reaches the storage as it is,
// and one with bad ones without them.
func TestSubmitOneToOne(t *testing.T) {
	storage := &instant{size: 8192}
	image := newImage(t, storage, raw.Options{})
	var errnos []unix.Errno
	request := func(op aio.Op, off, length int64) *aio.Request {
		return &aio.Request{Op: op, Offset: off, Length: length, Done: func(r *aio.Request) { errnos = append(errnos, r.Errno) }}
	}
	good := []*aio.Request{request(aio.OpRead, 0, 8192), request(aio.OpFlush, 0, 0), request(aio.OpDiscard, 8191, 1)}
	image.Submit(nil, good)
	if storage.batches != 1 || storage.seen != 3 || len(errnos) != 3 {
		t.Errorf("%d batches, %d requests, %d completions", storage.batches, storage.seen, len(errnos))
	}
	mixed := []*aio.Request{request(aio.OpWrite, 8192, 1), good[0], good[1], request(aio.OpRead, 1, 8192), good[2], request(aio.OpDiscard, -1, 1)}
	*storage, errnos = instant{size: 8192}, nil
	image.Submit(nil, mixed)
	want := []unix.Errno{unix.ENOSPC, 0, 0, unix.EINVAL, 0, unix.EINVAL}
	if storage.seen != 3 || len(errnos) != len(want) {
		t.Fatalf("%d requests reached the storage, outcomes %v", storage.seen, errnos)
	}
	for i := range want {
		if errnos[i] != want[i] {
			t.Errorf("request %d: %v, want %v", i, errnos[i], want[i])
		}
	}
}

func BenchmarkSubmit(b *testing.B) {
	image := newImage(b, &instant{size: 1 << 30}, raw.Options{Guard: true})
	batch := make([]*aio.Request, 32)
	for i := range batch {
		batch[i] = &aio.Request{Op: aio.OpRead, Offset: int64(i+1) << 16, Length: 4096, Done: func(*aio.Request) {}}
	}
	for b.Loop() {
		image.Submit(nil, batch)
	}
}
