package aio

import (
	"slices"
	"testing"
	"time"
)

func TestTimers(t *testing.T) {
	eachEngine(t, func(t *testing.T, l *Loop) {
		var order []int
		over := make(chan struct{})
		note := func(i int) func() { return func() { order = append(order, i) } }
		begin := time.Now()
		l.Call(func() {
			l.AfterFunc(30*time.Millisecond, func() {
				if time.Since(begin) < 30*time.Millisecond {
					t.Error("a timer ran early")
				}
				// A timer of a timer, and one that has run already.
				first := l.AfterFunc(0, note(5))
				l.AfterFunc(time.Millisecond, func() {
					l.Stop(first)
					close(over)
				})
			})
			l.AfterFunc(10*time.Millisecond, note(2))
			stopped := l.AfterFunc(20*time.Millisecond, note(3))
			l.AfterFunc(-time.Second, note(0))
			l.AfterFunc(0, note(1))
			l.AfterFunc(20*time.Millisecond, note(4))
			l.AfterFunc(1000*time.Hour, note(6))
			again := l.AfterFunc(0, note(7))
			l.Reset(again, 1000*time.Hour)
			l.Stop(stopped)
			l.Stop(stopped)
		})
		waitFor(t, over, "timers")
		l.Call(func() {
			if want := []int{0, 1, 2, 4, 5}; !slices.Equal(order, want) {
				t.Errorf("timers ran in the order %v", order)
			}
		})
	})
}

// TestTimerOrder: timers of one moment run in the order in which they were made,
// and one that a timer makes is for a later turn.
func TestTimerOrder(t *testing.T) {
	l := &Loop{}
	var order []int
	moment := time.Now().Add(-time.Second)
	for i := range 5 {
		l.timers.add(&Timer{at: moment, Run: func() { order = append(order, i) }})
	}
	l.AfterFunc(-time.Millisecond, func() {
		order = append(order, 5)
		l.AfterFunc(time.Hour, func() {})
		l.AfterFunc(0, func() { order = append(order, 6) })
	})
	l.timers.run()
	if !slices.Equal(order, []int{0, 1, 2, 3, 4, 5}) || len(l.timers) != 2 {
		t.Errorf("order %v, %d timers left", order, len(l.timers))
	}
	if d := l.timers.next(); d != 0 {
		t.Errorf("the next one is due in %v", d)
	}
	if d := (&timers{}).next(); d >= 0 {
		t.Errorf("without timers: %v", d)
	}
}

func TestMilliseconds(t *testing.T) {
	for _, tc := range []struct {
		d    time.Duration
		want int
	}{{-1, -1}, {0, 0}, {1, 1}, {time.Millisecond, 1}, {time.Millisecond + 1, 2}, {1 << 62, 1<<31 - 1}, {10000 * time.Hour, 1<<31 - 1}} {
		if got := milliseconds(tc.d); got != tc.want {
			t.Errorf("%v is %d ms, want %d", tc.d, got, tc.want)
		}
	}
}
