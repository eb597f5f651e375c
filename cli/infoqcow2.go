package cli

import (
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"strings"

	"platter/formats"
	"platter/formats/qcow2"
	"platter/formats/qcow2/layout"
)

type snapshotInfo struct {
	ICount      *uint64 `json:"icount,omitempty"`
	VMClockNsec int64   `json:"vm-clock-nsec"`
	Name        string  `json:"name"`
	DateSec     int64   `json:"date-sec"`
	DateNsec    int64   `json:"date-nsec"`
	VMClockSec  int64   `json:"vm-clock-sec"`
	ID          string  `json:"id"`
	VMStateSize int64   `json:"vm-state-size"`
}

// qcow2Info has pointers for what images of version 2 don't tell.
type qcow2Info struct {
	Compat        string       `json:"compat"`
	Compression   string       `json:"compression-type"`
	LazyRefcounts *bool        `json:"lazy-refcounts,omitempty"`
	Bitmaps       []bitmapInfo `json:"bitmaps,omitempty"`
	RefcountBits  int          `json:"refcount-bits"`
	Encrypt       *encryptInfo `json:"encrypt,omitempty"`
	DataFile      string       `json:"data-file,omitempty"`
	DataFileRaw   *bool        `json:"data-file-raw,omitempty"`
	Corrupt       *bool        `json:"corrupt,omitempty"`
	ExtendedL2    *bool        `json:"extended-l2,omitempty"`
}

type bitmapInfo struct {
	Flags       []string `json:"flags"`
	Name        string   `json:"name"`
	Granularity int64    `json:"granularity"`
}

// addQcow2 adds what only a qcow2 image has. f is the image's file, and snapshot
// the only one to tell about, unless it is "".
func (info *imageInfo) addQcow2(im *qcow2.Image, f io.ReaderAt, snapshot string) error {
	said, err := im.Info()
	if err != nil {
		return err
	}
	h := &said.Header
	g := h.Geometry()
	info.ClusterSize = g.ClusterSize()
	info.DirtyFlag = h.Has(layout.Dirty)
	info.Encrypted = h.Encryption != layout.Plain
	info.BackingFilename, info.BackingFormat = h.BackingFile, h.BackingFormat()
	info.FullBackingFilename = fullName(info.Filename, h.BackingFile)
	for _, s := range pick(said.Snapshots, snapshot) {
		info.Snapshots = append(info.Snapshots, describeSnapshot(s))
	}
	data := &qcow2Info{Compat: "0.10", Compression: h.CompressionType.String(), RefcountBits: 1 << g.RefcountOrder}
	if h.Version >= 3 {
		data.Compat = "1.1"
		lazy, corrupt := h.Compatible&layout.LazyRefcounts != 0, h.Has(layout.Corrupt)
		data.LazyRefcounts, data.Corrupt, data.ExtendedL2 = &lazy, &corrupt, &g.Extended
	}
	if g.External {
		raw := h.Autoclear&layout.RawExternal != 0
		data.DataFile, data.DataFileRaw = h.DataFile(), &raw
	}
	for _, b := range said.Bitmaps {
		data.Bitmaps = append(data.Bitmaps, describeBitmap(b))
	}
	if info.Encrypted {
		if data.Encrypt, err = describeEncryption(h, f); err != nil {
			return formats.Explain("open", info.Filename, fmt.Errorf("read encryption header: %w", err))
		}
	}
	info.FormatSpecific = &formatSpecific{Type: "qcow2", Data: data}
	return nil
}

// fullName is the name of a file that the image at path names, as QEMU prints
// it: not cleaned, and as it is where it's no plain path.
func fullName(path, name string) string {
	prefix, _, colon := strings.Cut(name, ":")
	if name == "" || filepath.IsAbs(name) || colon && !strings.Contains(prefix, "/") {
		return name
	}
	return path[:strings.LastIndexByte(path, '/')+1] + name
}

// pick returns the snapshot of that ID or else of that name, or all of them.
func pick(list []layout.Snapshot, snapshot string) []layout.Snapshot {
	if snapshot == "" {
		return list
	}
	i := slices.IndexFunc(list, func(s layout.Snapshot) bool { return s.ID == snapshot })
	if i < 0 {
		i = slices.IndexFunc(list, func(s layout.Snapshot) bool { return s.Name == snapshot })
	}
	if i < 0 {
		return nil
	}
	return list[i : i+1]
}

func describeSnapshot(s layout.Snapshot) snapshotInfo {
	info := snapshotInfo{
		ID: s.ID, Name: s.Name, VMStateSize: s.VMState, DateSec: int64(s.Seconds), DateNsec: int64(s.Nanoseconds),
		VMClockSec: int64(s.VMClock / 1e9), VMClockNsec: int64(s.VMClock % 1e9),
	}
	if s.ICount != layout.NoICount {
		info.ICount = &s.ICount
	}
	return info
}

func describeBitmap(b layout.Bitmap) bitmapInfo {
	info := bitmapInfo{Flags: []string{}, Name: b.Name, Granularity: 1 << b.GranularityBits}
	if b.Flags&layout.BitmapInUse != 0 {
		info.Flags = append(info.Flags, "in-use")
	}
	if b.Flags&layout.BitmapAuto != 0 {
		info.Flags = append(info.Flags, "auto")
	}
	return info
}
