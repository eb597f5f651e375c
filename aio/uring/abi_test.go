package uring

import (
	"testing"
	"unsafe"
)

// TestLayout compares every structure with linux/io_uring.h, whose sizes and
// offsets are the same on amd64 and arm64.
func TestLayout(t *testing.T) {
	var (
		s  SQE
		c  CQE
		p  params
		sq sqOffsets
		cq cqOffsets
		g  geteventsArg
		rr rsrcRegister
		fu filesUpdate
		pr probe
		po probeOp
	)
	for _, f := range []struct {
		name      string
		got, want uintptr
	}{
		{"sizeof io_uring_sqe", unsafe.Sizeof(s), 64},
		{"io_uring_sqe.opcode", unsafe.Offsetof(s.Opcode), 0},
		{"io_uring_sqe.flags", unsafe.Offsetof(s.Flags), 1},
		{"io_uring_sqe.ioprio", unsafe.Offsetof(s.Ioprio), 2},
		{"io_uring_sqe.fd", unsafe.Offsetof(s.Fd), 4},
		{"io_uring_sqe.off, cmd_op", unsafe.Offsetof(s.Off), 8},
		{"io_uring_sqe.addr", unsafe.Offsetof(s.Addr), 16},
		{"io_uring_sqe.len", unsafe.Offsetof(s.Len), 24},
		{"io_uring_sqe.rw_flags", unsafe.Offsetof(s.OpFlags), 28},
		{"io_uring_sqe.user_data", unsafe.Offsetof(s.UserData), 32},
		{"io_uring_sqe.buf_index", unsafe.Offsetof(s.BufIndex), 40},
		{"io_uring_sqe.personality", unsafe.Offsetof(s.Personality), 42},
		{"io_uring_sqe.file_index", unsafe.Offsetof(s.FileIndex), 44},
		{"io_uring_sqe.addr3, cmd", unsafe.Offsetof(s.Addr3), 48},

		{"sizeof io_uring_cqe", unsafe.Sizeof(c), 16},
		{"io_uring_cqe.user_data", unsafe.Offsetof(c.UserData), 0},
		{"io_uring_cqe.res", unsafe.Offsetof(c.Res), 8},
		{"io_uring_cqe.flags", unsafe.Offsetof(c.Flags), 12},

		{"sizeof io_uring_params", unsafe.Sizeof(p), 120},
		{"io_uring_params.sq_entries", unsafe.Offsetof(p.sqEntries), 0},
		{"io_uring_params.cq_entries", unsafe.Offsetof(p.cqEntries), 4},
		{"io_uring_params.flags", unsafe.Offsetof(p.flags), 8},
		{"io_uring_params.sq_thread_cpu", unsafe.Offsetof(p.sqThreadCPU), 12},
		{"io_uring_params.sq_thread_idle", unsafe.Offsetof(p.sqThreadIdle), 16},
		{"io_uring_params.features", unsafe.Offsetof(p.features), 20},
		{"io_uring_params.wq_fd", unsafe.Offsetof(p.wqFd), 24},
		{"io_uring_params.resv", unsafe.Offsetof(p.resv), 28},
		{"io_uring_params.sq_off", unsafe.Offsetof(p.sqOff), 40},
		{"io_uring_params.cq_off", unsafe.Offsetof(p.cqOff), 80},

		{"sizeof io_sqring_offsets", unsafe.Sizeof(sq), 40},
		{"io_sqring_offsets.head", unsafe.Offsetof(sq.head), 0},
		{"io_sqring_offsets.tail", unsafe.Offsetof(sq.tail), 4},
		{"io_sqring_offsets.ring_mask", unsafe.Offsetof(sq.ringMask), 8},
		{"io_sqring_offsets.ring_entries", unsafe.Offsetof(sq.ringEntries), 12},
		{"io_sqring_offsets.flags", unsafe.Offsetof(sq.flags), 16},
		{"io_sqring_offsets.dropped", unsafe.Offsetof(sq.dropped), 20},
		{"io_sqring_offsets.array", unsafe.Offsetof(sq.array), 24},
		{"io_sqring_offsets.resv1", unsafe.Offsetof(sq.resv1), 28},
		{"io_sqring_offsets.user_addr", unsafe.Offsetof(sq.userAddr), 32},

		{"sizeof io_cqring_offsets", unsafe.Sizeof(cq), 40},
		{"io_cqring_offsets.head", unsafe.Offsetof(cq.head), 0},
		{"io_cqring_offsets.tail", unsafe.Offsetof(cq.tail), 4},
		{"io_cqring_offsets.ring_mask", unsafe.Offsetof(cq.ringMask), 8},
		{"io_cqring_offsets.ring_entries", unsafe.Offsetof(cq.ringEntries), 12},
		{"io_cqring_offsets.overflow", unsafe.Offsetof(cq.overflow), 16},
		{"io_cqring_offsets.cqes", unsafe.Offsetof(cq.cqes), 20},
		{"io_cqring_offsets.flags", unsafe.Offsetof(cq.flags), 24},
		{"io_cqring_offsets.resv1", unsafe.Offsetof(cq.resv1), 28},
		{"io_cqring_offsets.user_addr", unsafe.Offsetof(cq.userAddr), 32},

		{"sizeof io_uring_getevents_arg", unsafe.Sizeof(g), 24},
		{"io_uring_getevents_arg.sigmask", unsafe.Offsetof(g.sigmask), 0},
		{"io_uring_getevents_arg.sigmask_sz", unsafe.Offsetof(g.sigmaskSize), 8},
		{"io_uring_getevents_arg.min_wait_usec", unsafe.Offsetof(g.minWaitUsec), 12},
		{"io_uring_getevents_arg.ts", unsafe.Offsetof(g.ts), 16},

		{"sizeof io_uring_rsrc_register", unsafe.Sizeof(rr), 32},
		{"io_uring_rsrc_register.nr", unsafe.Offsetof(rr.nr), 0},
		{"io_uring_rsrc_register.flags", unsafe.Offsetof(rr.flags), 4},
		{"io_uring_rsrc_register.resv2", unsafe.Offsetof(rr.resv2), 8},
		{"io_uring_rsrc_register.data", unsafe.Offsetof(rr.data), 16},
		{"io_uring_rsrc_register.tags", unsafe.Offsetof(rr.tags), 24},

		{"sizeof io_uring_files_update", unsafe.Sizeof(fu), 16},
		{"io_uring_files_update.offset", unsafe.Offsetof(fu.offset), 0},
		{"io_uring_files_update.resv", unsafe.Offsetof(fu.resv), 4},
		{"io_uring_files_update.fds", unsafe.Offsetof(fu.fds), 8},

		{"sizeof io_uring_probe and 256 ops", unsafe.Sizeof(pr), 16 + 256*8},
		{"io_uring_probe.last_op", unsafe.Offsetof(pr.lastOp), 0},
		{"io_uring_probe.ops_len", unsafe.Offsetof(pr.opsLen), 1},
		{"io_uring_probe.resv", unsafe.Offsetof(pr.resv), 2},
		{"io_uring_probe.resv2", unsafe.Offsetof(pr.resv2), 4},
		{"io_uring_probe.ops", unsafe.Offsetof(pr.ops), 16},

		{"sizeof io_uring_probe_op", unsafe.Sizeof(po), 8},
		{"io_uring_probe_op.op", unsafe.Offsetof(po.op), 0},
		{"io_uring_probe_op.resv", unsafe.Offsetof(po.resv), 1},
		{"io_uring_probe_op.flags", unsafe.Offsetof(po.flags), 2},
		{"io_uring_probe_op.resv2", unsafe.Offsetof(po.resv2), 4},
	} {
		if f.got != f.want {
			t.Errorf("%s is at %d, in linux/io_uring.h at %d", f.name, f.got, f.want)
		}
	}
}

// TestConstants compares numbers with linux/io_uring.h, as its preprocessor
// and compiler give them.
func TestConstants(t *testing.T) {
	for _, c := range []struct {
		name      string
		got, want uint64
	}{
		{"IORING_SETUP_CQSIZE", setupCQSize, 8},
		{"IORING_SETUP_SUBMIT_ALL", setupSubmitAll, 128},
		{"IORING_SETUP_COOP_TASKRUN", setupCoopTaskrun, 256},
		{"IORING_SETUP_TASKRUN_FLAG", setupTaskrunFlag, 512},
		{"IORING_SETUP_SQE128", setupSQE128, 1024},
		{"IORING_SETUP_SINGLE_ISSUER", setupSingleIssuer, 4096},
		{"IORING_SETUP_DEFER_TASKRUN", setupDeferTaskrun, 8192},
		{"IORING_SETUP_NO_SQARRAY", setupNoSQArray, 65536},
		{"IORING_FEAT_SINGLE_MMAP", featSingleMmap, 1},
		{"IORING_FEAT_NODROP", featNoDrop, 2},
		{"IORING_FEAT_SUBMIT_STABLE", featSubmitStable, 4},
		{"IORING_FEAT_FAST_POLL", featFastPoll, 32},
		{"IORING_FEAT_EXT_ARG", featExtArg, 256},
		{"IORING_ENTER_GETEVENTS", enterGetEvents, 1},
		{"IORING_ENTER_EXT_ARG", enterExtArg, 8},
		{"IORING_SQ_CQ_OVERFLOW", sqCQOverflow, 2},
		{"IORING_SQ_TASKRUN", sqTaskrun, 4},
		{"IORING_OFF_SQ_RING", offSQRing, 0},
		{"IORING_OFF_CQ_RING", offCQRing, 134217728},
		{"IORING_OFF_SQES", offSQEs, 268435456},
		{"IORING_REGISTER_FILES_UPDATE", registerFilesUpdate, 6},
		{"IORING_REGISTER_PROBE", registerProbe, 8},
		{"IORING_REGISTER_FILES2", registerFiles2, 13},
		{"IORING_RSRC_REGISTER_SPARSE", rsrcRegisterSparse, 1},
		{"IO_URING_OP_SUPPORTED", probeOpSupported, 1},
		{"IORING_OP_NOP", uint64(OpNop), 0},
		{"IORING_OP_READV", uint64(OpReadv), 1},
		{"IORING_OP_WRITEV", uint64(OpWritev), 2},
		{"IORING_OP_FSYNC", uint64(OpFsync), 3},
		{"IORING_OP_POLL_ADD", uint64(OpPollAdd), 6},
		{"IORING_OP_SENDMSG", uint64(OpSendmsg), 9},
		{"IORING_OP_ASYNC_CANCEL", uint64(OpAsyncCancel), 14},
		{"IORING_OP_FALLOCATE", uint64(OpFallocate), 17},
		{"IORING_OP_READ", uint64(OpRead), 22},
		{"IORING_OP_WRITE", uint64(OpWrite), 23},
		{"IORING_OP_FADVISE", uint64(OpFadvise), 24},
		{"IORING_OP_SEND", uint64(OpSend), 26},
		{"IORING_OP_RECV", uint64(OpRecv), 27},
		{"IORING_OP_URING_CMD", uint64(OpURingCmd), 46},
		{"IOSQE_FIXED_FILE", SQEFixedFile, 1},
		{"IOSQE_IO_LINK", SQELink, 4},
		{"IOSQE_CQE_SKIP_SUCCESS", SQECQESkipSuccess, 64},
		{"IORING_CQE_F_MORE", CQEMore, 2},
		{"IORING_FSYNC_DATASYNC", fsyncDatasync, 1},
		{"IORING_POLL_ADD_MULTI", pollMultishot, 1},
	} {
		if c.got != c.want {
			t.Errorf("%s is %d, in linux/io_uring.h %d", c.name, c.got, c.want)
		}
	}
}
