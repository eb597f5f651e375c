package native

import "unsafe"

// Pread reads n bytes at off into the memory at addr.
func (b *IOCB) Pread(fd int32, addr uintptr, n uint64, off int64, flags uint32) {
	*b = IOCB{Opcode: OpPread, Fd: fd, Buf: uint64(addr), Nbytes: n, Offset: off, RWFlags: flags}
}

// Pwrite writes the n bytes at addr to off.
func (b *IOCB) Pwrite(fd int32, addr uintptr, n uint64, off int64, flags uint32) {
	*b = IOCB{Opcode: OpPwrite, Fd: fd, Buf: uint64(addr), Nbytes: n, Offset: off, RWFlags: flags}
}

// Preadv reads at off into what the n elements of vec name, at most IOV_MAX. The
// kernel has read the vector when Submit returns.
func (b *IOCB) Preadv(fd int32, vec unsafe.Pointer, n int, off int64, flags uint32) {
	*b = IOCB{Opcode: OpPreadv, Fd: fd, Buf: uint64(uintptr(vec)), Nbytes: uint64(n), Offset: off, RWFlags: flags}
}

// Pwritev writes what the n elements of vec name to off; see Preadv.
func (b *IOCB) Pwritev(fd int32, vec unsafe.Pointer, n int, off int64, flags uint32) {
	*b = IOCB{Opcode: OpPwritev, Fd: fd, Buf: uint64(uintptr(vec)), Nbytes: uint64(n), Offset: off, RWFlags: flags}
}

// Fdsync makes what was written to the file durable, as fdatasync does. Before
// Linux 4.18, and on files that can't be synced, Submit fails with EINVAL.
func (b *IOCB) Fdsync(fd int32) { *b = IOCB{Opcode: OpFdsync, Fd: fd} }

// Notify has the completion carry data and signal the eventfd.
func (b *IOCB) Notify(eventfd int32, data uint64) {
	b.Flags, b.ResFD, b.Data = FlagResFD, eventfd, data
}
