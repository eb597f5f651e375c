package formattest

import (
	"fmt"
	"math/rand/v2"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"platter/aio"
)

// EveryFault does the same workload again and again on a new image, and each
// time fails another of the operations below it, until all have been failed: the
// first read, the second, …, the last flush. The request that needed the
// operation fails or does without it; all others succeed, the image holds what
// it should, goes on working, and can be closed and opened again. Config.Open
// should check the image when it is closed.
func EveryFault(t *testing.T, c Config) {
	if c.Dir == nil {
		c.Dir = func(t testing.TB) string { return t.TempDir() }
	}
	if c.SizeAlign == 0 {
		c.SizeAlign = 1
	}
	if c.Seed == 0 {
		c.Seed = newSeed(t)
	}
	c.Loops = 1
	for i, errno := range []unix.Errno{unix.EIO, unix.ENOSPC} {
		t.Run(unix.ErrnoName(errno), func(t *testing.T) {
			s := newSuite(t, c, aio.EngineIOUring, uint64(i))
			s.Create(t, s.path, s.aligned(faultSize))
			empty, err := os.ReadFile(s.path)
			if err != nil {
				t.Fatal(err)
			}
			failed := 0
			for s.fault(empty, errno, failed) {
				failed++
			}
			if failed < 10 {
				t.Errorf("only %d operations were failed", failed)
			}
			t.Logf("%d operations were failed, each in a run of its own", failed)
		})
	}
}

const faultSize = 512 << 10

// fault runs the workload with a fault after so many operations, and reports
// whether it was met.
func (s *suite) fault(empty []byte, errno unix.Errno, after int) bool {
	s.t.Helper()
	what := fmt.Sprintf("%v in place of operation %d", errno, after)
	if err := os.WriteFile(s.path, empty, 0o644); err != nil {
		s.t.Fatal(err)
	}
	var faulty *Faulty
	image, closeImage := s.open(false, func(below aio.Storage) aio.Storage {
		faulty = NewFaulty(below)
		return faulty
	})
	// The same requests every time.
	s.rng = rand.New(rand.NewPCG(s.Seed, 1))
	ln := s.lanes[0]
	ln.rng = rand.New(rand.NewPCG(s.Seed, 2))
	dealt := s.pieces(image.Size(), int64(image.Limits().BlockSize))[0]
	m := newModel(image.Size())
	run := func(rounds int, expected ...unix.Errno) {
		for range rounds {
			if !ln.round(image, dealt, int64(image.Limits().BlockSize), 8, m, expected) {
				s.t.Fatalf("with %s", what)
			}
		}
	}
	faulty.Inject(Fault{Errno: errno, After: after, Times: 1, Match: func(r *aio.Request) bool {
		return errno == unix.EIO || r.Op.Writes()
	}})
	run(5, errno)
	flushed := ln.do(image, aio.OpFlush, 0, 0, 0)
	met := faulty.Heal() > 0
	if flushed != 0 && (!met || flushed != errno) {
		s.t.Fatalf("flush with %s: %v", what, flushed)
	}
	if !m.check(s.t, "with "+what, 0, ln.readAll(image)) {
		s.t.FailNow()
	}
	run(2)
	ln.must(ln.do(image, aio.OpFlush, 0, 0, 0), "flush after "+what)
	closeImage()
	again, closeAgain := s.open(true, nil)
	if !m.check(s.t, "opened again after "+what, 0, ln.readAll(again)) {
		s.t.FailNow()
	}
	closeAgain()
	if s.t.Failed() {
		s.t.Fatalf("with %s", what)
	}
	return met
}
