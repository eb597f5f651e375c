package aio

import (
	"time"

	"golang.org/x/sys/unix"
)

// spinner decides how long a loop looks for work before it sleeps: for longer
// when work came soon after it had gone to sleep, and for shorter, in the end not
// at all, when work has been late several times in a row. So an idle loop uses no
// time, but one late answer doesn't cost the next ones their spin.
type spinner struct {
	max    time.Duration
	window time.Duration // 0, or from spinStart to max
	misses int           // waits since work came in time
}

const (
	// spinStart is the shortest window: a shorter one misses the client's
	// wake-up, and so is a waste.
	spinStart = 32 * time.Microsecond
	// spinMisses is how many waits in a row may be longer than max before the
	// window shrinks.
	spinMisses = 8
)

// until looks for work for as long as the window allows, and reports whether
// ready said that there is some.
func (s *spinner) until(begin time.Time, ready func() bool) bool {
	if s.window == 0 {
		return false
	}
	for {
		for range 16 {
			if ready() {
				s.misses = 0
				return true
			}
		}
		// The client may have been woken on this very processor, where the
		// kernel expects whoever woke it to go to sleep: let it run.
		_, _, _ = unix.RawSyscall(unix.SYS_SCHED_YIELD, 0, 0, 0)
		if ready() {
			s.misses = 0
			return true
		}
		if time.Since(begin) >= s.window {
			return false
		}
	}
}

// waited tells how long a loop that found nothing within the window has slept from
// begin, and whether it was for work that it woke, or for a timer, say, which it
// knew of.
func (s *spinner) waited(begin time.Time, found bool) {
	switch soon := time.Since(begin) <= s.max; {
	case soon && found:
		s.window, s.misses = min(max(2*s.window, spinStart), s.max), 0
	case soon:
	case s.misses < spinMisses:
		s.misses++
	case s.window >= 2*spinStart:
		s.window /= 2
	default:
		s.window = 0
	}
}
