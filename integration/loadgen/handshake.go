package loadgen

import (
	"encoding/binary"
	"fmt"
	"io"
)

// Numbers of the fixed newstyle handshake, from the NBD specification.
const (
	magicInit     = 0x4e42444d41474943 // "NBDMAGIC"
	magicOption   = 0x49484156454f5054 // "IHAVEOPT"
	magicOptReply = 0x0003e889045565a9

	handshakeFixed    = 1 << 0
	handshakeNoZeroes = 1 << 1

	optGo         = 7
	repAck        = 1
	repInfo       = 3
	repErrorBit   = 1 << 31
	infoExport    = 0
	flagReadOnly  = 1 << 1
	maxReplyBytes = 64 << 10
)

// export is what the server says about the chosen export.
type export struct {
	size  uint64
	flags uint16
}

// negotiate runs the handshake up to the transmission phase. It asks for no
// structured replies, so the server must answer with simple ones.
func negotiate(rw io.ReadWriter, name string) (export, error) {
	var hello [18]byte
	if _, err := io.ReadFull(rw, hello[:]); err != nil {
		return export{}, err
	}
	be := binary.BigEndian
	flags := be.Uint16(hello[16:])
	if be.Uint64(hello[0:]) != magicInit || be.Uint64(hello[8:]) != magicOption || flags&handshakeFixed == 0 {
		return export{}, fmt.Errorf("%w: no fixed newstyle greeting", ErrProtocol)
	}

	out := be.AppendUint32(nil, uint32(flags&(handshakeFixed|handshakeNoZeroes)))
	out = be.AppendUint64(out, magicOption)
	out = be.AppendUint32(out, optGo)
	out = be.AppendUint32(out, uint32(4+len(name)+2))
	out = be.AppendUint32(out, uint32(len(name)))
	out = append(out, name...)
	out = be.AppendUint16(out, 0) // no further information asked for
	if _, err := rw.Write(out); err != nil {
		return export{}, err
	}

	var (
		e     export
		known bool
	)
	for {
		kind, data, err := readOptionReply(rw)
		switch {
		case err != nil:
			return export{}, err
		case kind&repErrorBit != 0:
			return export{}, fmt.Errorf("%w %q: error %#x: %s", ErrRefused, name, kind, data)
		case kind == repInfo && len(data) == 12 && be.Uint16(data) == infoExport:
			e, known = export{be.Uint64(data[2:]), be.Uint16(data[10:])}, true
		case kind == repInfo: // block sizes and the like: of no use here
		case kind == repAck && known:
			return e, nil
		default:
			return export{}, fmt.Errorf("%w: unexpected option reply %d", ErrProtocol, kind)
		}
	}
}

func readOptionReply(r io.Reader) (kind uint32, data []byte, err error) {
	var head [20]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return 0, nil, err
	}
	be := binary.BigEndian
	length := be.Uint32(head[16:])
	if be.Uint64(head[0:]) != magicOptReply || be.Uint32(head[8:]) != optGo || length > maxReplyBytes {
		return 0, nil, fmt.Errorf("%w: malformed option reply", ErrProtocol)
	}
	data = make([]byte, length)
	_, err = io.ReadFull(r, data)
	return be.Uint32(head[12:]), data, err
}
