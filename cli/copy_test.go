package cli

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"platter/formats"
)

// fakeSource is a disk in memory whose extents are made up.
type fakeSource struct {
	data    []byte
	extents []formats.Extent
	readErr error // of what reaches beyond the middle
	mapErr  error // behind the middle
}

func (s *fakeSource) Size() int64 { return int64(len(s.data)) }

func (s *fakeSource) ReadAt(p []byte, off int64) (int, error) {
	if s.readErr != nil && off+int64(len(p)) > s.Size()/2 {
		return 0, s.readErr
	}
	for _, e := range s.extents {
		if e.Zero && off < e.Start+e.Length && e.Start < off+int64(len(p)) {
			return 0, fmt.Errorf("%d bytes at %d are known to be zero", len(p), off)
		}
	}
	return copy(p, s.data[off:]), nil
}

func (s *fakeSource) Extents(dst []formats.Extent, off, length int64, max int) ([]formats.Extent, error) {
	if s.mapErr != nil && off > s.Size()/2 {
		return dst, s.mapErr
	}
	n := 0
	for _, e := range s.extents {
		if e.Start >= off && n < min(max, 3) { // a few at a time
			dst = append(dst, e)
			n++
		}
	}
	return dst, nil
}

// fakeTarget is a disk in memory that fails, if it is told to, from the n-th
// write on.
type fakeTarget struct {
	mu     sync.Mutex
	data   []byte
	writes int
	fail   int
	err    error
}

func (t *fakeTarget) WriteAt(p []byte, off int64) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.writes++; t.err != nil && t.writes >= t.fail {
		return 0, t.err
	}
	if off < int64(len(t.data)) {
		copy(t.data[off:], p)
	}
	return len(p), nil
}

func (t *fakeTarget) Close() error { return nil }

// randomSource makes a disk of extents of all kinds and lengths.
func randomSource(rng *rand.Rand) *fakeSource {
	s := &fakeSource{}
	for len(s.data) < 5*window {
		length := int64(1) << rng.IntN(22)
		length = max(length, 512) + 512*rng.Int64N(3)
		e := formats.Extent{Start: s.Size(), Length: length, Zero: rng.IntN(3) == 0, Data: rng.IntN(2) == 0}
		b := make([]byte, length)
		for !e.Zero && rng.IntN(4) > 0 {
			b[rng.Int64N(length)] = 1
		}
		s.data = append(s.data, b...)
		s.extents = append(s.extents, e)
	}
	return s
}

// Whatever the extents are, the copy is the same, nothing that is zero is
// written, and progress adds up.
func TestCopyDisk(t *testing.T) {
	for range 6 {
		seed := rand.Uint64()
		rng := rand.New(rand.NewPCG(seed, 1))
		src := randomSource(rng)
		to := &fakeTarget{data: make([]byte, len(src.data))}
		dst := &target{WriterAt: zeroWatch{t, to, int64(len(src.data))}, Closer: to, size: src.Size(), files: []string{"new"}}
		if rng.IntN(2) == 0 {
			dst.clusterSize = 512 << rng.IntN(13)
			dst.compressed = func(p []byte, off int64) error {
				if off%dst.clusterSize != 0 || int64(len(p)) != min(dst.clusterSize, dst.size-off) {
					t.Errorf("seed %d: %d bytes at %d are no cluster of %d", seed, len(p), off, dst.clusterSize)
				}
				if isZero(p) {
					t.Errorf("seed %d: a cluster of zeroes", seed)
				}
				_, err := to.WriteAt(p, off)
				return err
			}
		}
		var mu sync.Mutex
		done := int64(0)
		err := copyDisk(t.Context(), dst, src, func(n int64) {
			mu.Lock()
			defer mu.Unlock()
			if done += n; n <= 0 || done > src.Size() {
				t.Errorf("seed %d: progress by %d to %d", seed, n, done)
			}
		})
		if err != nil || !bytes.Equal(to.data, src.data) {
			t.Fatalf("seed %d: the copy differs, %v", seed, err)
		}
	}
}

// zeroWatch fails the test when whole blocks of zeroes are written.
type zeroWatch struct {
	t    *testing.T
	to   *fakeTarget
	size int64
}

func (w zeroWatch) WriteAt(p []byte, off int64) (int, error) {
	for at := (off + grain - 1) &^ (grain - 1); at+grain <= off+int64(len(p)); at += grain {
		if isZero(p[at-off:][:grain]) {
			w.t.Errorf("zeroes written at %d", at)
		}
	}
	return w.to.WriteAt(p, off)
}

// ones is a disk of so many windows of data.
type ones int64

func (n ones) Size() int64 { return int64(n) * window }

func (n ones) ReadAt(p []byte, _ int64) (int, error) {
	return copy(p, bytes.Repeat([]byte{1}, len(p))), nil
}

func (n ones) Extents(dst []formats.Extent, off, length int64, _ int) ([]formats.Extent, error) {
	return append(dst, formats.Extent{Start: off, Length: length, Data: true}), nil
}

// atOnce is more than what is under way at a time.
const atOnce = 64

// The first thing that goes wrong ends the copy.
func TestCopyDiskFails(t *testing.T) {
	bad := errors.New("bad")
	for name, set := range map[string]func(s *fakeSource, to *fakeTarget){
		"read":       func(s *fakeSource, _ *fakeTarget) { s.readErr = bad },
		"map":        func(s *fakeSource, _ *fakeTarget) { s.mapErr = bad },
		"write":      func(_ *fakeSource, to *fakeTarget) { to.err, to.fail = bad, 1 },
		"last write": func(_ *fakeSource, to *fakeTarget) { to.err, to.fail = bad, 3 },
	} {
		src := &fakeSource{data: bytes.Repeat([]byte{1}, 5*window)}
		for off := int64(0); off < src.Size(); off += window / 2 {
			src.extents = append(src.extents, formats.Extent{Start: off, Length: window / 2, Data: true})
		}
		to := &fakeTarget{data: make([]byte, src.Size())}
		set(src, to)
		dst := &target{WriterAt: to, Closer: to, size: src.Size(), files: []string{"new"}}
		if err := copyDisk(t.Context(), dst, src, func(int64) {}); !errors.Is(err, bad) {
			t.Errorf("%s: %v", name, err)
		}
	}
	to := &fakeTarget{err: bad, fail: 1}
	dst := &target{WriterAt: to, Closer: to, size: ones(1000).Size(), files: []string{"new"}}
	if err := copyDisk(t.Context(), dst, ones(1000), func(int64) {}); !errors.Is(err, bad) || to.writes > atOnce {
		t.Errorf("%v after %d writes", err, to.writes)
	}
}

// A copy ends soon after its context.
func TestCopyDiskEnds(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	to := &fakeTarget{data: make([]byte, 1)}
	dst := &target{WriterAt: to, Closer: to, size: ones(1000).Size(), files: []string{"new"}}
	over := make(chan error, 1)
	go func() { over <- copyDisk(ctx, dst, ones(1000), func(int64) { cancel() }) }()
	select {
	case err := <-over:
		if !errors.Is(err, context.Canceled) || to.writes == 0 || to.writes > atOnce {
			t.Errorf("%v after %d writes", err, to.writes)
		}
	case <-time.After(time.Minute):
		t.Fatal("still copying after a minute")
	}
}

// alike finds the same runs as looking at each byte does.
func TestAlike(t *testing.T) {
	seed := rand.Uint64()
	rng := rand.New(rand.NewPCG(seed, 1))
	for range 2000 {
		off := rng.Int64N(3 * grain)
		p := make([]byte, rng.IntN(5*grain))
		for range rng.IntN(3) {
			if len(p) > 0 {
				p[rng.IntN(len(p))] = 1
			}
		}
		for at := 0; at < len(p); {
			n, zero := alike(p[at:], off+int64(at))
			if n <= 0 {
				t.Fatalf("seed %d: no progress at %d", seed, at)
			}
			if zero != (len(bytes.Trim(p[at:at+n], "\x00")) == 0) {
				t.Fatalf("seed %d: %d bytes at %d are zero: %v", seed, n, at, zero)
			}
			end := off + int64(at+n)
			if at+n < len(p) && end%grain != 0 {
				t.Fatalf("seed %d: a run ends at %d", seed, end)
			}
			if !zero {
				for b := at; b < at+n; { // no block of a run of data is zero
					next := min(b+int(grain-(off+int64(b))%grain), at+n)
					if isZero(p[b:next]) {
						t.Fatalf("seed %d: zeroes at %d in data", seed, b)
					}
					b = next
				}
			}
			at += n
		}
	}
}
