package aio

import (
	"testing"
	"time"
)

// TestSpinner: the window opens when work comes soon, never beyond its limit,
// and closes when work is late time after time.
func TestSpinner(t *testing.T) {
	const limit = time.Second
	soon, late := time.Now(), time.Now().Add(-time.Hour)
	s := spinner{max: limit}
	looks := 0
	look := func(after int) func() bool {
		looks = 0
		return func() bool { looks++; return looks == after }
	}
	if s.until(soon, look(1)) || looks != 0 {
		t.Errorf("a closed window looked %d times", looks)
	}
	for range 30 {
		if s.waited(soon); s.window <= 0 || s.window > limit {
			t.Fatalf("the window is %v wide", s.window)
		}
	}
	if !s.until(soon, look(5)) || looks != 5 {
		t.Errorf("found after %d looks", looks)
	}
	if s.until(late, look(1e9)) || looks == 0 {
		t.Errorf("not found, after %d looks", looks)
	}
	closed := 0
	for s.window > 0 {
		if s.waited(late); closed > 100 {
			t.Fatal("the window stays open")
		}
		closed++
	}
	s.waited(late)
	if s.window != 0 {
		t.Error("the window opened again")
	}
	never := spinner{}
	for _, begin := range []time.Time{soon, late, time.Now()} {
		if never.waited(begin); never.window != 0 {
			t.Error("a spinner without a limit spins")
		}
	}
}
