package nbdtest

import (
	"encoding/binary"
	"fmt"
)

// Reply is one reply to an option.
type Reply struct {
	Type uint32
	Data []byte
}

// OptionError is an error reply to an option.
type OptionError struct {
	Option, Type uint32
	Message      string
}

func (e *OptionError) Error() string {
	return fmt.Sprintf("nbd option %d failed with %#x: %s", e.Option, e.Type, e.Message)
}

// Listed is an export as NBD_OPT_LIST shows it.
type Listed struct{ Name, Description string }

// Hello reads the greeting and answers with flags, offered or not.
func (c *Client) Hello(flags uint32) error {
	b, err := c.read(18)
	if err != nil {
		return err
	}
	if init, option := binary.BigEndian.Uint64(b), binary.BigEndian.Uint64(b[8:]); init != MagicInit || option != MagicOption {
		return fmt.Errorf("%w: greeting % x", ErrProtocol, b)
	}
	c.Handshake = binary.BigEndian.Uint16(b[16:])
	if uint32(c.Handshake)&FixedNewstyle == 0 {
		return fmt.Errorf("%w: handshake flags %#x lack the fixed newstyle", ErrProtocol, c.Handshake)
	}
	c.noZeroes = flags&NoZeroes != 0
	return c.write(binary.BigEndian.AppendUint32(nil, flags))
}

// SendOption sends an option and does not wait. Length is what the header says,
// right or wrong; data is what follows.
func (c *Client) SendOption(id, length uint32, data []byte) error {
	b := make([]byte, 0, 16+len(data))
	b = binary.BigEndian.AppendUint64(b, MagicOption)
	b = binary.BigEndian.AppendUint32(b, id)
	b = binary.BigEndian.AppendUint32(b, length)
	return c.write(append(b, data...))
}

// RecvReply waits for the next reply, which must be to the option.
func (c *Client) RecvReply(option uint32) (Reply, error) {
	b, err := c.read(20)
	if err != nil {
		return Reply{}, err
	}
	magic, id := binary.BigEndian.Uint64(b), binary.BigEndian.Uint32(b[8:])
	kind, length := binary.BigEndian.Uint32(b[12:]), binary.BigEndian.Uint32(b[16:])
	if magic != MagicReply || id != option || length > 64<<10 {
		return Reply{}, fmt.Errorf("%w: reply % x to option %d", ErrProtocol, b, option)
	}
	data, err := c.read(int(length))
	return Reply{Type: kind, Data: data}, err
}

// Option sends an option and returns the replies to it, without the
// acknowledgement that ends them. An error reply is an *OptionError.
func (c *Client) Option(id uint32, data []byte) ([]Reply, error) {
	if err := c.SendOption(id, uint32(len(data)), data); err != nil {
		return nil, err
	}
	var replies []Reply
	for {
		reply, err := c.RecvReply(id)
		switch {
		case err != nil:
			return replies, err
		case reply.Type == RepAck && len(reply.Data) > 0:
			return replies, fmt.Errorf("%w: acknowledgement with data %q", ErrProtocol, reply.Data)
		case reply.Type == RepAck:
			return replies, nil
		case reply.Type&RepErr != 0:
			return replies, &OptionError{Option: id, Type: reply.Type, Message: string(reply.Data)}
		}
		replies = append(replies, reply)
	}
}

// Go chooses an export with NBD_OPT_GO, asking for its block sizes and for wanted.
func (c *Client) Go(name string, wanted ...uint16) error {
	_, err := c.Info(OptGo, name, append([]uint16{InfoBlockSize}, wanted...)...)
	return err
}

// Info sends NBD_OPT_INFO or NBD_OPT_GO. It keeps what the server says about
// size, flags and block sizes in c, and returns all of it by type.
func (c *Client) Info(option uint32, name string, wanted ...uint16) (map[uint16][]byte, error) {
	replies, err := c.Option(option, InfoData(name, wanted...))
	if err != nil {
		return nil, err
	}
	infos := make(map[uint16][]byte)
	for _, reply := range replies {
		if reply.Type != RepInfo || len(reply.Data) < 2 {
			return nil, fmt.Errorf("%w: reply %#x % x is no information", ErrProtocol, reply.Type, reply.Data)
		}
		kind := binary.BigEndian.Uint16(reply.Data)
		if _, twice := infos[kind]; twice {
			return nil, fmt.Errorf("%w: information %d came twice", ErrProtocol, kind)
		}
		infos[kind] = reply.Data[2:]
	}
	export, ok := infos[InfoExport]
	if !ok || len(export) != 10 {
		return nil, fmt.Errorf("%w: no size and flags in %v", ErrProtocol, infos)
	}
	c.Size, c.Flags = binary.BigEndian.Uint64(export), binary.BigEndian.Uint16(export[8:])
	if sizes, ok := infos[InfoBlockSize]; ok {
		if len(sizes) != 12 {
			return nil, fmt.Errorf("%w: block sizes % x", ErrProtocol, sizes)
		}
		c.MinBlock = binary.BigEndian.Uint32(sizes)
		c.PreferredBlock = binary.BigEndian.Uint32(sizes[4:])
		c.MaxBlock = binary.BigEndian.Uint32(sizes[8:])
	}
	return infos, nil
}

// InfoData is the data of NBD_OPT_INFO and NBD_OPT_GO.
func InfoData(name string, wanted ...uint16) []byte {
	b := binary.BigEndian.AppendUint32(nil, uint32(len(name)))
	b = append(b, name...)
	b = binary.BigEndian.AppendUint16(b, uint16(len(wanted)))
	for _, kind := range wanted {
		b = binary.BigEndian.AppendUint16(b, kind)
	}
	return b
}

// ExportName chooses an export with NBD_OPT_EXPORT_NAME.
func (c *Client) ExportName(name string) error {
	if err := c.SendOption(OptExportName, uint32(len(name)), []byte(name)); err != nil {
		return err
	}
	length := 10 + 124
	if c.noZeroes {
		length = 10
	}
	b, err := c.read(length)
	if err != nil {
		return err
	}
	for _, zero := range b[10:] {
		if zero != 0 {
			return fmt.Errorf("%w: reserved bytes % x", ErrProtocol, b[10:])
		}
	}
	c.Size, c.Flags = binary.BigEndian.Uint64(b), binary.BigEndian.Uint16(b[8:])
	return nil
}

// List asks for the exports of the server.
func (c *Client) List() ([]Listed, error) {
	replies, err := c.Option(OptList, nil)
	if err != nil {
		return nil, err
	}
	var all []Listed
	for _, reply := range replies {
		if reply.Type != RepServer || len(reply.Data) < 4 {
			return nil, fmt.Errorf("%w: reply %#x % x is no export", ErrProtocol, reply.Type, reply.Data)
		}
		length, rest := binary.BigEndian.Uint32(reply.Data), reply.Data[4:]
		if uint64(length) > uint64(len(rest)) {
			return nil, fmt.Errorf("%w: name of %d bytes in %d", ErrProtocol, length, len(rest))
		}
		all = append(all, Listed{Name: string(rest[:length]), Description: string(rest[length:])})
	}
	return all, nil
}

// Abort ends the handshake and waits for the acknowledgement.
func (c *Client) Abort() error {
	_, err := c.Option(OptAbort, nil)
	return err
}
