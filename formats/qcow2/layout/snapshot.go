package layout

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"slices"
)

// Snapshot is an entry of the snapshot table.
type Snapshot struct {
	ID          string
	Name        string
	L1Offset    int64
	L1Entries   uint32
	Seconds     uint32 // when it was taken, since 1970
	Nanoseconds uint32
	VMClock     uint64 // how long the guest had run, in nanoseconds
	VMState     int64  // size of the machine's state in bytes, 0 if there is none
	Size        int64  // of the disk in bytes
	ICount      uint64 // instructions executed; NoICount when they weren't counted
	Extra       []byte // extra data beyond what is known here, kept
}

// NoICount tells that instructions were not counted.
const NoICount = 1<<64 - 1

const (
	snapshotFixed = 40 // bytes before the extra data
	snapshotExtra = 24 // of known extra data: VM state size, disk size, icount
)

// ReadSnapshots reads and validates the snapshot table. An image of version 2 may
// not tell the size of a snapshot's disk; it is then the image's. It allocates
// less than 128 MiB, whatever the file holds: the table's 64 MiB at most for the
// strings, and the list.
func ReadSnapshots(r io.ReaderAt, h *Header) ([]Snapshot, error) {
	list, _, err := ReadSnapshotTable(r, h)
	return list, err
}

// ReadSnapshotTable is ReadSnapshots that also tells how many bytes the table
// takes in the file. That may be less than AppendSnapshots makes of it: older
// programs wrote less extra data, and the last entry needs no padding.
func ReadSnapshotTable(r io.ReaderAt, h *Header) (list []Snapshot, size int64, err error) {
	var (
		table = snapshotReader{r: bufio.NewReader(io.NewSectionReader(r, h.SnapshotsOffset, MaxSnapshotTableBytes))}
		g     = h.Geometry()
	)
	for i := range int(h.Snapshots) {
		s, err := table.next(h)
		if err == nil {
			err = s.Validate(g)
		}
		if err != nil {
			return nil, 0, fmt.Errorf("snapshot %d: %w", i, err)
		}
		list = append(list, s)
	}
	return list, table.size, nil
}

// snapshotReader reads the entries of a snapshot table.
type snapshotReader struct {
	r    *bufio.Reader
	size int64 // of what was read
	buf  []byte
}

// read returns the next n bytes, until it is called again.
func (t *snapshotReader) read(n int) ([]byte, error) {
	t.buf = slices.Grow(t.buf[:0], n)[:n]
	_, err := io.ReadFull(t.r, t.buf)
	switch {
	case err == io.EOF || err == io.ErrUnexpectedEOF:
		return nil, invalid("end of the entry", Hex(t.size+int64(n)), "must lie within the file and the snapshot table's 64 MiB")
	case err != nil:
		return nil, fmt.Errorf("read snapshot table: %w", err)
	}
	t.size += int64(n)
	return t.buf, nil
}

func (t *snapshotReader) next(h *Header) (Snapshot, error) {
	// Entries begin at multiples of 8. The last one isn't padded, and the file may
	// end with it.
	if padding := -t.size & 7; padding > 0 {
		if _, err := t.read(int(padding)); err != nil {
			return Snapshot{}, err
		}
	}
	b, err := t.read(snapshotFixed)
	if err != nil {
		return Snapshot{}, err
	}
	be := binary.BigEndian
	s := Snapshot{
		L1Offset: int64(be.Uint64(b)), L1Entries: be.Uint32(b[8:]),
		Seconds: be.Uint32(b[16:]), Nanoseconds: be.Uint32(b[20:]), VMClock: be.Uint64(b[24:]),
		VMState: int64(be.Uint32(b[32:])), Size: h.Size, ICount: NoICount,
	}
	id, name, extra := int(be.Uint16(b[12:])), int(be.Uint16(b[14:])), be.Uint32(b[36:])
	if extra > MaxSnapshotExtra {
		return Snapshot{}, invalid("extra_data_size", extra, "must be at most 1024")
	}
	if b, err = t.read(int(extra) + id + name); err != nil {
		return Snapshot{}, err
	}
	s.parseExtra(b[:extra])
	s.ID, s.Name = string(b[extra:int(extra)+id]), string(b[int(extra)+id:])
	return s, nil
}

func (s *Snapshot) parseExtra(b []byte) {
	be := binary.BigEndian
	if len(b) >= 8 {
		s.VMState = int64(be.Uint64(b))
	}
	if len(b) >= 16 {
		s.Size = int64(be.Uint64(b[8:]))
	}
	if len(b) >= 24 {
		s.ICount = be.Uint64(b[16:])
	}
	if len(b) > 24 {
		s.Extra = bytes.Clone(b[24:])
	}
}

// Validate reports the first field that the specification or a limit forbids.
func (s *Snapshot) Validate(g Geometry) error {
	need, ok := g.L1EntriesFor(s.Size)
	switch {
	case !ok:
		return invalid("disk size", uint64(s.Size), fmt.Sprintf("must be at most %d with clusters of %d bytes", g.MaxSize(), g.ClusterSize()))
	case int64(s.L1Entries)*8 > MaxL1Bytes:
		return invalid("l1_size", s.L1Entries, "must be at most 4194304 (32 MiB)")
	case int64(s.L1Entries) < need:
		return invalid("l1_size", s.L1Entries, fmt.Sprintf("must be at least %d for a disk of %d bytes", need, s.Size))
	case s.VMState < 0:
		return invalid("VM state size", uint64(s.VMState), "must be at most 9223372036854775807")
	case len(s.ID) > 1<<16-1:
		return invalid("length of the ID", len(s.ID), "must be at most 65535")
	case len(s.Name) > 1<<16-1:
		return invalid("length of the name", len(s.Name), "must be at most 65535")
	case snapshotExtra+len(s.Extra) > MaxSnapshotExtra:
		return invalid("extra_data_size", snapshotExtra+len(s.Extra), "must be at most 1024")
	case s.L1Entries > 0:
		return g.checkTableOffset("l1_table_offset", s.L1Offset)
	}
	return nil
}

// AppendSnapshots encodes a snapshot table. The snapshots must be valid, and the
// table is to be at most MaxSnapshotTableBytes long.
func AppendSnapshots(b []byte, list []Snapshot) []byte {
	be := binary.BigEndian
	for _, s := range list {
		start := len(b)
		b = be.AppendUint64(b, uint64(s.L1Offset))
		b = be.AppendUint32(b, s.L1Entries)
		b = be.AppendUint16(b, uint16(len(s.ID)))
		b = be.AppendUint16(b, uint16(len(s.Name)))
		b = be.AppendUint32(b, s.Seconds)
		b = be.AppendUint32(b, s.Nanoseconds)
		b = be.AppendUint64(b, s.VMClock)
		b = be.AppendUint32(b, shortVMState(s.VMState))
		b = be.AppendUint32(b, uint32(snapshotExtra+len(s.Extra)))
		b = be.AppendUint64(b, uint64(s.VMState))
		b = be.AppendUint64(b, uint64(s.Size))
		b = be.AppendUint64(b, s.ICount)
		b = append(b, s.Extra...)
		b = append(b, s.ID...)
		b = append(b, s.Name...)
		for (len(b)-start)%8 != 0 {
			b = append(b, 0)
		}
	}
	return b
}

// shortVMState is the size of the machine's state for programs that don't know
// the larger field: they shall see none rather than a part of it.
func shortVMState(size int64) uint32 {
	if size > 1<<32-1 {
		return 0
	}
	return uint32(size)
}
