// Package native drives Linux AIO (io_submit and io_getevents) by raw system
// calls: it makes contexts, encodes operations, submits batches of them and
// takes their completions. It knows nothing of loops.
//
// A Context may be used by any thread, by one at a time. The kernel copies an
// IOCB while it is submitted, so its memory may be used again at once; the data
// that it names belongs to the kernel until its Event has come.
//
// Linux AIO is asynchronous for files that were opened with O_DIRECT only: on
// others io_submit carries the operation out before it returns. With O_DIRECT too
// it sleeps where it must wait for a lock or for space to be allocated, unless
// RWF_NOWAIT (Linux 4.13) has the operation end with EAGAIN instead; and, in any
// case, for a place in a device's queue that is full.
//
// The layouts are those of linux/aio_abi.h; a test checks their sizes and
// offsets. What the name stands for is QEMU's: aio=native.
package native
