package qcow2

import (
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"platter/aio"
	"platter/formats"
	"platter/formats/qcow2/layout"
)

// Image is an open qcow2 image.
type Image struct {
	path     string
	dataPath string      // where the guest's data stands
	file     aio.Storage // metadata; and the guest's data, unless there is a data file
	data     aio.Storage // the guest's data
	dataSize int64       // of a data file in bytes
	g        layout.Geometry
	size     int64
	readOnly bool
	infoOnly bool
	limits   formats.Limits
	mergeGap int64 // the longest gap that is filled with zeroes, see joint
	noMerge  bool

	backing     formats.Image // nil without a backing file
	backingSize int64         // what is beyond reads as zeroes

	// Shifts that take a guest offset apart: to the L1 index, to the slice within
	// the table, and to the entry within the slice.
	tableShift, sliceShift uint
	wordShift              uint // 1 when entries have two words
	l1                     []table

	cache    cache
	inflight inflight
	alloc    allocator
	packer   packer
	metadata metadata
	commits  committer
	waiter   *waiter
	readers  chan struct{} // bound the goroutines that hold buffers: those that
	writers  chan struct{} // write read the old content, and so must not wait for their like

	background sync.WaitGroup // goroutines

	epoch  atomic.Uint32
	lanes  atomic.Pointer[map[*aio.Loop]*lane]
	laneMu sync.Mutex // adding and removing lanes

	past counts // of lanes that were removed

	lazy    atomic.Bool  // refcounts are written when the image is closed
	fileEnd atomic.Int64 // length of the file
	virgin  int64        // clusters from here on were never in the file before it was opened
	broken  atomic.Pointer[error]

	complained atomic.Int64 // when a compressed cluster was last said to be bad, in Unix seconds

	// metaMu guards what changes seldom: the header, and L1 entries while they
	// change.
	metaMu    sync.Mutex
	headerMu  sync.Mutex // writing the header
	header    *layout.Header
	l1Durable []uint64 // the L1 table on the disk
	l1Dirty   map[int]struct{}
}

var _ formats.Image = (*Image)(nil)

// Format is "qcow2".
func (im *Image) Format() string { return "qcow2" }

// Size is the size of the guest's disk in bytes.
func (im *Image) Size() int64 { return im.size }

// ReadOnly reports whether writes are refused.
func (im *Image) ReadOnly() bool { return im.readOnly }

// Limits tells what requests the image likes. Any range is fine.
func (im *Image) Limits() formats.Limits { return im.limits }

// Submit starts the batch; see formats.Image.
func (im *Image) Submit(l *aio.Loop, batch []*aio.Request) {
	ln := im.lane(l)
	if len(batch) > 1 && !im.infoOnly {
		ln.preloaded = im.preload(batch)
	}
	for _, r := range batch {
		if errno := im.refuse(r); errno != 0 {
			r.Complete(errno)
			continue
		}
		ln.begin(r)
	}
	ln.submit()
}

// refuse says with what error a request is to be refused, 0 if it isn't.
func (im *Image) refuse(r *aio.Request) unix.Errno {
	if r.Op == aio.OpFlush {
		return 0
	}
	switch {
	case im.infoOnly:
		return unix.EIO
	case im.readOnly && r.Op.Writes():
		return unix.EPERM
	case r.Offset < 0 || r.Length < 0:
		return unix.EINVAL
	case r.Offset > im.size || r.Length > im.size-r.Offset:
		if r.Op == aio.OpWrite || r.Op == aio.OpWriteZeroes {
			return unix.ENOSPC
		}
		return unix.EINVAL
	case r.Op.Writes() && im.broken.Load() != nil:
		return unix.EIO
	}
	return 0
}

// lane finds what the image keeps for a loop.
func (im *Image) lane(l *aio.Loop) *lane {
	if lanes := im.lanes.Load(); lanes != nil {
		if ln := (*lanes)[l]; ln != nil {
			return ln
		}
	}
	return im.addLane(l)
}

func (im *Image) addLane(l *aio.Loop) *lane {
	im.laneMu.Lock()
	defer im.laneMu.Unlock()
	lanes := map[*aio.Loop]*lane{}
	if old := im.lanes.Load(); old != nil {
		for k, v := range *old {
			lanes[k] = v
		}
	}
	ln := newLane(im, l)
	lanes[l] = ln
	im.lanes.Store(&lanes)
	return ln
}

// grace waits until every request that was under way when it was called has
// ended. Requests say in which epoch they began; those of the epoch that ends
// here are waited for. Only one grace at a time is allowed.
func (im *Image) grace() {
	old := im.epoch.Add(1) - 1
	lanes := im.lanes.Load()
	if lanes == nil {
		return
	}
	for _, ln := range *lanes {
		ln.drain(old & 1)
	}
}
