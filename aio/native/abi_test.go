package native

import (
	"testing"
	"unsafe"
)

// TestLayout compares the structures with linux/aio_abi.h, whose sizes and
// offsets are the same on amd64 and arm64.
func TestLayout(t *testing.T) {
	var (
		b IOCB
		e Event
	)
	for _, f := range []struct {
		name      string
		got, want uintptr
	}{
		{"sizeof iocb", unsafe.Sizeof(b), 64},
		{"iocb.aio_data", unsafe.Offsetof(b.Data), 0},
		{"iocb.aio_key", unsafe.Offsetof(b.Key), 8},
		{"iocb.aio_rw_flags", unsafe.Offsetof(b.RWFlags), 12},
		{"iocb.aio_lio_opcode", unsafe.Offsetof(b.Opcode), 16},
		{"iocb.aio_reqprio", unsafe.Offsetof(b.Reqprio), 18},
		{"iocb.aio_fildes", unsafe.Offsetof(b.Fd), 20},
		{"iocb.aio_buf", unsafe.Offsetof(b.Buf), 24},
		{"iocb.aio_nbytes", unsafe.Offsetof(b.Nbytes), 32},
		{"iocb.aio_offset", unsafe.Offsetof(b.Offset), 40},
		{"iocb.aio_reserved2", unsafe.Offsetof(b.Reserved2), 48},
		{"iocb.aio_flags", unsafe.Offsetof(b.Flags), 56},
		{"iocb.aio_resfd", unsafe.Offsetof(b.ResFD), 60},

		{"sizeof io_event", unsafe.Sizeof(e), 32},
		{"io_event.data", unsafe.Offsetof(e.Data), 0},
		{"io_event.obj", unsafe.Offsetof(e.Obj), 8},
		{"io_event.res", unsafe.Offsetof(e.Res), 16},
		{"io_event.res2", unsafe.Offsetof(e.Res2), 24},
	} {
		if f.got != f.want {
			t.Errorf("%s is at %d, in linux/aio_abi.h at %d", f.name, f.got, f.want)
		}
	}
}

// TestConstants compares numbers with linux/aio_abi.h.
func TestConstants(t *testing.T) {
	for _, c := range []struct {
		name      string
		got, want uint64
	}{
		{"IOCB_CMD_PREAD", uint64(OpPread), 0},
		{"IOCB_CMD_PWRITE", uint64(OpPwrite), 1},
		{"IOCB_CMD_FDSYNC", uint64(OpFdsync), 3},
		{"IOCB_CMD_PREADV", uint64(OpPreadv), 7},
		{"IOCB_CMD_PWRITEV", uint64(OpPwritev), 8},
		{"IOCB_FLAG_RESFD", FlagResFD, 1},
	} {
		if c.got != c.want {
			t.Errorf("%s is %d, in linux/aio_abi.h %d", c.name, c.got, c.want)
		}
	}
}
