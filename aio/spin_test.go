package aio

import (
	"testing"
	"time"
)

// TestSpinner: the window opens when work comes soon and grows as long as it
// comes too late for the window, never beyond its limit; it shrinks when work is
// late time after time, until it is closed.
func TestSpinner(t *testing.T) {
	const limit = time.Second
	soon, late := func() time.Time { return time.Now() }, func() time.Time { return time.Now().Add(-time.Hour) }
	s := spinner{max: limit}
	looks := 0
	look := func(after int) func() bool {
		looks = 0
		return func() bool { looks++; return looks == after }
	}
	if s.until(soon(), look(1)) || looks != 0 {
		t.Errorf("a closed window looked %d times", looks)
	}
	for range 30 {
		before := s.window
		s.waited(soon(), true)
		if s.window <= before && before < limit || s.window > limit || s.window < spinStart {
			t.Fatalf("from %v the window has grown to %v", before, s.window)
		}
	}
	if s.window != limit {
		t.Errorf("the window is %v wide after much success", s.window)
	}
	if !s.until(soon(), look(5)) || looks != 5 {
		t.Errorf("found after %d looks", looks)
	}
	if s.until(late(), look(1e9)) || looks == 0 {
		t.Errorf("not found, after %d looks", looks)
	}

	// Success, within the window or soon after it, makes up for what came late.
	for range 5 {
		for range spinMisses {
			if s.waited(late(), true); s.window != limit {
				t.Fatalf("the window has shrunk to %v", s.window)
			}
		}
		s.until(soon(), look(17))
		for range spinMisses {
			if s.waited(late(), true); s.window != limit {
				t.Fatalf("after success the window has shrunk to %v", s.window)
			}
		}
		s.waited(soon(), true)
	}

	// A timer is no work; but time that nothing came in is.
	for range spinMisses {
		s.waited(late(), true)
	}
	if s.waited(soon(), false); s.window != limit || s.misses != spinMisses {
		t.Errorf("a timer made the window %v wide, with %d misses", s.window, s.misses)
	}
	s.waited(soon(), true)

	waits := 0
	for s.window > 0 {
		before := s.window
		if s.waited(late(), waits%2 == 0); s.window > before || waits > 100 {
			t.Fatalf("after %d late answers the window is %v wide, before it was %v", waits, s.window, before)
		}
		waits++
	}
	if waits <= spinMisses+1 {
		t.Errorf("the window is closed after %d late answers", waits)
	}
	for range 2 * spinMisses {
		s.waited(late(), true)
	}
	if s.window != 0 {
		t.Error("the window opened again")
	}
}

// TestSpinnerLimits: a limit below the shortest window, or none at all, is kept.
func TestSpinnerLimits(t *testing.T) {
	for _, limit := range []time.Duration{0, 1, 10 * time.Microsecond, spinStart, 3 * spinStart} {
		s := spinner{max: limit}
		for range 10 {
			s.waited(time.Now().Add(time.Hour), true)
			if s.window != min(s.window, limit) || limit > 0 && s.window == 0 {
				t.Errorf("a window of %v, where %v is the limit", s.window, limit)
			}
		}
		for range 20 {
			s.waited(time.Now().Add(-time.Hour), true)
		}
		if s.window != 0 {
			t.Errorf("with a limit of %v a window of %v stays open", limit, s.window)
		}
	}
}
