package export

import (
	"errors"
	"fmt"
	"time"
)

// Throttle bounds what an export does, all of its queues together. The zero
// value bounds nothing.
//
// It counts requests as they come from clients, before merging. Writes are
// writes, discards and write-zeroes; the last two carry no data, and so count as
// requests only. Flushes are free.
type Throttle struct {
	IOPS Rates // requests
	BPS  Rates // bytes
}

// Rates are numbers per second; 0 stands for no bound. A request must keep to
// Total and to the one of its own kind.
type Rates struct {
	Total, Read, Write int64
	// Burst is how much may be done at once after a rest, by each of the rates. 0
	// stands for a tenth of a second's worth. Less than comes within two
	// milliseconds is no use: timers are no finer. A request of more bytes than
	// the burst waits for all of it, and the next ones wait until the rest has
	// come too.
	Burst int64
}

// MinBytesBurst is the smallest burst of bytes: a sector.
const MinBytesBurst = 512

const (
	maxIOPS = 1_000_000_000
	maxBPS  = 1 << 50
	// finest is the shortest burst that a rate can be kept with.
	finest = 2 * time.Millisecond
	// usual is the burst when none is set.
	usual = time.Second / 10
)

// ErrThrottle is returned for a throttle that makes no sense.
var ErrThrottle = errors.New("impossible throttle")

// Check tells whether the throttle makes sense, and if not, which value of it.
func (t Throttle) Check() error {
	if err := t.IOPS.check("iops", 1, maxIOPS); err != nil {
		return err
	}
	return t.BPS.check("bps", MinBytesBurst, maxBPS)
}

func (r Rates) check(name string, minBurst, most int64) error {
	for _, v := range []struct {
		suffix string
		value  int64
		least  int64
	}{{"", r.Total, 1}, {"-read", r.Read, 1}, {"-write", r.Write, 1}, {"-burst", r.Burst, minBurst}} {
		if v.value != 0 && (v.value < v.least || v.value > most) {
			return fmt.Errorf("%w: %s%s %d: choose from %d to %d, or 0 for none", ErrThrottle, name, v.suffix, v.value, v.least, most)
		}
	}
	if r.Burst != 0 && r.Total == 0 && r.Read == 0 && r.Write == 0 {
		return fmt.Errorf("%w: %s-burst %d: there is no rate that it belongs to: set %s, %s-read or %s-write too", ErrThrottle, name, r.Burst, name, name, name)
	}
	return nil
}

// burst is the burst of one of the rates.
func (r Rates) burst(rate int64, least float64) float64 {
	burst := float64(r.Burst)
	if burst == 0 {
		burst = float64(rate) * usual.Seconds()
	}
	return max(burst, float64(rate)*finest.Seconds(), least)
}

// SetThrottle bounds what the export does from now on; requests that wait go as
// the new bounds allow. The error is ErrThrottle, and then nothing has changed.
// It may be called from any goroutine, while the export serves.
func (e *Export) SetThrottle(t Throttle) error {
	if err := t.Check(); err != nil {
		return &Error{Op: "throttle", Export: e.opts.Name, Err: err}
	}
	s := &e.turns
	s.mu.Lock()
	defer s.mu.Unlock()
	s.set(t, clock())
	s.active.Store(t != Throttle{})
	if s.keeper != nil { // its timer is set for the old rates
		s.keeper.rouse()
	}
	return nil
}

// Throttle is what the export is bounded to.
func (e *Export) Throttle() Throttle {
	e.turns.mu.Lock()
	defer e.turns.mu.Unlock()
	return e.turns.throttle
}
