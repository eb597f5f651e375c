// Package codec packs and unpacks single clusters of qcow2 images, in the two
// ways that docs/interop/qcow2.rst of QEMU knows: raw deflate data, which it calls
// zlib, and zstd frames.
//
// Deflate data is packed for readers with a window of 4 KiB, QEMU's being one.
// Zstd frames are packed with a checksum, which every reader verifies.
//
// Everything that is unpacked may come from a stranger. Unpack writes to nothing
// but the cluster, and what it allocates doesn't depend on what the data says of
// itself. The library's readers and writers are kept in pools: once those are
// warm, packing and unpacking allocate nothing, save the few small tables that
// unusual deflate data needs. A packer keeps up to 7 MiB and an unpacker up to 3
// MiB of memory, until the garbage collector takes it.
//
// Both functions may be called from any goroutine.
package codec

import (
	"errors"
	"fmt"

	"platter/formats/qcow2/layout"
)

// ErrCorrupt means that the data isn't one packed cluster. What is wrong with it
// is wrapped beside it.
var ErrCorrupt = errors.New("corrupt compressed cluster")

func corrupt(cause error) error { return fmt.Errorf("%w: %w", ErrCorrupt, cause) }

// errTooLong: the data goes on where the cluster ends.
var errTooLong = errors.New("more than a cluster of data")

// Unpack decompresses one cluster, exactly len(dst) bytes, from src. Behind the
// compressed data src may have other bytes, as the last sector of a compressed
// cluster does. It allocates less than 8 MiB, whatever src holds.
//
// The error is ErrCorrupt when the data is damaged, cut off, or less or more than
// a cluster, and layout.ErrUnsupported for an unknown type. dst then holds
// anything.
func Unpack(t layout.CompressionType, dst, src []byte) error {
	switch t {
	case layout.Zlib:
		return inflate(dst, src)
	case layout.Zstd:
		return unpackFrames(dst, src)
	}
	return unsupported(t)
}

// Pack compresses src, one cluster, into dst[:n]. When that takes more than
// len(dst) bytes, or isn't shorter than src, ok is false and dst holds anything:
// the cluster is then to be written as it is. dst and src may not overlap. The
// error is layout.ErrUnsupported for an unknown type.
func Pack(t layout.CompressionType, dst, src []byte) (n int, ok bool, err error) {
	dst = dst[:min(len(dst), max(len(src)-1, 0))]
	switch t {
	case layout.Zlib:
		return deflate(dst, src)
	case layout.Zstd:
		n, ok = packFrame(dst, src)
		return n, ok, nil
	}
	return 0, false, unsupported(t)
}

func unsupported(t layout.CompressionType) error {
	return fmt.Errorf("%w: compression %s", layout.ErrUnsupported, t)
}
