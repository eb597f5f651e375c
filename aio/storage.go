package aio

// Storage is what an image stands on. File is the real one; tests put files
// that fail, fall short or record in its place.
type Storage interface {
	// Submit starts every request of the batch on the loop, on whose thread it
	// is called. It never blocks. Requests may complete in any order, also
	// before Submit returns. The slice is the caller's again on return.
	//
	// A write is durable when it had FlagFUA, or when an OpFlush that was
	// submitted after the write completed has itself completed. After a flush
	// has failed, all later ones fail too: what was lost stays lost. A read or
	// write either transfers its whole length or fails. Reads beyond the end
	// of the file fail with EIO; writes there make a file longer.
	//
	// Several loops may submit to one Storage at a time.
	Submit(l *Loop, batch []*Request)
	// Size is the length in bytes when the storage was opened or last resized.
	Size() int64
	// Close releases the storage. No request may be in flight.
	Close() error
}

// Truncater is a storage whose length can be changed.
type Truncater interface {
	// Truncate sets the length in bytes; what is added reads as zeroes. It is
	// durable after a flush, like a write. It may block: it is not for loops.
	Truncate(size int64) error
}

var (
	_ Storage   = (*File)(nil)
	_ Truncater = (*File)(nil)
)
