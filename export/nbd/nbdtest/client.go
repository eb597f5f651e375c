// Package nbdtest is a small NBD client for tests. It is made to look at a
// server closely: every step of the handshake and every request can be sent on
// its own, also wrongly, and Conn takes any bytes at all.
//
//	c, err := nbdtest.Dial("unix", path, "demo")
//	err = c.Read(0, buf)                           // one request at a time
//	err = c.Send(nbdtest.CmdRead, 0, 1, 0, 512, nil) // many in flight
//	cookie, errno, data, err := c.Recv()
//
// The one-at-a-time methods return an Errno when the server says no, and any
// other error when the connection or the protocol is broken.
package nbdtest

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"
)

// Timeout is how long a client waits for the server in one step, so that no
// test hangs.
const Timeout = 30 * time.Second

// ErrProtocol says that the server sent what the protocol does not allow here.
var ErrProtocol = errors.New("server breaks the protocol")

// Client is one connection. The one-at-a-time methods are for one goroutine;
// Send and Recv may be used by one goroutine each.
type Client struct {
	Conn      net.Conn
	Handshake uint16 // handshake flags of the server
	Size      uint64 // of the export, in bytes
	Flags     uint16 // transmission flags

	// Block sizes in bytes, 0 when the server did not tell.
	MinBlock, PreferredBlock, MaxBlock uint32

	noZeroes bool
	cookie   uint64

	mu    sync.Mutex
	reads map[uint64]uint32 // length of the reads in flight, by cookie
}

// Dial connects and chooses an export with NBD_OPT_GO.
func Dial(network, addr, name string) (*Client, error) {
	return dial(network, addr, func(c *Client) error {
		if err := c.Hello(FixedNewstyle); err != nil {
			return err
		}
		return c.Go(name)
	})
}

// DialExportName connects and chooses an export with NBD_OPT_EXPORT_NAME and
// the client flags given.
func DialExportName(network, addr, name string, flags uint32) (*Client, error) {
	return dial(network, addr, func(c *Client) error {
		if err := c.Hello(flags); err != nil {
			return err
		}
		return c.ExportName(name)
	})
}

// DialRaw connects and sends nothing: the greeting has not been read yet.
func DialRaw(network, addr string) (*Client, error) {
	return dial(network, addr, func(*Client) error { return nil })
}

func dial(network, addr string, handshake func(*Client) error) (*Client, error) {
	conn, err := net.DialTimeout(network, addr, Timeout)
	if err != nil {
		return nil, err
	}
	c := New(conn)
	if err := handshake(c); err != nil {
		conn.Close()
		return nil, err
	}
	return c, nil
}

// New makes a client of a connection on which nothing has been read yet.
func New(conn net.Conn) *Client {
	return &Client{Conn: conn, reads: make(map[uint64]uint32)}
}

// Close ends the connection without a word, like a client that dies.
func (c *Client) Close() error { return c.Conn.Close() }

// Read fills p from the export.
func (c *Client) Read(off int64, p []byte) error {
	data, err := c.do(CmdRead, 0, off, uint32(len(p)), nil)
	copy(p, data)
	return err
}

// Write stores p; the flag that makes sense is FUA.
func (c *Client) Write(off int64, p []byte, flags ...uint16) error {
	_, err := c.do(CmdWrite, join(flags), off, uint32(len(p)), p)
	return err
}

// Flush makes finished writes durable.
func (c *Client) Flush() error {
	_, err := c.do(CmdFlush, 0, 0, 0, nil)
	return err
}

// Trim gives a range up.
func (c *Client) Trim(off int64, length uint32, flags ...uint16) error {
	_, err := c.do(CmdTrim, join(flags), off, length, nil)
	return err
}

// WriteZeroes zeroes a range; flags that make sense are FUA, NoHole, FastZero.
func (c *Client) WriteZeroes(off int64, length uint32, flags ...uint16) error {
	_, err := c.do(CmdWriteZeroes, join(flags), off, length, nil)
	return err
}

// Cache asks the server to read ahead.
func (c *Client) Cache(off int64, length uint32) error {
	_, err := c.do(CmdCache, 0, off, length, nil)
	return err
}

// Disc says goodbye, waits until the server has closed, and closes. Data that
// still comes is an error.
func (c *Client) Disc() error {
	defer c.Conn.Close()
	if err := c.Send(CmdDisc, 0, 0, 0, 0, nil); err != nil {
		return err
	}
	_ = c.Conn.SetReadDeadline(time.Now().Add(Timeout))
	n, err := io.Copy(io.Discard, c.Conn)
	if err == nil && n > 0 {
		err = fmt.Errorf("%w: %d bytes after the disconnect", ErrProtocol, n)
	}
	return err
}

// do sends one request and waits for its reply, which must be the next.
func (c *Client) do(cmd, flags uint16, off int64, length uint32, payload []byte) ([]byte, error) {
	c.cookie++
	if err := c.Send(cmd, flags, c.cookie, uint64(off), length, payload); err != nil {
		return nil, err
	}
	cookie, errno, data, err := c.Recv()
	switch {
	case err != nil:
		return nil, err
	case cookie != c.cookie:
		return nil, fmt.Errorf("%w: reply to %d, want %d", ErrProtocol, cookie, c.cookie)
	case errno != 0:
		return nil, errno
	}
	return data, nil
}

// Send sends one request, right or wrong, and does not wait. Cookies of reads
// in flight must differ: Recv knows from them how long a reply is.
func (c *Client) Send(cmd, flags uint16, cookie, off uint64, length uint32, payload []byte) error {
	if cmd == CmdRead {
		c.mu.Lock()
		c.reads[cookie] = length
		c.mu.Unlock()
	}
	b := make([]byte, 0, 28+len(payload))
	b = binary.BigEndian.AppendUint32(b, MagicRequest)
	b = binary.BigEndian.AppendUint16(b, flags)
	b = binary.BigEndian.AppendUint16(b, cmd)
	b = binary.BigEndian.AppendUint64(b, cookie)
	b = binary.BigEndian.AppendUint64(b, off)
	b = binary.BigEndian.AppendUint32(b, length)
	return c.write(append(b, payload...))
}

// Recv waits for the next reply. Data is what a read brought.
func (c *Client) Recv() (cookie uint64, errno Errno, data []byte, err error) {
	header, err := c.read(16)
	if err != nil {
		return 0, 0, nil, err
	}
	if magic := binary.BigEndian.Uint32(header); magic != MagicSimple {
		return 0, 0, nil, fmt.Errorf("%w: reply starts with %#08x", ErrProtocol, magic)
	}
	errno = Errno(binary.BigEndian.Uint32(header[4:]))
	cookie = binary.BigEndian.Uint64(header[8:])
	c.mu.Lock()
	length := c.reads[cookie]
	delete(c.reads, cookie)
	c.mu.Unlock()
	if errno == 0 && length > 0 {
		data, err = c.read(int(length))
	}
	return cookie, errno, data, err
}

func (c *Client) write(b []byte) error {
	_ = c.Conn.SetWriteDeadline(time.Now().Add(Timeout)) // a dead connection says so below
	_, err := c.Conn.Write(b)
	return err
}

func (c *Client) read(n int) ([]byte, error) {
	_ = c.Conn.SetReadDeadline(time.Now().Add(Timeout))
	b := make([]byte, n)
	_, err := io.ReadFull(c.Conn, b)
	return b, err
}

func join(flags []uint16) (all uint16) {
	for _, flag := range flags {
		all |= flag
	}
	return all
}

func (e Errno) Error() string {
	if name, ok := errnoNames[e]; ok {
		return "nbd error " + name
	}
	return fmt.Sprintf("nbd error %d", uint32(e))
}
