package qcow2

import (
	"errors"
	"log/slog"

	"golang.org/x/sys/unix"

	"platter/formats/qcow2/layout"
)

// Close writes what is left of the metadata, gives back clusters that were
// reserved and not used, and closes the files. No request may be in flight.
func (im *Image) Close() error {
	var errs []error
	if !im.readOnly {
		errs = append(errs, im.endSession())
	}
	im.background.Wait()
	errs = append(errs, im.closeOthers(), im.file.Close(), im.waiter.close())
	return errors.Join(errs...)
}

// endSession leaves the image as if nobody had it open.
func (im *Image) endSession() error {
	im.commits.stop()
	im.background.Wait()
	if lanes := im.lanes.Load(); lanes != nil {
		for _, ln := range *lanes {
			ln.inbox.Lock()
			ln.closed = true
			left := []run{ln.reserved, ln.next, ln.arrived}
			ln.inbox.Unlock()
			for _, r := range left {
				if err := im.alloc.giveBack(r); err != nil {
					return err
				}
			}
		}
	}
	if err := im.packer.giveBack(im); err != nil {
		return err
	}
	im.lazy.Store(false)
	// What is released by one commit is written by the next.
	for range 3 {
		if err := im.commit(); err != nil {
			return err
		}
		if !im.changed() {
			break
		}
	}
	im.commits.stop()
	im.background.Wait()
	if im.broken.Load() == nil {
		if err := im.setFeature(layout.Dirty, false); err != nil {
			return err
		}
	}
	return im.alloc.trim()
}

// setFeature sets or clears an incompatible feature, durably.
func (im *Image) setFeature(bit uint64, on bool) error {
	im.headerMu.Lock()
	defer im.headerMu.Unlock()
	old := im.header.Incompatible
	if old&bit != 0 == on {
		return nil
	}
	im.header.Incompatible ^= bit
	if err := im.writeHeader(); err != nil {
		im.header.Incompatible = old
		return err
	}
	return nil
}

// corrupted notes that the image contradicts itself: it is marked as corrupt,
// and takes no more writes. It returns the error that the request gets.
func (im *Image) corrupted(err error) error {
	failed := errors.Join(err, unix.EIO)
	if !im.broken.CompareAndSwap(nil, &failed) {
		return failed
	}
	slog.Error("image is corrupt: it takes no more writes; platter check --repair all may help", "image", im.path, "error", err)
	if im.readOnly || im.g.Version < 3 {
		return failed
	}
	im.background.Add(1)
	go func() {
		defer im.background.Done()
		if err := im.setFeature(layout.Corrupt, true); err != nil {
			slog.Error("image can't be marked as corrupt", "image", im.path, "error", err)
		}
	}()
	return failed
}
