package check

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"platter/formats/qcow2/layout"
)

// snapshotTable is the snapshot table as far as it can be understood. Package
// layout refuses a table with a fault, which here is a finding.
type snapshotTable struct {
	list   []layout.Snapshot
	size   int64 // in the file, in bytes
	faults int64 // entries that must be written anew
}

// known is how much of the extra data of an entry version 3 demands.
const known = 16

// readSnapshots reads the table. Behind the file's end it has zeroes.
func (c *checker) readSnapshots() (snapshotTable, error) {
	var t snapshotTable
	section := io.NewSectionReader(c, c.h.SnapshotsOffset, layout.MaxSnapshotTableBytes)
	r := bufio.NewReaderSize(section, 64<<10)
	for i := range int(c.h.Snapshots) {
		s, size, faulty, err := readSnapshot(r, c.h)
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return t, &layout.FieldError{Field: fmt.Sprintf("snapshot table entry %d", i),
				Want: "must lie within the table's 64 MiB", Kind: layout.ErrInvalid}
		}
		if err != nil {
			return t, fmt.Errorf("read snapshot table: %w", err)
		}
		if faulty {
			c.corrupt(1, "snapshot table entry %d is incomplete or has too much extra data", i)
			t.faults++
		}
		t.list = append(t.list, s)
		t.size += size
	}
	return t, nil
}

// readSnapshot decodes an entry, without judging what it says.
func readSnapshot(r io.Reader, h *layout.Header) (s layout.Snapshot, size int64, faulty bool, err error) {
	var fixed [40]byte
	if _, err := io.ReadFull(r, fixed[:]); err != nil {
		return s, 0, false, err
	}
	be := binary.BigEndian
	s = layout.Snapshot{
		L1Offset: int64(be.Uint64(fixed[0:])), L1Entries: be.Uint32(fixed[8:]),
		Seconds: be.Uint32(fixed[16:]), Nanoseconds: be.Uint32(fixed[20:]), VMClock: be.Uint64(fixed[24:]),
		VMState: int64(be.Uint32(fixed[32:])), Size: h.Size, ICount: layout.NoICount,
	}
	length, id, name := int64(be.Uint32(fixed[36:])), int64(be.Uint16(fixed[12:])), int64(be.Uint16(fixed[14:]))
	kept := min(length, layout.MaxSnapshotExtra)
	rest := make([]byte, kept+id+name)
	extra, names := rest[:kept], rest[kept:]
	if _, err := io.ReadFull(r, extra); err != nil {
		return s, 0, false, err
	}
	if _, err := io.CopyN(io.Discard, r, length-kept); err != nil {
		return s, 0, false, err
	}
	if _, err := io.ReadFull(r, names); err != nil {
		return s, 0, false, err
	}
	s.ID, s.Name = string(names[:id]), string(names[id:])
	if kept >= 8 {
		s.VMState = int64(be.Uint64(extra))
	}
	if kept >= 16 {
		s.Size = int64(be.Uint64(extra[8:]))
	}
	if kept >= 24 {
		s.ICount, s.Extra = be.Uint64(extra[16:]), extra[24:]
	}
	size = 40 + length + id + name
	padding := -size & 7
	if _, err := io.CopyN(io.Discard, r, padding); err != nil {
		return s, 0, false, err
	}
	return s, size + padding, length > kept || h.Version >= 3 && length < known, nil
}
