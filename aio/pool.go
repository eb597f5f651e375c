package aio

import "sync"

// pool performs operations that may block on goroutines of their own, at most
// limit at a time. Workers stay when there is nothing to do: to begin one may
// allocate.
type pool struct {
	limit  int
	worker func() // work; made once, since go with a method allocates

	mu      sync.Mutex
	more    sync.Cond // something was queued for one that is idle
	queue   opList
	workers int
	idle    int // workers that wait and weren't told of anything yet
}

// threads is the process's pool: devices and file systems are shared, so a
// bound per loop would be none.
var threads = newPool(64)

func newPool(limit int) *pool {
	p := &pool{limit: limit}
	p.worker = p.work
	p.more.L = &p.mu
	return p
}

// run queues the operation. Its loop gets it back when it has been performed.
func (p *pool) run(o *op) {
	p.mu.Lock()
	p.queue.push(o)
	grow := p.idle == 0 && p.workers < p.limit
	if grow {
		p.workers++
	} else if p.idle > 0 {
		p.idle--
		p.more.Signal()
	}
	p.mu.Unlock()
	if grow {
		go p.worker()
	}
}

func (p *pool) work() {
	for {
		p.mu.Lock()
		for p.queue.empty() {
			p.idle++
			p.more.Wait()
		}
		o := p.queue.pop()
		p.mu.Unlock()
		o.perform()
		o.loop.complete(o)
	}
}
