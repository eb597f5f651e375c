package uring

import "unsafe"

// The methods below fill an entry that SQE has handed out. Addresses must stay
// valid until the operation completes; for vectors and message headers, until
// Enter has submitted it.

// Read reads n bytes at off into addr.
func (e *SQE) Read(fd int32, addr uintptr, n uint32, off uint64) {
	e.Opcode, e.Fd, e.Addr, e.Len, e.Off = OpRead, fd, uint64(addr), n, off
}

// Write writes n bytes at off from addr, with RWF_* flags.
func (e *SQE) Write(fd int32, addr uintptr, n uint32, off uint64, flags uint32) {
	e.Opcode, e.Fd, e.Addr, e.Len, e.Off, e.OpFlags = OpWrite, fd, uint64(addr), n, off, flags
}

// Readv reads at off into the n elements of the I/O vector at addr.
func (e *SQE) Readv(fd int32, addr unsafe.Pointer, n uint32, off uint64) {
	e.Opcode, e.Fd, e.Addr, e.Len, e.Off = OpReadv, fd, uint64(uintptr(addr)), n, off
}

// Writev writes at off from the n elements of the I/O vector at addr, with
// RWF_* flags.
func (e *SQE) Writev(fd int32, addr unsafe.Pointer, n uint32, off uint64, flags uint32) {
	e.Opcode, e.Fd, e.Addr, e.Len, e.Off, e.OpFlags = OpWritev, fd, uint64(uintptr(addr)), n, off, flags
}

// Fdatasync makes the file's data durable.
func (e *SQE) Fdatasync(fd int32) {
	e.Opcode, e.Fd, e.OpFlags = OpFsync, fd, fsyncDatasync
}

// Fallocate is fallocate(2) with the given mode.
func (e *SQE) Fallocate(fd int32, mode uint32, off, n uint64) {
	e.Opcode, e.Fd, e.Len, e.Off, e.Addr = OpFallocate, fd, mode, off, n
}

// Fadvise is posix_fadvise(2); n is cut to 32 bits by older kernels.
func (e *SQE) Fadvise(fd int32, off uint64, n uint32, advice uint32) {
	e.Opcode, e.Fd, e.Off, e.Len, e.OpFlags = OpFadvise, fd, off, n, advice
}

// Recv receives at most n bytes into addr.
func (e *SQE) Recv(fd int32, addr uintptr, n uint32) {
	e.Opcode, e.Fd, e.Addr, e.Len = OpRecv, fd, uint64(addr), n
}

// Send sends n bytes at addr with MSG_* flags.
func (e *SQE) Send(fd int32, addr uintptr, n uint32, flags uint32) {
	e.Opcode, e.Fd, e.Addr, e.Len, e.OpFlags = OpSend, fd, uint64(addr), n, flags
}

// Sendmsg sends what the message header names, with MSG_* flags.
func (e *SQE) Sendmsg(fd int32, msg unsafe.Pointer, flags uint32) {
	e.Opcode, e.Fd, e.Addr, e.Len, e.OpFlags = OpSendmsg, fd, uint64(uintptr(msg)), 1, flags
}

// PollMultishot completes every time one of the events (POLLIN, …) happens,
// until it is cancelled or its completion lacks CQEMore.
func (e *SQE) PollMultishot(fd int32, events uint32) {
	e.Opcode, e.Fd, e.OpFlags, e.Len = OpPollAdd, fd, events, pollMultishot
}

// Cancel cancels an operation of the ring that was submitted with that user data
// and waits for something: it completes with ECANCELED unless it has already
// done something. The cancel completes by itself, with ENOENT if there is no such
// operation.
func (e *SQE) Cancel(userData uint64) {
	e.Opcode, e.Fd, e.Addr = OpAsyncCancel, -1, userData
}

// Command is IORING_OP_URING_CMD: the file's driver gets op and the bytes of
// payload, of which 16 fit an ordinary entry and 80 one of a ring with SQE128.
// It reports false, and leaves a no-op, when the payload does not fit.
func (e *SQE) Command(r *Ring, fd int32, op uint32, payload []byte) bool {
	room := r.sqeSize - unsafe.Offsetof(e.Addr3)
	if uintptr(len(payload)) > room {
		return false
	}
	e.Opcode, e.Fd, e.Off = OpURingCmd, fd, uint64(op)
	area := unsafe.Slice((*byte)(unsafe.Pointer(&e.Addr3)), room)
	clear(area[copy(area, payload):])
	return true
}
