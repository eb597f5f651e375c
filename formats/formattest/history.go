package formattest

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"

	"platter/aio"
)

// A stamp fills a sector that the guest writes, and says which sector it is and
// which write: so a sector that holds another's bytes, or an older version, is
// recognised, and half a sector too. It is repeated to the end of the sector.
type stamp struct {
	sector  int64
	version uint64 // of a write; each has its own
}

const stampSize = 32

var stampMagic = [8]byte{'p', 'l', 'a', 't', 't', 'e', 'r', '!'}

func (s stamp) fill(sector []byte) {
	copy(sector, stampMagic[:])
	binary.BigEndian.PutUint64(sector[8:], uint64(s.sector))
	binary.BigEndian.PutUint64(sector[16:], s.version)
	binary.BigEndian.PutUint64(sector[24:], ^s.version)
	for n := stampSize; n < len(sector); n *= 2 {
		copy(sector[n:], sector[:n])
	}
}

// stampOf reads a sector's stamp. It is not ok unless the whole sector is filled
// with it.
func stampOf(sector []byte) (s stamp, ok bool) {
	s = stamp{int64(binary.BigEndian.Uint64(sector[8:])), binary.BigEndian.Uint64(sector[16:])}
	whole := [8]byte(sector) == stampMagic && binary.BigEndian.Uint64(sector[24:]) == ^s.version &&
		bytes.Equal(sector[stampSize:], sector[:len(sector)-stampSize])
	return s, whole
}

// describe says what a sector holds.
func describe(sector []byte) string {
	if isZero(sector) {
		return "zeroes"
	}
	if s, ok := stampOf(sector); ok {
		return fmt.Sprintf("version %#x of sector %d", s.version, s.sector)
	}
	return fmt.Sprintf("% x…", sector[:stampSize])
}

// stamped makes the bytes of a write of whole sectors.
func stamped(off, length int64, version uint64) []byte {
	data := make([]byte, length)
	for at := int64(0); at < length; at += sectorSize {
		stamp{(off + at) / sectorSize, version}.fill(data[at : at+sectorSize])
	}
	return data
}

// history is what a guest did to an image that was all zeroes, and knows what
// each sector may hold.
type history struct {
	records  []Record
	durable  []int
	sectors  [][]int32        // of each sector the records that change it
	versions map[uint64]int32 // the record of each write
}

// newHistory makes a history of a recording of stamped writes of whole sectors.
func newHistory(rec *Recording, size int64) *history {
	h := &history{records: rec.Records, durable: rec.durable(), sectors: make([][]int32, size/sectorSize), versions: map[uint64]int32{}}
	for i := range h.records {
		r := &h.records[i]
		if !r.Op.Writes() || r.Length == 0 {
			continue
		}
		for n := r.Offset / sectorSize; n < r.End()/sectorSize; n++ {
			h.sectors[n] = append(h.sectors[n], int32(i))
		}
		if r.Op == aio.OpWrite {
			s, _ := stampOf(r.Data[:sectorSize])
			h.versions[s.version] = int32(i)
		}
	}
	return h
}

// afterCut checks what is read at off after a power cut at a moment. A sector
// holds what it held when the last flush that completed before the cut was
// submitted, or anything that was written to it later, completed or not.
func (h *history) afterCut(moment int, off int64, data []byte) error {
	return h.check(off, data, view{
		what:   fmt.Sprintf("after a cut at moment %d", moment),
		moment: moment,
		placed: func(i int32) bool { return h.durable[i] <= moment },
	})
}

// reads checks what the guest read: what was over when the read was submitted,
// or anything that was submitted before the read completed.
func (h *history) reads() error {
	for i := range h.records {
		r := &h.records[i]
		if r.Op != aio.OpRead || r.Failed {
			continue
		}
		err := h.check(r.Offset, r.Data, view{
			what:   r.String(),
			moment: r.Completed,
			placed: func(i int32) bool { return h.records[i].before(r) && !h.records[i].Failed },
			racing: true,
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// view is a look at an image from outside.
type view struct {
	what   string
	moment int              // what was submitted until then may have been done
	placed func(int32) bool // what has been done for sure
	racing bool             // the rest may be half done, even in a sector
}

// check reports the first sector of data that holds what it must not.
func (h *history) check(off int64, data []byte, v view) error {
	var first error
	wrong := 0
	for at := int64(0); at < int64(len(data)); at += sectorSize {
		err := h.checkSector((off+at)/sectorSize, data[at:at+sectorSize], v)
		if err != nil {
			wrong++
			if first == nil {
				first = err
			}
		}
	}
	if wrong > 1 {
		return fmt.Errorf("%w\n(and %d more sectors are wrong)", first, wrong-1)
	}
	return first
}

func (h *history) checkSector(n int64, content []byte, v view) error {
	begun := h.begun(n, v)
	limit := h.limit(begun, v)
	current := func(i int32) bool { return h.records[i].Completed == 0 || h.records[i].Completed >= limit }
	if isZero(content) {
		if limit == 0 {
			return nil // the image as it was made
		}
		for _, i := range begun {
			if h.records[i].Op != aio.OpWrite && current(i) {
				return nil
			}
		}
		return h.wrong(n, v, "is zero, but was overwritten for good")
	}
	s, ok := stampOf(content)
	i, known := h.versions[s.version]
	switch {
	case !ok && v.racing && slices.ContainsFunc(begun, func(i int32) bool { return !v.placed(i) }):
		return nil
	case !ok || !known:
		return h.wrong(n, v, "holds what nobody wrote: "+describe(content))
	case s.sector != n:
		return h.wrong(n, v, fmt.Sprintf("holds bytes of sector %d, of %v", s.sector, &h.records[i]))
	case !slices.Contains(h.sectors[n], i):
		return h.wrong(n, v, fmt.Sprintf("holds what was never written there, by %v", &h.records[i]))
	case h.records[i].Submitted > v.moment:
		return h.wrong(n, v, fmt.Sprintf("holds what is yet to be written, by %v", &h.records[i]))
	case !current(i):
		return h.wrong(n, v, fmt.Sprintf("holds what was overwritten for good, of %v", &h.records[i]))
	}
	return nil
}

// begun is what may have been done to a sector, in order of submission.
func (h *history) begun(n int64, v view) []int32 {
	list := h.sectors[n]
	end, _ := slices.BinarySearchFunc(list, v.moment+1, func(i int32, moment int) int { return h.records[i].Submitted - moment })
	return list[:end]
}

// limit is the moment of submission of the last change that has been done for
// sure, or 0: it has taken the place of all that was over before. A discard takes
// nobody's place, since it may do nothing.
func (h *history) limit(begun []int32, v view) int {
	for _, i := range slices.Backward(begun) {
		if h.records[i].Op != aio.OpDiscard && v.placed(i) {
			return h.records[i].Submitted
		}
	}
	return 0
}

// wrong is an error that tells a sector's latest history.
func (h *history) wrong(n int64, v view, how string) error {
	const most = 12
	var b strings.Builder
	fmt.Fprintf(&b, "%s: sector %d (byte %d) %s; it was changed by", v.what, n, n*sectorSize, how)
	begun := h.begun(n, v)
	if len(begun) == 0 {
		b.WriteString(" nobody")
	}
	for _, i := range begun[max(0, len(begun)-most):] {
		fmt.Fprintf(&b, "\n  %v", &h.records[i])
		switch {
		case h.durable[i] != never:
			fmt.Fprintf(&b, ", durable from %d", h.durable[i])
		default:
			b.WriteString(", never durable")
		}
	}
	return errors.New(b.String())
}
