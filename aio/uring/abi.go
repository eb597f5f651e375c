package uring

// Setup flags, IORING_SETUP_* in linux/io_uring.h.
const (
	setupCQSize       = 1 << 3
	setupSubmitAll    = 1 << 7  // Linux 5.18
	setupCoopTaskrun  = 1 << 8  // 5.19
	setupTaskrunFlag  = 1 << 9  // 5.19
	setupSQE128       = 1 << 10 // 5.19
	setupSingleIssuer = 1 << 12 // 6.0
	setupDeferTaskrun = 1 << 13 // 6.1
	setupNoSQArray    = 1 << 16 // 6.6
)

// Features, IORING_FEAT_*.
const (
	featSingleMmap   = 1 << 0
	featNoDrop       = 1 << 1
	featSubmitStable = 1 << 2
	featFastPoll     = 1 << 5
	featExtArg       = 1 << 8
)

// Flags of io_uring_enter.
const (
	enterGetEvents = 1 << 0
	enterExtArg    = 1 << 3
)

// Flags in the submission ring's flags word.
const (
	sqCQOverflow = 1 << 1
	sqTaskrun    = 1 << 2
)

// Offsets for mmap.
const (
	offSQRing = 0
	offCQRing = 0x8000000
	offSQEs   = 0x10000000
)

// Opcodes of io_uring_register.
const (
	registerFilesUpdate = 6
	registerProbe       = 8
	registerFiles2      = 13
	rsrcRegisterSparse  = 1
	probeOpSupported    = 1
	probeOps            = 256
)

// Opcode is an IORING_OP_*.
type Opcode uint8

// The operations that prep.go encodes.
const (
	OpNop         Opcode = 0
	OpReadv       Opcode = 1
	OpWritev      Opcode = 2
	OpFsync       Opcode = 3
	OpPollAdd     Opcode = 6
	OpSendmsg     Opcode = 9
	OpAsyncCancel Opcode = 14
	OpFallocate   Opcode = 17
	OpRead        Opcode = 22
	OpWrite       Opcode = 23
	OpFadvise     Opcode = 24
	OpSend        Opcode = 26
	OpRecv        Opcode = 27
	OpURingCmd    Opcode = 46
)

// SQE flags, IOSQE_*.
const (
	SQEFixedFile      = 1 << 0
	SQELink           = 1 << 2
	SQECQESkipSuccess = 1 << 6
)

// CQE flags.
const (
	// CQEMore tells that a multishot operation goes on.
	CQEMore = 1 << 1
)

const (
	fsyncDatasync = 1 << 0
	pollMultishot = 1 << 0 // IORING_POLL_ADD_MULTI, in SQE.Len
)

// SQE is struct io_uring_sqe: 64 bytes. On a ring with 128-byte entries the
// command of OpURingCmd stretches from Addr3 into the 64 bytes that follow.
type SQE struct {
	Opcode      Opcode
	Flags       uint8
	Ioprio      uint16
	Fd          int32
	Off         uint64 // also: cmd_op in the lower half
	Addr        uint64
	Len         uint32
	OpFlags     uint32 // rw_flags, fsync_flags, msg_flags, poll32_events, …
	UserData    uint64
	BufIndex    uint16
	Personality uint16
	FileIndex   int32
	Addr3       uint64 // also: the first bytes of a command
	Pad         uint64
}

// CQE is struct io_uring_cqe: 16 bytes.
type CQE struct {
	UserData uint64
	Res      int32
	Flags    uint32
}

// params is struct io_uring_params: 120 bytes.
type params struct {
	sqEntries    uint32
	cqEntries    uint32
	flags        uint32
	sqThreadCPU  uint32
	sqThreadIdle uint32
	features     uint32
	wqFd         uint32
	resv         [3]uint32
	sqOff        sqOffsets
	cqOff        cqOffsets
}

// sqOffsets is struct io_sqring_offsets.
type sqOffsets struct {
	head, tail, ringMask, ringEntries, flags, dropped, array, resv1 uint32
	userAddr                                                        uint64
}

// cqOffsets is struct io_cqring_offsets.
type cqOffsets struct {
	head, tail, ringMask, ringEntries, overflow, cqes, flags, resv1 uint32
	userAddr                                                        uint64
}

// geteventsArg is struct io_uring_getevents_arg.
type geteventsArg struct {
	sigmask     uint64
	sigmaskSize uint32
	minWaitUsec uint32
	ts          uint64
}

// rsrcRegister is struct io_uring_rsrc_register.
type rsrcRegister struct {
	nr    uint32
	flags uint32
	resv2 uint64
	data  uint64
	tags  uint64
}

// filesUpdate is struct io_uring_files_update.
type filesUpdate struct {
	offset uint32
	resv   uint32
	fds    uint64
}

// probe is struct io_uring_probe with room for every opcode.
type probe struct {
	lastOp uint8
	opsLen uint8
	resv   uint16
	resv2  [3]uint32
	ops    [probeOps]probeOp
}

// probeOp is struct io_uring_probe_op.
type probeOp struct {
	op    uint8
	resv  uint8
	flags uint16
	resv2 uint32
}
