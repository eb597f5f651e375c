package formattest

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"

	"platter/aio"
	"platter/formats"
	"platter/integration/testenv"
)

// PowerCutConfig says how to get images of a format and how to check them. Its
// functions return errors because they are called on several goroutines.
type PowerCutConfig struct {
	// Create makes an empty image of size bytes at path.
	Create func(path string, size int64) error
	// DataPath is the second file that the image at path consists of, which
	// holds the guest's data, if there is one.
	DataPath func(path string) string
	// Open opens it. Unless wrap is nil, the image is to stand on what wrap
	// makes of the opened file, or of the opened files, that of the data last,
	// and do all that it does to them by that.
	Open func(path string, readOnly bool, wrap func(aio.Storage) aio.Storage) (formats.Image, error)
	// Check looks at the file that a power cut left, before it is opened. It
	// may have leaks. nil checks nothing.
	Check func(path string) error
	// CheckClean looks at the file when the image was used again and closed.
	// nil is Check.
	CheckClean func(path string) error
	// Dir makes a directory for the images; nil makes one in memory.
	Dir func(t testing.TB) string
	// Size is the image's, a multiple of 512; 0 is 1 MiB.
	Size int64
	// Engines are run one after the other; nil is io_uring and threads.
	Engines []aio.Engine
	// Loops is how many loops work at a time; 0 is 3.
	Loops int
	// Rounds is how many batches each loop does; 0 is 100.
	Rounds int
	// Cuts is how many power cuts are checked with each engine; 0 is 500.
	Cuts int
	// Seed makes the run repeatable, as far as threads are; 0 takes a new one.
	Seed uint64
}

// PowerCut shows that an image survives power cuts. Several loops write to it at
// the same time while a Recorder notes what becomes of its file. Then images are
// built as power cuts could have left them: each must pass the check, open, hold
// in each sector what was flushed or something newer, take writes, and pass the
// check after a clean close.
//
// Every sector that the guest writes says which one it is and which write, so
// another sector's bytes are found wherever they turn up.
//
// A failure tells the cut and the last operations before it. The images of failed
// cuts are in the test's artifact directory, which go test -artifacts keeps.
func PowerCut(t *testing.T, c PowerCutConfig) {
	t.Helper()
	if c.Seed == 0 {
		c.Seed = newSeed(t)
	}
	if c.Engines == nil {
		c.Engines = []aio.Engine{aio.EngineIOUring, aio.EngineThreads}
	}
	for _, engine := range c.Engines {
		t.Run(engine.String(), func(t *testing.T) {
			if err := c.run(t, engine); err != nil {
				t.Fatalf("%v\nto repeat: PLATTER_TEST_SEED=%d", err, c.Seed)
			}
		})
	}
}

// run is PowerCut on one engine. What is wrong with the format is an error; t is
// for what the test itself needs.
func (c PowerCutConfig) run(t testing.TB, engine aio.Engine) error {
	t.Helper()
	if c.Dir == nil {
		c.Dir = testenv.TmpfsDir
	}
	if c.Check == nil {
		c.Check = func(string) error { return nil }
	}
	if c.CheckClean == nil {
		c.CheckClean = c.Check
	}
	c.Size = cmp.Or(c.Size, 1<<20)
	c.Loops, c.Rounds, c.Cuts = cmp.Or(c.Loops, 3), cmp.Or(c.Rounds, 100), cmp.Or(c.Cuts, 500)
	rng := rand.New(rand.NewPCG(c.Seed, uint64(engine)))
	lag := rand.New(rand.NewPCG(rng.Uint64(), rng.Uint64()))
	dir := c.Dir(t)

	lanes := newLanes(t, engine, c.Loops, rng)
	path, err := imageIn(dir, "recorded")
	if err != nil {
		return err
	}
	disks, guest, err := c.record(path, lanes, lag)
	if err != nil {
		return err
	}
	h := newHistory(guest, c.Size)
	if err := h.reads(); err != nil {
		return err
	}
	var marks []int // where the guest is promised something
	for _, r := range guest.Records {
		if r.Completed != 0 && (r.Op == aio.OpFlush || r.Flags&aio.FlagFUA != 0) {
			marks = append(marks, r.Completed)
		}
	}
	cuts := together(disks).Cuts(rng, c.Cuts, marks...)
	checkers := make([]*checker, 2)
	for i, ln := range newLanes(t, engine, len(checkers), rng) {
		ch := &checker{PowerCutConfig: c, history: h, lane: ln}
		if ch.path, err = imageIn(dir, fmt.Sprintf("cut-%d", i)); err != nil {
			return err
		}
		for _, disk := range disks {
			ch.replayers = append(ch.replayers, NewReplayer(disk))
		}
		checkers[i] = ch
	}
	var errs []error
	for _, f := range checkAll(checkers, cuts) {
		errs = append(errs, fmt.Errorf("cut %d of %d, %v: %w", f.number, len(cuts), f.cut, f.err))
		for i, path := range c.files(filepath.Join(t.ArtifactDir(), fmt.Sprintf("cut-%d", f.number))) {
			replayer := checkers[0].replayers[i]
			errs = append(errs, fmt.Errorf("the last operations before it:\n%sThe image is %s", replayer.Describe(f.cut, 20), path),
				WriteImage(path, replayer.Build(f.cut)))
		}
	}
	return errors.Join(errs...)
}

// imageIn makes a folder for an image, since its name for its data file must not
// be another's.
func imageIn(dir, folder string) (path string, err error) {
	dir = filepath.Join(dir, folder)
	return filepath.Join(dir, "image"), os.Mkdir(dir, 0o755)
}

// files are the files of the image at path.
func (c PowerCutConfig) files(path string) []string {
	if c.DataPath == nil {
		return []string{path}
	}
	return []string{path, c.DataPath(path)}
}

// together is what happened to several files, to find moments in.
func together(disks []*Recording) *Recording {
	all := &Recording{Moments: disks[0].Moments}
	for _, disk := range disks {
		all.Records = append(all.Records, disk.Records...)
	}
	slices.SortFunc(all.Records, func(a, b Record) int { return a.Submitted - b.Submitted })
	return all
}

func newLanes(t testing.TB, engine aio.Engine, n int, rng *rand.Rand) []*lane {
	t.Helper()
	lanes := make([]*lane, n)
	for i := range lanes {
		l, err := aio.NewLoop(aio.LoopOptions{Engine: engine})
		if err != nil {
			testenv.Skip(t, err.Error())
		}
		lanes[i] = newLane(t, l, rand.New(rand.NewPCG(rng.Uint64(), rng.Uint64())))
	}
	return lanes
}

// sessions is how often the image is opened while it is recorded: what a format
// does when it closes an image and opens it again is part of it.
const sessions = 2

// record has the lanes work on an image and returns what happened to its files
// and to itself.
func (c PowerCutConfig) record(path string, lanes []*lane, lag *rand.Rand) (disks []*Recording, guest *Recording, err error) {
	if err := c.Create(path, c.Size); err != nil {
		return nil, nil, fmt.Errorf("create: %w", err)
	}
	clock := new(Clock)
	var below []*Recorder
	for _, file := range c.files(path) {
		initial, err := os.ReadFile(file)
		if err != nil {
			return nil, nil, err
		}
		r := NewRecorder(nil, clock, initial)
		r.Lag(lag)
		below = append(below, r)
	}
	above := NewRecorder(nil, clock, nil)
	above.Reads()
	for session := range sessions {
		wrapped := 0
		image, err := c.Open(path, false, func(file aio.Storage) aio.Storage {
			r := below[wrapped]
			wrapped++
			r.Reopen(file)
			return r
		})
		if err != nil {
			return nil, nil, fmt.Errorf("open: %w", err)
		}
		if wrapped != len(below) {
			err = errors.New("open does not use wrap")
		} else if image.Size() != c.Size {
			err = fmt.Errorf("size is %d, want %d", image.Size(), c.Size)
		} else {
			above.Reopen(image)
			err = c.session(above, image.Limits(), lanes, uint64(session))
		}
		if e := image.Close(); e != nil {
			err = errors.Join(err, fmt.Errorf("close: %w", e))
		}
		if err != nil {
			return nil, nil, err
		}
	}
	for _, r := range below {
		disks = append(disks, r.Recording())
	}
	return disks, above.Recording(), nil
}

// session reads the image, has every lane do random batches, and leaves writes
// that are not flushed. Sessions write different versions.
func (c PowerCutConfig) session(image aio.Storage, limits formats.Limits, lanes []*lane, number uint64) error {
	if !limits.MultiConn {
		lanes = lanes[:1] // a flush speaks for one loop only
	}
	if err := lanes[0].readInto(image, limits, make([]byte, c.Size)); err != nil {
		return err
	}
	errs := make([]error, len(lanes))
	var over sync.WaitGroup
	for i, ln := range lanes {
		g := &guest{lane: ln, size: c.Size, limits: limits, version: (number*uint64(len(lanes)) + uint64(i)) << 32}
		over.Go(func() {
			for range (c.Rounds + sessions - 1) / sessions {
				if errs[i] = g.round(image); errs[i] != nil {
					return
				}
			}
			last := g.complete(&aio.Request{Op: aio.OpWrite})
			g.submit(image, last)
			errs[i] = outcome(last)
		})
	}
	over.Wait()
	return errors.Join(errs...)
}

// failure is a cut that the format did not survive.
type failure struct {
	number int
	cut    Cut
	err    error
}

// enough failures have been seen.
const enough = 3

// checkAll has the checkers share the cuts.
func checkAll(checkers []*checker, cuts []Cut) []failure {
	var mu sync.Mutex
	var failed []failure
	next := 0
	take := func() (int, bool) {
		mu.Lock()
		defer mu.Unlock()
		next++
		return next - 1, next <= len(cuts) && len(failed) < enough
	}
	var over sync.WaitGroup
	for _, ch := range checkers {
		over.Go(func() {
			for n, ok := take(); ok; n, ok = take() {
				if err := ch.check(cuts[n]); err != nil {
					mu.Lock()
					failed = append(failed, failure{n, cuts[n], err})
					mu.Unlock()
				}
			}
		})
	}
	over.Wait()
	slices.SortFunc(failed, func(a, b failure) int { return a.number - b.number })
	return failed
}

// checker checks one cut at a time, on a loop of its own.
type checker struct {
	PowerCutConfig
	history   *history
	replayers []*Replayer // of each file
	lane      *lane
	path      string
	want      []byte // what the image is to hold
	got       []byte
}

func (ch *checker) check(cut Cut) error {
	for i, path := range ch.files(ch.path) {
		if err := WriteImage(path, ch.replayers[i].Build(cut)); err != nil {
			return err
		}
	}
	if err := ch.Check(ch.path); err != nil {
		return fmt.Errorf("check: %w", err)
	}
	ch.want, ch.got = slices.Grow(ch.want[:0], int(ch.Size))[:ch.Size], slices.Grow(ch.got[:0], int(ch.Size))[:ch.Size]
	err := ch.using(false, func(image formats.Image) error {
		if err := ch.lane.readInto(image, image.Limits(), ch.want); err != nil {
			return err
		}
		if err := ch.history.afterCut(cut.Moment, 0, ch.want); err != nil {
			return err
		}
		return ch.goOn(image, cut.Seed)
	})
	if err != nil {
		return err
	}
	if err := ch.CheckClean(ch.path); err != nil {
		return fmt.Errorf("check after going on and a clean close: %w", err)
	}
	return ch.using(true, func(image formats.Image) error {
		if err := ch.lane.readInto(image, image.Limits(), ch.got); err != nil {
			return err
		}
		if bytes.Equal(ch.got, ch.want) {
			return nil
		}
		for at := 0; at < len(ch.got); at += sectorSize {
			if !bytes.Equal(ch.got[at:at+sectorSize], ch.want[at:at+sectorSize]) {
				return fmt.Errorf("after going on and a clean close: sector %d (byte %d) holds %s, want %s",
					at/sectorSize, at, describe(ch.got[at:at+sectorSize]), describe(ch.want[at:at+sectorSize]))
			}
		}
		return nil
	})
}

// using opens the image for f and closes it.
func (ch *checker) using(readOnly bool, f func(formats.Image) error) error {
	image, err := ch.Open(ch.path, readOnly, nil)
	if err != nil {
		return fmt.Errorf("open: %w", err)
	}
	if image.Size() != ch.Size {
		err = fmt.Errorf("size is %d, want %d", image.Size(), ch.Size)
	} else {
		err = f(image)
	}
	if e := image.Close(); e != nil {
		err = errors.Join(err, fmt.Errorf("close: %w", e))
	}
	return err
}

// goOn does a few more writes and notes what the image is to hold.
func (ch *checker) goOn(image formats.Image, seed uint64) error {
	ch.lane.rng = rand.New(rand.NewPCG(seed, 0))
	g := &guest{lane: ch.lane, size: ch.Size, limits: image.Limits(), version: 1 << 63}
	for range 10 {
		r := &aio.Request{Op: aio.OpWrite}
		if g.rng.IntN(5) == 0 {
			r.Op = aio.OpWriteZeroes
		}
		g.complete(r)
		g.submit(image, r)
		if err := outcome(r); err != nil {
			return fmt.Errorf("go on: %w", err)
		}
		if at := ch.want[r.Offset:r.End()]; r.Op == aio.OpWrite {
			copy(at, stamped(r.Offset, r.Length, g.version))
		} else {
			clear(at)
		}
	}
	return nil
}
