package nbdtest

// The numbers of the protocol, written down once more from its specification
// and not taken from the server, so that a wrong one there is found.
const (
	MagicInit    = uint64(0x4e42444d41474943)
	MagicOption  = uint64(0x49484156454f5054)
	MagicReply   = uint64(0x0003e889045565a9)
	MagicRequest = uint32(0x25609513)
	MagicSimple  = uint32(0x67446698)
)

// Client flags.
const (
	FixedNewstyle = uint32(1 << 0)
	NoZeroes      = uint32(1 << 1)
)

// Options.
const (
	OptExportName      = uint32(1)
	OptAbort           = uint32(2)
	OptList            = uint32(3)
	OptStartTLS        = uint32(5)
	OptInfo            = uint32(6)
	OptGo              = uint32(7)
	OptStructuredReply = uint32(8)
)

// Replies to options.
const (
	RepAck            = uint32(1)
	RepServer         = uint32(2)
	RepInfo           = uint32(3)
	RepErr            = uint32(1 << 31)
	RepErrUnsupported = RepErr | 1
	RepErrInvalid     = RepErr | 3
	RepErrUnknown     = RepErr | 6
	RepErrTooBig      = RepErr | 9
)

// Types of information.
const (
	InfoExport      = uint16(0)
	InfoName        = uint16(1)
	InfoDescription = uint16(2)
	InfoBlockSize   = uint16(3)
)

// Transmission flags.
const (
	HasFlags        = uint16(1 << 0)
	ReadOnly        = uint16(1 << 1)
	SendFlush       = uint16(1 << 2)
	SendFUA         = uint16(1 << 3)
	Rotational      = uint16(1 << 4)
	SendTrim        = uint16(1 << 5)
	SendWriteZeroes = uint16(1 << 6)
	CanMultiConn    = uint16(1 << 8)
	SendCache       = uint16(1 << 10)
	SendFastZero    = uint16(1 << 11)
)

// Commands.
const (
	CmdRead        = uint16(0)
	CmdWrite       = uint16(1)
	CmdDisc        = uint16(2)
	CmdFlush       = uint16(3)
	CmdTrim        = uint16(4)
	CmdCache       = uint16(5)
	CmdWriteZeroes = uint16(6)
	CmdBlockStatus = uint16(7)
)

// Flags of commands.
const (
	FUA      = uint16(1 << 0)
	NoHole   = uint16(1 << 1)
	DF       = uint16(1 << 2)
	ReqOne   = uint16(1 << 3)
	FastZero = uint16(1 << 4)
)

// Errno is an error of the protocol, as a reply carries it. 0 is success.
type Errno uint32

// The errors of the specification.
const (
	EPERM     = Errno(1)
	EIO       = Errno(5)
	ENOMEM    = Errno(12)
	EINVAL    = Errno(22)
	ENOSPC    = Errno(28)
	EOVERFLOW = Errno(75)
	ENOTSUP   = Errno(95)
	ESHUTDOWN = Errno(108)
)

var errnoNames = map[Errno]string{
	EPERM: "EPERM", EIO: "EIO", ENOMEM: "ENOMEM", EINVAL: "EINVAL", ENOSPC: "ENOSPC",
	EOVERFLOW: "EOVERFLOW", ENOTSUP: "ENOTSUP", ESHUTDOWN: "ESHUTDOWN",
}
