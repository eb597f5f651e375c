package aio

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// FileOptions say how a file is opened. They are what `--cache` chooses.
type FileOptions struct {
	ReadOnly bool
	Direct   bool // O_DIRECT: past the page cache
	Sync     bool // O_DSYNC: every write is durable when it completes
	NoFlush  bool // flushes and FUA do nothing; a power cut may lose everything
}

// ErrNotBlocks is returned for a file that is neither a regular file nor a
// block device.
var ErrNotBlocks = errors.New("not a regular file or block device")

// ErrUnalignedSize is returned when a file is opened for writing past the page
// cache and its end can't be written that way.
var ErrUnalignedSize = errors.New("size is not a multiple of the block size that O_DIRECT needs; use --cache writeback")

// File is a regular file or block device that requests are carried out on. Any
// number of loops may submit to it at a time.
type File struct {
	f      *os.File
	opts   FileOptions
	size   int64
	device bool
	inline bool  // reads and writes never wait: done on the loop's thread
	nowait bool  // reads can be tried on the loop's thread: RWF_NOWAIT
	async  bool  // io_submit needn't wait: O_DIRECT with RWF_NOWAIT
	align  int64 // of offset, length and memory; 1 when the page cache is used
	sector int64 // smallest range fallocate takes on a device; 1 on files
	fd     int

	noPunch     atomic.Bool // found out by trying
	noZeroRange atomic.Bool
	flushes     flushQueue
	locks       rangeLocks // of direct writes

	mu    sync.Mutex
	loops []*Loop // that have it registered
}

// OpenFile opens an existing regular file or block device. It is never created
// or truncated. Errors are *os.PathError or wrap ErrNotBlocks.
func OpenFile(path string, o FileOptions) (*File, error) {
	flags := os.O_RDWR
	if o.ReadOnly {
		flags = os.O_RDONLY
	}
	if o.Direct {
		flags |= unix.O_DIRECT
	}
	if o.Sync {
		flags |= unix.O_DSYNC
	}
	// Not to wait for a pipe's other end; it means nothing to files and devices.
	flags |= unix.O_NONBLOCK
	// Looking after the access time costs some hundredths of a cached read. Only
	// the file's owner may do without.
	f, err := os.OpenFile(path, flags|unix.O_NOATIME, 0)
	if errors.Is(err, unix.EPERM) {
		f, err = os.OpenFile(path, flags, 0)
	}
	if err != nil {
		return nil, err
	}
	file := &File{f: f, fd: int(f.Fd()), opts: o}
	if err := file.probe(); err != nil {
		f.Close()
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	return file, nil
}

// probe finds out what the file is and how its I/O is carried out.
func (f *File) probe() error {
	fd := f.fd
	// A ring fails requests on a descriptor in non-blocking mode where it would
	// have to wait.
	if err := unix.SetNonblock(fd, false); err != nil {
		return fmt.Errorf("set blocking mode: %w", err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return fmt.Errorf("stat: %w", err)
	}
	f.align, f.sector = 1, 1
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		f.size = st.Size
	case unix.S_IFBLK:
		f.device = true
		size, err := unix.Seek(fd, 0, unix.SEEK_END)
		if err != nil {
			return fmt.Errorf("find size: %w", err)
		}
		sector, err := unix.IoctlGetInt(fd, unix.BLKSSZGET)
		if err != nil {
			return fmt.Errorf("find sector size: %w", err)
		}
		f.size, f.sector = size, int64(sector)
	default:
		return ErrNotBlocks
	}
	var fs unix.Statfs_t
	if err := unix.Fstatfs(fd, &fs); err != nil {
		return fmt.Errorf("stat file system: %w", err)
	}
	// These have no NOWAIT, so a ring punts every operation to a worker thread;
	// but their reads and writes only copy memory. Nothing else is done inline:
	// a disk or a server may make it wait.
	f.inline = !f.device && (fs.Type == unix.TMPFS_MAGIC || fs.Type == unix.RAMFS_MAGIC)
	if f.opts.Direct && !f.inline {
		f.align = directAlignment(fd)
		if !f.opts.ReadOnly && f.size%f.align != 0 {
			return ErrUnalignedSize
		}
	}
	if !f.inline && takesNowait(fd, int(f.align)) {
		f.nowait, f.async = f.align == 1, f.align > 1
	}
	return nil
}

// takesNowait reports whether the file can be asked not to wait, by a read of n
// bytes. There may be nothing to read in the cache, or at all: that is an answer
// too.
func takesNowait(fd, n int) bool {
	m, err := NewMemory(n) // aligned, as O_DIRECT wants it
	if err != nil {
		return false
	}
	_, err = unix.Preadv2(fd, [][]byte{m.Bytes()}, 0, unix.RWF_NOWAIT)
	return m.Close() == nil && (err == nil || errors.Is(err, unix.EAGAIN))
}

// directAlignment is what O_DIRECT wants of offsets, lengths and addresses.
func directAlignment(fd int) int64 {
	var st unix.Statx_t
	err := unix.Statx(fd, "", unix.AT_EMPTY_PATH, unix.STATX_DIOALIGN, &st)
	if err == nil && st.Mask&unix.STATX_DIOALIGN != 0 && st.Dio_offset_align > 0 {
		return int64(max(st.Dio_mem_align, st.Dio_offset_align))
	}
	return 4096
}

// Submit starts the batch; see Storage.
func (f *File) Submit(l *Loop, batch []*Request) {
	slot := int32(-1)
	if !f.inline {
		slot = l.fileSlot(f)
	}
	for _, r := range batch {
		switch {
		case r.Length == 0 && r.Op != OpFlush:
			r.Complete(0)
		case r.Op <= OpWrite && f.inline:
			f.transferInline(l, r)
		case r.Op == OpRead && f.nowait && f.readCached(l, r):
		default:
			f.start(l, r, slot)
		}
	}
}

// start begins a request that goes through the engine.
func (f *File) start(l *Loop, r *Request, slot int32) {
	o := l.newOp()
	o.file, o.req, o.fd, o.slot = f, r, int32(f.fd), slot
	o.off, o.left = r.Offset, r.Length
	switch r.Op {
	case OpRead, OpWrite:
		o.startTransfer()
	case OpFlush:
		o.startFlush()
	case OpDiscard, OpWriteZeroes:
		o.startZero()
	case OpCache:
		o.startCache()
	default:
		o.end(unix.EINVAL)
	}
}

// Size is the length in bytes when the file was opened.
func (f *File) Size() int64 { return f.size }

// Truncate sets the length of a regular file; see Truncater. Size stays what it
// was when the file was opened.
func (f *File) Truncate(size int64) error {
	if f.device {
		return &os.PathError{Op: "truncate", Path: f.f.Name(), Err: unix.EINVAL}
	}
	return f.f.Truncate(size)
}

// Fd is the descriptor, for looking at the file: locks, SEEK_DATA. It is valid
// until Close.
func (f *File) Fd() int { return f.fd }

// InMemory reports whether the file is one of a memory file system, where reading
// and writing only copy.
func (f *File) InMemory() bool { return f.inline }

// IsBlockDevice tells a device from a regular file.
func (f *File) IsBlockDevice() bool { return f.device }

// Alignment is what requests should be aligned to lest they be copied: 1 when
// the page cache is used.
func (f *File) Alignment() int { return int(f.align) }

// Close closes the file; it flushes nothing. No request may be in flight on any
// loop, and it must not be called on a loop's thread, since it waits for the
// loops that used the file.
func (f *File) Close() error {
	f.mu.Lock()
	loops := f.loops
	f.loops = nil
	f.mu.Unlock()
	for _, l := range loops {
		l.Call(func() { l.forget(f) })
	}
	return f.f.Close()
}

// fileSlot is the file's registered slot on this loop.
func (l *Loop) fileSlot(f *File) int32 {
	slot, ok := l.files[f]
	if ok || l.engine != EngineIOUring {
		return slot
	}
	slot = l.driver.attach(int32(f.fd))
	l.files[f] = slot
	f.mu.Lock()
	f.loops = append(f.loops, l)
	f.mu.Unlock()
	return slot
}

// forget gives up the file's registered slot, which keeps it open.
func (l *Loop) forget(f *File) {
	l.driver.detach(int32(f.fd), l.files[f])
	delete(l.files, f)
}

// forgetAll lets files know that the loop is gone. The kernel takes a ring apart in
// its own time: a slot that were left would keep its file open, and locked, beyond
// the loop's end.
func (l *Loop) forgetAll() {
	for f, slot := range l.files {
		l.driver.detach(int32(f.fd), slot)
		f.mu.Lock()
		f.loops = slices.DeleteFunc(f.loops, func(x *Loop) bool { return x == l })
		f.mu.Unlock()
	}
}
