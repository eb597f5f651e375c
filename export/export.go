// Package export is an image on offer: what every front end shares, whatever
// protocol it speaks.
//
// An Export is one image under a name, with its policy (read-only or not,
// merging or not), its throttle and its statistics. A front end opens a Queue for each stream
// of requests it has (an NBD connection, a virtqueue, a ublk queue), which is then
// served by the loop that the export's mapping has for it, and submits whatever
// is ready there as one batch. The queue checks bounds and permission, counts,
// keeps what the throttle doesn't let go yet, lets package merge join what belongs
// together, and hands the rest to the image.
//
// A queue is on one loop at a time. Export.Move takes those of a live export to
// other loops, and Export.Drain holds them still: see Mover.
package export

import (
	"sync"

	"platter/aio"
	"platter/formats"
)

// Options are an export's name and policy.
type Options struct {
	Name        string // as clients ask for it; may be empty
	Description string // for people; may be empty
	ReadOnly    bool   // refuse writes even if the image would take them
	NoMerge     bool   // hand every request to the image as it came
	NoBypass    bool   // hand every request to a goroutine first: slow, to be compared with
	Queues      int    // queues that OpenQueue opens at a time, at most; 0: any number
}

// Export is an image on offer. Its methods may be called from any goroutine.
type Export struct {
	image formats.Image
	opts  Options
	turns turns

	control sync.Mutex // held while the export is drained or moves

	mu      sync.Mutex
	queues  map[*Queue]struct{}
	past    Stats       // of queues that are closed
	loops   []*aio.Loop // where queues are opened: that of number i at i modulo the length
	drained bool        // so are queues that are opened
}

// New offers the image, which stays the caller's to close once every queue is
// closed.
func New(image formats.Image, o Options) *Export {
	if o.NoBypass {
		image = apart{image}
	}
	return &Export{image: image, opts: o, queues: map[*Queue]struct{}{}}
}

// Name is the name under which clients ask for the export.
func (e *Export) Name() string { return e.opts.Name }

// Description is a text for people.
func (e *Export) Description() string { return e.opts.Description }

// Size is the guest-visible size in bytes.
func (e *Export) Size() int64 { return e.image.Size() }

// ReadOnly reports whether writes are refused.
func (e *Export) ReadOnly() bool { return e.opts.ReadOnly || e.image.ReadOnly() }

// Queues is how many queues OpenQueue opens at a time, at most; 0 is any number.
func (e *Export) Queues() int { return e.opts.Queues }

// Limits tells what requests the image takes and likes.
func (e *Export) Limits() formats.Limits { return e.image.Limits() }

// Stats adds up what all queues, open and closed, have done, and what the image
// tells of gaps that it has filled. It disturbs nobody.
func (e *Export) Stats() Stats {
	e.mu.Lock()
	defer e.mu.Unlock()
	sum := e.past
	for q := range e.queues {
		sum.add(q.stats())
	}
	if filler, ok := e.image.(formats.GapFiller); ok {
		sum.Gaps = filler.GapStats()
	}
	return sum
}

// Flush makes every write that has completed on any queue durable. It waits for
// that, and so must not be called on a loop.
func (e *Export) Flush(l *aio.Loop) error {
	done := make(chan *aio.Request, 1)
	l.Post(func() {
		r := &aio.Request{Op: aio.OpFlush, Done: func(r *aio.Request) { done <- r }}
		e.image.Submit(l, []*aio.Request{r})
	})
	if r := <-done; r.Errno != 0 {
		return &Error{Op: "flush", Export: e.opts.Name, Err: r.Errno}
	}
	return nil
}

// Error is what an export failed at.
type Error struct {
	Op     string
	Export string
	Err    error
}

func (e *Error) Error() string {
	if e.Export == "" {
		return e.Op + " export: " + e.Err.Error()
	}
	return e.Op + " export " + e.Export + ": " + e.Err.Error()
}

// Unwrap gives the cause.
func (e *Error) Unwrap() error { return e.Err }
