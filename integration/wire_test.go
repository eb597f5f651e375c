package integration

import (
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"testing"
	"time"

	"platter/integration/testenv"
)

// The numbers of the protocol, apart from those of the server under test: a
// mistake there must not repeat itself here.
const (
	magicGreeting    = 0x4e42444d41474943 // "NBDMAGIC"
	magicOption      = 0x49484156454f5054 // "IHAVEOPT"
	magicOptionReply = 0x0003e889045565a9
	magicRequest     = 0x25609513
	magicSimpleReply = 0x67446698

	optExportName = 1
	optAbort      = 2
	optList       = 3
	optInfo       = 6
	optGo         = 7

	repAck       = 1
	repInfo      = 3
	repErrUnsup  = 1<<31 + 1
	repErrUnknwn = 1<<31 + 6

	cmdRead  = 0
	cmdWrite = 1
	cmdFlush = 3
	cmdTrim  = 4

	nbdEINVAL = 22
	nbdENOSPC = 28
)

// wireTimeout bounds each read and write of a wireClient.
const wireTimeout = 10 * time.Second

// wireClient speaks NBD byte by byte, rightly or not.
type wireClient struct {
	t    testing.TB
	conn net.Conn
}

// dial connects and reads the greeting.
func dial(t testing.TB, s *testenv.Server) *wireClient {
	t.Helper()
	network, address := s.Addr()
	conn, err := net.DialTimeout(network, address, wireTimeout)
	if err != nil {
		t.Fatal(err)
	}
	c := &wireClient{t, conn}
	t.Cleanup(func() { _ = conn.Close() }) // some tests have closed it
	greeting := c.read(18)
	if binary.BigEndian.Uint64(greeting) != magicGreeting || binary.BigEndian.Uint64(greeting[8:]) != magicOption {
		t.Fatalf("greeting % x", greeting)
	}
	if flags := binary.BigEndian.Uint16(greeting[16:]); flags != 3 {
		t.Fatalf("handshake flags %#x, want fixed newstyle and no zeroes", flags)
	}
	return c
}

// start is dial with the client's flags sent: fixed newstyle, no zeroes.
func start(t testing.TB, s *testenv.Server) *wireClient {
	t.Helper()
	c := dial(t, s)
	c.write(be(uint32(3)))
	return c
}

// ready is start with the default export chosen.
func ready(t testing.TB, s *testenv.Server) *wireClient {
	t.Helper()
	c := start(t, s)
	c.option(optGo, goPayload(""))
	for {
		switch kind, _ := c.optionReply(optGo); kind {
		case repInfo:
		case repAck:
			return c
		default:
			t.Fatalf("reply %#x to GO", kind)
		}
	}
}

// be joins integers of fixed size and byte slices in network order.
func be(parts ...any) []byte {
	var out []byte
	for _, p := range parts {
		var err error
		if out, err = binary.Append(out, binary.BigEndian, p); err != nil {
			panic(err) // a part of no fixed size: a mistake of the test
		}
	}
	return out
}

func goPayload(name string) []byte {
	return be(uint32(len(name)), []byte(name), uint16(0))
}

func (c *wireClient) write(p []byte) {
	c.t.Helper()
	c.deadline()
	if _, err := c.conn.Write(p); err != nil {
		c.t.Fatalf("write: %v", err)
	}
}

func (c *wireClient) read(n int) []byte {
	c.t.Helper()
	c.deadline()
	p := make([]byte, n)
	if got, err := io.ReadFull(c.conn, p); err != nil {
		c.t.Fatalf("read %d bytes: %v after %d", n, err, got)
	}
	return p
}

func (c *wireClient) deadline() {
	if err := c.conn.SetDeadline(time.Now().Add(wireTimeout)); err != nil {
		c.t.Fatal(err)
	}
}

// wantClosed reads what is left and fails the test unless the server closes
// the connection in time.
func (c *wireClient) wantClosed() {
	c.t.Helper()
	c.deadline()
	if _, err := io.Copy(io.Discard, c.conn); errors.Is(err, os.ErrDeadlineExceeded) {
		c.t.Error("the server keeps the connection open")
	}
}

func (c *wireClient) option(option uint32, payload []byte) {
	c.t.Helper()
	c.write(be(uint64(magicOption), option, uint32(len(payload)), payload))
}

func (c *wireClient) optionReply(option uint32) (kind uint32, payload []byte) {
	c.t.Helper()
	header := c.read(20)
	if binary.BigEndian.Uint64(header) != magicOptionReply || binary.BigEndian.Uint32(header[8:]) != option {
		c.t.Fatalf("option reply % x to option %d", header, option)
	}
	length := binary.BigEndian.Uint32(header[16:])
	if length > 8192 {
		c.t.Fatalf("an option reply of %d bytes", length)
	}
	return binary.BigEndian.Uint32(header[12:]), c.read(int(length))
}

func request(flags, command uint16, cookie, offset uint64, length uint32) []byte {
	return be(uint32(magicRequest), flags, command, cookie, offset, length)
}

// call sends a request without payload and returns the error of its reply, and
// the data when it is a read that succeeded.
func (c *wireClient) call(flags, command uint16, offset uint64, length uint32) (errno uint32, data []byte) {
	c.t.Helper()
	const cookie = 0xfeedfacecafebeef
	c.write(request(flags, command, cookie, offset, length))
	errno = c.reply(cookie)
	if errno == 0 && command == cmdRead {
		data = c.read(int(length))
	}
	return errno, data
}

func (c *wireClient) reply(cookie uint64) (errno uint32) {
	c.t.Helper()
	header := c.read(16)
	if binary.BigEndian.Uint32(header) != magicSimpleReply || binary.BigEndian.Uint64(header[8:]) != cookie {
		c.t.Fatalf("reply % x", header)
	}
	return binary.BigEndian.Uint32(header[4:])
}

// wantServing fails the test unless a new client is served.
func wantServing(t testing.TB, s *testenv.Server) {
	t.Helper()
	c := ready(t, s)
	if errno, _ := c.call(0, cmdRead, 0, 512); errno != 0 {
		t.Errorf("a read by a new client: error %d", errno)
	}
	c.conn.Close()
}
