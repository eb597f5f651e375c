package aio

import "sync"

// pool performs operations that may block on goroutines of their own, at most
// limit at a time. A worker lives as long as there is something to do.
type pool struct {
	limit  int
	worker func() // work; made once, since go with a method allocates

	mu      sync.Mutex
	queue   opList
	workers int
}

// threads is the process's pool: devices and file systems are shared, so a
// bound per loop would be none.
var threads = newPool(64)

func newPool(limit int) *pool {
	p := &pool{limit: limit}
	p.worker = p.work
	return p
}

// run queues the operation. Its loop gets it back when it has been performed.
func (p *pool) run(o *op) {
	p.mu.Lock()
	p.queue.push(o)
	grow := p.workers < p.limit
	if grow {
		p.workers++
	}
	p.mu.Unlock()
	if grow {
		go p.worker()
	}
}

func (p *pool) work() {
	for {
		p.mu.Lock()
		if p.queue.empty() {
			p.workers--
			p.mu.Unlock()
			return
		}
		o := p.queue.pop()
		p.mu.Unlock()
		o.perform()
		o.loop.complete(o)
	}
}
