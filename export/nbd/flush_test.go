package nbd

import (
	"bytes"
	"sync"
	"testing"

	"platter/aio"
	"platter/export/nbd/nbdtest"
)

// slowFlush is a file whose flushes take until they are let go.
type slowFlush struct {
	*aio.File

	mu      sync.Mutex
	holding bool
	held    []func()
}

func (s *slowFlush) Submit(l *aio.Loop, batch []*aio.Request) {
	for _, r := range batch {
		s.mu.Lock()
		hold := s.holding && r.Op == aio.OpFlush
		if hold {
			s.held = append(s.held, func() { l.Post(func() { s.File.Submit(l, []*aio.Request{r}) }) })
		}
		s.mu.Unlock()
		if !hold {
			s.File.Submit(l, []*aio.Request{r})
		}
	}
}

// hold keeps flushes from now on, and letGo those that it has and none any more.
func (s *slowFlush) hold() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.holding = true
}

func (s *slowFlush) letGo() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.holding = false
	for _, f := range s.held {
		f()
	}
	s.held = nil
}

func (s *slowFlush) waiting() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.held)
}

// TestFlushStallsNobody: while the storage takes its time over a flush, all else on
// the same loop, on other connections and behind the flush on its own, is carried
// out and answered: reads, writes in place, to new clusters (more than an image
// has in reserve) and to those of backing files, zeroes and discards.
func TestFlushStallsNobody(t *testing.T) {
	const size, cluster = 32 * mib, 64 * kib
	eachDisk(t, size, func(t *testing.T, d *disk) {
		var slow *slowFlush
		r := newRig(t, d.open(func(f aio.Storage) aio.Storage {
			slow = &slowFlush{File: f.(*aio.File)}
			return slow
		}), rigOptions{})
		defer func() { slow.letGo() }()
		flusher, other := r.dial(), r.dial()
		write := func(c *nbdtest.Client, off int, p []byte) {
			t.Helper()
			must(t, c.Write(int64(off), p))
			copy(d.data[off:], p)
		}
		write(flusher, 0, pattern(4096, 1)) // so that there is something to flush
		slow.hold()
		must(t, flusher.Send(nbdtest.CmdFlush, 0, 1<<32, 0, 0, nil))
		eventually(t, "a flush of the file", func() bool { return slow.waiting() > 0 })
		for i, c := range []*nbdtest.Client{other, flusher} {
			got := make([]byte, mib)
			for off := i * 4 * mib; off < size; off += 8 * mib {
				must(t, c.Read(int64(off), got))
				if !bytes.Equal(got, d.data[off:off+mib]) {
					t.Errorf("%d holds something else", off)
				}
			}
			write(c, 0, pattern(4096, 2)) // in place
			for off := cluster * i; off < size*3/4; off += 16 * cluster {
				write(c, off+512, pattern(1000, uint64(off)))
			}
			for off := size*3/4 + cluster*i; off < size; off += 2 * cluster { // nothing is there yet
				write(c, off+512, pattern(1000, uint64(off)))
			}
			for off := size*3/4 + i*cluster; off < size; off += 8 * cluster {
				must(t, c.WriteZeroes(int64(off), cluster))
				clear(d.data[off : off+cluster])
			}
			must(t, c.Trim(int64(size/2+i*mib), mib))
			must(t, c.WriteZeroes(int64(size/2+i*mib), mib))
			clear(d.data[size/2+i*mib:][:mib])
		}
		if slow.waiting() == 0 {
			t.Fatal("the flush is over")
		}
		slow.letGo()
		if cookie, errno, _, err := flusher.Recv(); err != nil || errno != 0 || cookie != 1<<32 {
			t.Errorf("the flush: %d, %v, %v", cookie, errno, err)
		}
		must(t, flusher.Disc())
		must(t, other.Disc())
		d.finish(r, nil)
	})
}
