package layout

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
)

// BitmapsExtension is what the bitmaps header extension says.
type BitmapsExtension struct {
	Count           uint32
	DirectorySize   int64 // in bytes
	DirectoryOffset int64
}

// Bitmaps decodes and validates the bitmaps extension; it is nil when there is
// none. Without the autoclear bit nothing that it says has to be right.
func (h *Header) Bitmaps() (*BitmapsExtension, error) {
	b, ok := h.Extension(ExtensionBitmaps)
	if !ok {
		return nil, nil
	}
	if len(b) != 24 {
		return nil, invalid("length of the bitmaps extension", len(b), "must be 24")
	}
	be := binary.BigEndian
	x := &BitmapsExtension{be.Uint32(b), int64(be.Uint64(b[8:])), int64(be.Uint64(b[16:]))}
	g := h.Geometry()
	switch {
	case be.Uint32(b[4:]) != 0:
		return nil, invalid("reserved field of the bitmaps extension", be.Uint32(b[4:]), "must be 0")
	case x.Count == 0 || x.Count > MaxBitmaps:
		return nil, invalid("nb_bitmaps", x.Count, "must be 1 to 65535")
	case x.DirectorySize <= 0 || x.DirectorySize > MaxBitmapDirectory:
		return nil, invalid("bitmap_directory_size", uint64(x.DirectorySize), "must be 1 to 67107840")
	}
	if err := g.checkTableOffset("bitmap_directory_offset", x.DirectoryOffset); err != nil {
		return nil, err
	}
	return x, nil
}

// Encode is what the header extension holds.
func (x *BitmapsExtension) Encode() []byte {
	b := make([]byte, 24)
	binary.BigEndian.PutUint32(b, x.Count)
	binary.BigEndian.PutUint64(b[8:], uint64(x.DirectorySize))
	binary.BigEndian.PutUint64(b[16:], uint64(x.DirectoryOffset))
	return b
}

// BitmapFlags are the flags of a bitmap directory entry.
type BitmapFlags uint32

// The flags that are known; others are reserved.
const (
	BitmapInUse           BitmapFlags = 1 << iota // not saved correctly: may be out of date
	BitmapAuto                                    // all writes are noted in it
	BitmapExtraCompatible                         // may be used without knowing its extra data
	bitmapFlagsKnown      = 1<<iota - 1
)

// DirtyTracking is the only type of bitmap there is.
const DirtyTracking = 1

// Bitmap is an entry of the bitmap directory.
type Bitmap struct {
	Name            string
	TableOffset     int64
	TableEntries    uint32 // each is for a cluster of bits
	Flags           BitmapFlags
	Type            uint8
	GranularityBits uint8  // a bit is for 1<<GranularityBits bytes of the disk
	Extra           []byte // unknown here, kept
}

const bitmapFixed = 24 // bytes before the extra data

// ReadBitmaps reads and validates the bitmap directory. It doesn't ask whether the
// autoclear bit says that the bitmaps are up to date. It allocates less than 128
// MiB, whatever the file holds: the directory's 64 MiB at most for the strings,
// and the list.
func ReadBitmaps(r io.ReaderAt, h *Header) ([]Bitmap, error) {
	x, err := h.Bitmaps()
	if x == nil || err != nil {
		return nil, err
	}
	// Reading an entry at a time keeps a hole in the file from taking memory.
	directory := bufio.NewReader(io.NewSectionReader(r, x.DirectoryOffset, x.DirectorySize))
	return parseBitmaps(directory, x.DirectorySize, h, int(x.Count))
}

// ParseBitmaps decodes and validates a bitmap directory of count entries.
func ParseBitmaps(b []byte, h *Header, count int) ([]Bitmap, error) {
	return parseBitmaps(bytes.NewReader(b), int64(len(b)), h, count)
}

func parseBitmaps(r io.Reader, size int64, h *Header, count int) ([]Bitmap, error) {
	var (
		list      []Bitmap
		names     = make(map[string]bool)
		directory = bitmapReader{r: r, size: size}
	)
	for i := range count {
		m, err := directory.next()
		if err == nil {
			err = m.Validate(h)
		}
		if err == nil && names[m.Name] {
			err = invalid("name", m.Name, "must not be another bitmap's")
		}
		if err != nil {
			return nil, fmt.Errorf("bitmap %d: %w", i, err)
		}
		names[m.Name] = true
		list = append(list, m)
	}
	if directory.at != size {
		return nil, invalid("bitmap_directory_size", size, fmt.Sprintf("must be %d, where the last of %d bitmaps ends", directory.at, count))
	}
	return list, nil
}

// bitmapReader reads the entries of a bitmap directory.
type bitmapReader struct {
	r    io.Reader
	size int64 // of the directory
	at   int64 // how far it was read
	buf  [bitmapFixed + MaxBitmapExtra + MaxBitmapName + 7]byte
}

// read returns the next n bytes, until it is called again.
func (d *bitmapReader) read(n int) ([]byte, error) {
	if d.at += int64(n); d.at > d.size {
		return nil, invalid("bitmap_directory_size", d.size, fmt.Sprintf("must be at least %d for this entry", d.at))
	}
	_, err := io.ReadFull(d.r, d.buf[:n])
	switch {
	case err == io.EOF || err == io.ErrUnexpectedEOF:
		return nil, invalid("bitmap_directory_size", d.size, "must lie within the file")
	case err != nil:
		return nil, fmt.Errorf("read bitmap directory: %w", err)
	}
	return d.buf[:n], nil
}

func (d *bitmapReader) next() (Bitmap, error) {
	b, err := d.read(bitmapFixed)
	if err != nil {
		return Bitmap{}, err
	}
	be := binary.BigEndian
	m := Bitmap{
		TableOffset: int64(be.Uint64(b)), TableEntries: be.Uint32(b[8:]), Flags: BitmapFlags(be.Uint32(b[12:])),
		Type: b[16], GranularityBits: b[17],
	}
	name, extra := int64(be.Uint16(b[18:])), int64(be.Uint32(b[20:]))
	if err := checkBitmapLengths(name, extra); err != nil {
		return Bitmap{}, err
	}
	if b, err = d.read(int(extra+name+7) &^ 7); err != nil { // the fixed part is a multiple of 8
		return Bitmap{}, err
	}
	if extra > 0 {
		m.Extra = bytes.Clone(b[:extra])
	}
	m.Name = string(b[extra : extra+name])
	return m, nil
}

func checkBitmapLengths(name, extra int64) error {
	switch {
	case name == 0 || name > MaxBitmapName:
		return invalid("name_size", name, "must be 1 to 1023")
	case extra > MaxBitmapExtra:
		return invalid("extra_data_size", extra, "must be at most 1024")
	}
	return nil
}

// Validate reports the first field that the specification or a limit forbids.
func (m *Bitmap) Validate(h *Header) error {
	if err := checkBitmapLengths(int64(len(m.Name)), int64(len(m.Extra))); err != nil {
		return err
	}
	switch {
	case m.Flags&^bitmapFlagsKnown != 0:
		return invalid("flags", Hex(m.Flags), "must not have reserved bits set")
	case m.Type != DirtyTracking:
		return invalid("type", m.Type, "must be 1 (dirty tracking)")
	case m.GranularityBits < MinBitmapGranularity || m.GranularityBits > MaxBitmapGranularity:
		return invalid("granularity_bits", m.GranularityBits, "must be 9 to 31")
	}
	g := h.Geometry()
	need, limit := g.BitmapTableEntries(h.Size, m.GranularityBits), int64(MaxBitmapBytes)>>g.ClusterBits
	switch {
	case m.TableEntries == 0 || int64(m.TableEntries) > limit:
		return invalid("bitmap_table_size", m.TableEntries, fmt.Sprintf("must be 1 to %d (512 MiB)", limit))
	case m.Flags&BitmapInUse == 0 && int64(m.TableEntries) != need:
		return invalid("bitmap_table_size", m.TableEntries, fmt.Sprintf("must be %d for a disk of %d bytes", need, h.Size))
	}
	return g.checkTableOffset("bitmap_table_offset", m.TableOffset)
}

// BitmapTableEntries is how many clusters a bitmap of a disk of size bytes takes.
func (g Geometry) BitmapTableEntries(size int64, granularityBits uint8) int64 {
	bits := (size + 1<<granularityBits - 1) >> granularityBits
	return g.Clusters((bits + 7) / 8)
}

// CheckBitmapTable reports what is wrong with a bitmap table entry. One without
// an offset stands for a cluster of zeroes or, with bit 0, of ones.
func (g Geometry) CheckBitmapTable(word uint64) error {
	reserved := uint64(0xff<<56 | 0x1fe)
	switch off := EntryOffset(word); {
	case word&reserved != 0, off != 0 && word&1 != 0:
		return invalid("bitmap table entry", Hex(word), "must not have reserved bits set")
	case !g.aligned(off):
		return invalid("bitmap table entry", Hex(word), "must name a multiple of the cluster size")
	}
	return nil
}

// AppendBitmaps encodes a bitmap directory. The bitmaps must be valid, and the
// directory is to be at most MaxBitmapDirectory long.
func AppendBitmaps(b []byte, list []Bitmap) []byte {
	be := binary.BigEndian
	for _, m := range list {
		start := len(b)
		b = be.AppendUint64(b, uint64(m.TableOffset))
		b = be.AppendUint32(b, m.TableEntries)
		b = be.AppendUint32(b, uint32(m.Flags))
		b = append(b, m.Type, m.GranularityBits)
		b = be.AppendUint16(b, uint16(len(m.Name)))
		b = be.AppendUint32(b, uint32(len(m.Extra)))
		b = append(b, m.Extra...)
		b = append(b, m.Name...)
		for (len(b)-start)%8 != 0 {
			b = append(b, 0)
		}
	}
	return b
}
