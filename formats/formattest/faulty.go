package formattest

import (
	"sync"

	"golang.org/x/sys/unix"

	"platter/aio"
)

// Faulty is a storage that passes requests on to another, except those that it
// is told to fail. It keeps account of writes that a power cut would lose.
type Faulty struct {
	aio.Storage

	mu     sync.Mutex
	faults []*Fault
	hits   int
	clock  uint64   // counts writes and flushes
	dirty  []uint64 // when each write that is not durable yet completed
}

// Fault says which requests fail and how.
type Fault struct {
	Match func(*aio.Request) bool // called on any loop, one call at a time
	Errno unix.Errno
	After int // so many matching requests succeed first
	Times int // so many fail; 0: all from then on
}

// NewFaulty makes a Faulty that fails nothing yet.
func NewFaulty(below aio.Storage) *Faulty { return &Faulty{Storage: below} }

// Fd is the descriptor of the file below, or -1 when it has none.
func (f *Faulty) Fd() int {
	if file, ok := f.Storage.(interface{ Fd() int }); ok {
		return file.Fd()
	}
	return -1
}

// Truncate changes the length of the storage below. It fails while a fault
// matches a write of no bytes at the new end.
func (f *Faulty) Truncate(size int64) error {
	if errno := f.verdict(&aio.Request{Op: aio.OpWrite, Offset: size}); errno != 0 {
		return errno
	}
	t, ok := f.Storage.(aio.Truncater)
	if !ok {
		return unix.EOPNOTSUPP
	}
	return t.Truncate(size)
}

// Inject adds a fault.
func (f *Faulty) Inject(fault Fault) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.faults = append(f.faults, &fault)
}

// Heal removes all faults and returns how many requests they failed.
func (f *Faulty) Heal() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	hits := f.hits
	f.faults, f.hits = nil, 0
	return hits
}

// Unflushed counts the writes, discards and write-zeroes that completed but are
// not durable: without FUA, and without a flush afterwards.
func (f *Faulty) Unflushed() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.dirty)
}

// Submit fails some requests and passes on the others.
func (f *Faulty) Submit(l *aio.Loop, batch []*aio.Request) {
	good := make([]*aio.Request, 0, len(batch))
	for _, r := range batch {
		if errno := f.verdict(r); errno != 0 {
			r.Complete(errno)
			continue
		}
		f.follow(r)
		good = append(good, r)
	}
	if len(good) > 0 {
		f.Storage.Submit(l, good)
	}
}

func (f *Faulty) verdict(r *aio.Request) unix.Errno {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, fault := range f.faults {
		if !fault.Match(r) {
			continue
		}
		if fault.After > 0 {
			fault.After--
			continue
		}
		if fault.Times > 0 {
			if fault.Times--; fault.Times == 0 {
				fault.Times = -1
			}
		} else if fault.Times < 0 {
			continue
		}
		f.hits++
		return fault.Errno
	}
	return 0
}

// follow keeps account of a write or a flush when it completes.
func (f *Faulty) follow(r *aio.Request) {
	if r.Op != aio.OpFlush && !r.Op.Writes() {
		return
	}
	f.mu.Lock()
	submitted := f.clock
	f.mu.Unlock()
	op, durable, done := r.Op, r.Flags&aio.FlagFUA != 0, r.Done
	r.Done = func(r *aio.Request) {
		if r.Errno == 0 {
			f.account(op, durable, submitted)
		}
		r.Done = done
		done(r)
	}
}

func (f *Faulty) account(op aio.Op, durable bool, submitted uint64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if op != aio.OpFlush {
		f.clock++
		if !durable {
			f.dirty = append(f.dirty, f.clock)
		}
		return
	}
	for len(f.dirty) > 0 && f.dirty[0] <= submitted {
		f.dirty = f.dirty[1:]
	}
}
