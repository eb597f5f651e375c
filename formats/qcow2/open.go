package qcow2

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"

	"golang.org/x/sys/unix"

	"platter/aio"
	"platter/formats"
	"platter/formats/qcow2/layout"
	_ "platter/formats/raw" // a format that backing files may have
)

func init() {
	formats.Register(formats.Driver{Name: "qcow2", Probe: probe, Open: open})
}

// What keeps an image from being opened, for errors.Is.
var (
	// ErrEncrypted: reading takes a key.
	ErrEncrypted = errors.New("image is encrypted")
	// ErrCorrupt: the image is marked as corrupt and can only be read.
	ErrCorrupt = errors.New("image is marked as corrupt")
	// ErrDirty: the image was not closed cleanly, so that its refcounts may be
	// wrong.
	ErrDirty = errors.New("image was not closed cleanly")
	// ErrNoSnapshot: there is no snapshot of that ID or name.
	ErrNoSnapshot = errors.New("no such snapshot")
)

// DefaultMetadataCache is how much of the L2 tables is kept in memory, in bytes,
// unless Options say otherwise.
const DefaultMetadataCache = 32 << 20

// Options tell what New cannot find in the image.
type Options struct {
	Path     string // the file's name, for messages
	ReadOnly bool   // refuse writes with EPERM
	Snapshot string // ID or name of the internal snapshot to read, only with ReadOnly
	// MetadataCache bounds the memory for L2 tables in bytes; 0 is
	// DefaultMetadataCache.
	MetadataCache int64
	// MergeGap is how many bytes between writes of a batch to a new cluster are
	// filled with zeroes, so that the file gets one write; 0 is DefaultMergeGap or
	// MemoryMergeGap, and a negative number fills none. It is at most MaxMergeGap.
	MergeGap int64
	// NoMerge has every write of a guest to a new cluster be one of the file.
	NoMerge bool
	// OpenBacking opens the backing file that the image names, with the format
	// that it states ("" if it states none). When it is nil what isn't allocated
	// reads as zeroes. The image closes what it returns.
	OpenBacking func(name, format string) (formats.Image, error)
	// OpenData opens the external data file. The image closes what it returns.
	OpenData func(name string) (aio.Storage, error)
	// InfoOnly opens an image of which only Info is wanted, neither its backing
	// file nor its data file, and also if it is encrypted. Requests to read or
	// write it fail with EIO.
	InfoOnly bool
}

func open(s formats.Source) (formats.Image, error) {
	o := Options{Path: s.Path, ReadOnly: s.Options.ReadOnly, Snapshot: s.Options.Snapshot, MetadataCache: s.Options.MetadataCache, MergeGap: s.Options.MergeGap, NoMerge: s.Options.NoMerge}
	o.InfoOnly = s.Options.InfoOnly
	if !o.InfoOnly {
		o.OpenBacking = s.OpenBacking
		o.OpenData = func(name string) (aio.Storage, error) {
			f, err := s.OpenData(name)
			if err != nil {
				return nil, err
			}
			return f, nil
		}
	}
	im, err := New(s.File, o)
	if err != nil {
		return nil, err
	}
	return im, nil
}

func probe(header []byte) bool {
	if len(header) < 8 || string(header[:4]) != layout.Magic {
		return false
	}
	version := binary.BigEndian.Uint32(header[4:])
	return version >= 2
}

// New opens the image that the storage holds, and owns the storage from then on
// unless it fails. For writing, the storage should be an aio.Truncater.
func New(storage aio.Storage, o Options) (*Image, error) {
	w, err := newWaiter()
	if err != nil {
		return nil, err
	}
	im := &Image{
		path: o.Path, dataPath: o.Path, infoOnly: o.InfoOnly, file: storage, data: storage, readOnly: o.ReadOnly || o.InfoOnly, waiter: w,
		readers: make(chan struct{}, slots), writers: make(chan struct{}, slots),
	}
	im.commits.im, im.alloc.im = im, im
	im.fileEnd.Store(storage.Size())
	if err := im.open(o); err != nil {
		return nil, errors.Join(err, im.closeOthers(), w.close())
	}
	return im, nil
}

// slots is how many goroutines hold buffers at a time, for reading and for
// writing each.
const slots = 16

func (im *Image) open(o Options) error {
	h, err := layout.ReadHeader(im.reader(), im.fileEnd.Load())
	if err != nil {
		return im.explain(err)
	}
	im.header, im.g, im.size = h, h.Geometry(), h.Size&^511
	if err := im.admit(h); err != nil {
		return err
	}
	if o.Snapshot != "" {
		if err := im.useSnapshot(o.Snapshot); err != nil {
			return err
		}
	}
	im.shape(o.MetadataCache)
	if err := im.readL1(); err != nil {
		return im.explain(err)
	}
	if err := im.openOthers(o); err != nil {
		return err
	}
	if err := im.fitData(); err != nil {
		return im.explain(err)
	}
	im.limits = im.limitsOf()
	im.mergeGap, im.noMerge = im.mergeGapOf(o), o.NoMerge
	if im.readOnly {
		return nil
	}
	if err := im.readRefcountTable(); err != nil {
		return im.explain(err)
	}
	if err := im.collectMetadata(); err != nil {
		return im.explain(err)
	}
	return im.startSession()
}

// admit refuses images that can't be read at all, or not be written.
func (im *Image) admit(h *layout.Header) error {
	switch {
	case im.infoOnly:
	case h.Encryption != layout.Plain:
		return &formats.Error{Op: "open", Path: im.path, Err: fmt.Errorf("%w (%s)", ErrEncrypted, h.Encryption),
			Remedy: "convert it to an image without encryption: qemu-img convert --object secret,… --image-opts …"}
	case h.Has(layout.Corrupt) && !im.readOnly:
		return &formats.Error{Op: "open", Path: im.path, Err: ErrCorrupt,
			Remedy: "open it read-only, or repair it: platter check --repair all"}
	case h.Has(layout.Dirty) && !im.readOnly:
		return im.repairDirty()
	}
	return nil
}

func (im *Image) useSnapshot(name string) error {
	if !im.readOnly {
		return &formats.Error{Op: "open", Path: im.path, Err: fmt.Errorf("%w: a snapshot for writing", formats.ErrBadOptions),
			Remedy: "open it read-only"}
	}
	list, err := layout.ReadSnapshots(im.reader(), im.header)
	if err != nil {
		return im.explain(err)
	}
	for _, match := range []func(layout.Snapshot) bool{
		func(s layout.Snapshot) bool { return s.ID == name },
		func(s layout.Snapshot) bool { return s.Name == name },
	} {
		for _, s := range list {
			if match(s) {
				im.header.L1Offset, im.header.L1Entries, im.size = s.L1Offset, s.L1Entries, s.Size&^511
				return nil
			}
		}
	}
	return &formats.Error{Op: "open", Path: im.path, Err: fmt.Errorf("%w: %q", ErrNoSnapshot, name),
		Remedy: "see the list: platter info"}
}

// shape works out how guest offsets are taken apart, and how large caches are.
func (im *Image) shape(cacheBytes int64) {
	entries := min(int64(sliceSize), im.g.ClusterSize()) / int64(im.g.L2EntrySize())
	im.tableShift = im.g.L2Bits() + im.g.ClusterBits
	im.sliceShift = im.g.ClusterBits
	for n := int64(1); n < entries; n *= 2 {
		im.sliceShift++
	}
	if im.g.Extended {
		im.wordShift = 1
	}
	if cacheBytes == 0 {
		cacheBytes = DefaultMetadataCache
	}
	im.cache.max = max(int(cacheBytes/sliceSize), 16)
	im.cache.loads = make(map[loadKey]*load)
	im.cache.full = im.commits.kick
}

func (im *Image) reader() io.ReaderAt { return readerAt{im.waiter, im.file, im.fileEnd.Load} }

// readL1 reads the L1 table. Entries that are wrong are found when they are
// used.
func (im *Image) readL1() error {
	n := int64(im.header.L1Entries)
	if n > 0 && im.header.L1Offset+n*8 > im.fileEnd.Load() {
		return &layout.FieldError{Field: "l1_table_offset", Value: layout.Hex(im.header.L1Offset),
			Want: fmt.Sprintf("must lie within the file with all %d entries", n), Kind: layout.ErrInvalid}
	}
	b := make([]byte, n*8)
	if err := im.waiter.readAt(im.file, b, im.header.L1Offset); err != nil {
		return fmt.Errorf("read L1 table: %w", err)
	}
	im.l1 = make([]table, n)
	for i := range im.l1 {
		im.l1[i].word.Store(binary.BigEndian.Uint64(b[8*i:]))
	}
	if im.readOnly {
		return nil
	}
	im.l1Durable = make([]uint64, n)
	for i := range im.l1 {
		im.l1Durable[i] = im.l1[i].word.Load()
	}
	im.l1Dirty = make(map[int]struct{})
	return nil
}

// openOthers opens the backing file and the data file.
func (im *Image) openOthers(o Options) error {
	if im.infoOnly {
		return nil
	}
	if im.header.BackingFile != "" && o.OpenBacking != nil {
		backing, err := o.OpenBacking(im.header.BackingFile, im.header.BackingFormat())
		if err != nil {
			return err
		}
		im.backing = backing
		im.backingSize = min(backing.Size(), im.size)
	}
	if im.g.External {
		if o.OpenData == nil {
			return &formats.Error{Op: "open", Path: im.path, Err: fmt.Errorf("%w: no way to open the data file", formats.ErrBadOptions)}
		}
		data, err := o.OpenData(im.header.DataFile())
		if err != nil {
			return err
		}
		im.data, im.dataPath = data, formats.Beside(im.path, im.header.DataFile())
	}
	return nil
}

// fitData makes a data file as long as the disk, so that all of it can be read.
func (im *Image) fitData() error {
	im.dataSize = im.data.Size()
	f, ok := im.data.(aio.Truncater)
	if im.data == im.file || im.readOnly || im.dataSize >= im.size || !ok {
		return nil
	}
	if err := f.Truncate(im.size); err != nil {
		return fmt.Errorf("set length of the data file to %d: %w", im.size, err)
	}
	im.dataSize = im.size
	return nil
}

// closeOthers closes what openOthers opened.
func (im *Image) closeOthers() error {
	var errs []error
	if im.backing != nil {
		errs = append(errs, im.backing.Close())
		im.backing = nil
	}
	if im.data != im.file {
		errs = append(errs, im.data.Close())
		im.data = im.file
	}
	return errors.Join(errs...)
}

func (im *Image) readRefcountTable() error {
	h := im.header
	n := int64(h.RefcountTableClusters) << h.ClusterBits
	if h.RefcountTableOffset+n > im.fileEnd.Load() {
		return &layout.FieldError{Field: "refcount_table_offset", Value: layout.Hex(h.RefcountTableOffset),
			Want: fmt.Sprintf("must lie within the file with all %d clusters", h.RefcountTableClusters), Kind: layout.ErrInvalid}
	}
	b := make([]byte, n)
	if err := im.waiter.readAt(im.file, b, h.RefcountTableOffset); err != nil {
		return fmt.Errorf("read refcount table: %w", err)
	}
	r := &im.alloc.refs
	*r = refcounts{im: im, a: &im.alloc, g: im.g, offset: h.RefcountTableOffset, blocks: make(map[int64]*block)}
	r.max = max(int(refcountCache>>h.ClusterBits), 8)
	r.table = make([]uint64, n/8)
	for i := range r.table {
		r.table[i] = binary.BigEndian.Uint64(b[8*i:])
	}
	im.alloc.fileEnd = im.fileEnd.Load()
	im.alloc.frontier = im.g.Clusters(im.fileEnd.Load())
	im.virgin = im.alloc.frontier << im.g.ClusterBits
	return nil
}

// refcountCache is how much memory clean refcount blocks may take.
const refcountCache = 8 << 20

// startSession tells other programs that the image is written to without
// knowledge of features that are unknown here, and of bitmaps, which aren't kept
// up to date.
func (im *Image) startSession() error {
	// What the guest writes into a last cluster that is cut off must be read again.
	if err := im.alloc.extend(min(im.alloc.frontier<<im.g.ClusterBits, im.hostLimit())); err != nil {
		return im.explain(err)
	}
	im.lazy.Store(im.header.Compatible&layout.LazyRefcounts != 0)
	keep := im.header.Autoclear & layout.RawExternal
	if im.header.Autoclear == keep {
		return nil
	}
	slog.Warn("clearing autoclear features: bitmaps, if there are any, are not up to date from now on", "image", im.path)
	im.header.Autoclear = keep
	if err := im.writeHeader(); err != nil {
		return im.explain(err)
	}
	return nil
}

// writeHeader writes the fields that change while an image is open. They stand
// in the first sector, which is written as a whole or not at all.
func (im *Image) writeHeader() error {
	b := make([]byte, 512)
	if err := im.waiter.readAt(im.file, b, 0); err != nil {
		return fmt.Errorf("read header: %w", err)
	}
	h := im.header
	binary.BigEndian.PutUint64(b[48:], uint64(h.RefcountTableOffset))
	binary.BigEndian.PutUint32(b[56:], h.RefcountTableClusters)
	if h.Version >= 3 {
		binary.BigEndian.PutUint64(b[72:], h.Incompatible)
		binary.BigEndian.PutUint64(b[88:], h.Autoclear)
	}
	if err := im.waiter.writeAt(im.file, b, 0); err != nil {
		return fmt.Errorf("write header: %w", err)
	}
	return im.waiter.flush(im.file)
}

// limitsOf derives the limits from the format and from the file.
func (im *Image) limitsOf() formats.Limits {
	return formats.Limits{
		BlockSize: 1, PreferredSize: 4096, MaxTransfer: 32 << 20, MaxSegments: 1024,
		DiscardGranularity: uint32(im.g.ClusterSize()), MultiConn: true, FUA: true,
		FastZero: im.g.Version >= 3 && !im.readOnly,
	}
}

// hostLimit is the end of what can become clusters.
func (im *Image) hostLimit() int64 {
	if f, ok := im.file.(interface{ IsBlockDevice() bool }); ok && f.IsBlockDevice() {
		return im.file.Size()
	}
	return min(layout.MaxOffset, math.MaxInt64)
}

// dataEnd is the length of the file that the guest's data is in.
func (im *Image) dataEnd() int64 {
	if im.data != im.file {
		return im.dataSize
	}
	return im.fileEnd.Load()
}

// truncate sets the length of the file.
func (im *Image) truncate(size int64) error {
	f, ok := im.file.(aio.Truncater)
	if !ok {
		return fmt.Errorf("set length of the file: %w", unix.EOPNOTSUPP)
	}
	if err := f.Truncate(size); err != nil {
		return fmt.Errorf("set length of the file to %d: %w", size, err)
	}
	return nil
}

// explain makes an error about the image one for its user.
func (im *Image) explain(err error) error {
	remedy := ""
	switch {
	case errors.Is(err, layout.ErrUnsupported):
		remedy = "open it with the program that made it, and convert it"
	case errors.Is(err, layout.ErrInvalid):
		remedy = "see what can be saved: platter check"
	case errors.Is(err, layout.ErrNotQcow2):
		err = fmt.Errorf("%w: %w", formats.ErrFormat, err)
		remedy = "name its format, or let it be found out: --format auto"
	}
	return &formats.Error{Op: "open", Path: im.path, Err: err, Remedy: remedy}
}
