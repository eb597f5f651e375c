package native

// Opcode is an IOCB_CMD_* in linux/aio_abi.h.
type Opcode uint16

// The operations that prep.go encodes.
const (
	OpPread   Opcode = 0
	OpPwrite  Opcode = 1
	OpFdsync  Opcode = 3 // Linux 4.18
	OpPreadv  Opcode = 7
	OpPwritev Opcode = 8
)

// FlagResFD is IOCB_FLAG_RESFD: the completion is to signal the eventfd in ResFD.
const FlagResFD = 1 << 0

// IOCB is struct iocb on a little-endian machine: 64 bytes.
type IOCB struct {
	Data      uint64 // comes back in the event
	Key       uint32 // the kernel's
	RWFlags   uint32 // RWF_*
	Opcode    Opcode
	Reqprio   int16
	Fd        int32
	Buf       uint64 // address of the bytes, or of the vector
	Nbytes    uint64 // bytes, or elements of the vector
	Offset    int64
	Reserved2 uint64
	Flags     uint32 // FlagResFD
	ResFD     int32
}

// Event is struct io_event: 32 bytes.
type Event struct {
	Data uint64
	Obj  uint64 // the address that the IOCB had
	Res  int64  // bytes or -errno
	Res2 int64
}
