package nbd

import "github.com/pojntfx/go-nbd/pkg/protocol"

// The numbers of the NBD protocol, as doc/proto.md of NetworkBlockDevice/nbd
// gives them. All integers on the wire are big-endian. What go-nbd has a name
// for is taken from there; protocol_test.go holds every one of them against the
// specification.

// Magic numbers.
const (
	magicInit    = protocol.NEGOTIATION_MAGIC_OLDSTYLE // "NBDMAGIC", first on the wire
	magicOption  = protocol.NEGOTIATION_MAGIC_OPTION   // "IHAVEOPT", before every option
	magicReply   = protocol.NEGOTIATION_MAGIC_REPLY    // before every reply to an option
	magicRequest = protocol.TRANSMISSION_MAGIC_REQUEST
	magicSimple  = protocol.TRANSMISSION_MAGIC_REPLY // before a simple reply to a request
)

// Sizes of what stands on the wire, in bytes.
const (
	greetingSize    = 8 + 8 + 2             // magicInit, magicOption, handshake flags
	clientFlagsSize = 4                     // the client's answer to the greeting
	optionSize      = 8 + 4 + 4             // magicOption, option, length of the data that follows
	replySize       = 8 + 4 + 4 + 4         // magicReply, option, type, length of the data that follows
	exportNameSize  = 8 + 2                 // size, transmission flags
	reservedZeroes  = 124                   // after exportNameSize, unless noZeroes was agreed
	infoExportSize  = 2 + 8 + 2             // type, size, transmission flags
	infoBlockSize   = 2 + 4 + 4 + 4         // type, minimum, preferred, maximum
	requestSize     = 4 + 2 + 2 + 8 + 8 + 4 // magicRequest, flags, command, cookie, offset, length
	simpleSize      = 4 + 4 + 8             // magicSimple, error, cookie
)

// maxString is the longest string (a name, a description, a message) that the
// protocol allows, in bytes.
const maxString = 4096

// Handshake flags of the server, and the client's answers to them.
const (
	handshakeFixedNewstyle = protocol.NEGOTIATION_HANDSHAKE_FLAG_FIXED_NEWSTYLE
	handshakeNoZeroes      = uint16(1 << 1)

	clientFixedNewstyle = uint32(1 << 0)
	clientNoZeroes      = uint32(1 << 1)
)

// Options that a client sends while it negotiates.
const (
	optExportName      = uint32(1)
	optAbort           = protocol.NEGOTIATION_ID_OPTION_ABORT
	optList            = protocol.NEGOTIATION_ID_OPTION_LIST
	optStartTLS        = uint32(5)
	optInfo            = protocol.NEGOTIATION_ID_OPTION_INFO
	optGo              = protocol.NEGOTIATION_ID_OPTION_GO
	optStructuredReply = uint32(8)
	optListMetaContext = uint32(9)
	optSetMetaContext  = uint32(10)
	optExtendedHeaders = uint32(11)
)

// Types of the replies to options. repError is set in every error.
const (
	repAck    = protocol.NEGOTIATION_TYPE_REPLY_ACK
	repServer = protocol.NEGOTIATION_TYPE_REPLY_SERVER
	repInfo   = protocol.NEGOTIATION_TYPE_REPLY_INFO

	repError           = uint32(1 << 31)
	repErrUnsupported  = protocol.NEGOTIATION_TYPE_REPLY_ERR_UNSUPPORTED
	repErrPolicy       = repError | 2
	repErrInvalid      = repError | 3
	repErrPlatform     = repError | 4
	repErrTLSRequired  = repError | 5
	repErrUnknown      = protocol.NEGOTIATION_TYPE_REPLY_ERR_UNKNOWN
	repErrShutdown     = repError | 7
	repErrBlockSizeReq = repError | 8
	repErrTooBig       = repError | 9
)

// Types of information that a client asks for with optInfo and optGo.
const (
	infoTypeExport      = protocol.NEGOTIATION_TYPE_INFO_EXPORT
	infoTypeName        = protocol.NEGOTIATION_TYPE_INFO_NAME
	infoTypeDescription = protocol.NEGOTIATION_TYPE_INFO_DESCRIPTION
	infoTypeBlockSize   = protocol.NEGOTIATION_TYPE_INFO_BLOCKSIZE
)

// Transmission flags: what an export can do.
const (
	flagHasFlags        = protocol.NEGOTIATION_REPLY_FLAGS_HAS_FLAGS // always set
	flagReadOnly        = uint16(1 << 1)
	flagSendFlush       = uint16(1 << 2)
	flagSendFUA         = uint16(1 << 3)
	flagRotational      = uint16(1 << 4)
	flagSendTrim        = uint16(1 << 5)
	flagSendWriteZeroes = uint16(1 << 6)
	flagSendDF          = uint16(1 << 7)
	flagCanMultiConn    = protocol.NEGOTIATION_REPLY_FLAGS_CAN_MULTI_CONN
	flagSendResize      = uint16(1 << 9)
	flagSendCache       = uint16(1 << 10)
	flagSendFastZero    = uint16(1 << 11)
)

// Commands of the transmission phase.
const (
	cmdRead        = protocol.TRANSMISSION_TYPE_REQUEST_READ
	cmdWrite       = protocol.TRANSMISSION_TYPE_REQUEST_WRITE
	cmdDisc        = protocol.TRANSMISSION_TYPE_REQUEST_DISC
	cmdFlush       = uint16(3)
	cmdTrim        = uint16(4)
	cmdCache       = uint16(5)
	cmdWriteZeroes = uint16(6)
	cmdBlockStatus = uint16(7)
)

// Flags of a command.
const (
	cmdFlagFUA      = uint16(1 << 0)
	cmdFlagNoHole   = uint16(1 << 1)
	cmdFlagDF       = uint16(1 << 2)
	cmdFlagReqOne   = uint16(1 << 3)
	cmdFlagFastZero = uint16(1 << 4)
)

// Errors of the transmission phase. They look like Linux's errno, but are the
// protocol's own: wireError translates.
const (
	wireEPERM     = protocol.TRANSMISSION_ERROR_EPERM
	wireEIO       = uint32(5)
	wireENOMEM    = uint32(12)
	wireEINVAL    = protocol.TRANSMISSION_ERROR_EINVAL
	wireENOSPC    = uint32(28)
	wireEOVERFLOW = uint32(75)
	wireENOTSUP   = uint32(95)
	wireESHUTDOWN = uint32(108)
)
