package loadgen

import (
	"bufio"
	"encoding/binary"
	"io"
	"net"
	"path/filepath"
	"sync"
	"testing"
)

// fakeServer is an NBD server over a byte slice, with knobs for misbehaviour.
type fakeServer struct {
	data    []byte
	flags   uint16
	reverse int                                             // answer in groups of this many, last request first
	errno   func(cmd uint16, off uint64) uint32             // error to answer with; 0 is success
	mangle  func(reply []byte)                              // alters a reply's header before it is sent
	hello   func(net.Conn) error                            // replaces the whole session
	saw     func(conn int, cmd uint16, off uint64, len int) // told about every request

	mu       sync.Mutex
	goodbyes int
}

// start listens, serves until the test ends, and returns the socket's path.
func (s *fakeServer) start(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for id := 0; ; id++ {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer c.Close()
				// That a client goes away is no failure of the server.
				if s.hello != nil {
					_ = s.hello(c)
					return
				}
				_ = s.serve(c, id)
			})
		}
	})
	t.Cleanup(func() { l.Close(); wg.Wait() })
	return path
}

func (s *fakeServer) serve(c net.Conn, id int) error {
	in := bufio.NewReaderSize(c, 64<<10)
	if err := s.greet(in, c); err != nil {
		return err
	}
	be := binary.BigEndian
	var (
		head    = make([]byte, requestBytes)
		scratch = make([]byte, 1<<20)
		group   = make([]byte, 0, 1<<20)
		spare   = make([]byte, 0, 1<<20)
		held    int
	)
	for {
		if _, err := io.ReadFull(in, head); err != nil {
			return err
		}
		cmd, off, n := be.Uint16(head[6:]), be.Uint64(head[16:]), int(be.Uint32(head[24:]))
		if cmd == cmdDisc {
			s.mu.Lock()
			s.goodbyes++
			s.mu.Unlock()
			return nil
		}
		if cmd == cmdWrite {
			if _, err := io.ReadFull(in, scratch[:n]); err != nil {
				return err
			}
		}
		if s.saw != nil {
			s.mu.Lock()
			s.saw(id, cmd, off, n)
			s.mu.Unlock()
		}
		var errno uint32
		if s.errno != nil {
			errno = s.errno(cmd, off)
		}
		reply := be.AppendUint32(spare[:0], magicReply)
		reply = be.AppendUint32(reply, errno)
		reply = append(reply, head[8:16]...)
		switch {
		case errno != 0:
		case cmd == cmdRead:
			reply = append(reply, s.data[off:off+uint64(n)]...)
		case cmd == cmdWrite:
			s.mu.Lock()
			copy(s.data[off:], scratch[:n])
			s.mu.Unlock()
		}
		if s.mangle != nil {
			s.mangle(reply)
		}
		// reply lies in spare; what was held before follows it.
		reply = append(reply, group...)
		group, spare = reply, group
		if held++; held >= s.reverse {
			if _, err := c.Write(group); err != nil {
				return err
			}
			group, held = group[:0], 0
		}
	}
}

// greet carries out the handshake as the specification describes it.
func (s *fakeServer) greet(in io.Reader, out io.Writer) error {
	be := binary.BigEndian
	hello := be.AppendUint64(nil, magicInit)
	hello = be.AppendUint64(hello, magicOption)
	hello = be.AppendUint16(hello, handshakeFixed|handshakeNoZeroes)
	if _, err := out.Write(hello); err != nil {
		return err
	}
	var fixed [20]byte // client flags, IHAVEOPT, option, length
	if _, err := io.ReadFull(in, fixed[:]); err != nil {
		return err
	}
	body := make([]byte, be.Uint32(fixed[16:]))
	if _, err := io.ReadFull(in, body); err != nil {
		return err
	}
	if name := string(body[4 : 4+be.Uint32(body)]); name != "" {
		_, err := out.Write(append(optionReply(1<<31|6, 7), "unknown"...))
		return err
	}
	info := optionReply(repInfo, 14) // block sizes, which the client passes over
	info = be.AppendUint16(info, 3)
	info = append(info, make([]byte, 12)...)
	info = append(info, optionReply(repInfo, 12)...)
	info = be.AppendUint16(info, infoExport)
	info = be.AppendUint64(info, uint64(len(s.data)))
	info = be.AppendUint16(info, s.flags|1)
	_, err := out.Write(append(info, optionReply(repAck, 0)...))
	return err
}

func optionReply(kind, length uint32) []byte {
	be := binary.BigEndian
	b := be.AppendUint64(nil, magicOptReply)
	b = be.AppendUint32(b, optGo)
	b = be.AppendUint32(b, kind)
	return be.AppendUint32(b, length)
}
