package formattest

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"platter/aio"
	"platter/formats"
)

// patience is how long a batch may take before the test fails: far longer than
// any takes.
const patience = 60 * time.Second

// lane is a test's way to one loop: a place for buffers, and batches done one
// after the other.
type lane struct {
	t    testing.TB
	loop *aio.Loop
	rng  *rand.Rand
	mem  *aio.Memory
	used int
	over chan struct{}
}

// laneMemory is enough for the largest transfer with its odd gaps.
const laneMemory = 64 << 20

func newLane(t testing.TB, l *aio.Loop, rng *rand.Rand) *lane {
	t.Helper()
	mem, err := aio.NewMemory(laneMemory)
	if err != nil {
		t.Fatal(err)
	}
	ln := &lane{t: t, loop: l, rng: rng, mem: mem, over: make(chan struct{}, 1)}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Errorf("close loop: %v", err)
		}
		if err := mem.Close(); err != nil {
			t.Error(err)
		}
	})
	return ln
}

// vec takes n bytes of the lane's memory in so many segments, of odd lengths at
// odd places.
func (ln *lane) vec(n int64, segments int) []aio.Iovec {
	segments = int(min(int64(segments), max(n, 1)))
	var vec []aio.Iovec
	for left := int(n); left > 0; {
		take := left
		if rest := segments - len(vec); rest > 1 {
			take = 1 + ln.rng.IntN(max(1, 2*left/rest-1))
			take = min(take, left-rest+1)
		}
		ln.used += ln.rng.IntN(64)
		vec = append(vec, ln.mem.Iovec(ln.used, take))
		ln.used += take
		left -= take
	}
	return vec
}

// alignedVec takes n bytes in one piece that starts a page.
func (ln *lane) alignedVec(n int64) []aio.Iovec {
	ln.used = (ln.used + 4095) &^ 4095
	vec := []aio.Iovec{ln.mem.Iovec(ln.used, int(n))}
	ln.used += int(n)
	return vec
}

// submit hands the requests to the image as one batch and waits for them all.
// Afterwards the lane's memory is free again, but still holds what was read.
func (ln *lane) submit(image aio.Storage, batch ...*aio.Request) {
	ln.t.Helper()
	pending := len(batch)
	for _, r := range batch {
		r.Errno = unix.ENOANO // nobody's errno: Complete has to set one
		r.Done = func(r *aio.Request) {
			if r.Errno == unix.ENOANO {
				panic("formattest: a request was completed without an outcome")
			}
			r.Done = doneTwice
			if pending--; pending == 0 {
				ln.over <- struct{}{}
			}
		}
	}
	ln.loop.Post(func() { image.Submit(ln.loop, batch) })
	select {
	case <-ln.over:
		ln.used = 0
	case <-time.After(patience):
		// The loop still owns requests and memory, so nothing can be cleaned up.
		panic(fmt.Sprintf("formattest: a batch of %d requests is not over after %v; the first is %v %d+%d",
			len(batch), patience, batch[0].Op, batch[0].Offset, batch[0].Length))
	}
}

func doneTwice(r *aio.Request) {
	panic(fmt.Sprintf("formattest: %v %d+%d was completed twice", r.Op, r.Offset, r.Length))
}

// do is one request that has no bytes of its own.
func (ln *lane) do(image aio.Storage, op aio.Op, flags aio.Flags, off, length int64) unix.Errno {
	ln.t.Helper()
	r := &aio.Request{Op: op, Flags: flags, Offset: off, Length: length}
	ln.submit(image, r)
	return r.Errno
}

// write is one write.
func (ln *lane) write(image aio.Storage, flags aio.Flags, off int64, data []byte) unix.Errno {
	ln.t.Helper()
	vec := ln.vec(int64(len(data)), 1)
	aio.CopyIn(vec, data)
	r := &aio.Request{Op: aio.OpWrite, Flags: flags, Offset: off, Length: int64(len(data)), Vec: vec}
	ln.submit(image, r)
	return r.Errno
}

// read is one read.
func (ln *lane) read(image aio.Storage, off, length int64) ([]byte, unix.Errno) {
	ln.t.Helper()
	vec := ln.vec(length, 1)
	r := &aio.Request{Op: aio.OpRead, Offset: off, Length: length, Vec: vec}
	ln.submit(image, r)
	data := make([]byte, length)
	aio.CopyOut(data, vec)
	return data, r.Errno
}

// must fails the test when an operation failed.
func (ln *lane) must(errno unix.Errno, what string) {
	ln.t.Helper()
	if errno != 0 {
		ln.t.Fatalf("%s: %v", what, errno)
	}
}

// readAll reads the whole image in pieces.
func (ln *lane) readAll(image formats.Image) []byte {
	ln.t.Helper()
	all := make([]byte, 0, image.Size())
	for int64(len(all)) < image.Size() {
		off := int64(len(all))
		data, errno := ln.read(image, off, min(image.Size()-off, 1<<20))
		ln.must(errno, fmt.Sprintf("read at %d", off))
		all = append(all, data...)
	}
	return all
}

// bytes makes n random bytes, all of them odd, so that they differ from a hole.
func (ln *lane) bytes(n int64) []byte {
	b := make([]byte, (n+7)&^7)
	for i := 0; i < len(b); i += 8 {
		binary.LittleEndian.PutUint64(b[i:], ln.rng.Uint64()|0x0101010101010101)
	}
	return b[:n]
}
