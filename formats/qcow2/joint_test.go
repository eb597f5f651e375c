package qcow2_test

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"platter/aio"
	"platter/formats"
	"platter/formats/formattest"
	"platter/formats/qcow2"
	"platter/formats/raw"
)

func newRaw(s aio.Storage) (formats.Image, error) {
	return raw.New(s, raw.Options{ReadOnly: true})
}

const kib = 1 << 10

// TestWritesAreJoined counts at the file what batches of small writes cost: QEMU
// has a write of the file for each, and over a backing file writes twice.
func TestWritesAreJoined(t *testing.T) {
	const total = 12 << 20
	for _, c := range []struct {
		name     string
		options  string
		backing  bool
		shuffled bool
		depth    int
		step     int64   // from the start of one write of 4 KiB to that of the next
		ratio    float64 // of bytes written to those of the guest, at most
		each     int64   // guest writes to a write of the file, at least
	}{
		{"sequential, depth 16", "compat=1.1", false, false, 16, 4 * kib, 1.02, 16},
		{"sequential, depth 64", "compat=1.1", false, false, 64, 4 * kib, 1.02, 16},
		{"shuffled, depth 64", "compat=1.1", false, true, 64, 4 * kib, 1.02, 16},
		{"version 2", "compat=0.10", false, false, 16, 4 * kib, 1.02, 16},
		{"extended L2", "extended_l2=on", false, true, 16, 4 * kib, 1.02, 16},
		{"over a backing file, depth 16", "compat=1.1", true, false, 16, 4 * kib, 1.05, 16},
		{"over a backing file, shuffled, depth 64", "compat=1.1", true, true, 64, 4 * kib, 1.05, 16},
		{"extended L2 over a backing file", "extended_l2=on", true, true, 64, 4 * kib, 1.05, 16},
		{"every other page", "compat=1.1", false, false, 64, 8 * kib, 2.02, 8},
		{"every other page, shuffled", "compat=1.1", false, true, 64, 8 * kib, 2.02, 8},
		{"every other page over a backing file", "compat=1.1", true, false, 64, 8 * kib, 2.05, 8},
		{"every other page, extended L2", "extended_l2=on", false, true, 64, 8 * kib, 2.02, 8},
	} {
		t.Run(c.name, func(t *testing.T) {
			rng := seeded(t)
			x := openTapped(t, c.options, c.backing, qcow2.Options{})
			x.prepare()
			before := x.file.bytes
			requests := int64(0)
			for off := int64(0); off < total; {
				var batch []*aio.Request
				for range c.depth {
					if off >= total {
						break
					}
					batch = append(batch, x.request(aio.OpWrite, off, 4*kib, byte(rng.Uint32())))
					off += c.step
				}
				if c.shuffled {
					rng.Shuffle(len(batch), func(i, j int) { batch[i], batch[j] = batch[j], batch[i] })
				}
				requests += int64(len(batch))
				x.do(0, batch...)
			}
			x.do(0, &aio.Request{Op: aio.OpFlush})
			writes, _ := x.file.took()
			ratio := float64(x.file.bytes-before) / float64(requests*4*kib)
			t.Logf("%d guest writes, %d of the file; %.3f bytes written for each of the guest's", requests, len(writes), ratio)
			if int64(len(writes))*c.each > requests {
				t.Errorf("%d guest writes took %d of the file, want at least %d in each", requests, len(writes), c.each)
			}
			if ratio > c.ratio {
				t.Errorf("%.3f bytes written for each of the guest's, want at most %g", ratio, c.ratio)
			}
			if c.backing && c.step == 4*kib {
				if _, reads := x.below.took(); len(reads) > 0 {
					t.Errorf("%d reads of the backing file under clusters that are covered, the first %v", len(reads), reads[0])
				}
			}
			x.finish()
		})
	}
}

// TestMergeGap: gaps up to its size are filled, longer ones are not.
func TestMergeGap(t *testing.T) {
	for _, c := range []struct {
		gap, between int64
		writes       int
	}{
		{0, 4 * kib, 1}, {0, 20 * kib, 2}, {4 * kib, 4 * kib, 1}, {4 * kib, 8 * kib, 2}, {-1, 4 * kib, 2}, {-1, 0, 1}, {64 * kib, 40 * kib, 1},
	} {
		t.Run(fmt.Sprintf("%d of %d", c.between, c.gap), func(t *testing.T) {
			x := openTapped(t, "compat=1.1", false, qcow2.Options{MergeGap: c.gap})
			x.prepare()
			x.do(0, x.request(aio.OpWrite, 8*kib+c.between, 4*kib, 2), x.request(aio.OpWrite, 4*kib, 4*kib, 3))
			writes, _ := x.file.took()
			if len(writes) != c.writes {
				t.Errorf("%d writes: %v", len(writes), writes)
			}
			s := x.im.Stats()
			want := int64(0)
			if c.writes == 1 {
				want = c.between
			}
			if s.GapBytes != want || s.Joined != int64(2-c.writes) {
				t.Errorf("stats: %+v", s)
			}
			x.finish()
		})
	}
}

// TestGapAcrossClusters: between the last bytes of a new cluster and the first of
// the next one in the file there is a gap like any other, and clusters that are
// not neighbours in the file are not joined.
func TestGapAcrossClusters(t *testing.T) {
	x := openTapped(t, "compat=1.1", false, qcow2.Options{})
	x.prepare()
	x.do(0, x.request(aio.OpWrite, 56*kib, 4*kib, 2), x.request(aio.OpWrite, 68*kib, 4*kib, 3))
	if writes, _ := x.file.took(); len(writes) != 1 {
		t.Errorf("writes: %v", writes)
	}
	// The guest's second cluster comes first in the file.
	x.do(0, x.request(aio.OpWrite, 512*kib, 4*kib, 2), x.request(aio.OpWrite, 508*kib, 4*kib, 3))
	if writes, _ := x.file.took(); len(writes) != 2 {
		t.Errorf("writes: %v", writes)
	}
	x.finish()
}

// TestNoGapWhereOthersWrite: zeroes must not overwrite what another loop is
// writing to the same new cluster.
func TestNoGapWhereOthersWrite(t *testing.T) {
	x := openTapped(t, "compat=1.1", false, qcow2.Options{})
	x.prepare()
	x.file.hold = func(r *aio.Request) bool { return r.Op == aio.OpWrite && r.Length == 4*kib }
	first := x.start(1, x.request(aio.OpWrite, 8*kib, 4*kib, 2))
	x.file.wait(t, 1)
	x.file.hold = func(r *aio.Request) bool { return false }
	x.do(0, x.request(aio.OpWrite, 4*kib, 4*kib, 3), x.request(aio.OpWrite, 12*kib, 4*kib, 4))
	if writes, _ := x.file.took(); len(writes) != 3 {
		t.Errorf("writes: %v", writes)
	}
	x.file.release()
	first()
	x.finish()
}

// TestOthersWaitForAGap: what another loop writes where zeroes are on their way
// must not be overwritten by them.
func TestOthersWaitForAGap(t *testing.T) {
	x := openTapped(t, "compat=1.1", false, qcow2.Options{})
	x.prepare()
	x.file.hold = func(r *aio.Request) bool { return r.Op == aio.OpWrite && r.Length == 12*kib }
	filled := x.start(0, x.request(aio.OpWrite, 4*kib, 4*kib, 3), x.request(aio.OpWrite, 12*kib, 4*kib, 4))
	x.file.wait(t, 1)
	var later []func() []unix.Errno
	for i, loop := range []int{1, 0, 1} { // in the gap, and elsewhere in the cluster
		later = append(later, x.start(loop, x.request(aio.OpWrite, int64(8+i*16)*kib, 4*kib, byte(5+i))))
	}
	if writes, _ := x.file.took(); len(writes) != 1 {
		t.Errorf("writes while the zeroes are on their way: %v", writes)
	}
	x.file.release()
	filled()
	for _, wait := range later {
		if errnos := wait(); errnos[0] != 0 {
			t.Error(errnos)
		}
	}
	x.finish()
}

// TestJointWriteFails: what was joined is written one by one, and only what
// fails then has failed.
func TestJointWriteFails(t *testing.T) {
	for _, options := range []string{"compat=1.1", "extended_l2=on"} {
		for _, backing := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, backing file %v", options, backing), func(t *testing.T) {
				x := openTapped(t, options, backing, qcow2.Options{})
				x.prepare()
				x.file.fail = func(r *aio.Request) unix.Errno {
					if r.Op == aio.OpWrite && r.Length > 4*kib {
						return unix.ENOSPC
					}
					return 0
				}
				batch := []*aio.Request{x.request(aio.OpWrite, 16*kib, 4*kib, 3), x.request(aio.OpWrite, 8*kib, 4*kib, 4), x.request(aio.OpWrite, 0, 4*kib, 5)}
				for i, errno := range x.start(0, batch...)() {
					if errno != 0 {
						t.Errorf("write %d: %v", i, errno)
					}
				}
				// One of them can't be written at all. A goroutine is who tries, over a
				// backing file, so that the file itself must say no.
				model := slices.Clone(x.model[1<<20 : 1<<20+4*kib])
				x.file.fail = func(r *aio.Request) unix.Errno {
					if r.Op == aio.OpWrite && (r.Length > 4*kib || r.Vec[0].Base == x.memory.Iovec(x.used-4*kib, 1).Base) {
						return unix.ENOSPC
					}
					return 0
				}
				batch = []*aio.Request{x.request(aio.OpWrite, 1<<20+16*kib, 4*kib, 3), x.request(aio.OpWrite, 1<<20, 4*kib, 5)}
				errnos := x.start(0, batch...)()
				want := unix.ENOSPC
				if backing || options != "compat=1.1" {
					want = 0 // the goroutine's write is no loop's, and succeeds
				} else {
					copy(x.model[1<<20:], model)
				}
				if errnos[0] != 0 || errnos[1] != want {
					t.Errorf("%v, want none and %v", errnos, want)
				}
				x.file.fail = nil
				x.finish()
			})
		}
	}
}

// TestWritesJoinACopy: while the backing file is being read for a new cluster,
// further writes of the loop become part of it, and others wait.
func TestWritesJoinACopy(t *testing.T) {
	x := openTapped(t, "compat=1.1", true, qcow2.Options{})
	x.prepare()
	x.below.hold = func(r *aio.Request) bool { return r.Op == aio.OpRead }
	waits := []func() []unix.Errno{x.start(0, x.request(aio.OpWrite, 0, 40*kib, 3))}
	x.below.wait(t, 1)
	waits = append(waits,
		x.start(0, x.request(aio.OpWrite, 40*kib, 24*kib, 4)), // joins
		x.start(0, x.request(aio.OpWrite, 0, 4*kib, 5)),       // overlaps: waits
		x.start(1, x.request(aio.OpWrite, 60*kib, 4*kib, 6)))  // another loop's: waits
	if writes, _ := x.file.took(); len(writes) != 0 {
		t.Errorf("writes while the backing file is read: %v", writes)
	}
	if _, reads := x.below.took(); !slices.Equal(reads, []span{{40 * kib, 24 * kib}}) {
		t.Errorf("reads of the backing file: %v", reads)
	}
	x.below.release()
	for _, wait := range waits {
		if errnos := wait(); errnos[0] != 0 {
			t.Error(errnos)
		}
	}
	writes, _ := x.file.took()
	if len(writes) != 3 || writes[0].length != 64*kib || writes[1].length != 4*kib || writes[2].length != 4*kib {
		t.Errorf("writes: %v", writes)
	}
	x.finish()
}

// TestZeroedDuringACopy: a cluster that is made to read as zeroes while the
// backing file is read for it doesn't come to show the backing file again.
func TestZeroedDuringACopy(t *testing.T) {
	for _, options := range []string{"compat=1.1", "extended_l2=on"} {
		t.Run(options, func(t *testing.T) {
			x := openTapped(t, options, true, qcow2.Options{})
			x.prepare()
			x.below.hold = func(r *aio.Request) bool { return r.Op == aio.OpRead }
			write := x.request(aio.OpWrite, 64*kib+512, 512, 3)
			wait := x.start(0, write)
			x.below.wait(t, 1)
			x.do(1, x.request(aio.OpWriteZeroes, 0, 1<<20, 0))
			x.below.release()
			if errnos := wait(); errnos[0] != 0 {
				t.Error(errnos)
			}
			copy(x.model[write.Offset:], slices.Repeat([]byte{3}, 512))
			x.finish()
		})
	}
}

// TestCopyFails: the backing file can't be read, or there is no room.
func TestCopyFails(t *testing.T) {
	x := openTapped(t, "compat=1.1", true, qcow2.Options{})
	x.prepare()
	broken := func(r *aio.Request) unix.Errno { return unix.EIO }
	x.below.fail = broken
	before := slices.Clone(x.model)
	if errnos := x.start(0, x.request(aio.OpWrite, 0, 4*kib, 3))(); errnos[0] != unix.EIO {
		t.Errorf("over a backing file that can't be read: %v", errnos)
	}
	x.below.fail, x.file.fail = nil, func(r *aio.Request) unix.Errno {
		if r.Op == aio.OpWrite {
			return unix.ENOSPC
		}
		return 0
	}
	if errnos := x.start(0, x.request(aio.OpWrite, 0, 4*kib, 3))(); errnos[0] != unix.ENOSPC {
		t.Errorf("without space: %v", errnos)
	}
	x.file.fail, x.model = nil, before
	x.do(0, x.request(aio.OpWrite, 0, 4*kib, 3))
	x.finish()
}

// TestBatchesOfEverything: any batches, merged before or not, from two loops at a
// time, that share clusters but no bytes.
func TestBatchesOfEverything(t *testing.T) {
	for _, options := range []string{"compat=1.1", "compat=0.10", "cluster_size=4K", "compression_type=zstd", "extended_l2=on,cluster_size=32K", "extended_l2=on"} {
		for _, on := range []string{"nothing", "a backing file", "compressed clusters"} {
			t.Run(options+", "+on, func(t *testing.T) {
				rng := seeded(t)
				x := openTapped(t, options, on == "a backing file", qcow2.Options{})
				if on == "compressed clusters" {
					x.compress()
				}
				if rng.IntN(2) == 0 {
					x.image = formattest.Merged(x.im)
				}
				for range 60 {
					x.used = 0
					var waits []func() []unix.Errno
					taken := map[int64]bool{}
					for loop := range x.loops {
						waits = append(waits, x.start(loop, randomBatch(x, rng, taken)...))
					}
					for _, wait := range waits {
						for _, errno := range wait() {
							if errno != 0 {
								t.Fatal(errno)
							}
						}
					}
				}
				x.finish()
			})
		}
	}
}

// randomBatch makes requests in places of 2 KiB that aren't taken, close
// together.
func randomBatch(x *tapped, rng *rand.Rand, taken map[int64]bool) []*aio.Request {
	const place = 2 * kib
	base := rng.Int64N(tappedSize/place - 256)
	var batch []*aio.Request
	for range 1 + rng.IntN(48) {
		at, n := base+rng.Int64N(128), 1+rng.Int64N(8)
		for i := range n {
			if taken[at+i] {
				n = i
				break
			}
			taken[at+i] = true
		}
		if n == 0 {
			continue
		}
		op := aio.OpWrite
		if rng.IntN(6) == 0 {
			op = aio.OpWriteZeroes
		}
		off, length := at*place, n*place
		if rng.IntN(2) == 0 { // within sectors
			off, length = off+512*rng.Int64N(3), length-1536
		}
		batch = append(batch, x.request(op, off, length, byte(rng.Uint32())))
	}
	return batch
}

// TestCopyStaysOpen: a cluster that a joined request leaves half written waits for
// the batch that comes next, and one that a single request leaves so doesn't.
func TestCopyStaysOpen(t *testing.T) {
	for _, flags := range []aio.Flags{aio.FlagJoined, 0} {
		t.Run(fmt.Sprint(flags), func(t *testing.T) {
			x := openTapped(t, "compat=1.1", true, qcow2.Options{})
			x.prepare()
			first := x.request(aio.OpWrite, 0, 96*kib, 2)
			first.Flags = flags
			second := x.request(aio.OpWrite, 96*kib, 32*kib, 3)
			var over sync.WaitGroup
			for _, r := range []*aio.Request{first, second} {
				over.Add(1)
				r.Done = func(r *aio.Request) {
					if r.Errno != 0 {
						t.Error(r.Errno)
					}
					over.Done()
				}
			}
			l := x.loops[0]
			l.Post(func() {
				x.im.Submit(l, []*aio.Request{first})
				l.Post(func() { x.im.Submit(l, []*aio.Request{second}) }) // in the next turn
			})
			over.Wait()
			_, reads := x.below.took()
			if waited := len(reads) == 0; waited != (flags == aio.FlagJoined) {
				t.Errorf("reads of the backing file: %v", reads)
			}
			x.finish()
		})
	}
}

// TestCopyEndsInABusyLoop: it doesn't stay open for as long as others keep the
// loop busy.
func TestCopyEndsInABusyLoop(t *testing.T) {
	x := openTapped(t, "compat=1.1", true, qcow2.Options{})
	x.prepare()
	l := x.loops[0]
	half := x.request(aio.OpWrite, 0, 96*kib, 2)
	half.Flags = aio.FlagJoined
	other := x.request(aio.OpRead, tappedSize-1<<20, 4*kib, 0) // of a cluster that is mapped
	const most = 1000
	turns, over := 0, false
	stopped := make(chan struct{})
	half.Done = func(*aio.Request) { over = true }
	var again func()
	other.Done = func(*aio.Request) {
		if turns++; over || turns == most {
			close(stopped)
			return
		}
		l.Post(again)
	}
	again = func() { x.im.Submit(l, []*aio.Request{other}) }
	l.Post(func() { x.im.Submit(l, []*aio.Request{half, other}) })
	<-stopped
	until(t, "the write ends when the loop has nothing else to do", func() bool {
		ended := make(chan bool)
		l.Post(func() { ended <- over })
		return <-ended
	})
	if turns == most {
		t.Errorf("a cluster stayed open for %d turns of a busy loop", turns)
	}
	if half.Errno != 0 || other.Errno != 0 {
		t.Error(half.Errno, other.Errno)
	}
	x.finish()
}
