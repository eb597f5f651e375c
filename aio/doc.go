// Package aio does block I/O asynchronously: many requests in flight on one
// thread, with one kernel entry for a whole batch of them.
//
// A Loop is one locked OS thread that waits in exactly one place. Files,
// sockets, timers and functions posted from other threads all come to it there.
// A Request is one block operation; a File is where it is carried out; Memory
// and Arena are where its bytes stand, outside the Go heap. Everything that
// happens to a request happens on its loop's thread, so nothing on its way is
// locked, sent through a channel, or allocated.
//
// How a loop waits and works is its Engine's business: io_uring puts sockets and
// files on one ring (aio/uring); threads waits in epoll and hands file I/O to a
// bounded pool, for kernels and containers where io_uring is forbidden; native
// does as threads, but for files with O_DIRECT, which go to Linux AIO
// (aio/native). How a file's reads and writes are carried out is a property of
// the file, found once when it is opened: on memory file systems, whose
// operations never wait but which a ring would punt to a worker thread, they are
// done at once on the loop's thread. Where the kernel can be asked to read
// without waiting (RWF_NOWAIT), reads are tried that way first, since a copy
// from the page cache is cheapest without a detour. Everything else is the
// engine's.
//
// Wrong use of memory is the one thing this package can't defend against: an
// Iovec must name memory that outlives its request.
package aio
