package cli

import (
	"fmt"
	"runtime"

	"platter/aio"
	"platter/config"
)

// loopCount is how many loops there are to be.
func (c *serveCmd) loopCount() int {
	if c.Loops == 0 {
		return min(runtime.NumCPU(), 4)
	}
	return c.Loops
}

// checkQueues refuses numbers of loops and queues that can't be.
func (c *serveCmd) checkQueues() error {
	n := c.loopCount()
	if n < 1 || n > config.MaxLoops {
		return fmt.Errorf("--loops %d: choose from 1 to %d, or 0 for the default", n, config.MaxLoops)
	}
	if c.Queues < 0 || c.Queues > config.MaxQueues {
		return fmt.Errorf("--queues %d: choose from 1 to %d, or 0 for as many as come", c.Queues, config.MaxQueues)
	}
	named := map[string]bool{"": true}
	for _, arg := range c.Images {
		name, _ := c.split(arg)
		named[name] = true
	}
	seen := map[string]bool{}
	for _, q := range c.QueueLoops {
		switch {
		case !named[q.Export]:
			return fmt.Errorf("--queue-loops: there is no export named %q", q.Export)
		case seen[q.Export]:
			return fmt.Errorf("--queue-loops: two lists for %s", whose(q.Export))
		}
		seen[q.Export] = true
		for _, l := range q.Loops {
			if l >= n {
				return fmt.Errorf("--queue-loops: there is no loop %d: they are counted from 0 to %d (--loops %d)", l, n-1, n)
			}
		}
	}
	return nil
}

func whose(export string) string {
	if export == "" {
		return "every export"
	}
	return fmt.Sprintf("%q", export)
}

// place gives the exports the loops that --queue-loops has for them. The others get
// theirs from the server.
func (c *serveCmd) place(s *service) error {
	for _, e := range s.exports {
		list := c.queueLoops(e.Name())
		if list == nil {
			continue
		}
		loops := make([]*aio.Loop, len(list))
		for i, l := range list {
			loops[i] = s.loops[l]
		}
		if err := e.Move(loops); err != nil {
			return err
		}
	}
	return nil
}

// queueLoops is the list for an export, nil if there is none.
func (c *serveCmd) queueLoops(export string) (list []int) {
	for _, q := range c.QueueLoops {
		if q.Export == export {
			return q.Loops
		}
		if q.Export == "" {
			list = q.Loops
		}
	}
	return list
}
