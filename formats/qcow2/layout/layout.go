// Package layout is the qcow2 format on disk: the header with its extensions,
// the entries of the L1, L2 and refcount tables, and the snapshot and bitmap
// directories, as docs/interop/qcow2.rst of QEMU specifies them.
//
// It decodes, validates and encodes, and knows nothing of caches, locks or what
// a disk does; the engine, the checker and whoever creates an image share it.
// Everything it decodes may come from a stranger: every length is checked before
// memory is allocated for it, every offset before anyone may follow it, and what
// is wrong is reported as a *FieldError that names the field, its value and the
// limit. Nothing here keeps state: all of it may be called from any goroutine, on
// values that no one changes meanwhile.
package layout

import (
	"errors"
	"fmt"
)

// What can be wrong with an image, for errors.Is.
var (
	// ErrNotQcow2: the file doesn't begin with the magic number.
	ErrNotQcow2 = errors.New("not a qcow2 image")
	// ErrInvalid: a field has a value that the specification doesn't allow, or
	// that is beyond the limits that QEMU and this package set.
	ErrInvalid = errors.New("invalid image")
	// ErrUnsupported: the image uses a version or a feature that is unknown here.
	ErrUnsupported = errors.New("unsupported image")
)

// FieldError tells which field of an image is wrong.
type FieldError struct {
	Field string // its name in the specification
	Value any    // what it holds
	Want  string // what it must be, as in "must be 9 to 21"
	Kind  error  // ErrInvalid or ErrUnsupported
}

func (e *FieldError) Error() string {
	switch v := e.Value.(type) {
	case nil:
		return fmt.Sprintf("%s %s", e.Field, e.Want)
	case Hex:
		return fmt.Sprintf("%s is %#x, %s", e.Field, uint64(v), e.Want)
	case string:
		return fmt.Sprintf("%s is %q, %s", e.Field, v, e.Want)
	default:
		return fmt.Sprintf("%s is %d, %s", e.Field, v, e.Want)
	}
}

func (e *FieldError) Unwrap() error { return e.Kind }

// Hex is a value that is best shown in base 16: an offset or a set of bits.
type Hex uint64

func invalid(field string, value any, want string) error {
	return &FieldError{field, value, want, ErrInvalid}
}

// Limits that QEMU sets, and so every image that exists keeps. They bound what
// a hostile image can make a reader allocate. (QEMU takes data file names of any
// length, but Linux has no longer ones, and no extra data of bitmaps at all.)
const (
	MinClusterBits         = 9
	MaxClusterBits         = 21
	MinExtendedClusterBits = 14 // with extended L2 entries
	MaxRefcountOrder       = 6
	MaxL1Bytes             = 32 << 20
	MaxRefcountTableBytes  = 8 << 20
	MaxSnapshots           = 65536
	MaxSnapshotTableBytes  = 64 << 20
	MaxSnapshotExtra       = 1024
	MaxBackingName         = 1023
	MaxBackingFormat       = 15
	MaxDataFileName        = 4095
	MaxBitmaps             = 65535
	MaxBitmapDirectory     = 1024 * MaxBitmaps
	MaxBitmapName          = 1023
	MaxBitmapExtra         = 1024
	MaxBitmapBytes         = 512 << 20 // of one bitmap, in whole clusters
	MaxBitmapTableEntries  = MaxBitmapBytes >> MinClusterBits
	MinBitmapGranularity   = 9
	MaxBitmapGranularity   = 31
)

// MaxOffset is the end of what an L1, L2 or bitmap entry can name: 56 bits.
const MaxOffset = 1 << 56
