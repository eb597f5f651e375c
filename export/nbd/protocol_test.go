package nbd

import (
	"testing"

	"golang.org/x/sys/unix"
)

// TestConstants holds every number against the specification, whoever has
// defined it.
func TestConstants(t *testing.T) {
	for _, c := range []struct {
		name string
		got  uint64
		want uint64
	}{
		{"NBDMAGIC", magicInit, 0x4e42444d41474943},
		{"IHAVEOPT", magicOption, 0x49484156454f5054},
		{"magic of option replies", magicReply, 0x0003e889045565a9},
		{"NBD_REQUEST_MAGIC", uint64(magicRequest), 0x25609513},
		{"NBD_SIMPLE_REPLY_MAGIC", uint64(magicSimple), 0x67446698},

		{"size of the greeting", greetingSize, 18},
		{"size of client flags", clientFlagsSize, 4},
		{"size of an option", optionSize, 16},
		{"size of a reply to an option", replySize, 20},
		{"size of the reply to NBD_OPT_EXPORT_NAME", exportNameSize, 10},
		{"reserved zeroes", reservedZeroes, 124},
		{"size of NBD_INFO_EXPORT", infoExportSize, 12},
		{"size of NBD_INFO_BLOCK_SIZE", infoBlockSize, 14},
		{"size of a request", requestSize, 28},
		{"size of a simple reply", simpleSize, 16},
		{"longest string", maxString, 4096},

		{"NBD_FLAG_FIXED_NEWSTYLE", uint64(handshakeFixedNewstyle), 0x1},
		{"NBD_FLAG_NO_ZEROES", uint64(handshakeNoZeroes), 0x2},
		{"NBD_FLAG_C_FIXED_NEWSTYLE", uint64(clientFixedNewstyle), 0x1},
		{"NBD_FLAG_C_NO_ZEROES", uint64(clientNoZeroes), 0x2},

		{"NBD_OPT_EXPORT_NAME", uint64(optExportName), 1},
		{"NBD_OPT_ABORT", uint64(optAbort), 2},
		{"NBD_OPT_LIST", uint64(optList), 3},
		{"NBD_OPT_STARTTLS", uint64(optStartTLS), 5},
		{"NBD_OPT_INFO", uint64(optInfo), 6},
		{"NBD_OPT_GO", uint64(optGo), 7},
		{"NBD_OPT_STRUCTURED_REPLY", uint64(optStructuredReply), 8},
		{"NBD_OPT_LIST_META_CONTEXT", uint64(optListMetaContext), 9},
		{"NBD_OPT_SET_META_CONTEXT", uint64(optSetMetaContext), 10},
		{"NBD_OPT_EXTENDED_HEADERS", uint64(optExtendedHeaders), 11},

		{"NBD_REP_ACK", uint64(repAck), 1},
		{"NBD_REP_SERVER", uint64(repServer), 2},
		{"NBD_REP_INFO", uint64(repInfo), 3},
		{"bit of error replies", uint64(repError), 1 << 31},
		{"NBD_REP_ERR_UNSUP", uint64(repErrUnsupported), 0x80000001},
		{"NBD_REP_ERR_POLICY", uint64(repErrPolicy), 0x80000002},
		{"NBD_REP_ERR_INVALID", uint64(repErrInvalid), 0x80000003},
		{"NBD_REP_ERR_PLATFORM", uint64(repErrPlatform), 0x80000004},
		{"NBD_REP_ERR_TLS_REQD", uint64(repErrTLSRequired), 0x80000005},
		{"NBD_REP_ERR_UNKNOWN", uint64(repErrUnknown), 0x80000006},
		{"NBD_REP_ERR_SHUTDOWN", uint64(repErrShutdown), 0x80000007},
		{"NBD_REP_ERR_BLOCK_SIZE_REQD", uint64(repErrBlockSizeReq), 0x80000008},
		{"NBD_REP_ERR_TOO_BIG", uint64(repErrTooBig), 0x80000009},

		{"NBD_INFO_EXPORT", uint64(infoTypeExport), 0},
		{"NBD_INFO_NAME", uint64(infoTypeName), 1},
		{"NBD_INFO_DESCRIPTION", uint64(infoTypeDescription), 2},
		{"NBD_INFO_BLOCK_SIZE", uint64(infoTypeBlockSize), 3},

		{"NBD_FLAG_HAS_FLAGS", uint64(flagHasFlags), 0x001},
		{"NBD_FLAG_READ_ONLY", uint64(flagReadOnly), 0x002},
		{"NBD_FLAG_SEND_FLUSH", uint64(flagSendFlush), 0x004},
		{"NBD_FLAG_SEND_FUA", uint64(flagSendFUA), 0x008},
		{"NBD_FLAG_ROTATIONAL", uint64(flagRotational), 0x010},
		{"NBD_FLAG_SEND_TRIM", uint64(flagSendTrim), 0x020},
		{"NBD_FLAG_SEND_WRITE_ZEROES", uint64(flagSendWriteZeroes), 0x040},
		{"NBD_FLAG_SEND_DF", uint64(flagSendDF), 0x080},
		{"NBD_FLAG_CAN_MULTI_CONN", uint64(flagCanMultiConn), 0x100},
		{"NBD_FLAG_SEND_RESIZE", uint64(flagSendResize), 0x200},
		{"NBD_FLAG_SEND_CACHE", uint64(flagSendCache), 0x400},
		{"NBD_FLAG_SEND_FAST_ZERO", uint64(flagSendFastZero), 0x800},

		{"NBD_CMD_READ", uint64(cmdRead), 0},
		{"NBD_CMD_WRITE", uint64(cmdWrite), 1},
		{"NBD_CMD_DISC", uint64(cmdDisc), 2},
		{"NBD_CMD_FLUSH", uint64(cmdFlush), 3},
		{"NBD_CMD_TRIM", uint64(cmdTrim), 4},
		{"NBD_CMD_CACHE", uint64(cmdCache), 5},
		{"NBD_CMD_WRITE_ZEROES", uint64(cmdWriteZeroes), 6},
		{"NBD_CMD_BLOCK_STATUS", uint64(cmdBlockStatus), 7},

		{"NBD_CMD_FLAG_FUA", uint64(cmdFlagFUA), 0x01},
		{"NBD_CMD_FLAG_NO_HOLE", uint64(cmdFlagNoHole), 0x02},
		{"NBD_CMD_FLAG_DF", uint64(cmdFlagDF), 0x04},
		{"NBD_CMD_FLAG_REQ_ONE", uint64(cmdFlagReqOne), 0x08},
		{"NBD_CMD_FLAG_FAST_ZERO", uint64(cmdFlagFastZero), 0x10},

		{"NBD_EPERM", uint64(wireEPERM), 1},
		{"NBD_EIO", uint64(wireEIO), 5},
		{"NBD_ENOMEM", uint64(wireENOMEM), 12},
		{"NBD_EINVAL", uint64(wireEINVAL), 22},
		{"NBD_ENOSPC", uint64(wireENOSPC), 28},
		{"NBD_EOVERFLOW", uint64(wireEOVERFLOW), 75},
		{"NBD_ENOTSUP", uint64(wireENOTSUP), 95},
		{"NBD_ESHUTDOWN", uint64(wireESHUTDOWN), 108},
	} {
		if c.got != c.want {
			t.Errorf("%s is %#x, want %#x", c.name, c.got, c.want)
		}
	}
}

func TestWireError(t *testing.T) {
	for _, c := range []struct {
		name  string
		errno unix.Errno
		want  uint32
	}{
		{"success", 0, 0},
		{"EPERM", unix.EPERM, 1},
		{"EROFS", unix.EROFS, 1},
		{"EIO", unix.EIO, 5},
		{"ENOMEM", unix.ENOMEM, 12},
		{"EINVAL", unix.EINVAL, 22},
		{"ENOSPC", unix.ENOSPC, 28},
		{"EDQUOT", unix.EDQUOT, 28},
		{"EFBIG", unix.EFBIG, 28},
		{"EOVERFLOW", unix.EOVERFLOW, 75},
		{"ENOTSUP", unix.ENOTSUP, 95},
		{"EOPNOTSUPP", unix.EOPNOTSUPP, 95},
		{"ESHUTDOWN", unix.ESHUTDOWN, 108},
		{"EACCES", unix.EACCES, 5},
		{"ETIMEDOUT", unix.ETIMEDOUT, 5},
		{"beyond the table", 4095, 5},
		{"beyond any errno", ^unix.Errno(0), 5},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := wireError(c.errno); got != c.want {
				t.Errorf("wireError(%d) = %d, want %d", c.errno, got, c.want)
			}
		})
	}
}
