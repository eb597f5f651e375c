package formattest

import (
	"bytes"
	"fmt"
	"math"

	"golang.org/x/sys/unix"

	"platter/aio"
	"platter/formats"
)

// sizes makes images of odd sizes: each keeps its size, starts as zeroes, and
// holds a byte in its last block.
func sizes(s *suite) {
	ln := s.lanes[0]
	base := s.path
	for i, size := range []int64{0, 1, 511, 512, 513, 4095, 4096, 4097, 65_535, 65_537, 1<<20 + 512, 5<<30 + 1} {
		size = s.aligned(size)
		s.path = fmt.Sprintf("%s-%d", base, i)
		s.Create(s.t, s.path, size)
		image, closeImage := s.open(false, nil)
		if image.Size() != size {
			s.t.Fatalf("size %d, want %d", image.Size(), size)
		}
		ln.must(ln.do(image, aio.OpFlush, 0, 0, 0), "flush")
		if length := min(size, int64(image.Limits().BlockSize)); length > 0 {
			last := size - length
			got, errno := ln.read(image, last, length)
			ln.must(errno, "read the last block")
			if !bytes.Equal(got, make([]byte, length)) {
				s.t.Fatalf("size %d: a new image ends with % x", size, got)
			}
			want := ln.bytes(length)
			ln.must(ln.write(image, aio.FlagFUA, last, want), "write the last block")
			closeImage()
			image, closeImage = s.open(false, nil)
			got, errno = ln.read(image, last, length)
			ln.must(errno, "read the last block again")
			if !bytes.Equal(got, want) || image.Size() != size {
				s.t.Fatalf("size %d: the last block is lost, or the size changed to %d", size, image.Size())
			}
		}
		closeImage()
	}
}

// edges reads, writes and zeroes ranges that begin and end next to the borders
// of sectors, pages and clusters.
func edges(s *suite) {
	image := s.fresh(256<<10+777, nil)
	ln, block := s.lanes[0], int64(image.Limits().BlockSize)
	m := newModel(image.Size())
	background := ln.bytes(image.Size())
	ln.must(ln.write(image, 0, 0, background), "fill")
	copy(m.data, background)

	var borders []int64
	for _, b := range []int64{512, 4096, 65_536, image.Size()} {
		borders = append(borders, b-block, b, b+block)
	}
	borders = append(borders, 0)
	for _, from := range borders {
		for _, to := range borders {
			from, to := from/block*block, min(to, image.Size())
			if from >= to {
				continue
			}
			r := &aio.Request{Op: aio.OpWrite, Offset: from, Length: to - from}
			switch s.rng.IntN(4) {
			case 0:
				r.Op = aio.OpWriteZeroes
			case 1:
				r.Op, r.Flags = aio.OpWriteZeroes, aio.FlagNoUnmap
			}
			var data []byte
			if r.Op == aio.OpWrite {
				data = ln.bytes(r.Length)
				r.Vec = ln.vec(r.Length, 1+s.rng.IntN(4))
				aio.CopyIn(r.Vec, data)
			}
			ln.submit(image, r)
			ln.must(r.Errno, fmt.Sprintf("%v %d+%d", r.Op, from, r.Length))
			m.apply(r, data)
			got, errno := ln.read(image, from, r.Length)
			ln.must(errno, "read")
			m.check(s.t, fmt.Sprintf("after %v", r.Op), from, got)
		}
	}
	m.check(s.t, "in the end", 0, ln.readAll(image))
}

// segments uses vectors as long as the image takes, of odd pieces.
func segments(s *suite) {
	image := s.fresh(1<<20, nil)
	limits := image.Limits()
	block := int64(limits.BlockSize)
	if limits.MaxSegments < 1 || limits.MaxTransfer < block || block&(block-1) != 0 {
		s.t.Fatalf("limits make no sense: %+v", limits)
	}
	ln := s.lanes[0]
	for _, count := range []int{1, 2, limits.MaxSegments/2 + 1, limits.MaxSegments} {
		for _, length := range []int64{512 << 10, 300_001 / block * block} {
			off := 8192 + s.rng.Int64N(1000)/block*block
			want := ln.bytes(length)
			out := &aio.Request{Op: aio.OpWrite, Offset: off, Length: length, Vec: ln.vec(length, count)}
			aio.CopyIn(out.Vec, want)
			ln.submit(image, out)
			ln.must(out.Errno, fmt.Sprintf("write %d segments", len(out.Vec)))
			in := &aio.Request{Op: aio.OpRead, Offset: off, Length: length, Vec: ln.vec(length, count)}
			aio.CopyIn(in.Vec, make([]byte, length))
			ln.submit(image, in)
			ln.must(in.Errno, fmt.Sprintf("read %d segments", len(in.Vec)))
			got := make([]byte, length)
			aio.CopyOut(got, in.Vec)
			if !bytes.Equal(got, want) {
				s.t.Fatalf("%d segments, %d bytes at %d: not what was written", count, length, off)
			}
		}
	}
}

// largestTransfer does one write and one read of the size that the image says
// it takes.
func largestTransfer(s *suite) {
	image := s.fresh(40<<20, nil)
	ln := s.lanes[0]
	length := min(image.Limits().MaxTransfer, 32<<20)
	want := bytes.Repeat(ln.bytes(4099), int(length/4099)+1)[:length]
	ln.must(ln.write(image, 0, 4096, want), "write")
	got, errno := ln.read(image, 4096, length)
	ln.must(errno, "read")
	if !bytes.Equal(got, want) {
		s.t.Fatal("the largest transfer is not what was written")
	}
}

// zeroesReadZero zeroes ranges far larger than a transfer, which hold data in
// places, with every combination of flags.
func zeroesReadZero(s *suite) {
	image := s.fresh(1<<30, nil)
	ln, size := s.lanes[0], image.Size()
	for _, flags := range []aio.Flags{0, aio.FlagFUA} {
		for at := int64(0); at < size; at += size / 8 {
			ln.must(ln.write(image, 0, at, ln.bytes(8192)), "write")
		}
		ln.must(ln.do(image, aio.OpWriteZeroes, flags, 0, size), "zero all")
		for at := int64(0); at < size; at += size / 8 {
			expectZero(s, image, at, 8192)
		}
	}
	for _, flags := range []aio.Flags{aio.FlagNoUnmap, aio.FlagNoUnmap | aio.FlagFUA} {
		ln.must(ln.write(image, 0, 4096, ln.bytes(1<<20)), "write")
		ln.must(ln.do(image, aio.OpWriteZeroes, flags, 4096, 1<<20), "zero and keep the space")
		expectZero(s, image, 4096, 1<<20)
	}
	ln.must(ln.do(image, aio.OpDiscard, 0, 0, size), "discard all")
}

func expectZero(s *suite, image formats.Image, off, length int64) {
	s.t.Helper()
	got, errno := s.lanes[0].read(image, off, length)
	s.lanes[0].must(errno, "read")
	if !bytes.Equal(got, make([]byte, length)) {
		s.t.Fatalf("%d+%d does not read as zeroes", off, length)
	}
}

// beyondEnd sends requests that leave the image: they fail, the good ones in
// the same batch don't, and the image does not grow.
func beyondEnd(s *suite) {
	image := s.fresh(64<<10, nil)
	ln, size, block := s.lanes[0], image.Size(), int64(image.Limits().BlockSize)
	want := ln.bytes(size)
	ln.must(ln.write(image, 0, 0, want), "fill")
	ranges := []struct{ off, length int64 }{
		{size, block}, {size - block, 2 * block}, {size + 1<<20, block}, {0, size + block},
		{-block, block}, {-block, 3 * block}, {math.MaxInt64 - block + 1, block}, {math.MaxInt64 / block * block, block},
	}
	for op := aio.OpRead; int(op) < aio.OpCount; op++ {
		if op == aio.OpFlush {
			continue
		}
		for _, r := range ranges {
			bad := &aio.Request{Op: op, Offset: r.off, Length: r.length}
			if op == aio.OpRead || op == aio.OpWrite {
				bad.Vec = ln.vec(r.length, 2)
			}
			before := &aio.Request{Op: aio.OpRead, Length: block, Vec: ln.vec(block, 1)}
			after := &aio.Request{Op: aio.OpRead, Length: size, Vec: ln.vec(size, 3)}
			ln.submit(image, before, bad, after)
			wanted := unix.EINVAL
			if r.off >= 0 && (op == aio.OpWrite || op == aio.OpWriteZeroes) {
				wanted = unix.ENOSPC
			}
			if bad.Errno != wanted {
				s.t.Errorf("%v %d+%d: %v, want %v", op, r.off, r.length, bad.Errno, wanted)
			}
			if before.Errno != 0 || after.Errno != 0 {
				s.t.Errorf("requests beside a bad %v: %v, %v", op, before.Errno, after.Errno)
			}
		}
	}
	if image.Size() != size || !bytes.Equal(ln.readAll(image), want) {
		s.t.Error("requests beyond the end changed the image")
	}
}

// readOnly opens an image for reading: it reads right and refuses the rest.
func readOnly(s *suite) {
	s.Create(s.t, s.path, s.aligned(300<<10))
	image, closeImage := s.open(false, nil)
	ln, block := s.lanes[0], int64(image.Limits().BlockSize)
	want := ln.bytes(image.Size())
	ln.must(ln.write(image, 0, 0, want), "fill")
	ln.must(ln.do(image, aio.OpFlush, 0, 0, 0), "flush")
	if image.ReadOnly() {
		s.t.Error("says that it is read-only")
	}
	closeImage()

	image, _ = s.open(true, nil)
	if !image.ReadOnly() {
		s.t.Error("does not say that it is read-only")
	}
	for _, op := range []aio.Op{aio.OpWrite, aio.OpDiscard, aio.OpWriteZeroes} {
		r := &aio.Request{Op: op, Offset: block, Length: block}
		if op == aio.OpWrite {
			r.Vec = ln.vec(block, 1)
		}
		ln.submit(image, r)
		if r.Errno != unix.EPERM {
			s.t.Errorf("%v: %v, want EPERM", op, r.Errno)
		}
	}
	ln.must(ln.do(image, aio.OpFlush, 0, 0, 0), "flush")
	ln.must(ln.do(image, aio.OpCache, 0, 0, image.Size()), "cache")
	if !bytes.Equal(ln.readAll(image), want) {
		s.t.Error("a read-only image does not read right")
	}
}

// random runs all operations on all loops at once, then opens the image again:
// what was flushed is there.
func random(s *suite) {
	s.Create(s.t, s.path, s.aligned(3<<20+777))
	image, closeImage := s.open(false, nil)
	limits := image.Limits()
	m := newModel(image.Size())
	for range 2 {
		s.workload(image, int64(limits.BlockSize), limits.MaxSegments, m)
		m.check(s.t, "after the workload", 0, s.lanes[0].readAll(image))
		ln := s.lanes[s.rng.IntN(len(s.lanes))]
		ln.must(ln.do(image, aio.OpFlush, 0, 0, 0), "flush")
		closeImage()
		image, closeImage = s.open(false, nil)
		if !m.check(s.t, "after opening it again", 0, s.lanes[0].readAll(image)) {
			return
		}
	}
}

// extents asks where the data is and believes it: extents cover the range, in
// order, joined, and what is said to be zero is.
func extents(s *suite) {
	image := s.fresh(8<<20, nil)
	mapper, ok := image.(formats.Mapper)
	if !ok {
		s.t.Fatalf("%T is no formats.Mapper", image)
	}
	limits, size := image.Limits(), image.Size()
	m := newModel(size)
	// Two looks may differ: a file system tells pages that were read, even of
	// zeroes, for data. Each is checked by itself.
	check := func(off, length int64, most int) []formats.Extent {
		s.t.Helper()
		list, err := mapper.Extents(nil, off, length, most)
		if err != nil {
			s.t.Fatal(err)
		}
		at := off
		for i, e := range list {
			if e.Start != at || e.Length <= 0 {
				s.t.Fatalf("extent %d of %d+%d starts at %d, want %d: %+v", i, off, length, e.Start, at, e)
			}
			if !e.Zero && !e.Data {
				s.t.Fatalf("neither zero nor data: %+v", e)
			}
			if i > 0 && joinable(list[i-1], e) {
				s.t.Fatalf("not joined: %+v, %+v", list[i-1], e)
			}
			at += e.Length
			if e.Zero {
				m.check(s.t, "zero extent", e.Start, make([]byte, e.Length))
				for from := e.Start; from < at; from += 1 << 20 {
					expectZero(s, image, from, min(at-from, 1<<20))
				}
			}
		}
		if most > 0 && len(list) > most {
			s.t.Fatalf("%d extents, at most %d were asked for", len(list), most)
		}
		if at > off+length || (most == 0 || len(list) < most) && at != off+length {
			s.t.Fatalf("extents of %d+%d end at %d", off, length, at)
		}
		return list
	}
	if list := check(0, size, 0); len(list) != 1 || !list[0].Zero || list[0].Data {
		s.t.Errorf("a new image is not one hole: %+v", list)
	}
	for range 3 {
		s.workload(image, int64(limits.BlockSize), limits.MaxSegments, m)
		s.lanes[0].must(s.lanes[0].do(image, aio.OpFlush, 0, 0, 0), "flush")
		check(0, size, 0)
		for range 20 {
			off := s.rng.Int64N(size)
			check(off, s.rng.Int64N(size-off), s.rng.IntN(4))
		}
		if list := check(0, size, 1); len(list) != 1 {
			s.t.Errorf("asked for one extent, got %d", len(list))
		}
	}
	check(0, 0, 0)
	check(size, 0, 0)
	kept := []formats.Extent{{Start: -1}}
	if list, err := mapper.Extents(kept, 0, size, 1); err != nil || len(list) != 2 || list[0] != kept[0] {
		s.t.Errorf("extents are not appended: %+v, %v", list, err)
	}
	if _, err := mapper.Extents(nil, 0, size+1, 0); err == nil {
		s.t.Error("extents beyond the end are no error")
	}
}

// joinable reports whether b goes on where a ends, in every respect.
func joinable(a, b formats.Extent) bool {
	if a.Offset >= 0 && b.Offset >= 0 {
		b.Offset -= a.Length
	}
	b.Start, b.Length = a.Start, a.Length
	return a == b
}
