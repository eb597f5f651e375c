package nbd

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
)

// Offer is an export as it is offered to a client that negotiates.
type Offer struct {
	Name        string // at most 4096 bytes of UTF-8 without NUL
	Description string // shown to people; may be empty
	Size        uint64 // bytes
	Flags       uint16 // transmission flags

	// Block sizes in bytes. MinBlock is a power of 2 up to 64 KiB,
	// PreferredBlock a power of 2 of at least MinBlock and 512, MaxBlock a
	// multiple of MinBlock.
	MinBlock, PreferredBlock, MaxBlock uint32
}

// Catalogue is where a negotiation looks exports up. It is used by many
// connections at a time.
type Catalogue interface {
	// Find returns the export of that name; the empty name means the default
	// export.
	Find(name string) (Offer, bool)
	// List returns every export that clients may know of.
	List() []Offer
}

// limits bounds what a client may ask for before it is served. Time is bounded
// by the deadline of the connection.
type limits struct {
	options int    // options that one client may send
	skip    uint32 // longest data of an option that is skipped, in bytes
}

// defaultLimits are far beyond what clients do. A client that lists a server
// with many exports asks several times for each of them.
var defaultLimits = limits{options: 1024, skip: 64 << 10}

// result is what client and server agreed on.
type result struct {
	offer    Offer
	noZeroes bool
}

// optionBuffer holds the data of one option: the longest name, and more requests
// for information than there are types of it.
const optionBuffer = 8 << 10

// flushAt is the number of bytes of replies that are gathered before they are
// sent while there is more to come.
const flushAt = 32 << 10

// negotiation is the handshake phase of one connection. Its memory does not
// depend on anything that the client sends.
type negotiation struct {
	rw       io.ReadWriter
	exports  Catalogue
	lim      limits
	noZeroes bool
	in       [optionBuffer]byte
	out      []byte // replies that are not sent yet
}

// negotiate greets the client and answers its options until it has chosen an
// export (NBD_OPT_GO, NBD_OPT_EXPORT_NAME) or gone. It reads exactly the bytes
// of the negotiation: the first byte of the transmission phase is still in the
// socket. It blocks; the caller sets a deadline on the connection and closes it
// when an error is returned. That is an *Error; see errors.go for its reasons.
func negotiate(rw io.ReadWriter, c Catalogue, lim limits) (result, error) {
	n := &negotiation{rw: rw, exports: c, lim: lim}
	offer, err := n.run()
	if err != nil {
		return result{}, &Error{Op: "negotiate with client", Addr: peer(rw), Err: err}
	}
	return result{offer: offer, noZeroes: n.noZeroes}, nil
}

// peer is the address of a client that has one; Unix clients are nameless.
func peer(rw io.ReadWriter) string {
	if conn, ok := rw.(net.Conn); ok {
		if tcp, ok := conn.RemoteAddr().(*net.TCPAddr); ok {
			return tcp.String()
		}
	}
	return ""
}

func (n *negotiation) run() (Offer, error) {
	if err := n.greet(); err != nil {
		return Offer{}, err
	}
	for range n.lim.options {
		id, length, err := n.readOption()
		if err != nil {
			return Offer{}, err
		}
		offer, err := n.answer(id, length)
		if err != nil {
			return Offer{}, err
		}
		if offer != nil {
			return *offer, nil
		}
	}
	return Offer{}, fmt.Errorf("%w: more than %d", errTooManyOptions, n.lim.options)
}

// greet sends the greeting and takes the client's flags. A client that does not
// claim to know the fixed newstyle is answered as if it did, which the
// specification allows.
func (n *negotiation) greet() error {
	n.out = binary.BigEndian.AppendUint64(n.out, magicInit)
	n.out = binary.BigEndian.AppendUint64(n.out, magicOption)
	n.out = binary.BigEndian.AppendUint16(n.out, handshakeFixedNewstyle|handshakeNoZeroes)
	if err := n.send(); err != nil {
		return err
	}
	if _, err := io.ReadFull(n.rw, n.in[:clientFlagsSize]); err != nil {
		return fmt.Errorf("read client flags: %w", err)
	}
	flags := binary.BigEndian.Uint32(n.in[:])
	if unknown := flags &^ (clientFixedNewstyle | clientNoZeroes); unknown != 0 {
		return fmt.Errorf("%w: %#x", errClientFlags, unknown)
	}
	n.noZeroes = flags&clientNoZeroes != 0
	return nil
}

// readOption reads the header of the next option.
func (n *negotiation) readOption() (id, length uint32, err error) {
	header := n.in[:optionSize]
	if _, err := io.ReadFull(n.rw, header); err != nil {
		return 0, 0, fmt.Errorf("read option: %w", err)
	}
	if magic := binary.BigEndian.Uint64(header); magic != magicOption {
		return 0, 0, fmt.Errorf("%w: option starts with %#016x", errNotNBD, magic)
	}
	id = binary.BigEndian.Uint32(header[8:])
	length = binary.BigEndian.Uint32(header[12:])
	if length > n.lim.skip {
		return 0, 0, fmt.Errorf("%w: %s with %d bytes, the limit is %d", errOptionTooBig, optionName(id), length, n.lim.skip)
	}
	return id, length, nil
}

// readData reads the data of an option that fits n.in.
func (n *negotiation) readData(length uint32) ([]byte, error) {
	data := n.in[:length]
	if _, err := io.ReadFull(n.rw, data); err != nil {
		return nil, fmt.Errorf("read data of option: %w", noEOF(err))
	}
	return data, nil
}

// skipData throws the data of an option away.
func (n *negotiation) skipData(length uint32) error {
	for length > 0 {
		part := min(length, optionBuffer)
		if _, err := n.readData(part); err != nil {
			return err
		}
		length -= part
	}
	return nil
}

// noEOF tells the end of the stream within an option from the one between two.
func noEOF(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// reply adds the header of a reply, whose data of that length the caller adds.
func (n *negotiation) reply(option, kind uint32, length int) {
	n.out = binary.BigEndian.AppendUint64(n.out, magicReply)
	n.out = binary.BigEndian.AppendUint32(n.out, option)
	n.out = binary.BigEndian.AppendUint32(n.out, kind)
	n.out = binary.BigEndian.AppendUint32(n.out, uint32(length))
}

// refuse sends an error reply with a message for the person at the client.
func (n *negotiation) refuse(option, kind uint32, message string) error {
	message = clip(message)
	n.reply(option, kind, len(message))
	n.out = append(n.out, message...)
	return n.send()
}

// send writes the gathered replies in one piece.
func (n *negotiation) send() error {
	_, err := n.rw.Write(n.out)
	n.out = n.out[:0]
	if err != nil {
		return fmt.Errorf("send reply: %w", err)
	}
	return nil
}
