package uring

import (
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

func (r *Ring) register(op uintptr, arg unsafe.Pointer, n uintptr) error {
	_, _, errno := unix.Syscall6(unix.SYS_IO_URING_REGISTER, uintptr(r.fd), op, uintptr(arg), n, 0, 0)
	runtime.KeepAlive(arg)
	if errno != 0 {
		return &Error{"io_uring_register", errno}
	}
	return nil
}

// RegisterFiles makes room for n registered files, all empty (Linux 5.19).
func (r *Ring) RegisterFiles(n uint32) error {
	arg := &rsrcRegister{nr: n, flags: rsrcRegisterSparse}
	return r.register(registerFiles2, unsafe.Pointer(arg), unsafe.Sizeof(*arg))
}

// UpdateFile puts fd into a registered slot; -1 empties it.
func (r *Ring) UpdateFile(slot uint32, fd int32) error {
	r.arg.fd = fd
	arg := &filesUpdate{offset: slot, fds: uint64(uintptr(unsafe.Pointer(&r.arg.fd)))}
	return r.register(registerFilesUpdate, unsafe.Pointer(arg), 1)
}

// Supports reports whether the kernel knows every one of the opcodes.
func (r *Ring) Supports(ops ...Opcode) (bool, error) {
	p := new(probe)
	if err := r.register(registerProbe, unsafe.Pointer(p), probeOps); err != nil {
		return false, err
	}
	for _, op := range ops {
		if int(op) >= int(p.opsLen) || p.ops[op].flags&probeOpSupported == 0 {
			return false, nil
		}
	}
	return true, nil
}
