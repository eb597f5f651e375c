package formattest

import (
	"sync"

	"platter/aio"
	"platter/formats"
	"platter/merge"
)

// merged is an image whose requests are merged first, as an export does it.
type merged struct {
	formats.Image
	mu      sync.Mutex
	mergers map[*aio.Loop]*merge.Merger
}

// Merged returns the image, which is a formats.Mapper too, with merging before it.
func Merged(image formats.Image) formats.Image {
	return &merged{Image: image, mergers: map[*aio.Loop]*merge.Merger{}}
}

func (m *merged) Submit(l *aio.Loop, batch []*aio.Request) {
	m.mu.Lock()
	merger := m.mergers[l]
	if merger == nil {
		limits := m.Limits()
		merger = merge.New(merge.Limits{Bytes: min(limits.MaxTransfer, 1<<20), Segments: limits.MaxSegments},
			func(members []*aio.Request) { m.Image.Submit(l, members) })
		m.mergers[l] = merger
	}
	m.mu.Unlock()
	m.Image.Submit(l, merger.Merge(nil, batch))
}

// Extents are those of the image.
func (m *merged) Extents(dst []formats.Extent, off, length int64, most int) ([]formats.Extent, error) {
	return m.Image.(formats.Mapper).Extents(dst, off, length, most)
}
