// Package formattest is the conformance suite of image formats: Run puts an
// image format through everything that formats.Image promises, on real loops
// and real files.
//
// Beside every image stands a model, an array of bytes. Several loops at a time
// do random operations on ranges that are disjoint but close together, so that
// they share sectors, pages and clusters, and what they read must be what the
// model holds. Faulty is a storage that fails on demand and keeps account of
// what is not durable yet; it goes below an image to show how the format copes.
//
// PowerCut shows that images survive power cuts. A Recorder below the image notes
// what reaches the disk, another above it what the guest does; a Replayer builds
// the images that a cut could leave; and each of them is checked, opened, compared
// with what the guest was promised, and used.
//
// Every run has its own seed, which a failing test prints. Setting
// PLATTER_TEST_SEED repeats that run.
package formattest

import (
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"platter/aio"
	"platter/formats"
	"platter/integration/testenv"
)

// Config says how to get images of a format and what to run on them.
type Config struct {
	// Create makes an empty image of size bytes at path.
	Create func(t testing.TB, path string, size int64)
	// Open opens it. Unless wrap is nil, the image is to stand on what wrap
	// makes of the opened file.
	Open func(t testing.TB, path string, readOnly bool, wrap func(aio.Storage) aio.Storage) formats.Image
	// Dir makes a directory for the images; nil is t.TempDir.
	Dir func(t testing.TB) string
	// DataPath is the file that holds the guest's data of the image at path, if
	// that is another.
	DataPath func(path string) string
	// SizeAlign is what sizes of images must be a multiple of; 0 is 1.
	SizeAlign int64
	// Engines are run one after the other; nil is all: io_uring, native and threads.
	Engines []aio.Engine
	// Loops is how many loops work at a time; 0 is 3.
	Loops int
	// Merge has requests merged on their way to the image.
	Merge bool
	// Rounds is how many batches each loop does in the random tests; 0 is 40.
	Rounds int
	// Seed makes the run repeatable; 0 takes a new one.
	Seed uint64
}

var cases = []struct {
	name string
	run  func(*suite)
}{
	{"Sizes", sizes},
	{"Edges", edges},
	{"Segments", segments},
	{"LargestTransfer", largestTransfer},
	{"ZeroesReadZero", zeroesReadZero},
	{"BeyondEnd", beyondEnd},
	{"ReadOnly", readOnly},
	{"Random", random},
	{"Linearizable", linearizable},
	{"Extents", extents},
	{"Durable", durable},
	{"Faults", faults},
	{"RandomFaults", randomFaults},
	{"ShortFile", shortFile},
}

// Run runs the suite.
func Run(t *testing.T, c Config) {
	if c.Dir == nil {
		c.Dir = func(t testing.TB) string { return t.TempDir() }
	}
	if c.SizeAlign == 0 {
		c.SizeAlign = 1
	}
	if c.Engines == nil {
		c.Engines = []aio.Engine{aio.EngineIOUring, aio.EngineNative, aio.EngineThreads}
	}
	if c.Loops == 0 {
		c.Loops = 3
	}
	if c.Rounds == 0 {
		c.Rounds = 40
	}
	if c.Seed == 0 {
		c.Seed = newSeed(t)
	}
	for _, engine := range c.Engines {
		t.Run(engine.String(), func(t *testing.T) {
			for i, test := range cases {
				t.Run(test.name, func(t *testing.T) {
					test.run(newSuite(t, c, engine, uint64(i)))
				})
			}
		})
	}
}

func newSeed(t testing.TB) uint64 {
	if text := os.Getenv("PLATTER_TEST_SEED"); text != "" {
		seed, err := strconv.ParseUint(text, 10, 64)
		if err != nil {
			t.Fatalf("PLATTER_TEST_SEED: %v", err)
		}
		return seed
	}
	return uint64(time.Now().UnixNano())
}

// suite is what one test of the suite has: loops, each with a lane to it, and
// a fresh path.
type suite struct {
	Config
	t     *testing.T
	rng   *rand.Rand
	lanes []*lane
	path  string
}

func newSuite(t *testing.T, c Config, engine aio.Engine, number uint64) *suite {
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("to repeat: PLATTER_TEST_SEED=%d", c.Seed)
		}
	})
	s := &suite{Config: c, t: t, rng: rand.New(rand.NewPCG(c.Seed, number)), path: filepath.Join(c.Dir(t), "image")}
	for range c.Loops {
		l, err := aio.NewLoop(aio.LoopOptions{Engine: engine})
		if err != nil {
			testenv.Skip(t, err.Error())
		}
		s.lanes = append(s.lanes, newLane(t, l, rand.New(rand.NewPCG(s.rng.Uint64(), s.rng.Uint64()))))
	}
	return s
}

// open opens the image and closes it when the test ends, or before, with close.
func (s *suite) open(readOnly bool, wrap func(aio.Storage) aio.Storage) (image formats.Image, close func()) {
	s.t.Helper()
	image = s.Open(s.t, s.path, readOnly, wrap)
	if s.Merge {
		image = Merged(image)
	}
	closed := false
	close = func() {
		if closed {
			return
		}
		closed = true
		if err := image.Close(); err != nil {
			s.t.Errorf("close image: %v", err)
		}
	}
	s.t.Cleanup(close)
	return image, close
}

// fresh creates an image of about size bytes and opens it.
func (s *suite) fresh(size int64, wrap func(aio.Storage) aio.Storage) formats.Image {
	s.t.Helper()
	s.Create(s.t, s.path, s.aligned(size))
	image, _ := s.open(false, wrap)
	return image
}

// aligned makes a size one that the format can have.
func (s *suite) aligned(size int64) int64 {
	return (size + s.SizeAlign - 1) / s.SizeAlign * s.SizeAlign
}
