package qcow2

import (
	"fmt"
	"log/slog"

	"platter/formats"
	"platter/formats/qcow2/check"
	"platter/formats/qcow2/layout"
)

// checkFile is the image's file as package check reads and writes it.
type checkFile struct{ im *Image }

func (f checkFile) ReadAt(p []byte, off int64) (int, error) { return f.im.reader().ReadAt(p, off) }

func (f checkFile) WriteAt(p []byte, off int64) (int, error) {
	if err := f.im.waiter.writeAt(f.im.file, p, off); err != nil {
		return 0, err
	}
	f.im.fileEnd.Store(max(f.im.fileEnd.Load(), off+int64(len(p))))
	return len(p), nil
}

func (f checkFile) Size() (int64, error) { return f.im.fileEnd.Load(), nil }

func (f checkFile) Sync() error { return f.im.waiter.flush(f.im.file) }

func (f checkFile) Truncate(size int64) error {
	if err := f.im.truncate(size); err != nil {
		return err
	}
	f.im.fileEnd.Store(size)
	return nil
}

// CheckFile is the image's file for package check. Nobody may use the image
// while it is being checked, and after a repair it must be closed and opened
// anew.
func (im *Image) CheckFile() check.File { return checkFile{im} }

// repairDirty makes the refcounts of an image right that was not closed cleanly,
// as lazy refcounts leave them behind. The mapping and the data are right as
// they are.
func (im *Image) repairDirty() error {
	slog.Warn("image was not closed cleanly: repairing its refcounts", "image", im.path)
	report, err := check.Run(checkFile{im}, check.Options{Repair: check.RepairAll})
	if err == nil && report.ExitCode() != 0 {
		err = fmt.Errorf("%d corruptions and %d leaks are left", report.Corruptions, report.Leaks)
	}
	if err != nil {
		return &formats.Error{Op: "open", Path: im.path, Err: fmt.Errorf("%w, and can't be repaired: %w", ErrDirty, err),
			Remedy: "open it read-only, or see what is wrong: platter check"}
	}
	h, err := layout.ReadHeader(im.reader(), im.fileEnd.Load())
	if err != nil {
		return im.explain(err)
	}
	im.header = h
	return nil
}
