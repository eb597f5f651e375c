package codec

import (
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"

	"github.com/klauspost/compress/zstd"

	"platter/formats/qcow2/layout"
)

// maxWindow is how far back zstd data may refer, as QEMU has it. A cluster is
// unpacked in its own memory, so that a large window takes none.
const maxWindow = 128 << 20

var decoders = sync.Pool{New: func() any {
	d, err := zstd.NewReader(nil,
		zstd.WithDecoderConcurrency(1),
		zstd.WithDecoderLowmem(true),
		zstd.WithDecoderMaxMemory(maxWindow),
		zstd.WithDecoderMaxWindow(maxWindow),
		zstd.WithDecodeAllCapLimit(true))
	if err != nil {
		panic(err) // options that don't exist
	}
	return d
}}

// unpackFrames unpacks a cluster, which may be in several frames.
func unpackFrames(dst, src []byte) error {
	d := decoders.Get().(*zstd.Decoder)
	defer decoders.Put(d)
	for n := 0; n < len(dst); {
		size, err := frameSize(src)
		if err != nil {
			return corrupt(fmt.Errorf("%d of %d bytes: %w", n, len(dst), err))
		}
		b, err := d.DecodeAll(src[:size], dst[n:n:len(dst)])
		switch {
		case errors.Is(err, zstd.ErrDecoderSizeExceeded):
			return corrupt(errTooLong)
		case err != nil:
			return corrupt(err)
		}
		n += len(b)
		src = src[size:]
	}
	return nil
}

// What the two bits of a block header say of the block, as in RFC 8878.
const (
	blockRLE      = 1 // a byte, to be repeated
	blockReserved = 3
)

// frameSize returns how many bytes the frame takes with which src begins. The
// library would take what follows it for another one.
func frameSize(src []byte) (int, error) {
	var h zstd.Header
	if err := h.Decode(src); err != nil {
		return 0, err
	}
	size := int64(h.HeaderSize)
	if h.Skippable {
		size += int64(h.SkippableSize)
	}
	for last := h.Skippable; !last; {
		if size+3 > int64(len(src)) {
			return 0, io.ErrUnexpectedEOF
		}
		block := uint32(src[size]) | uint32(src[size+1])<<8 | uint32(src[size+2])<<16
		last = block&1 != 0
		size += 3
		switch block >> 1 & 3 {
		case blockRLE:
			size++
		case blockReserved:
			return 0, zstd.ErrReservedBlockType
		default:
			size += int64(block >> 3)
		}
	}
	if h.HasCheckSum {
		size += 4
	}
	if size > int64(len(src)) {
		return 0, io.ErrUnexpectedEOF
	}
	return int(size), nil
}

type packer struct {
	e   *zstd.Encoder
	buf []byte // has room for what doesn't get smaller
}

var packers = sync.Pool{New: func() any {
	e, err := zstd.NewWriter(nil,
		zstd.WithEncoderConcurrency(1),
		zstd.WithLowerEncoderMem(true),
		zstd.WithAllLitEntropyCompression(true), // even what has no repeats
		zstd.WithWindowSize(1<<layout.MaxClusterBits))
	if err != nil {
		panic(err) // options that don't exist
	}
	return &packer{e: e}
}}

func packFrame(dst, src []byte) (n int, ok bool) {
	p := packers.Get().(*packer)
	defer packers.Put(p)
	p.buf = slices.Grow(p.buf[:0], p.e.MaxEncodedSize(len(src)))
	p.buf = p.e.EncodeAll(src, p.buf)
	if len(p.buf) > len(dst) {
		return 0, false
	}
	return copy(dst, p.buf), true
}
