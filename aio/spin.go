package aio

import "time"

// spinner decides how long a loop looks for work before it sleeps. The window
// opens while sleeps turn out short, since spinning would have been the faster
// way, and closes when they turn out long, so that an idle loop uses no time.
type spinner struct {
	max    time.Duration
	window time.Duration
}

const spinFloor = 8 * time.Microsecond

// until looks for work for as long as the window allows, and reports whether
// ready said that there is some.
func (s *spinner) until(begin time.Time, ready func() bool) bool {
	if s.window == 0 {
		return false
	}
	for {
		for range 64 {
			if ready() {
				return true
			}
		}
		if time.Since(begin) >= s.window {
			return false
		}
	}
}

// waited tells how long it took from begin until there was work.
func (s *spinner) waited(begin time.Time) {
	if s.max == 0 {
		return
	}
	if time.Since(begin) <= s.max {
		s.window = min(max(2*s.window, spinFloor), s.max)
	} else if s.window /= 2; s.window < spinFloor {
		s.window = 0
	}
}
