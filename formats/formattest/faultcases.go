package formattest

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"

	"golang.org/x/sys/unix"

	"platter/aio"
	"platter/formats"
)

// overFaulty makes an image that stands on a Faulty.
func (s *suite) overFaulty(size int64) (formats.Image, *Faulty) {
	s.t.Helper()
	var faulty *Faulty
	image := s.fresh(size, func(below aio.Storage) aio.Storage {
		faulty = NewFaulty(below)
		return faulty
	})
	if faulty == nil {
		s.t.Fatal("Open does not use wrap")
	}
	return image, faulty
}

// durable looks below the image: a flush reaches the storage, on whatever loop
// the writes were done, and FUA needs none.
func durable(s *suite) {
	image, faulty := s.overFaulty(1 << 20)
	for i, ln := range s.lanes {
		ln.must(ln.write(image, 0, int64(i)*8192, ln.bytes(8192)), "write")
	}
	flusher := s.lanes[len(s.lanes)-1]
	if !image.Limits().MultiConn {
		for _, ln := range s.lanes {
			ln.must(ln.do(image, aio.OpFlush, 0, 0, 0), "flush")
		}
	} else {
		flusher.must(flusher.do(image, aio.OpFlush, 0, 0, 0), "flush")
	}
	if n := faulty.Unflushed(); n != 0 {
		s.t.Errorf("%d writes are not durable after a flush", n)
	}
	flusher.must(flusher.write(image, aio.FlagFUA, 512<<10, flusher.bytes(8192)), "write with FUA")
	if n := faulty.Unflushed(); n != 0 {
		s.t.Errorf("%d writes are not durable after one with FUA", n)
	}
	// Too little to free anything, which need not be durable.
	block := int64(image.Limits().BlockSize)
	flusher.must(flusher.do(image, aio.OpWriteZeroes, aio.FlagFUA, 512<<10+block, max(block, 100)), "zero with FUA")
	if n := faulty.Unflushed(); n != 0 {
		s.t.Errorf("%d writes are not durable after zeroes with FUA", n)
	}
}

// faults fails one kind of operation after the other below the image: the
// request that needed it fails with the same error, and when the fault is gone
// the image works.
func faults(s *suite) {
	image, faulty := s.overFaulty(1 << 20)
	ln, size := s.lanes[0], image.Size()
	want := ln.bytes(size)
	ln.must(ln.write(image, 0, 0, want), "fill")
	for _, c := range []struct {
		op    aio.Op
		errno unix.Errno
	}{
		{aio.OpRead, unix.EIO},
		{aio.OpWrite, unix.EIO}, {aio.OpWrite, unix.ENOSPC},
		{aio.OpWriteZeroes, unix.EIO}, {aio.OpWriteZeroes, unix.ENOSPC},
		{aio.OpDiscard, unix.EIO}, {aio.OpFlush, unix.EIO},
	} {
		faulty.Inject(Fault{Errno: c.errno, Match: func(r *aio.Request) bool {
			return r.Op == c.op || c.op != aio.OpRead && (r.Op.Writes() || r.Op == aio.OpFlush)
		}})
		r := &aio.Request{Op: c.op, Offset: 128 << 10, Length: 64 << 10}
		switch c.op {
		case aio.OpFlush:
			r.Offset, r.Length = 0, 0
		case aio.OpRead, aio.OpWrite:
			r.Vec = ln.vec(r.Length, 3)
		}
		ln.submit(image, r)
		hits := faulty.Heal()
		switch {
		case c.op == aio.OpDiscard && r.Errno == 0: // it may do nothing
		case hits == 0 && r.Errno == 0: // it needed nothing below
		case r.Errno != c.errno:
			s.t.Errorf("%v: %v, want %v", c.op, r.Errno, c.errno)
		}
		ln.must(ln.write(image, 0, 0, want), "write after the fault")
		ln.must(ln.do(image, aio.OpFlush, 0, 0, 0), "flush after the fault")
		if !bytes.Equal(ln.readAll(image), want) {
			s.t.Fatalf("the image is wrong after a failed %v", c.op)
		}
	}
}

// randomFaults has a part of all operations fail below the image. What
// succeeded holds, and when the faults are gone everything works.
func randomFaults(s *suite) {
	image, faulty := s.overFaulty(2<<20 + 333)
	limits := image.Limits()
	m := newModel(image.Size())
	for _, errno := range []unix.Errno{unix.EIO, unix.ENOSPC} {
		rng := rand.New(rand.NewPCG(s.rng.Uint64(), s.rng.Uint64()))
		faulty.Inject(Fault{Errno: errno, Match: func(r *aio.Request) bool {
			return (errno == unix.EIO || r.Op.Writes()) && rng.IntN(8) == 0
		}})
		s.workload(image, int64(limits.BlockSize), limits.MaxSegments, m, errno)
		if faulty.Heal() == 0 {
			s.t.Error("no fault was met")
		}
		m.check(s.t, fmt.Sprintf("after %v", errno), 0, s.lanes[0].readAll(image))
		s.workload(image, int64(limits.BlockSize), limits.MaxSegments, m)
		m.check(s.t, "after the faults", 0, s.lanes[0].readAll(image))
	}
}

// shortFile takes the end of the file away behind the image's back. Reads
// either are right or fail with EIO, and are never made up; with the end back,
// everything is there.
func shortFile(s *suite) {
	image := s.fresh(256<<10+100, nil)
	ln, size, block := s.lanes[0], image.Size(), int64(image.Limits().BlockSize)
	want := ln.bytes(size)
	ln.must(ln.write(image, 0, 0, want), "fill")
	ln.must(ln.do(image, aio.OpFlush, 0, 0, 0), "flush")
	path := s.path
	if s.DataPath != nil {
		path = s.DataPath(path)
	}
	whole, err := os.ReadFile(path)
	if err != nil {
		s.t.Fatal(err)
	}
	middle := size / 2 / 512 * 512
	cut := int64(bytes.Index(whole, want[middle:middle+512])) // formats lay their files out as they like
	if cut < 0 {
		s.t.Fatal("the file doesn't hold what was written")
	}
	if err := os.Truncate(path, cut); err != nil {
		s.t.Fatal(err)
	}
	failed := 0
	for off := int64(0); off < size; off += 5 * 1024 {
		length := min(size-off, 5*1024)
		switch got, errno := ln.read(image, off, length); {
		case errno == unix.EIO:
			failed++
		case errno != 0:
			s.t.Errorf("read %d+%d of a file that was cut at %d: %v, want EIO", off, length, cut, errno)
		case !bytes.Equal(got, want[off:off+length]):
			s.t.Errorf("read %d+%d of a file that was cut at %d: succeeds with bytes that nobody wrote", off, length, cut)
		}
	}
	if failed == 0 {
		s.t.Error("every read of a file cut in half succeeded")
	}
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		s.t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(whole[cut:], cut); err != nil {
		s.t.Fatal(err)
	}
	if !bytes.Equal(ln.readAll(image), want) {
		s.t.Error("wrong after the end of the file is back")
	}
	last := (size - 1) / block * block
	ln.must(ln.write(image, 0, last, want[last:]), "write at the end")
}
