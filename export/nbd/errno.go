package nbd

import "golang.org/x/sys/unix"

// wireErrors is the one place where an errno becomes an error of the protocol.
// "Error values" of the specification lists the values and asks that EDQUOT and
// EFBIG are sent as ENOSPC, and writes to a read-only export as EPERM.
var wireErrors = [...]uint32{
	unix.EPERM: wireEPERM,
	unix.EROFS: wireEPERM,

	unix.EIO:    wireEIO,
	unix.ENOMEM: wireENOMEM,
	unix.EINVAL: wireEINVAL,

	unix.ENOSPC: wireENOSPC,
	unix.EDQUOT: wireENOSPC,
	unix.EFBIG:  wireENOSPC,

	unix.EOVERFLOW:  wireEOVERFLOW,
	unix.EOPNOTSUPP: wireENOTSUP, // ENOTSUP is the same number on Linux
	unix.ESHUTDOWN:  wireESHUTDOWN,
}

// wireError is the protocol's error for errno; 0 stays 0. The specification
// leaves open what any other errno becomes: it is EIO, because EINVAL would
// blame a request that was right.
//
// The specification keeps EOVERFLOW for reads with DF and ENOTSUP for fast
// zeroes: whoever lets an image's errno through for another command has to see
// to that.
func wireError(errno unix.Errno) uint32 {
	if errno == 0 {
		return 0
	}
	if uint(errno) < uint(len(wireErrors)) {
		if wire := wireErrors[errno]; wire != 0 {
			return wire
		}
	}
	return wireEIO
}
