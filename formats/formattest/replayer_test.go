package formattest

import (
	"bytes"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"platter/aio"
	"platter/integration/testenv"
)

// write, zeroes, discard, flush and truncate make records by hand. A write's
// bytes are all the same letter.
func write(off, length int64, letter byte, submitted, completed int) Record {
	return Record{Op: aio.OpWrite, Offset: off, Length: length, Data: bytes.Repeat([]byte{letter}, int(length)),
		Submitted: submitted, Completed: completed}
}

func zeroes(off, length int64, submitted, completed int) Record {
	return Record{Op: aio.OpWriteZeroes, Offset: off, Length: length, Submitted: submitted, Completed: completed}
}

func discard(off, length int64, submitted, completed int) Record {
	return Record{Op: aio.OpDiscard, Offset: off, Length: length, Submitted: submitted, Completed: completed}
}

func flush(submitted, completed int) Record {
	return Record{Op: aio.OpFlush, Submitted: submitted, Completed: completed}
}

func truncate(size int64, submitted, completed int) Record {
	return Record{Op: OpTruncate, Offset: size, Submitted: submitted, Completed: completed}
}

func fua(r Record) Record {
	r.Flags |= aio.FlagFUA
	return r
}

func failed(r Record) Record {
	r.Failed = true
	return r
}

// short writes an image as a letter for each sector, with "." for zeroes. What
// is in brackets is a sector of several letters, each with how often it comes, or
// a shorter one at the end.
func short(image []byte) string {
	var b strings.Builder
	for len(image) > 0 {
		sector := image[:min(sectorSize, len(image))]
		image = image[len(sector):]
		var runs []string
		for len(sector) > 0 {
			n := len(sector) - len(bytes.TrimLeft(sector, string(sector[:1])))
			runs = append(runs, fmt.Sprintf("%s%d", bytes.ReplaceAll(sector[:1], []byte{0}, []byte(".")), n))
			sector = sector[n:]
		}
		if whole, ok := strings.CutSuffix(runs[0], strconv.Itoa(sectorSize)); ok {
			b.WriteString(whole)
		} else {
			fmt.Fprintf(&b, "%v", runs)
		}
	}
	return b.String()
}

// letters is a file of a sector of each letter.
func letters(s string) []byte {
	var b []byte
	for _, c := range []byte(s) {
		if c == '.' {
			c = 0
		}
		b = append(b, bytes.Repeat([]byte{c}, sectorSize)...)
	}
	return b
}

// outcomes is every image that cuts of the strategies at a moment leave, out of
// many.
func outcomes(rec *Recording, moment int, strategies ...Strategy) []string {
	if len(strategies) == 0 {
		for s := range strategyCount {
			strategies = append(strategies, s)
		}
	}
	p := NewReplayer(rec)
	seen := map[string]bool{}
	for _, s := range strategies {
		for seed := range uint64(200) {
			seen[short(p.Build(Cut{Moment: moment, Strategy: s, Seed: seed}))] = true
		}
	}
	return slices.Sorted(maps.Keys(seen))
}

// TestDurable shows from which moment on no power cut can undo an operation.
func TestDurable(t *testing.T) {
	for _, c := range []struct {
		name    string
		records []Record
		want    int // of the first one
	}{
		{"NoFlush", []Record{write(0, 512, 'a', 1, 2)}, never},
		{"FlushAfterwards", []Record{write(0, 512, 'a', 1, 2), flush(3, 4)}, 4},
		{"FlushBeforeItCompletes", []Record{write(0, 512, 'a', 1, 3), flush(2, 4)}, never},
		{"FlushBeforeItCompletesAndAnother", []Record{write(0, 512, 'a', 1, 3), flush(2, 4), flush(5, 6)}, 6},
		{"FlushThatFails", []Record{write(0, 512, 'a', 1, 2), failed(flush(3, 4))}, never},
		{"FlushInFlight", []Record{write(0, 512, 'a', 1, 2), flush(3, 0)}, never},
		{"LaterFlushCompletesFirst", []Record{write(0, 512, 'a', 1, 2), flush(3, 9), flush(4, 5)}, 5},
		{"EarlierFlushCompletesFirst", []Record{write(0, 512, 'a', 1, 2), flush(3, 5), flush(4, 9)}, 5},
		{"WriteThatFails", []Record{failed(write(0, 512, 'a', 1, 2)), flush(3, 4)}, never},
		{"WriteInFlight", []Record{write(0, 512, 'a', 1, 0), flush(3, 4)}, never},
		{"FUA", []Record{fua(write(0, 512, 'a', 1, 2)), flush(3, 4)}, 2},
		{"FUAThatFails", []Record{failed(fua(write(0, 512, 'a', 1, 2)))}, never},
		{"FUAOfAnother", []Record{write(0, 512, 'a', 1, 2), fua(write(0, 512, 'a', 3, 4))}, never},
		{"Zeroes", []Record{zeroes(0, 512, 1, 2), flush(3, 4)}, 4},
		{"Discard", []Record{fua(discard(0, 512, 1, 2))}, 2},
		{"Truncate", []Record{truncate(0, 1, 2), flush(3, 4)}, 4},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := (&Recording{Records: c.records}).durable()[0]; got != c.want {
				t.Errorf("durable from moment %d, want %d", got, c.want)
			}
		})
	}
}

// TestBuild shows, rule by rule, every image that a power cut may leave.
func TestBuild(t *testing.T) {
	old := letters("old")
	for _, c := range []struct {
		name    string
		initial []byte
		records []Record
		moment  int
		want    []string // all of them
	}{
		{"BeforeAnything", old, []Record{write(0, 512, 'A', 1, 2)}, 0, []string{"old"}},
		{"NotYetSubmitted", old, []Record{write(0, 512, 'A', 5, 6)}, 4, []string{"old"}},
		{"InFlight", old, []Record{write(0, 512, 'A', 5, 6)}, 5, []string{"Ald", "old"}},
		{"Unflushed", old, []Record{write(0, 512, 'A', 5, 6)}, 100, []string{"Ald", "old"}},
		{"Failed", old, []Record{failed(write(0, 512, 'A', 1, 2)), flush(3, 4)}, 100, []string{"Ald", "old"}},
		{"FlushInFlight", old, []Record{write(0, 512, 'A', 1, 2), flush(3, 5)}, 4, []string{"Ald", "old"}},
		{"Flushed", old, []Record{write(0, 512, 'A', 1, 2), flush(3, 5)}, 5, []string{"Ald"}},
		{"FUA", old, []Record{fua(write(0, 512, 'A', 1, 2))}, 2, []string{"Ald"}},
		{"FUAInFlight", old, []Record{fua(write(0, 512, 'A', 1, 3))}, 2, []string{"Ald", "old"}},
		{"TornBetweenSectors", old, []Record{write(0, 3*512, 'A', 1, 2)}, 2,
			[]string{"AAA", "AAd", "AlA", "Ald", "oAA", "oAd", "olA", "old"}},
		{"TornBetweenSectorsOfTheFile", old, []Record{write(256, 1024, 'A', 1, 2)}, 2,
			[]string{"[o256 A256]A[A256 d256]", "[o256 A256]Ad", "[o256 A256]l[A256 d256]", "[o256 A256]ld",
				"oA[A256 d256]", "oAd", "ol[A256 d256]", "old"}},
		{"Independent", old, []Record{write(0, 512, 'A', 1, 2), write(1024, 512, 'B', 3, 4)}, 4,
			[]string{"AlB", "Ald", "olB", "old"}},
		{"OverlappingInAnyOrder", old, []Record{write(0, 1024, 'A', 1, 2), write(0, 1024, 'B', 3, 4)}, 4,
			[]string{"AAd", "ABd", "Ald", "BAd", "BBd", "Bld", "oAd", "oBd", "old"}},
		{"DurableComesAfterWhatWasOver", old, []Record{failed(write(0, 512, 'A', 1, 2)), fua(write(0, 512, 'B', 3, 4))}, 4,
			[]string{"Bld"}},
		{"DurableComesBeforeWhatFollows", old, []Record{fua(write(0, 512, 'B', 1, 2)), write(0, 512, 'A', 3, 4)}, 4,
			[]string{"Ald", "Bld"}},
		{"DurableAndInFlightInAnyOrder", old, []Record{write(0, 512, 'A', 1, 0), fua(write(0, 512, 'B', 2, 3))}, 4,
			[]string{"Ald", "Bld"}},
		{"DurableCoversAPart", old, []Record{write(0, 1024, 'A', 1, 2), fua(write(0, 512, 'B', 3, 4))}, 4,
			[]string{"BAd", "Bld"}},
		{"PartsOfASectorKeepTheirOrder", old, []Record{write(0, 384, 'A', 1, 2), write(128, 384, 'B', 3, 4)}, 4,
			[]string{"[A128 B384]ld", "[A384 o128]ld", "[o128 B384]ld", "old"}},
		{"WholeSectorsDoNot", old, []Record{write(0, 512, 'A', 1, 2), write(0, 256, 'B', 3, 4)}, 4,
			[]string{"Ald", "[B256 A256]ld", "[B256 o256]ld", "old"}},
		{"Zeroes", old, []Record{zeroes(0, 1024, 1, 2)}, 2, []string{"..d", ".ld", "o.d", "old"}},
		{"ZeroesMakeNothingLonger", old, []Record{fua(zeroes(1024, 1<<40, 1, 2))}, 2, []string{"ol."}},
		{"WriteMakesItLonger", old, []Record{write(4*512, 1024, 'A', 1, 2)}, 2,
			[]string{"old", "old..A", "old.A", "old.AA"}},
		{"WriteMakesItLongerByAPart", old, []Record{write(3*512, 100, 'A', 1, 2)}, 2, []string{"old", "old[A100]"}},
		{"Grow", old, []Record{truncate(4*512, 1, 2)}, 2, []string{"old", "old."}},
		{"GrowAndWrite", old, []Record{truncate(4*512, 1, 2), write(4*512, 512, 'A', 3, 4)}, 4,
			[]string{"old", "old.", "old.A"}},
		{"GrowDurably", old, []Record{truncate(4*512, 1, 2), flush(3, 4)}, 4, []string{"old."}},
		{"Shrink", old, []Record{truncate(512, 1, 2)}, 2, []string{"o", "old"}},
		{"ShrinkDurably", old, []Record{truncate(512, 1, 2), flush(3, 4)}, 4, []string{"o"}},
		{"ShrinkAndWrite", old, []Record{truncate(512, 1, 2), write(1024, 512, 'A', 3, 4)}, 4,
			[]string{"o", "o.A", "olA", "old"}},
		{"ShrinkAndGrow", old, []Record{truncate(512, 1, 2), truncate(4*512, 3, 4)}, 4,
			[]string{"o", "o...", "old", "old."}},
		{"NothingComesBackAfterShrinking", old, []Record{write(512, 1024, 'A', 1, 2), truncate(512, 3, 4), fua(write(0, 512, 'B', 5, 6))}, 6,
			[]string{"B", "BAA", "BAd", "BlA", "Bld"}},
		{"FailedTruncate", old, []Record{failed(truncate(512, 1, 2)), flush(3, 4)}, 4, []string{"o", "old"}},
		{"DiscardedPages", letters("aaaaaaaabbbbbbbb"), []Record{discard(0, 8192, 1, 2)}, 2,
			[]string{"........" + "........", "........bbbbbbbb", "aaaaaaaa........", "aaaaaaaabbbbbbbb"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			rec := &Recording{Initial: c.initial, Records: c.records}
			if got := outcomes(rec, c.moment); !slices.Equal(got, c.want) {
				t.Errorf("images are\n%q, want\n%q", got, c.want)
			}
			if !bytes.Equal(rec.Initial, c.initial) {
				t.Error("the recording was changed")
			}
		})
	}
}

// TestStrategies shows what each strategy makes of three writes after a durable
// one.
func TestStrategies(t *testing.T) {
	rec := &Recording{Initial: letters("....."), Records: []Record{
		fua(write(0, 512, 'D', 1, 2)),
		write(512, 1024, 'A', 3, 4), write(1024, 1024, 'B', 5, 6), flush(7, 0), write(2048, 512, 'C', 8, 9),
	}}
	for s, want := range map[Strategy][]string{
		AllLost:  {"D...."},
		AllKept:  {"DABBC"},
		LastLost: {"DABB."},
		LastKept: {"D...C"},
		OneLost:  {"D.BBC", "DAA.C", "DABB."},
		OneKept:  {"D...C", "D.BB.", "DAA.."},
		Mixed:    {"D....", "D...C", "D.BB.", "D.BBC", "DAA..", "DAA.C", "DABB.", "DABBC"},
		Reversed: {"DAABC"},
	} {
		t.Run(s.String(), func(t *testing.T) {
			if got := outcomes(rec, 100, s); !slices.Equal(got, want) {
				t.Errorf("images are %q, want %q", got, want)
			}
		})
	}
	// A sector is old, or of either write that covers it: 2*3*2*2 images.
	all := outcomes(rec, 100)
	if len(all) != 24 {
		t.Errorf("%d images: %q", len(all), all)
	}
	for _, s := range []Strategy{Torn, Shuffled} {
		if got := outcomes(rec, 100, s); !slices.Equal(got, all) {
			t.Errorf("%v: %q, want every image", s, got)
		}
	}
}

// TestDurableDiscard: it zeroed some pages, and which ones does not change from
// one cut to the other.
func TestDurableDiscard(t *testing.T) {
	seen := map[string]bool{}
	for i := range int64(60) {
		initial := bytes.Repeat([]byte{'a'}, 64*pageSize)
		rec := &Recording{Initial: initial, Records: []Record{fua(discard(i*pageSize+100, 2*pageSize, 1, 2))}}
		p := NewReplayer(rec)
		first := slices.Clone(p.Build(Cut{Moment: 2}))
		for s := range strategyCount {
			p.Build(Cut{}) // from the start
			if !bytes.Equal(p.Build(Cut{Moment: 3, Strategy: s, Seed: uint64(s)}), first) {
				t.Fatalf("another image at another cut, %v", s)
			}
		}
		from, to := i*pageSize, (i+3)*pageSize
		if !bytes.Equal(first[:from], initial[:from]) || !bytes.Equal(first[to:], initial[to:]) {
			t.Fatal("more than the pages of a discard has changed")
		}
		zero := func(at int64) bool { return first[at] == 0 }
		seen[fmt.Sprint(zero(from), zero(from+100), zero(from+pageSize), zero(from+2*pageSize), zero(from+2*pageSize+100))] = true
	}
	for _, want := range []string{"false false false false false", "false true true true false", "false false true false false"} {
		if !seen[want] {
			t.Errorf("first byte, start, second page, third page, end: zero is never %s", want)
		}
	}
	for got := range seen {
		if !strings.HasPrefix(got, "false ") || !strings.HasSuffix(got, " false") {
			t.Errorf("a discard reaches too far: zero is %s", got)
		}
	}
}

// TestBuildsOnlyWhatCanBe makes random recordings and compares each sector of
// what is built with what may be there, found in the simplest way.
func TestBuildsOnlyWhatCanBe(t *testing.T) {
	seed := newSeed(t)
	rng := rand.New(rand.NewPCG(seed, 0))
	for range 60 {
		rec := randomRecording(rng)
		p := NewReplayer(rec)
		for _, cut := range rec.Cuts(rng, 50) {
			image := short(p.Build(cut))
			for n, c := range []byte(image) {
				if allowed := maybe(rec, n, cut.Moment); !strings.ContainsRune(allowed, rune(c)) {
					t.Fatalf("sector %d is %c, may be one of %q, in %s after a cut %v (PLATTER_TEST_SEED=%d)\n%s",
						n, c, allowed, image, cut, seed, p.Describe(cut, 100))
				}
			}
		}
	}
}

// randomRecording is of writes of whole sectors, each with its letter.
func randomRecording(rng *rand.Rand) *Recording {
	const sectors = 12
	rec := &Recording{Initial: letters(strings.Repeat("!", sectors))}
	var open []int
	for rec.Moments < 80 {
		rec.Moments++
		if len(open) > 3 || len(open) > 0 && rng.IntN(2) == 0 {
			k := rng.IntN(len(open))
			r := &rec.Records[open[k]]
			r.Completed, r.Failed = rec.Moments, rng.IntN(12) == 0
			open = slices.Delete(open, k, k+1)
			continue
		}
		first := rng.Int64N(sectors)
		r := write(first*512, (1+rng.Int64N(sectors-first))*512, '0'+byte(len(rec.Records)), rec.Moments, 0)
		switch rng.IntN(6) {
		case 0:
			r = flush(rec.Moments, 0)
		case 1:
			r.Op, r.Data = aio.OpWriteZeroes, nil
		}
		if r.Op.Writes() && rng.IntN(6) == 0 {
			r = fua(r)
		}
		open = append(open, len(rec.Records))
		rec.Records = append(rec.Records, r)
	}
	return rec
}

// maybe is the letters that a sector may be after a cut.
func maybe(rec *Recording, sector, moment int) string {
	over := func(r *Record) bool { return r.Completed > 0 && r.Completed <= moment && !r.Failed }
	durable := func(r *Record) bool {
		if !over(r) || r.Flags&aio.FlagFUA != 0 {
			return over(r)
		}
		return slices.ContainsFunc(rec.Records, func(f Record) bool {
			return f.Op == aio.OpFlush && over(&f) && f.Submitted > r.Completed
		})
	}
	covers := func(r *Record) bool {
		return r.Op.Writes() && int64(sector)*512 >= r.Offset && int64(sector)*512 < r.End()
	}
	// Whether a durable operation began after the end of one.
	replaced := func(end int) bool {
		return slices.ContainsFunc(rec.Records, func(r Record) bool {
			return covers(&r) && durable(&r) && end > 0 && r.Submitted > end
		})
	}
	list := ""
	if !slices.ContainsFunc(rec.Records, func(r Record) bool { return covers(&r) && durable(&r) }) {
		list = "!"
	}
	for _, r := range rec.Records {
		switch {
		case !covers(&r) || r.Submitted > moment || replaced(r.Completed):
		case r.Op == aio.OpWriteZeroes:
			list += "."
		default:
			list += string(rune(r.Data[0]))
		}
	}
	return list
}

// TestBuildTwice: an image depends on its cut alone, not on what was built
// before.
func TestBuildTwice(t *testing.T) {
	seed := newSeed(t)
	rng := rand.New(rand.NewPCG(seed, 0))
	for range 20 {
		rec := randomRecording(rng)
		again := NewReplayer(rec)
		cuts := rec.Cuts(rng, 40)
		images := map[Cut]string{}
		for _, cut := range cuts {
			images[cut] = short(NewReplayer(rec).Build(cut))
		}
		for range 100 {
			cut := cuts[rng.IntN(len(cuts))]
			if rng.IntN(4) == 0 {
				again.Describe(cuts[rng.IntN(len(cuts))], 5)
			}
			if got := short(again.Build(cut)); got != images[cut] {
				t.Fatalf("cut %v: %s, then %s (PLATTER_TEST_SEED=%d)", cut, images[cut], got, seed)
			}
		}
	}
}

func TestCuts(t *testing.T) {
	rec := &Recording{Records: []Record{write(0, 512, 'a', 1, 2), flush(3, 10), write(0, 512, 'a', 12, 0), flush(13, 20), flush(21, 0)}, Moments: 40}
	draw := func(seed uint64, n int) []Cut { return rec.Cuts(rand.New(rand.NewPCG(seed, 0)), n, 30, 35) }
	cuts := draw(1, 400)
	if !reflect.DeepEqual(cuts, draw(1, 400)) || reflect.DeepEqual(cuts, draw(2, 400)) {
		t.Error("cuts do not depend on the seed alone")
	}
	if !slices.IsSortedFunc(cuts, func(a, b Cut) int { return a.Moment - b.Moment }) {
		t.Error("cuts are out of order")
	}
	strategies, moments := map[Strategy]int{}, map[int]int{}
	for _, c := range cuts {
		strategies[c.Strategy]++
		moments[c.Moment]++
	}
	if len(strategies) != int(strategyCount) {
		t.Errorf("strategies drawn: %v", strategies)
	}
	if got, want := slices.Sorted(maps.Keys(moments)), []int{0, 1, 2, 3, 9, 10, 12, 13, 19, 20, 21, 29, 30, 34, 35}; !slices.Equal(got, want) {
		t.Errorf("moments drawn: %v, want %v", got, want)
	}
	// Few cuts are enough to see both sides of each border.
	sides := map[int]bool{}
	for _, c := range draw(3, 16) {
		sides[c.Moment] = true
	}
	for _, want := range []int{9, 10, 19, 20, 29, 30, 34, 35} {
		if !sides[want] {
			t.Errorf("moment %d is not among 16 cuts", want)
		}
	}
	if cuts := new(Recording).Cuts(rand.New(rand.NewPCG(1, 0)), 3); len(cuts) != 3 || cuts[2].Moment != 0 {
		t.Errorf("cuts of nothing: %v", cuts)
	}
}

func TestDescribe(t *testing.T) {
	rec := &Recording{Initial: letters("....."), Records: []Record{
		write(0, 512, 'x', 1, 2),
		fua(write(0, 512, 'D', 3, 4)), write(512, 1024, 'A', 5, 6), flush(7, 0), write(2048, 512, 'C', 8, 12), write(0, 512, 'L', 13, 14),
	}}
	got := NewReplayer(rec).Describe(Cut{Moment: 10, Strategy: LastKept}, 4)
	want := `write with FUA 0+512 at 3..4: durable
write 512+1024 at 5..6: lost
flush 0+0 at 7..in flight
write 2048+512 at 8..12: in flight then, kept
`
	if got != want {
		t.Errorf("described as\n%s, want\n%s", got, want)
	}
	torn := &Recording{Initial: letters("...."), Records: []Record{write(256, 1024, 'A', 1, 2)}}
	p := NewReplayer(torn)
	for seed := range uint64(1000) {
		cut := Cut{Moment: 2, Strategy: Torn, Seed: seed}
		if short(p.Build(cut)) == "[.256 A256].[A256 .256]." {
			if got, want := p.Describe(cut, 4), "write 256+1024 at 1..2: torn, kept is 256+256 1024+256\n"; got != want {
				t.Errorf("described as %q, want %q", got, want)
			}
			return
		}
	}
	t.Error("never torn in the middle")
}

func TestWriteImage(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	path := filepath.Join(testenv.TmpfsDir(t), "file")
	for _, size := range []int{200_000, 0, 1, 4095, 4096, 4097, 12_288, 100_001} {
		image := make([]byte, size)
		for range rng.IntN(5) {
			if size > 0 {
				image[rng.IntN(size)] = 1
			}
		}
		if size > 0 && rng.IntN(2) == 0 {
			image[size-1] = 1
		}
		if err := WriteImage(path, image); err != nil {
			t.Fatal(err)
		}
		if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, image) {
			t.Errorf("%d bytes: the file differs, or %v", size, err)
		}
	}
	if err := WriteImage(path, make([]byte, 1<<20)); err != nil {
		t.Fatal(err)
	}
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil || st.Size != 1<<20 || st.Blocks != 0 {
		t.Errorf("zeroes take up %d blocks of %d bytes (%v)", st.Blocks, st.Size, err)
	}
	if err := WriteImage(filepath.Join(path, "nowhere"), nil); err == nil || !strings.Contains(err.Error(), "nowhere") {
		t.Errorf("a path that can't be: %v", err)
	}
}
