package qcow2

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"platter/aio"
	"platter/formats"
	"platter/formats/qcow2/layout"
)

var _ formats.Mapper = (*Image)(nil)

// Extents tells what stands where, as `qemu-img map` does; see formats.Mapper.
// Clusters that aren't allocated are looked up in the backing file. Data that
// falls into a hole of a sparse file reads as zeroes.
func (im *Image) Extents(dst []formats.Extent, off, length int64, max int) ([]formats.Extent, error) {
	if off < 0 || length < 0 || off > im.size || length > im.size-off {
		return dst, &formats.Error{Op: "map", Path: im.path,
			Err: fmt.Errorf("range %d+%d beyond the end: %w", off, length, unix.EINVAL)}
	}
	holes := im.holes()
	end, first := off+length, len(dst)
	var more []formats.Extent
	for off < end {
		m, err := im.waitLookup(off, end)
		if err != nil {
			return dst, &formats.Error{Op: "map", Path: im.path, Err: fmt.Errorf("what maps %#x: %w", off, err),
				Remedy: "see what is wrong: platter check"}
		}
		if below := min(m.length, im.backingSize-off); m.kind == hole && below > 0 {
			if more, err = im.extentsBelow(more[:0], off, below); err != nil {
				return dst, err
			}
			m.length = below
		} else {
			e := im.extent(m, off)
			m.length = e.Length
			more = holes.split(more[:0], e)
		}
		for _, e := range more {
			if n := len(dst); n > first && joins(dst[n-1], e) {
				dst[n-1].Length += e.Length
				continue
			}
			if max > 0 && len(dst)-first == max {
				return dst, nil
			}
			dst = append(dst, e)
		}
		off += m.length
	}
	return dst, nil
}

// extent describes a mapping that starts at off, or as much of it as has one
// place.
func (im *Image) extent(m mapping, off int64) formats.Extent {
	e := formats.Extent{Start: off, Length: m.length, Present: m.kind != hole, Offset: -1}
	switch m.kind {
	case data:
		e.Data, e.Offset, e.File = true, m.host, im.dataPath
	case compressed:
		e.Data, e.Packed, e.File = true, true, im.path
	default:
		e.Zero, e.File = true, im.path
		within := off & (im.g.ClusterSize() - 1)
		if m.kind == zero {
			// Zeroes go on over clusters that stand anywhere.
			e.Length = min(e.Length, im.g.ClusterSize()-within)
		}
		if host := layout.EntryOffset(m.word); host != 0 || im.g.External && m.word&layout.Copied != 0 {
			e.Offset, e.File = host+within, im.dataPath
		}
	}
	return e
}

// extentsBelow asks the backing file, one level down.
func (im *Image) extentsBelow(dst []formats.Extent, off, length int64) ([]formats.Extent, error) {
	mapper, ok := im.backing.(formats.Mapper)
	if !ok {
		return append(dst, formats.Extent{Start: off, Length: length, Depth: 1, Present: true, Data: true, Offset: -1}), nil
	}
	list, err := mapper.Extents(dst, off, length, 0)
	for i := range list {
		list[i].Depth++
	}
	return list, err
}

// joins reports whether b goes on where a ends, in every respect.
func joins(a, b formats.Extent) bool {
	if a.Offset >= 0 && b.Offset >= 0 {
		b.Offset -= a.Length
	}
	b.Start, b.Length = a.Start, a.Length
	return a == b
}

// holes finds what of the data was never written. fd is that of the file with
// the data, or -1 when nothing is to be looked for.
type holes struct{ fd int }

// holes tells where to look for holes. Looking costs a system call or two for
// each extent, so it is only done where much of the image was never written, as
// after preallocating no more than the metadata. QEMU does the same.
func (im *Image) holes() holes {
	fd := fdOf(im.file)
	var st unix.Stat_t
	if fd < 0 || unix.Fstat(fd, &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFREG {
		return holes{-1}
	}
	written := st.Blocks * 512 >> im.g.ClusterBits
	if im.g.Clusters(st.Size) < max(written*10/9, written+2) {
		return holes{-1}
	}
	return holes{fdOf(im.data)}
}

// fdOf is the file descriptor of a storage, -1 if it has none.
func fdOf(s aio.Storage) int {
	if f, ok := s.(interface{ Fd() int }); ok {
		return f.Fd()
	}
	return -1
}

// split appends the extent to dst, in pieces where data and holes alternate.
func (h holes) split(dst []formats.Extent, e formats.Extent) []formats.Extent {
	for h.fd >= 0 && e.Data && !e.Packed && e.Length > 0 {
		piece := e
		piece.Length, piece.Zero = h.run(e.Offset, e.Length)
		dst = append(dst, piece)
		e.Start += piece.Length
		e.Offset += piece.Length
		e.Length -= piece.Length
	}
	if e.Length > 0 {
		dst = append(dst, e)
	}
	return dst
}

// run tells how much of the range at off is data, or a hole. What can't be told
// is data.
func (h holes) run(off, length int64) (n int64, hole bool) {
	at, err := unix.Seek(h.fd, off, unix.SEEK_DATA)
	switch {
	case errors.Is(err, unix.ENXIO): // no more data up to the end, or beyond it
		return length, true
	case err != nil:
		return length, false
	case at > off:
		return min(at-off, length), true
	}
	if at, err = unix.Seek(h.fd, off, unix.SEEK_HOLE); err != nil || at <= off {
		return length, false
	}
	return min(at-off, length), false
}
