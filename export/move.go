package export

import (
	"errors"
	"fmt"
	"slices"

	"platter/aio"
	"platter/config"
	"platter/formats"
)

// What keeps a queue from being opened or moved, for errors.Is.
var (
	// ErrLoops: the mapping of queues to loops can't be.
	ErrLoops = errors.New("impossible loops")
	// ErrTooManyQueues: the export has as many queues as it offers.
	ErrTooManyQueues = errors.New("too many queues")
	// ErrFixed: a queue has no Mover.
	ErrFixed = errors.New("a queue can neither be drained nor moved")
	// ErrStays: a queue stays on its loop, since its client does not take
	// replies, or does not send the rest of a request.
	ErrStays = errors.New("a client does nothing")
)

// Mover is what a front end does with the stream of requests of a queue when the
// export is drained or moved. Its methods are called on the thread of the queue's
// loop. A stream that ends meanwhile closes its queue, and calls nothing back.
type Mover interface {
	// Drain has no more requests submitted before Resume is called, and calls
	// done when none is in flight. What the client sends waits. Replies may
	// still be on their way.
	Drain(done func())
	// Resume goes on after Drain.
	Resume()
	// Move takes the stream to another loop: it begins no more requests here,
	// lets those that it has begun be carried out and answered, gives back all
	// of its memory and descriptors that belong to the loop, and calls
	// Queue.MoveTo. done is called when the stream goes on: there, or, with an
	// error that is ErrStays, here.
	Move(to *aio.Loop, done func(error))
}

// OpenQueue opens a queue for a client, on the loop that the mapping has for it.
// It may be called from any goroutine; the queue is used on its loop's thread,
// which Queue.Post leads to, and there the front end begins by Queue.Attach. It
// fails with ErrTooManyQueues, or with ErrLoops before the first Move.
func (e *Export) OpenQueue() (*Queue, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if len(e.loops) == 0 {
		return nil, &Error{Op: "open queue of", Export: e.opts.Name, Err: fmt.Errorf("%w: there are none", ErrLoops)}
	}
	index, open := e.freeIndex()
	if e.opts.Queues > 0 && open >= e.opts.Queues {
		return nil, &Error{Op: "open queue of", Export: e.opts.Name, Err: fmt.Errorf("%w: the limit is %d", ErrTooManyQueues, e.opts.Queues)}
	}
	q := e.newQueue(e.loops[index%len(e.loops)])
	q.index, q.fixed, q.drained = index, false, e.drained
	return q, nil
}

// freeIndex is the lowest number that no queue has, so that those of clients that
// come and go stay spread over the loops, and how many have one. The caller holds
// mu.
func (e *Export) freeIndex() (index, open int) {
	taken := make([]bool, len(e.queues)+1)
	for q := range e.queues {
		if q.index >= 0 {
			open++
			if q.index < len(taken) {
				taken[q.index] = true
			}
		}
	}
	return slices.Index(taken, false), open
}

// Loops is the mapping: queue i is served by the loop at i modulo its length. It
// is empty before the first Move.
func (e *Export) Loops() []*aio.Loop {
	e.mu.Lock()
	defer e.mu.Unlock()
	return slices.Clone(e.loops)
}

// Move gives the export a new mapping of queues to loops, in which a loop may
// stand several times, and returns when every queue is on the loop that it has
// there. Clients needn't notice: what is in flight is carried out and answered
// where it began, and what they send meanwhile waits. Queues that are opened
// meanwhile are opened on the new loops. A queue whose client does nothing, so
// that what was begun can't be ended, stays where it is, as ErrStays says, and
// goes on; the others have moved then.
//
// Move may be called from any goroutine, but not on a loop; of several calls
// one is carried out after the other. No loop, old or new, may be closed before
// its queues have left it.
func (e *Export) Move(to []*aio.Loop) error {
	switch {
	case len(to) == 0 || slices.Contains(to, nil):
		return &Error{Op: "move", Export: e.opts.Name, Err: fmt.Errorf("%w: there must be one at least", ErrLoops)}
	case len(to) > config.MaxQueues:
		return &Error{Op: "move", Export: e.opts.Name, Err: fmt.Errorf("%w: a mapping of %d queues, the limit is %d", ErrLoops, len(to), config.MaxQueues)}
	}
	e.control.Lock()
	defer e.control.Unlock()
	e.mu.Lock()
	e.loops = slices.Clone(to)
	queues := e.open()
	e.mu.Unlock()
	return e.each("move", queues, func(q *Queue, done func(error)) {
		target := to[max(q.index, 0)%len(to)]
		switch {
		case q.loop == target:
			done(nil)
		case q.fixed:
			done(ErrFixed)
		case q.mover == nil: // the front end has yet to begin, which it will there
			q.MoveTo(target, func() { done(nil) })
		default:
			q.mover.Move(target, done)
		}
	})
}

// Drain returns when no request is in flight on any queue; none is begun before
// Resume, also on queues that are opened meanwhile. Clients needn't notice. When
// it fails the export goes on. It may be called from any goroutine, but not on a
// loop. Move, and another Drain, wait until Resume.
func (e *Export) Drain() error {
	e.control.Lock()
	e.mu.Lock()
	e.drained = true
	queues := e.open()
	e.mu.Unlock()
	err := e.each("drain", queues, func(q *Queue, done func(error)) {
		if q.fixed {
			done(ErrFixed)
			return
		}
		q.drained = true
		if q.mover == nil {
			done(nil)
		} else {
			q.mover.Drain(func() { done(nil) })
		}
	})
	if err != nil {
		e.Resume()
	}
	return err
}

// Resume goes on after Drain.
func (e *Export) Resume() {
	e.mu.Lock()
	e.drained = false
	queues := e.open()
	e.mu.Unlock()
	for _, q := range queues {
		q.Post(func() {
			if q.drained = false; q.mover != nil {
				q.mover.Resume()
			}
		})
	}
	e.control.Unlock()
}

// open lists the queues. The caller holds mu.
func (e *Export) open() []*Queue {
	queues := make([]*Queue, 0, len(e.queues))
	for q := range e.queues {
		queues = append(queues, q)
	}
	return queues
}

// each calls begin for every queue, on its loop's thread, and waits until all have
// called done or are closed.
func (e *Export) each(what string, queues []*Queue, begin func(q *Queue, done func(error))) error {
	ended := make([]chan error, len(queues))
	for i, q := range queues {
		ended[i] = make(chan error, 1)
		q.Post(func() { begin(q, func(err error) { ended[i] <- err }) })
	}
	failed := 0
	var causes error
	for i, q := range queues {
		var err error
		select {
		case err = <-ended[i]:
		case <-q.gone:
		}
		if err != nil {
			failed++
		}
		switch {
		case err == nil || errors.Is(causes, err):
		case causes == nil:
			causes = err
		default:
			causes = fmt.Errorf("%w, %w", causes, err)
		}
	}
	if failed == 0 {
		return nil
	}
	return &Error{Op: what, Export: e.opts.Name, Err: fmt.Errorf("%d of %d queues: %w", failed, len(queues), causes)}
}

// Loop is the loop that the queue is on. It may be called from any goroutine, but
// only on the loop's thread is it sure to be true for longer than a moment.
func (q *Queue) Loop() *aio.Loop {
	q.export.mu.Lock()
	defer q.export.mu.Unlock()
	return q.loop
}

// Post has f called on the thread of the queue's loop, also when the queue moves
// meanwhile, unless it is closed before. It may be called from any goroutine.
func (q *Queue) Post(f func()) {
	e := q.export
	e.mu.Lock()
	defer e.mu.Unlock()
	l := q.loop
	l.Post(func() {
		e.mu.Lock()
		_, open := e.queues[q]
		here := q.loop == l
		e.mu.Unlock()
		switch {
		case !open:
		case here:
			f()
		default:
			q.Post(f)
		}
	})
}

// Attach tells who drains and moves the queue from now on. A queue of an export
// that is drained is drained at once.
func (q *Queue) Attach(m Mover) {
	q.mover, q.fixed = m, false
	if q.drained {
		m.Drain(func() {})
	}
}

// MoveTo hands the queue over to another loop, on whose thread arrive is called.
// It is called by the Mover, on the thread of the loop that the queue is on; from
// then on the queue must not be used there. Nothing may be in flight.
func (q *Queue) MoveTo(to *aio.Loop, arrive func()) {
	q.settle(to)
	e := q.export
	e.mu.Lock()
	from := q.loop
	q.loop = to
	to.Post(arrive) // before anything that is posted to the queue from now on
	e.mu.Unlock()
	e.leave(from)
}

// leave tells the image, on the loop's thread, that no queue is on the loop any
// more, if that is so.
func (e *Export) leave(l *aio.Loop) {
	image, ok := e.image.(formats.Leaver)
	if !ok {
		return
	}
	e.mu.Lock()
	used := false
	for q := range e.queues {
		used = used || q.loop == l
	}
	e.mu.Unlock()
	if !used {
		image.Leave(l)
	}
}
