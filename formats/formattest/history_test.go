package formattest

import (
	"slices"
	"strings"
	"testing"

	"platter/aio"
)

// guestWrite is a write of one version to whole sectors.
func guestWrite(sector, sectors int64, version uint64, submitted, completed int) Record {
	return Record{Op: aio.OpWrite, Offset: sector * sectorSize, Length: sectors * sectorSize,
		Data: stamped(sector*sectorSize, sectors*sectorSize, version), Submitted: submitted, Completed: completed}
}

// version is what a write leaves in a sector.
func version(sector int64, version uint64) []byte {
	return stamped(sector*sectorSize, sectorSize, version)
}

// TestPromises shows, rule by rule, what sector 3 of an image of 8 may hold after
// a power cut.
func TestPromises(t *testing.T) {
	const at = 3
	one, two, three := guestWrite(2, 3, 1, 1, 2), guestWrite(3, 1, 2, 3, 4), guestWrite(0, 8, 3, 5, 6)
	zero, gone := zeroes(0, 8*512, 3, 4), discard(0, 8*512, 3, 4)
	for _, c := range []struct {
		name    string
		records []Record
		moment  int
		want    []uint64 // versions; 0 is zeroes
	}{
		{"Nothing", nil, 5, []uint64{0}},
		{"Elsewhere", []Record{fua(guestWrite(4, 1, 1, 1, 2))}, 5, []uint64{0}},
		{"NotYetSubmitted", []Record{one}, 0, []uint64{0}},
		{"InFlight", []Record{one}, 1, []uint64{0, 1}},
		{"Completed", []Record{one}, 2, []uint64{0, 1}},
		{"FlushInFlight", []Record{one, flush(3, 6)}, 5, []uint64{0, 1}},
		{"Flushed", []Record{one, flush(3, 6)}, 6, []uint64{1}},
		{"FlushedTooEarly", []Record{guestWrite(3, 1, 1, 1, 4), flush(3, 6)}, 6, []uint64{0, 1}},
		{"FlushFailed", []Record{one, failed(flush(3, 6))}, 6, []uint64{0, 1}},
		{"FUA", []Record{fua(one)}, 2, []uint64{1}},
		{"FUAInFlight", []Record{fua(one)}, 1, []uint64{0, 1}},
		{"FUAOfAnother", []Record{one, fua(guestWrite(5, 1, 2, 3, 4))}, 4, []uint64{0, 1}},
		{"WrittenSinceTheFlush", []Record{one, flush(3, 4), guestWrite(3, 1, 2, 5, 6), guestWrite(0, 8, 3, 7, 0)}, 8, []uint64{1, 2, 3}},
		{"OlderThanDurable", []Record{one, two, flush(5, 6)}, 6, []uint64{2}},
		{"AnyNewer", []Record{fua(one), two, three}, 6, []uint64{1, 2, 3}},
		{"WithDurableAtATime", []Record{guestWrite(3, 1, 1, 1, 9), fua(guestWrite(3, 1, 2, 3, 4))}, 9, []uint64{1, 2}},
		{"DurableWhileInFlight", []Record{guestWrite(3, 1, 1, 1, 0), fua(guestWrite(3, 1, 2, 3, 4))}, 9, []uint64{1, 2}},
		{"Failed", []Record{fua(one), failed(two)}, 6, []uint64{1, 2}},
		{"FailedIsNeverDurable", []Record{fua(one), failed(fua(two)), flush(5, 6)}, 6, []uint64{1, 2}},
		{"Zeroed", []Record{fua(one), zero}, 4, []uint64{0, 1}},
		{"NotYetZeroed", []Record{fua(one), zero}, 2, []uint64{1}},
		{"ZeroedDurably", []Record{fua(one), fua(zero)}, 4, []uint64{0}},
		{"Discarded", []Record{fua(one), gone}, 4, []uint64{0, 1}},
		{"DiscardedDurably", []Record{fua(one), fua(gone)}, 4, []uint64{0, 1}},
		{"DiscardedAndWritten", []Record{fua(one), fua(gone), fua(three)}, 6, []uint64{3}},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := newHistory(&Recording{Records: c.records}, 8*sectorSize)
			for v := range uint64(4) {
				content := make([]byte, sectorSize)
				if v > 0 {
					content = version(at, v)
				}
				err := h.afterCut(c.moment, at*sectorSize, content)
				if allowed := slices.Contains(c.want, v); allowed != (err == nil) {
					t.Errorf("version %d: %v, want only %v", v, err, c.want)
				}
			}
		})
	}
}

// TestPromisesBroken shows what is said of sectors that hold what they must not.
func TestPromisesBroken(t *testing.T) {
	h := newHistory(&Recording{Records: []Record{
		guestWrite(0, 8, 1, 1, 2), guestWrite(0, 8, 2, 3, 4), flush(5, 6), guestWrite(4, 2, 3, 8, 0),
	}}, 8*sectorSize)
	half := append(version(3, 1)[:256], version(3, 2)[256:]...)
	flipped := version(3, 2)
	flipped[511] ^= 1
	for _, c := range []struct {
		name    string
		content []byte
		want    string
	}{
		{"Another", version(4, 2), "sector 3 (byte 1536) holds bytes of sector 4, of write 0+4096 at 3..4"},
		{"Older", version(3, 1), "holds what was overwritten for good, of write 0+4096 at 1..2"},
		{"Zeroes", make([]byte, sectorSize), "is zero, but was overwritten for good"},
		{"Unknown", version(3, 77), "holds what nobody wrote: version 0x4d of sector 3"},
		{"Half", half, "holds what nobody wrote: 70 6c 61"},
		{"Flipped", flipped, "holds what nobody wrote: 70 6c 61"},
		{"Elsewhere", version(3, 3), "holds what was never written there, by write 2048+1024 at 8..in flight"},
	} {
		t.Run(c.name, func(t *testing.T) {
			err := h.afterCut(9, 3*sectorSize, c.content)
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v, want %q", err, c.want)
			}
		})
	}
	t.Run("HalfOfWhatIsInFlight", func(t *testing.T) {
		err := h.afterCut(9, 4*sectorSize, append(version(4, 2)[:256], version(4, 3)[256:]...))
		if err == nil || !strings.Contains(err.Error(), "holds what nobody wrote") {
			t.Error(err)
		}
	})
	t.Run("Future", func(t *testing.T) {
		err := h.afterCut(7, 4*sectorSize, version(4, 3))
		if err == nil || !strings.Contains(err.Error(), "yet to be written") {
			t.Error(err)
		}
	})
	t.Run("History", func(t *testing.T) {
		err := h.afterCut(9, 4*sectorSize, slices.Concat(version(4, 1), version(5, 3), version(6, 1)))
		want := `after a cut at moment 9: sector 4 (byte 2048) holds what was overwritten for good, of write 0+4096 at 1..2; it was changed by
  write 0+4096 at 1..2, durable from 6
  write 0+4096 at 3..4, durable from 6
  write 2048+1024 at 8..in flight, never durable
(and 1 more sectors are wrong)`
		if err == nil || err.Error() != want {
			t.Errorf("%v, want\n%s", err, want)
		}
	})
}

// TestReads shows what a guest may read.
func TestReads(t *testing.T) {
	read := func(submitted, completed int, data []byte) Record {
		return Record{Op: aio.OpRead, Offset: 3 * sectorSize, Length: sectorSize, Data: data, Submitted: submitted, Completed: completed}
	}
	zero := make([]byte, sectorSize)
	half := append(version(3, 1)[:256], version(3, 2)[256:]...)
	write := func(v uint64, submitted, completed int) Record { return guestWrite(3, 1, v, submitted, completed) }
	for _, c := range []struct {
		name    string
		records []Record
		fine    bool
	}{
		{"New", []Record{read(1, 2, zero)}, true},
		{"Written", []Record{write(1, 1, 2), read(3, 4, version(3, 1))}, true},
		{"Lost", []Record{write(1, 1, 2), read(3, 4, zero)}, false},
		{"Replaced", []Record{write(1, 1, 2), write(2, 3, 4), read(5, 6, version(3, 1))}, false},
		{"BeforeAWriteIsOver", []Record{write(1, 1, 3), read(2, 4, zero)}, true},
		{"AfterAWriteHasBegun", []Record{write(1, 1, 3), read(2, 4, version(3, 1))}, true},
		{"DuringAWrite", []Record{read(1, 3, version(3, 1)), write(1, 2, 4)}, true},
		{"BeforeAWrite", []Record{read(1, 2, version(3, 1)), write(1, 3, 4)}, false},
		{"HalfOfAWrite", []Record{write(1, 1, 2), write(2, 3, 5), read(4, 6, half)}, true},
		{"HalfOfAWriteThatIsOver", []Record{write(1, 1, 2), write(2, 3, 4), read(5, 6, half)}, false},
		{"FailedWrite", []Record{write(1, 1, 2), failed(write(2, 3, 4)), read(5, 6, version(3, 1))}, true},
		{"FailedRead", []Record{write(1, 1, 2), failed(read(3, 4, nil))}, true},
		{"Discarded", []Record{write(1, 1, 2), discard(0, 4096, 3, 4), read(5, 6, version(3, 1)), read(7, 8, zero)}, true},
		{"Zeroed", []Record{write(1, 1, 2), zeroes(0, 4096, 3, 4), read(5, 6, version(3, 1))}, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			err := newHistory(&Recording{Records: c.records}, 8*sectorSize).reads()
			if (err == nil) != c.fine {
				t.Errorf("%v, want fine: %v", err, c.fine)
			}
		})
	}
}

func TestStamps(t *testing.T) {
	sector := version(5, 9)
	if s, ok := stampOf(sector); !ok || s != (stamp{5, 9}) {
		t.Errorf("%+v, %v", s, ok)
	}
	for i := range sector {
		sector[i] ^= 0x80
		if _, ok := stampOf(sector); ok {
			t.Fatalf("byte %d does not matter", i)
		}
		sector[i] ^= 0x80
	}
}
