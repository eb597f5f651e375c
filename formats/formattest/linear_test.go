package formattest

import (
	"testing"

	"platter/aio"
)

// TestCheckRegister shows histories of a sector that are in order, and that are
// not.
func TestCheckRegister(t *testing.T) {
	write := func(tag uint64, begin, end int64) *event {
		return &event{op: aio.OpWrite, tag: tag, begin: begin, end: end}
	}
	zero := func(begin, end int64) *event { return &event{op: aio.OpWriteZeroes, begin: begin, end: end} }
	discard := func(begin, end int64) *event { return &event{op: aio.OpDiscard, begin: begin, end: end} }
	read := func(tag uint64, begin, end int64) *event {
		return &event{op: aio.OpRead, found: []uint64{tag, tag}, begin: begin, end: end}
	}
	for _, c := range []struct {
		name   string
		events []*event
		fine   bool
	}{
		{"new", []*event{read(0, 1, 2)}, true},
		{"what nobody wrote", []*event{read(7, 1, 2)}, false},
		{"written before", []*event{write(7, 1, 2), read(7, 3, 4)}, true},
		{"lost", []*event{write(7, 1, 2), read(0, 3, 4)}, false},
		{"under way", []*event{write(7, 1, 4), read(7, 2, 3)}, true},
		{"under way, not yet", []*event{write(7, 1, 4), read(0, 2, 3)}, true},
		{"from the future", []*event{read(7, 1, 2), write(7, 3, 4)}, false},
		{"overwritten", []*event{write(7, 1, 2), write(8, 3, 4), read(7, 5, 6)}, false},
		{"two at a time", []*event{write(7, 1, 4), write(8, 2, 3), read(7, 5, 6)}, true},
		{"zeroed", []*event{write(7, 1, 2), zero(3, 4), read(0, 5, 6)}, true},
		{"not zeroed", []*event{write(7, 1, 2), zero(3, 4), read(7, 5, 6)}, false},
		{"discarded", []*event{write(7, 1, 2), discard(3, 4), read(0, 5, 6)}, true},
		{"not discarded", []*event{write(7, 1, 2), discard(3, 4), read(7, 5, 6)}, true},
		{"back in time", []*event{write(7, 1, 2), write(8, 3, 10), read(8, 4, 5), read(7, 6, 7)}, false},
		{"back in time, both over", []*event{write(7, 1, 4), write(8, 5, 10), read(8, 6, 7), read(7, 8, 9)}, false},
	} {
		err := checkRegister(c.events, 0)
		if c.fine != (err == nil) {
			t.Errorf("%s: %v", c.name, err)
		}
	}
}
