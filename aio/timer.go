package aio

import (
	"slices"
	"time"
)

// Timer is a function that a loop calls later: Run, on the loop's thread.
type Timer struct {
	Run func()
	at  time.Time
}

// timers are a loop's timers, the soonest last. There are few: time-outs of
// connections, not of requests.
type timers []*Timer

// AfterFunc has f called on the loop's thread when d has passed; timers of the
// same moment in the order in which they were made. It is called on that thread.
func (l *Loop) AfterFunc(d time.Duration, f func()) *Timer {
	t := &Timer{Run: f}
	l.Reset(t, d)
	return t
}

// Reset has the timer run when d has passed, and no sooner if it was set
// already. A timer may be used again as often as one likes, which allocates
// nothing. It is called on the loop's thread.
func (l *Loop) Reset(t *Timer, d time.Duration) {
	l.Stop(t)
	t.at = time.Now().Add(d)
	l.timers.add(t)
}

// Stop forgets a timer. It is no error if it has run already. It is called on the
// loop's thread.
func (l *Loop) Stop(t *Timer) {
	if i := slices.Index(l.timers, t); i >= 0 {
		l.timers = slices.Delete(l.timers, i, i+1)
	}
}

// add puts a timer behind those that come sooner or at the same time.
func (t *timers) add(x *Timer) {
	i, _ := slices.BinarySearchFunc(*t, x, func(a, b *Timer) int { return b.at.Compare(a.at) })
	*t = slices.Insert(*t, i, x)
}

// next is how long a turn may wait; negative without timers.
func (t *timers) next() time.Duration {
	if len(*t) == 0 {
		return -1
	}
	return max(time.Until((*t)[len(*t)-1].at), 0)
}

// run calls the timers that are due. Those that they make are for a later turn.
func (t *timers) run() {
	if len(*t) == 0 {
		return
	}
	now := time.Now()
	for n := len(*t); n > 0 && (*t)[n-1].at.Before(now); n = len(*t) {
		due := (*t)[n-1]
		(*t)[n-1] = nil
		*t = (*t)[:n-1]
		due.Run()
	}
}
