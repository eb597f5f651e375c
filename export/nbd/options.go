package nbd

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"strings"
	"unicode/utf8"
)

// answer takes the data of one option and answers it. It returns the export
// when the option was the client's choice, and nil when the client goes on. An
// error ends the connection.
func (n *negotiation) answer(id, length uint32) (*Offer, error) {
	switch id {
	case optExportName:
		return n.exportName(length)
	case optGo, optInfo:
		return n.info(id, length)
	case optList:
		return nil, n.list(length)
	case optAbort:
		return nil, n.abort(length)
	}
	if err := n.skipData(length); err != nil {
		return nil, err
	}
	return nil, n.refuse(id, repErrUnsupported, optionName(id)+" is not supported")
}

// exportName is the old way to choose an export. It knows no error reply: the
// connection ends instead.
func (n *negotiation) exportName(length uint32) (*Offer, error) {
	if length > maxString {
		return nil, fmt.Errorf("%w: an export name of %d bytes", errOptionTooBig, length)
	}
	name, err := n.readData(length)
	if err != nil {
		return nil, err
	}
	if !validName(name) {
		return nil, fmt.Errorf("%w: %s", errUnknownExport, quote(name))
	}
	offer, ok := n.exports.Find(string(name))
	if !ok {
		return nil, fmt.Errorf("%w: %s", errUnknownExport, quote(name))
	}
	n.out = binary.BigEndian.AppendUint64(n.out, offer.Size)
	n.out = binary.BigEndian.AppendUint16(n.out, offer.Flags)
	if !n.noZeroes {
		n.out = append(n.out, make([]byte, reservedZeroes)...)
	}
	if err := n.send(); err != nil {
		return nil, err
	}
	return &offer, nil
}

// info answers NBD_OPT_INFO and NBD_OPT_GO, which differ only in what follows
// a success.
func (n *negotiation) info(id, length uint32) (*Offer, error) {
	if length > optionBuffer {
		if err := n.skipData(length); err != nil {
			return nil, err
		}
		return nil, n.refuse(id, repErrTooBig, fmt.Sprintf("%d bytes of data are too much for %s", length, optionName(id)))
	}
	data, err := n.readData(length)
	if err != nil {
		return nil, err
	}
	name, wanted, ok := parseInfo(data)
	switch {
	case !ok:
		return nil, n.refuse(id, repErrInvalid, "the lengths within "+optionName(id)+" do not add up")
	case len(name) > maxString:
		return nil, n.refuse(id, repErrTooBig, fmt.Sprintf("the export name has %d bytes, at most %d are allowed", len(name), maxString))
	case !validName(name):
		return nil, n.refuse(id, repErrInvalid, "the export name is not UTF-8, or contains a NUL")
	}
	offer, ok := n.exports.Find(string(name))
	if !ok {
		return nil, n.refuse(id, repErrUnknown, n.unknown(name))
	}
	n.inform(id, &offer, wanted)
	n.reply(id, repAck, 0)
	if err := n.send(); err != nil {
		return nil, err
	}
	if id == optInfo {
		return nil, nil
	}
	return &offer, nil
}

// parseInfo takes the data of NBD_OPT_INFO and NBD_OPT_GO apart: the name and the
// types of information that are wanted, two bytes each.
func parseInfo(data []byte) (name, wanted []byte, ok bool) {
	const nameLength, count = 4, 2
	if len(data) < nameLength+count {
		return nil, nil, false
	}
	length := binary.BigEndian.Uint32(data)
	data = data[nameLength:]
	if uint64(length) > uint64(len(data)-count) {
		return nil, nil, false
	}
	name, data = data[:length], data[length:]
	wanted = data[count:]
	return name, wanted, len(wanted) == 2*int(binary.BigEndian.Uint16(data))
}

// inform adds what is to be said about an export: always its size, its flags
// and its block sizes, and what else was asked for and is known.
func (n *negotiation) inform(id uint32, offer *Offer, wanted []byte) {
	n.reply(id, repInfo, infoExportSize)
	n.out = binary.BigEndian.AppendUint16(n.out, infoTypeExport)
	n.out = binary.BigEndian.AppendUint64(n.out, offer.Size)
	n.out = binary.BigEndian.AppendUint16(n.out, offer.Flags)

	n.reply(id, repInfo, infoBlockSize)
	n.out = binary.BigEndian.AppendUint16(n.out, infoTypeBlockSize)
	n.out = binary.BigEndian.AppendUint32(n.out, offer.MinBlock)
	n.out = binary.BigEndian.AppendUint32(n.out, offer.PreferredBlock)
	n.out = binary.BigEndian.AppendUint32(n.out, offer.MaxBlock)

	if wants(wanted, infoTypeName) {
		n.informString(id, infoTypeName, offer.Name)
	}
	if offer.Description != "" && wants(wanted, infoTypeDescription) {
		n.informString(id, infoTypeDescription, offer.Description)
	}
}

func (n *negotiation) informString(id uint32, kind uint16, s string) {
	s = clip(s)
	n.reply(id, repInfo, 2+len(s))
	n.out = binary.BigEndian.AppendUint16(n.out, kind)
	n.out = append(n.out, s...)
}

// wants reports whether a type is among those asked for. A type that is asked
// for twice is answered once.
func wants(wanted []byte, kind uint16) bool {
	for ; len(wanted) >= 2; wanted = wanted[2:] {
		if binary.BigEndian.Uint16(wanted) == kind {
			return true
		}
	}
	return false
}

func (n *negotiation) list(length uint32) error {
	if err := n.skipData(length); err != nil {
		return err
	}
	if length > 0 {
		return n.refuse(optList, repErrInvalid, "NBD_OPT_LIST takes no data")
	}
	for _, offer := range n.exports.List() {
		name, description := clip(offer.Name), clip(offer.Description)
		n.reply(optList, repServer, 4+len(name)+len(description))
		n.out = binary.BigEndian.AppendUint32(n.out, uint32(len(name)))
		n.out = append(n.out, name...)
		n.out = append(n.out, description...)
		if len(n.out) >= flushAt {
			if err := n.send(); err != nil {
				return err
			}
		}
	}
	n.reply(optList, repAck, 0)
	return n.send()
}

// abort ends the negotiation on the client's wish. Data that comes with it is
// ignored, and so is a client that does not wait for the reply.
func (n *negotiation) abort(length uint32) error {
	if n.skipData(length) == nil {
		n.reply(optAbort, repAck, 0)
		_ = n.send()
	}
	return errAborted
}

// unknown tells a client that asked for a wrong name which ones are right.
func (n *negotiation) unknown(name []byte) string {
	const most = 8
	var b strings.Builder
	if len(name) == 0 {
		b.WriteString("there is no default export")
	} else {
		fmt.Fprintf(&b, "there is no export %s", quote(name))
	}
	offers := n.exports.List()
	if len(offers) == 0 {
		b.WriteString("; nothing is exported")
		return b.String()
	}
	b.WriteString("; ask for one of these: ")
	for i, offer := range offers[:min(most, len(offers))] {
		if i > 0 {
			b.WriteString(", ")
		}
		b.WriteString(quote([]byte(offer.Name)))
	}
	if more := len(offers) - most; more > 0 {
		fmt.Fprintf(&b, " and %d more", more)
	}
	return b.String()
}

// validName reports whether name is a string in the sense of the protocol. Its
// length is checked elsewhere.
func validName(name []byte) bool {
	return utf8.Valid(name) && bytes.IndexByte(name, 0) < 0
}

// quote makes a name from outside fit for a message: short, and in one line of
// printable characters.
func quote(name []byte) string {
	const most = 64
	if len(name) > most {
		return fmt.Sprintf("%q...", name[:most])
	}
	return fmt.Sprintf("%q", name)
}

// clip cuts s to what the protocol allows, between two characters.
func clip(s string) string {
	if len(s) <= maxString {
		return s
	}
	end := maxString
	for end > 0 && !utf8.RuneStart(s[end]) {
		end--
	}
	return s[:end]
}

var optionNames = map[uint32]string{
	optExportName:      "NBD_OPT_EXPORT_NAME",
	optAbort:           "NBD_OPT_ABORT",
	optList:            "NBD_OPT_LIST",
	optStartTLS:        "NBD_OPT_STARTTLS",
	optInfo:            "NBD_OPT_INFO",
	optGo:              "NBD_OPT_GO",
	optStructuredReply: "NBD_OPT_STRUCTURED_REPLY",
	optListMetaContext: "NBD_OPT_LIST_META_CONTEXT",
	optSetMetaContext:  "NBD_OPT_SET_META_CONTEXT",
	optExtendedHeaders: "NBD_OPT_EXTENDED_HEADERS",
}

// optionName is the specification's name for an option.
func optionName(id uint32) string {
	if name, ok := optionNames[id]; ok {
		return name
	}
	return fmt.Sprintf("option %d", id)
}
