package aio

import (
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// DefaultPoll is how long a loop spins at most before it sleeps: long enough to
// cover a client's wake-up, short enough not to be noticed.
const DefaultPoll = 64 * time.Microsecond

// DefaultMemory is how much memory a loop's arena maps at most, in bytes.
const DefaultMemory = 256 << 20

// LoopOptions shape a loop. The zero value is a good one, but for Poll.
type LoopOptions struct {
	Engine Engine
	Poll   time.Duration // longest spin before sleeping; 0 never spins
	Memory int64         // limit of the loop's arena in bytes; DefaultMemory when 0
}

// Loop is one locked OS thread on which sockets, files and timers are served:
// it waits for all of them in one place. Post, Close and Engine may be called
// from any goroutine; everything else, and every callback, happens on the
// loop's thread, between two waits, so callbacks must not block.
//
// One turn of the loop: functions that were posted, then completions, then what
// Defer was told, then one kernel entry that submits everything the turn started.
type Loop struct {
	engine Engine
	driver driver
	arena  *Arena
	spin   spinner
	timers timers

	files   map[*File]int32 // registered slots
	ops     []*op           // by index
	freeOps *op
	tasks   []*Task
	spare   []*Task  // tasks of the turn that is being run
	ran     []func() // memory for posted
	active  int      // operations that a driver has
	sockets int      // that are open
	cold    int      // reads that aren't looked for in the page cache, see readCached

	transfer transferFunc // tests put faults before the system call

	mu        sync.Mutex
	posted    []func()
	completed *op         // by pool threads, newest first
	pending   atomic.Bool // posted or completed may have something
	asleep    atomic.Bool // the thread is, or is about to be, in the kernel
	closing   bool        // set on the thread
	ended     bool        // guarded by mu: nobody posts or wakes any more
	exited    chan struct{}
}

// driver is the part of an engine that a loop runs on.
type driver interface {
	// start begins an operation. Its done is called from a later turn.
	start(o *op)
	// cancel has a receive that was started end soon: with what has come, or
	// with ECANCELED or EAGAIN.
	cancel(o *op)
	// turn submits what was started, waits until something happened or timeout
	// has passed (not at all when it is 0, forever when it is negative), and
	// calls done for what completed.
	turn(timeout time.Duration)
	// wake ends a turn that waits. Any thread may call it.
	wake()
	// attach and detach make a descriptor known before its first and after its
	// last use. The result is the registered slot, or -1.
	attach(fd int32) int32
	detach(fd, slot int32)
	close()
}

// NewLoop starts a loop on a thread of its own.
func NewLoop(o LoopOptions) (*Loop, error) {
	engine, err := o.Engine.Resolve()
	if err != nil {
		return nil, err
	}
	if o.Memory == 0 {
		o.Memory = DefaultMemory
	}
	l := &Loop{engine: engine, arena: NewArena(o.Memory), spin: spinner{max: o.Poll}, files: map[*File]int32{},
		transfer: transfer, exited: make(chan struct{})}
	started := make(chan error)
	go l.run(started)
	if err := <-started; err != nil {
		return nil, err
	}
	return l, nil
}

func (l *Loop) run(started chan<- error) {
	runtime.LockOSThread()
	// The ring is closed by then. A goroutine that ended locked would take the
	// thread with it, and children with a parent-death signal that it started
	// before.
	defer runtime.UnlockOSThread()
	defer close(l.exited)
	var err error
	switch l.engine {
	case EngineIOUring:
		l.driver, err = newRingDriver(l)
	case EngineNative:
		l.driver, err = newNativeDriver(l)
	default:
		l.driver, err = newEpollDriver(l)
	}
	started <- err
	if err != nil {
		return
	}
	for !l.closing || l.active > 0 || len(l.tasks) > 0 || l.pending.Load() {
		l.runPosted()
		l.timers.run()
		l.runTasks()
		timeout := l.timers.next()
		if l.pending.Load() || len(l.tasks) > 0 || (l.closing && l.active == 0) {
			timeout = 0
		}
		l.driver.turn(timeout)
	}
	l.mu.Lock()
	l.ended = true
	l.mu.Unlock()
	l.forgetAll()
	l.driver.close()
	l.arena.close()
}

// Engine is the engine that the loop runs on; never EngineAuto.
func (l *Loop) Engine() Engine { return l.engine }

// Arena is the loop's memory.
func (l *Loop) Arena() *Arena { return l.arena }

// Post has f called on the loop's thread, in the order of the calls. It returns
// at once. When the loop has ended it does nothing.
func (l *Loop) Post(f func()) {
	l.mu.Lock()
	if !l.ended {
		l.posted = append(l.posted, f)
	}
	l.mu.Unlock()
	l.notify()
}

// Call has f called on the loop's thread and waits until it has returned, or
// until the loop has ended, perhaps without having called f. It must not be
// called on a loop's thread.
func (l *Loop) Call(f func()) {
	done := make(chan struct{})
	l.Post(func() {
		defer close(done)
		f()
	})
	select {
	case <-done:
	case <-l.exited:
	}
}

// Go has work called on a thread of the pool that files share, where it may
// block, and then done on the loop's. It is called on the loop's thread.
func (l *Loop) Go(work, done func()) {
	o := l.newOp()
	o.kind, o.work = opFunc, work
	o.done = func(o *op) {
		o.work = nil
		l.freeOp(o)
		done()
	}
	l.active++
	threads.run(o)
}

// Close ends the loop when what is in flight has completed, and waits for that;
// a receive on a socket counts, so sockets are closed before. What was posted
// earlier is still called, what is posted afterwards need not be; timers that
// aren't due are forgotten. Then the arena's memory is gone. Close may be called
// again, but not on a loop's thread. The error is always nil.
func (l *Loop) Close() error {
	l.Post(func() { l.closing = true })
	<-l.exited
	return nil
}

// notify tells the loop that posted or completed has something.
func (l *Loop) notify() {
	if l.pending.Swap(true) || !l.asleep.Load() {
		return
	}
	// The loop may have woken by itself and end just now; another file may have
	// got the number of its eventfd then.
	l.mu.Lock()
	if !l.ended {
		l.driver.wake()
	}
	l.mu.Unlock()
}

// complete hands an operation that a pool thread has performed back to its loop.
func (l *Loop) complete(o *op) {
	l.mu.Lock()
	o.next, l.completed = l.completed, o
	l.mu.Unlock()
	l.notify()
}

func (l *Loop) runPosted() {
	if !l.pending.Load() {
		return
	}
	l.pending.Store(false)
	l.mu.Lock()
	posted, completed := l.posted, l.completed
	l.posted, l.completed = l.ran, nil
	l.ran = nil
	l.mu.Unlock()
	var first *op
	for completed != nil { // into the order in which they completed
		o := completed
		completed, o.next, first = o.next, first, o
	}
	for first != nil {
		o := first
		first, o.next = o.next, nil
		l.active--
		o.done(o)
	}
	for i, f := range posted {
		posted[i] = nil
		f()
	}
	l.ran = posted[:0]
}

// Task is something to do once at the end of a turn, however often it was asked
// for: what a front end does for a whole batch of completions.
type Task struct {
	Run    func()
	queued bool
}

// Defer has t run at the end of this turn, before the loop enters the kernel; or,
// called by a task, at the end of the next.
func (l *Loop) Defer(t *Task) {
	if !t.queued {
		t.queued = true
		l.tasks = append(l.tasks, t)
	}
}

// Undefer forgets that t was to run. It is no error if it wasn't.
func (l *Loop) Undefer(t *Task) {
	if i := slices.Index(l.tasks, t); i >= 0 {
		l.tasks = slices.Delete(l.tasks, i, i+1)
		t.queued = false
	}
}

// runTasks runs what was deferred so far. What the tasks defer is for the next
// turn, which doesn't wait then.
func (l *Loop) runTasks() {
	l.spare, l.tasks = l.tasks, l.spare[:0]
	for i, t := range l.spare {
		t.queued = false
		l.spare[i] = nil
		t.Run()
	}
}

// newOp takes an op from the free list. The caller sets what it needs.
func (l *Loop) newOp() *op {
	o := l.freeOps
	if o == nil {
		o = &op{loop: l, slot: -1, index: uint32(len(l.ops))}
		l.ops = append(l.ops, o)
		return o
	}
	l.freeOps, o.next = o.next, nil
	return o
}

func (l *Loop) freeOp(o *op) {
	o.file, o.req, o.vec, o.done, o.slot, o.cancelled = nil, nil, nil, nil, -1, false
	o.next, l.freeOps = l.freeOps, o
}

// start hands an op to the driver.
func (l *Loop) start(o *op) {
	l.active++
	l.driver.start(o)
}

// finish ends an op that the driver had.
func (l *Loop) finish(o *op) {
	l.active--
	o.done(o)
}
