package export

import (
	"platter/aio"
	"platter/formats"
)

// apart hands each request to a goroutine of its own, in memory of its own, and
// from there to the image: what a server does that has a coroutine for each
// request. It is there to be compared with.
type apart struct{ formats.Image }

// Submit does so. Requests of a batch may overtake each other.
func (a apart) Submit(l *aio.Loop, batch []*aio.Request) {
	for _, r := range batch {
		go func() {
			own := &aio.Request{Op: r.Op, Flags: r.Flags, Offset: r.Offset, Length: r.Length, Vec: append([]aio.Iovec(nil), r.Vec...)}
			own.Done = func(own *aio.Request) { r.Complete(own.Errno) }
			l.Post(func() { a.Image.Submit(l, []*aio.Request{own}) })
		}()
	}
}
