package nbd

import "errors"

// Error is an NBD connection or server that failed at something.
type Error struct {
	Op   string // what was done: "negotiate with client"
	Addr string // with whom or where; empty when there is no address to tell
	Err  error  // why
}

func (e *Error) Error() string {
	if e.Addr == "" {
		return e.Op + ": " + e.Err.Error()
	}
	return e.Op + " " + e.Addr + ": " + e.Err.Error()
}

func (e *Error) Unwrap() error { return e.Err }

// Reasons why a negotiation ends without an export, besides the errors of the
// connection itself: io.EOF when the client left between two options,
// io.ErrUnexpectedEOF when it left within one, os.ErrDeadlineExceeded when it
// took too long.
var (
	// errAborted: the client said that it is done (NBD_OPT_ABORT). This is the
	// regular end of a client that only looked around, no failure.
	errAborted = errors.New("client ended the negotiation")
	// errNotNBD: what came is not an NBD option.
	errNotNBD = errors.New("client does not speak nbd")
	// errClientFlags: the client answered with flags that were not offered.
	errClientFlags = errors.New("client uses unknown handshake flags")
	// errTooManyOptions: more options than any client needs.
	errTooManyOptions = errors.New("client sent too many options")
	// errOptionTooBig: an option that is too long even to be skipped, or a name
	// that is too long where the protocol has no way to say so.
	errOptionTooBig = errors.New("client sent an option that is too big")
	// errUnknownExport: no export has that name, and the protocol has no way to
	// tell the client (NBD_OPT_EXPORT_NAME).
	errUnknownExport = errors.New("client wants an unknown export")
)
