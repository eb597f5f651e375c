package formattest

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strings"

	"platter/aio"
)

const (
	sectorSize = 512  // what a disk writes as a whole or not at all, in bytes
	pageSize   = 4096 // what a discard frees as a whole or not at all, in bytes
)

// Strategy is what a power cut does to the operations that aren't durable.
type Strategy uint8

// The strategies.
const (
	AllLost  Strategy = iota // none was done
	AllKept                  // all were done
	LastLost                 // all but the one that was submitted last
	LastKept                 // that one alone
	OneLost                  // all but any one
	OneKept                  // any one alone
	Mixed                    // some were done and some were not
	Torn                     // some were done in part
	Reversed                 // all were done, later ones first
	Shuffled                 // some were done, in whole or in part, in any order
	strategyCount
)

var strategyNames = [strategyCount]string{"all lost", "all kept", "last lost", "last kept", "one lost", "one kept",
	"mixed", "torn", "reversed", "shuffled"}

func (s Strategy) String() string { return strategyNames[s] }

// Cut is a power cut: when it happens and what it does. It says everything about
// the image that it leaves.
type Cut struct {
	Moment   int // what was submitted until then, and nothing else, may have been done
	Strategy Strategy
	Seed     uint64 // of what the strategy leaves to chance
}

func (c Cut) String() string {
	return fmt.Sprintf("at moment %d, %s, seed %d", c.Moment, c.Strategy, c.Seed)
}

// Cuts draws n power cuts, in order of their moments. Half of them are next to a
// border: just before or after the completion of a flush, or a moment of marks.
// The others are next to any operation.
func (r *Recording) Cuts(rng *rand.Rand, n int, marks ...int) []Cut {
	borders, moments := slices.Clone(marks), []int{0}
	for _, o := range r.Records {
		moments = append(moments, o.Submitted)
		if o.Completed != 0 {
			moments = append(moments, o.Completed)
		}
		if o.Op == aio.OpFlush && o.Completed != 0 {
			borders = append(borders, o.Completed)
		}
	}
	// Each border comes before any comes again.
	rng.Shuffle(len(borders), func(i, j int) { borders[i], borders[j] = borders[j], borders[i] })
	cuts := make([]Cut, n)
	for i := range cuts {
		moment := moments[rng.IntN(len(moments))]
		if i%2 == 0 && len(borders) > 0 {
			moment = borders[i/4%len(borders)] - i/2%2
		}
		cuts[i] = Cut{Moment: moment, Strategy: Strategy(rng.IntN(int(strategyCount))), Seed: rng.Uint64()}
	}
	slices.SortStableFunc(cuts, func(a, b Cut) int { return a.Moment - b.Moment })
	return cuts
}

// Replayer builds from a recording the images that a power cut could leave. Its
// methods must not be called concurrently.
//
// Durable operations are present; see Recording. Of every other one that was
// submitted before the cut, also one that failed or was in flight, each 512-byte
// sector may be present or not, whatever becomes of others. What overlaps takes
// effect as follows.
//
//   - An operation that was over when another was submitted comes before it, if
//     either of them is durable, or a truncation, or covers a sector only in part.
//   - All others may come in any order: those that were in flight at a time, and
//     those that no flush has told apart.
//
// A write makes the file long enough for its last sector that is present; what
// is new in between reads as zeroes. Write-zeroes don't make it longer. A
// truncation is present or not. A discard zeroes some pages of its range and
// leaves others, but from when it is durable on these are always the same.
//
// Images are built in memory: the file must be of moderate length.
type Replayer struct {
	rec     *Recording
	durable []int

	base    []byte // after the first settled operations, which are durable
	settled int
	moment  int    // that base was built for
	image   []byte // built last
}

// NewReplayer makes a Replayer of a recording, which must not be changed.
func NewReplayer(rec *Recording) *Replayer {
	return &Replayer{rec: rec, durable: rec.durable(), base: slices.Clone(rec.Initial)}
}

// span is a range of a file, in bytes.
type span struct{ from, to int64 }

// Build returns the image that a cut leaves. It is the Replayer's and valid until
// the next call. Cuts in order of their moments are built faster.
func (p *Replayer) Build(cut Cut) []byte {
	p.settle(cut.Moment)
	p.image = append(p.image[:0], p.base...)
	kept := p.kept(cut)
	for i, spans := range kept {
		for _, s := range spans {
			p.image = apply(p.image, &p.rec.Records[p.settled+i], s)
		}
	}
	if cut.Strategy == Reversed || cut.Strategy == Shuffled {
		p.reorder(cut, kept)
	}
	return p.image
}

// settle brings base up to the first operation that isn't durable at a moment.
func (p *Replayer) settle(moment int) {
	if moment < p.moment {
		p.base, p.settled = append(p.base[:0], p.rec.Initial...), 0
	}
	p.moment = moment
	for p.settled < len(p.durable) && p.durable[p.settled] <= moment {
		for _, s := range p.whole(p.settled) {
			p.base = apply(p.base, &p.rec.Records[p.settled], s)
		}
		p.settled++
	}
}

// kept says, for each operation after the settled ones until the cut, which
// parts of it are present.
func (p *Replayer) kept(cut Cut) [][]span {
	var kept [][]span
	var open []int // those that aren't durable
	for i := p.settled; i < len(p.durable) && p.rec.Records[i].Submitted <= cut.Moment; i++ {
		kept = append(kept, p.whole(i))
		if p.durable[i] > cut.Moment {
			open = append(open, i)
		}
	}
	if len(open) == 0 {
		return kept
	}
	rng := rand.New(rand.NewPCG(cut.Seed, uint64(cut.Strategy)))
	chosen := open[len(open)-1]
	if cut.Strategy == OneLost || cut.Strategy == OneKept {
		chosen = open[rng.IntN(len(open))]
	}
	chance := []float64{0.1, 0.5, 0.9}[rng.IntN(3)]
	for _, i := range open {
		keep, torn := false, false
		switch cut.Strategy {
		case AllKept, Reversed:
			keep = true
		case LastLost, OneLost:
			keep = i != chosen
		case LastKept, OneKept:
			keep = i == chosen
		case Mixed:
			keep = rng.Float64() < chance
		case Torn, Shuffled:
			keep = rng.Float64() < chance
			torn = rng.IntN(2) == 0
		}
		r := &p.rec.Records[i]
		at := &kept[i-p.settled]
		switch {
		case torn && r.Op != OpTruncate:
			*at = tear(rng, r)
		case keep:
			*at = []span{{r.Offset, r.End()}}
		default:
			*at = nil
		}
	}
	return kept
}

// whole is what is present of a durable operation: everything, but for discards.
func (p *Replayer) whole(i int) []span {
	r := &p.rec.Records[i]
	switch {
	case !r.changes():
		return nil
	case r.Op != aio.OpDiscard:
		return []span{{r.Offset, r.End()}}
	}
	// Chance, but the same at every cut.
	rng := rand.New(rand.NewPCG(uint64(i), uint64(r.Offset)))
	switch rng.IntN(3) {
	case 0:
		return nil
	case 1:
		return []span{{r.Offset, r.End()}}
	}
	return pick(rng, r, pageSize)
}

// tear picks what is present of a torn operation.
func tear(rng *rand.Rand, r *Record) []span {
	unit := int64(sectorSize)
	if r.Op == aio.OpDiscard {
		unit = pageSize
	}
	first, end := r.Offset/unit+1, (r.End()+unit-1)/unit
	if first >= end { // a single unit is not torn
		if rng.IntN(2) == 0 {
			return nil
		}
		return []span{{r.Offset, r.End()}}
	}
	at := (first + rng.Int64N(end-first)) * unit
	switch rng.IntN(3) {
	case 0:
		return []span{{r.Offset, at}}
	case 1:
		return []span{{at, r.End()}}
	}
	return pick(rng, r, unit)
}

// pick picks some units of an operation's range, of which borders lie at
// multiples of unit.
func pick(rng *rand.Rand, r *Record, unit int64) []span {
	units := r.Length/unit + 1
	longest := max([]int64{1, 4, units}[rng.IntN(3)], units/256)
	var spans []span
	for at := r.Offset; at < r.End(); {
		next := min((at/unit+1+rng.Int64N(longest))*unit, r.End())
		if rng.IntN(2) == 0 {
			spans = append(spans, span{at, next})
		}
		at = next
	}
	return spans
}

// reorder does those operations once more, in another order, that nothing holds
// in place. What they cover in part keeps its first order, since on the way to
// the disk a sector is whole.
func (p *Replayer) reorder(cut Cut, kept [][]span) {
	var loose []int
	for i := range kept {
		r := &p.rec.Records[p.settled+i]
		switch {
		case r.Op == OpTruncate && len(kept[i]) > 0:
			loose = loose[:0] // nothing from before comes behind a truncation
		case r.changes() && p.durable[p.settled+i] > cut.Moment && !p.overwritten(r, cut.Moment, len(kept)):
			loose = append(loose, i)
		}
	}
	slices.Reverse(loose)
	if cut.Strategy == Shuffled {
		rng := rand.New(rand.NewPCG(cut.Seed, uint64(strategyCount)))
		rng.Shuffle(len(loose), func(i, j int) { loose[i], loose[j] = loose[j], loose[i] })
	}
	for _, i := range loose {
		for _, s := range kept[i] {
			s.from, s.to = (s.from+sectorSize-1)/sectorSize*sectorSize, s.to/sectorSize*sectorSize
			if s.from < s.to {
				p.image = apply(p.image, &p.rec.Records[p.settled+i], s)
			}
		}
	}
}

// overwritten reports whether a durable operation, among the n that aren't
// settled, has taken the place of r.
func (p *Replayer) overwritten(r *Record, moment, n int) bool {
	for i := p.settled; i < p.settled+n; i++ {
		o := &p.rec.Records[i]
		if p.durable[i] <= moment && o.changes() && r.before(o) && r.overlaps(o) {
			return true
		}
	}
	return false
}

// apply does the part of an operation that lies in s.
func apply(image []byte, r *Record, s span) []byte {
	size := int64(len(image))
	switch {
	case r.Op == OpTruncate:
		return resize(image, r.Offset)
	case r.Op == aio.OpWrite:
		if s.to > size {
			image = resize(image, s.to)
		}
		copy(image[s.from:s.to], r.Data[s.from-r.Offset:])
	case s.from < size:
		clear(image[s.from:min(s.to, size)])
	}
	return image
}

func resize(image []byte, size int64) []byte {
	old := int64(len(image))
	if size <= old {
		return image[:size]
	}
	image = slices.Grow(image, int(size-old))[:size]
	clear(image[old:])
	return image
}

// Describe lists the last operations before a cut, at most n, and what the cut
// does to each.
func (p *Replayer) Describe(cut Cut, n int) string {
	p.settle(cut.Moment)
	kept := p.kept(cut)
	end := p.settled + len(kept)
	var b strings.Builder
	for i := max(0, end-n); i < end; i++ {
		r := &p.rec.Records[i]
		fate := "durable"
		if p.durable[i] > cut.Moment {
			fate = fateOf(r, kept[i-p.settled])
			if r.Completed > cut.Moment {
				fate = "in flight then, " + fate
			}
		}
		if r.changes() {
			fmt.Fprintf(&b, "%v: %s\n", r, fate)
		} else {
			fmt.Fprintf(&b, "%v\n", r)
		}
	}
	return b.String()
}

func fateOf(r *Record, kept []span) string {
	switch {
	case len(kept) == 0:
		return "lost"
	case kept[0] == span{r.Offset, r.End()}:
		return "kept"
	}
	var b strings.Builder
	b.WriteString("torn, kept is")
	for i, s := range kept {
		if i == 8 {
			fmt.Fprintf(&b, " and %d more", len(kept)-i)
			break
		}
		fmt.Fprintf(&b, " %d+%d", s.from, s.to-s.from)
	}
	return b.String()
}

// WriteImage makes a file of an image, with holes where it is zero.
func WriteImage(path string, image []byte) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	for at := 0; at < len(image); {
		end := at
		for end < len(image) && !isZero(image[end:min(end+pageSize, len(image))]) {
			end = min(end+pageSize, len(image))
		}
		if end > at {
			if _, err := f.WriteAt(image[at:end], int64(at)); err != nil {
				f.Close()
				return err
			}
		}
		at = end + pageSize // the page at end is zero, or the image is over
	}
	if err := f.Truncate(int64(len(image))); err != nil {
		f.Close()
		return err
	}
	return f.Close()
}

var zeroPage [pageSize]byte

// isZero reports whether b, a byte at least and a page at most, is all zeroes.
func isZero(b []byte) bool { return b[0] == 0 && bytes.Equal(b, zeroPage[:len(b)]) }
