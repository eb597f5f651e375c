package raw

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"platter/formats"
)

// Extents finds the holes with SEEK_DATA and SEEK_HOLE. Where the file system
// or the device cannot tell, all is data. See formats.Mapper.
func (im *Image) Extents(dst []formats.Extent, off, length int64, max int) ([]formats.Extent, error) {
	if off < 0 || length < 0 || off > im.size || length > im.size-off {
		return dst, &formats.Error{Op: "map", Path: im.path,
			Err: fmt.Errorf("range %d+%d beyond the end: %w", off, length, unix.EINVAL)}
	}
	end, first := off+length, len(dst)
	for off < end && (max <= 0 || len(dst)-first < max) {
		next, hole, err := im.run(off)
		if err != nil {
			return dst, formats.Explain("map", im.path, err)
		}
		next = min(next, end)
		if last := len(dst) - 1; last >= first && dst[last].Zero == hole {
			// The file changed between two looks: what followed was the other kind.
			dst[last].Length += next - off
			off = next
			continue
		}
		dst = append(dst, formats.Extent{Start: off, Length: next - off, Present: true, Zero: hole, Data: !hole, Offset: off, File: im.path})
		off = next
	}
	return dst, nil
}

// run tells how far the data or the hole at off reaches, which is at most to
// the end of the image.
func (im *Image) run(off int64) (next int64, hole bool, err error) {
	if im.fd < 0 {
		return im.size, false, nil
	}
	data, err := unix.Seek(im.fd, off, unix.SEEK_DATA)
	switch {
	case errors.Is(err, unix.ENXIO):
		// No more data: a hole up to the end, provided that the end is where
		// it was.
		var st unix.Stat_t
		if err := unix.Fstat(im.fd, &st); err != nil {
			return 0, false, err
		}
		if st.Mode&unix.S_IFMT == unix.S_IFREG && st.Size < im.size {
			return 0, false, fmt.Errorf("file shrank from %d to %d bytes: %w", im.size, st.Size, unix.EIO)
		}
		return im.size, true, nil
	case errors.Is(err, unix.EINVAL), errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.ENOSYS):
		return im.size, false, nil
	case err != nil:
		return 0, false, err
	case data > off:
		return min(data, im.size), true, nil
	}
	end, err := unix.Seek(im.fd, off, unix.SEEK_HOLE)
	if errors.Is(err, unix.ENXIO) {
		return 0, false, fmt.Errorf("file shrank while it was mapped: %w", unix.EIO)
	}
	if err != nil {
		return 0, false, err
	}
	if end <= off { // the data went meanwhile
		return im.size, false, nil
	}
	return min(end, im.size), false, nil
}
