package qcow2

import (
	"platter/formats/qcow2/layout"
)

// Info is what an image says of itself.
type Info struct {
	Header    layout.Header // as it was read; the slices in it must not be changed
	Snapshots []layout.Snapshot
	Bitmaps   []layout.Bitmap // only if the image says that they are up to date
}

// Dirty reports whether the image says that it was not closed cleanly, or while
// it is open for writing with lazy refcounts, that it would not be now.
func (im *Image) Dirty() bool {
	im.headerMu.Lock()
	defer im.headerMu.Unlock()
	return im.header.Has(layout.Dirty)
}

// Info reads what the image says of itself. It waits, and must not be called on
// a loop.
func (im *Image) Info() (*Info, error) {
	im.headerMu.Lock()
	info := &Info{Header: *im.header}
	im.headerMu.Unlock()
	var err error
	if info.Snapshots, err = layout.ReadSnapshots(im.reader(), &info.Header); err != nil {
		return nil, im.explain(err)
	}
	if info.Header.Autoclear&layout.BitmapsValid != 0 {
		if info.Bitmaps, err = layout.ReadBitmaps(im.reader(), &info.Header); err != nil {
			return nil, im.explain(err)
		}
	}
	return info, nil
}
