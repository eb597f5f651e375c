package formats

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// SyncDir makes new names in a folder durable where the file system can do that.
func SyncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return nil // a directory that can be written but not read
	}
	defer d.Close()
	if err := d.Sync(); err != nil && !errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("make the name durable: %w", err)
	}
	return nil
}

// Preallocate reserves n bytes of a new file from off on. They read as zeroes.
// What doesn't fit fails at once, as far as the file system can tell.
func Preallocate(f *os.File, off, n int64) error {
	// Some file systems stop for a signal, and begin anew when asked again. A
	// smaller piece has a better chance to come between two signals.
	const least = 64 << 20
	piece := n
	for end := off + n; off < end; {
		piece = min(piece, end-off)
		err := unix.Fallocate(int(f.Fd()), 0, off, piece)
		if errors.Is(err, unix.EINTR) {
			piece = max(piece/2, min(piece, least))
			continue
		}
		if err != nil {
			return fmt.Errorf("preallocate %d bytes: %w", end-off, err)
		}
		off += piece
	}
	return nil
}
