package aio

import (
	"time"

	"golang.org/x/sys/unix"
)

// spinner decides how long a loop looks for work before it sleeps. It spins
// while that tends to be worth it: when work came sooner than a spin lasts, and
// until it has been late several times in a row, so that an idle loop uses no
// time but one late answer doesn't cost the next ones their spin.
type spinner struct {
	max    time.Duration
	window time.Duration // max or 0
	misses int           // waits since work came in time
}

// spinMisses is how many waits in a row may be longer than a spin.
const spinMisses = 8

// until looks for work for as long as the window allows, and reports whether
// ready said that there is some.
func (s *spinner) until(begin time.Time, ready func() bool) bool {
	if s.window == 0 {
		return false
	}
	for {
		for range 16 {
			if ready() {
				return true
			}
		}
		// The client may have been woken on this very processor, where the
		// kernel expects whoever woke it to go to sleep: let it run.
		_, _, _ = unix.RawSyscall(unix.SYS_SCHED_YIELD, 0, 0, 0)
		if ready() {
			return true
		}
		if time.Since(begin) >= s.window {
			return false
		}
	}
}

// waited tells how long it took from begin until there was work.
func (s *spinner) waited(begin time.Time) {
	switch {
	case time.Since(begin) <= s.max:
		s.window, s.misses = s.max, 0
	case s.misses < spinMisses:
		s.misses++
	default:
		s.window = 0
	}
}
