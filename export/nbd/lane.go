package nbd

import (
	"slices"
	"sync"

	"platter/aio"
)

// lane is one loop and what its connections share.
type lane struct {
	loop   *aio.Loop
	budget budget
	stays  bool // also without connections
}

// lanes are those of a server: one for each loop that it was made with, and one
// for each other on which it has connections, since an export was moved there.
type lanes struct {
	mu  sync.Mutex
	all []*lane
}

// on finds the lane of a loop, on whose thread it is called.
func (s *lanes) on(l *aio.Loop) *lane {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, x := range s.all {
		if x.loop == l {
			return x
		}
	}
	x := &lane{loop: l, budget: budget{left: loopBudget}}
	s.all = append(s.all, x)
	return x
}

// vacate forgets a lane without connections. It is called on its loop's thread.
func (s *lanes) vacate(x *lane) {
	if x.stays || len(x.budget.conns) > 0 {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.all = slices.DeleteFunc(s.all, func(y *lane) bool { return x == y })
}
