package qcow2

import (
	"fmt"
	"log/slog"
	"time"

	"golang.org/x/sys/unix"

	"platter/aio"
	"platter/formats/qcow2/codec"
)

// readCompressed reads n bytes from guest on, within one compressed cluster whose
// entry is word. It is for goroutines.
func (im *Image) readCompressed(vec []aio.Iovec, guest, n int64, word uint64) unix.Errno {
	packed, err := im.waiter.memory()
	if err != nil {
		return errnoOf(err)
	}
	defer im.waiter.give(packed)
	plain, err := im.waiter.memory()
	if err != nil {
		return errnoOf(err)
	}
	defer im.waiter.give(plain)
	size := im.g.ClusterSize()
	cluster := plain.Bytes()[:size]
	if err := im.unpack(cluster, packed, word); err != nil {
		if now := time.Now().Unix(); im.complained.Swap(now) != now { // a guest may read it again and again
			slog.Error("compressed cluster can't be read", "image", im.path, "guest offset", guest, "error", err)
		}
		return errnoOf(err)
	}
	within := guest & (size - 1)
	aio.CopyIn(vec, cluster[within:within+n])
	return 0
}

// unpack reads and decompresses a cluster.
func (im *Image) unpack(cluster []byte, packed *aio.Memory, word uint64) error {
	off, length := im.g.CompressedRange(word)
	length = min(length, im.fileEnd.Load()-off) // the last sector may be cut off
	if length <= 0 {
		return fmt.Errorf("compressed cluster at %#x lies beyond the end of the file", off)
	}
	// What is packed is smaller than a cluster; more than that is not its own.
	length = min(length, transferSize)
	err := im.waiter.do(im.file, aio.Request{Op: aio.OpRead, Offset: off, Length: length, Vec: []aio.Iovec{packed.Iovec(0, int(length))}})
	if err != nil {
		return fmt.Errorf("read compressed cluster at %#x: %w", off, err)
	}
	if err := codec.Unpack(im.header.CompressionType, cluster, packed.Bytes()[:length]); err != nil {
		return fmt.Errorf("decompress cluster at %#x: %w", off, err)
	}
	return nil
}
