package formattest

import (
	"errors"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"platter/aio"
	"platter/formats"
	"platter/formats/raw"
)

// TestPowerCutRaw: what the guest does to a raw image is what reaches the disk,
// so it keeps every promise that a disk keeps.
func TestPowerCutRaw(t *testing.T) {
	c := rawConfig()
	c.Cuts = 250
	PowerCut(t, c)
}

func rawConfig() PowerCutConfig {
	return PowerCutConfig{
		Create: func(path string, size int64) error { return raw.Create(path, size, raw.CreateOptions{}) },
		Open: func(path string, readOnly bool, wrap func(aio.Storage) aio.Storage) (formats.Image, error) {
			f, err := aio.OpenFile(path, aio.FileOptions{ReadOnly: readOnly})
			if err != nil {
				return nil, err
			}
			var storage aio.Storage = f
			if wrap != nil {
				storage = wrap(f)
			}
			return raw.New(storage, raw.Options{Path: path, ReadOnly: readOnly})
		},
	}
}

// TestPowerCutToy: a format with a table survives if it does everything in the
// right order.
func TestPowerCutToy(t *testing.T) {
	c := toyConfig(t, noBug, noBug, true)
	c.Cuts = 250
	PowerCut(t, c)
}

// expectFound runs PowerCut on a format that must not pass it, and sees that one
// of the errors is wanted.
func expectFound(t *testing.T, c PowerCutConfig, wanted ...string) {
	t.Helper()
	err := c.run(t, aio.EngineThreads)
	if err == nil {
		t.Fatalf("not found (PLATTER_TEST_SEED=%d)", c.Seed)
	}
	if !slices.ContainsFunc(wanted, func(s string) bool { return strings.Contains(err.Error(), s) }) {
		t.Errorf("found as: %v\nwant one of %q (PLATTER_TEST_SEED=%d)", err, wanted, c.Seed)
	}
}

// TestPowerCutFinds breaks the toy in every way and sees that it is found, by
// what the guest reads alone.
func TestPowerCutFinds(t *testing.T) {
	bugs := []toyBug{flushesNothing, ignoresFUA, mapsBeforeData, mapsInFlight, reusesEarly, clearsFirst,
		forgetsAllocations, closesEarly, readsNeighbour}
	for _, bug := range bugs {
		t.Run(string(bug), func(t *testing.T) {
			expectFound(t, toyConfig(t, bug, noBug, false),
				"overwritten for good", "holds bytes of sector", "holds what was never written there", "input/output error")
		})
	}
}

// TestPowerCutFindsAfterwards: images that power cuts left must not only be
// whole, but work.
func TestPowerCutFindsAfterwards(t *testing.T) {
	for _, c := range []struct {
		bug  toyBug
		want string
	}{
		{forgetsAllocations, "after going on and a clean close: sector"},
		{closesEarly, "after going on and a clean close: sector"},
		{failsWrites, "go on: write"},
	} {
		t.Run(string(c.bug), func(t *testing.T) {
			expectFound(t, toyConfig(t, noBug, c.bug, false), c.want)
		})
	}
}

// TestPowerCutChecks: the checks that a format brings see every image, and the
// guest's promises are not all that counts.
func TestPowerCutChecks(t *testing.T) {
	t.Run("Tables", func(t *testing.T) {
		expectFound(t, toyConfig(t, noBug, forgetsAllocations, true), "check after going on and a clean close: blocks")
	})
	count := func(fail int) (check func(string) error, calls *atomic.Int32) {
		calls = new(atomic.Int32)
		return func(path string) error {
			if _, err := os.Stat(path); err != nil {
				return err
			}
			if int(calls.Add(1)) == fail {
				return errors.New("unclean")
			}
			return nil
		}, calls
	}
	t.Run("Each", func(t *testing.T) {
		c := rawConfig()
		c.Cuts, c.Engines = 20, []aio.Engine{aio.EngineThreads}
		var dirty, clean *atomic.Int32
		c.Check, dirty = count(0)
		c.CheckClean, clean = count(0)
		PowerCut(t, c)
		if dirty.Load() != 20 || clean.Load() != 20 {
			t.Errorf("%d checks and %d when closed, of 20 cuts", dirty.Load(), clean.Load())
		}
	})
	t.Run("AfterCut", func(t *testing.T) {
		c := rawConfig()
		c.Cuts = 30
		c.Check, _ = count(7)
		c.CheckClean, _ = count(0)
		expectFound(t, c, "check: unclean")
	})
	t.Run("WhenClosed", func(t *testing.T) {
		c := rawConfig()
		c.Cuts = 30
		c.CheckClean, _ = count(7)
		expectFound(t, c, "check after going on and a clean close: unclean")
	})
}

// resized is an image that tells a wrong size, or fails to close.
type resized struct {
	formats.Image
	size     int64
	closeErr error
}

func (r resized) Size() int64  { return r.size }
func (r resized) Close() error { return errors.Join(r.Image.Close(), r.closeErr) }

// TestPowerCutErrors: whatever a format's functions say is reported.
func TestPowerCutErrors(t *testing.T) {
	bad := errors.New("bad luck")
	good := rawConfig().Open
	for _, c := range []struct {
		name  string
		want  string
		spoil func(*PowerCutConfig)
	}{
		{"Create", "create: bad luck", func(c *PowerCutConfig) { c.Create = func(string, int64) error { return bad } }},
		{"Open", "open: bad luck", func(c *PowerCutConfig) {
			c.Open = func(string, bool, func(aio.Storage) aio.Storage) (formats.Image, error) { return nil, bad }
		}},
		{"NoWrap", "does not use wrap", func(c *PowerCutConfig) {
			c.Open = func(path string, readOnly bool, _ func(aio.Storage) aio.Storage) (formats.Image, error) {
				return good(path, readOnly, nil)
			}
		}},
		{"Size", "size is 5, want 1048576", func(c *PowerCutConfig) {
			c.Open = func(path string, readOnly bool, wrap func(aio.Storage) aio.Storage) (formats.Image, error) {
				image, err := good(path, readOnly, wrap)
				return resized{Image: image, size: 5}, err
			}
		}},
		{"Close", "close: bad luck", func(c *PowerCutConfig) {
			c.Open = func(path string, readOnly bool, wrap func(aio.Storage) aio.Storage) (formats.Image, error) {
				image, err := good(path, readOnly, wrap)
				return resized{image, image.Size(), bad}, err
			}
		}},
		{"OpenAfterCut", "open: bad luck", func(c *PowerCutConfig) {
			c.Open = func(path string, readOnly bool, wrap func(aio.Storage) aio.Storage) (formats.Image, error) {
				if wrap == nil {
					return nil, bad
				}
				return good(path, readOnly, wrap)
			}
		}},
		{"OpenReadOnly", "open: bad luck", func(c *PowerCutConfig) {
			c.Open = func(path string, readOnly bool, wrap func(aio.Storage) aio.Storage) (formats.Image, error) {
				if readOnly {
					return nil, bad
				}
				return good(path, readOnly, wrap)
			}
		}},
		{"SizeAfterCut", "size is 512, want 1048576", func(c *PowerCutConfig) {
			c.Open = func(path string, readOnly bool, wrap func(aio.Storage) aio.Storage) (formats.Image, error) {
				image, err := good(path, readOnly, wrap)
				if wrap == nil {
					return resized{Image: image, size: 512}, err
				}
				return image, err
			}
		}},
		{"CloseAfterCut", "close: bad luck", func(c *PowerCutConfig) {
			c.Open = func(path string, readOnly bool, wrap func(aio.Storage) aio.Storage) (formats.Image, error) {
				image, err := good(path, readOnly, wrap)
				if wrap == nil {
					return resized{image, image.Size(), bad}, err
				}
				return image, err
			}
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			config := rawConfig()
			config.Cuts = 5
			c.spoil(&config)
			expectFound(t, config, c.want)
		})
	}
}

// TestPowerCutReports: a failure says what to look at.
func TestPowerCutReports(t *testing.T) {
	c := toyConfig(t, flushesNothing, noBug, false)
	err := c.run(t, aio.EngineThreads)
	if err == nil {
		t.Fatal("not found")
	}
	text := err.Error()
	for _, want := range []string{" of 500, at moment ", ", seed ", "the last operations before it:\n", "write ", "The image is "} {
		if !strings.Contains(text, want) {
			t.Errorf("no %q in: %v", want, err)
		}
	}
	_, path, _ := strings.Cut(text, "The image is ")
	path, _, _ = strings.Cut(path, "\n")
	if info, err := os.Stat(path); err != nil || info.Size() == 0 {
		t.Errorf("%q: %v, %v", path, info, err)
	}
	if n := strings.Count(text, "The image is "); n < 1 || n > enough+1 {
		t.Errorf("%d failures", n)
	}
}
