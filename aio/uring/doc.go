// Package uring drives io_uring by raw system calls: it sets rings up, hands
// out submission entries, enters the kernel and reads completions. It knows
// nothing of files or sockets beyond how their operations are encoded.
//
// A Ring belongs to the one thread that made it: every method is called there,
// with the goroutine locked to the thread, because the flags that make a ring
// fast (SINGLE_ISSUER, DEFER_TASKRUN) bind it to its task. New tries the newest
// flags first and falls back to what older kernels take; Features of the kernel
// are asked for with Supports.
//
// The layouts are those of linux/io_uring.h; a test checks their sizes and
// offsets. This package, aio/native and aio hold the project's unsafe code for
// block I/O.
package uring
