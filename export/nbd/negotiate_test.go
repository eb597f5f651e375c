package nbd

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"platter/export/nbd/nbdtest"
)

// shelf is a Catalogue; its first export is the default.
type shelf []Offer

func (s shelf) List() []Offer { return s }

func (s shelf) Find(name string) (Offer, bool) {
	if name == "" && len(s) > 0 {
		return s[0], true
	}
	i := slices.IndexFunc(s, func(o Offer) bool { return o.Name == name })
	if i < 0 {
		return Offer{}, false
	}
	return s[i], true
}

var (
	demo = Offer{
		Name: "demo", Description: "the first disk", Size: 1 << 40, Flags: flagHasFlags | flagSendFlush,
		MinBlock: 1, PreferredBlock: 4096, MaxBlock: 32 << 20,
	}
	plain = Offer{
		Name: "größe", Size: 512, Flags: flagHasFlags | flagReadOnly,
		MinBlock: 512, PreferredBlock: 65536, MaxBlock: 1 << 20,
	}
	testShelf = shelf{demo, plain}
)

// outcome is how the server's side of a negotiation ended.
type outcome struct {
	result
	err error
}

// start runs a negotiation against a client that has done nothing yet. The
// server's end closes when the negotiation fails, as a server does.
func start(t *testing.T, c Catalogue, lim limits) (*nbdtest.Client, <-chan outcome) {
	t.Helper()
	server, client := net.Pipe()
	t.Cleanup(func() { server.Close(); client.Close() })
	if err := server.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	done := make(chan outcome, 1)
	go func() {
		res, err := negotiate(server, c, lim)
		if err != nil {
			server.Close()
		}
		done <- outcome{res, err}
	}()
	return nbdtest.New(client), done
}

// hello starts a negotiation and gets past the greeting.
func hello(t *testing.T, flags uint32) (*nbdtest.Client, <-chan outcome) {
	t.Helper()
	c, done := start(t, testShelf, defaultLimits)
	if err := c.Hello(flags); err != nil {
		t.Fatal(err)
	}
	return c, done
}

// chosen checks that the negotiation ended with that export.
func chosen(t *testing.T, done <-chan outcome, want Offer) {
	t.Helper()
	got := <-done
	if got.err != nil || got.offer != want {
		t.Fatalf("negotiation gave %+v, %v, want %q", got.offer, got.err, want.Name)
	}
}

// failed checks that the negotiation ended with that error, as an *Error.
func failed(t *testing.T, done <-chan outcome, want error) {
	t.Helper()
	got := <-done
	var typed *Error
	if !errors.As(got.err, &typed) || !errors.Is(got.err, want) {
		t.Fatalf("negotiation gave %+v, %v, want an *Error of %v", got.offer, got.err, want)
	}
}

// refused checks that err is an error reply of that type with a message.
func refused(t *testing.T, err error, kind uint32, message string) {
	t.Helper()
	var refusal *nbdtest.OptionError
	if !errors.As(err, &refusal) || refusal.Type != kind || !strings.Contains(refusal.Message, message) {
		t.Fatalf("got %v, want reply %#x with %q", err, kind, message)
	}
}

// closed checks that the server has hung up without another word.
func closed(t *testing.T, c *nbdtest.Client) {
	t.Helper()
	if n, err := c.Conn.Read(make([]byte, 1)); n != 0 || !errors.Is(err, io.EOF) {
		t.Fatalf("read gave %d, %v, want the end of the connection", n, err)
	}
}

func TestGreeting(t *testing.T) {
	c, done := hello(t, nbdtest.FixedNewstyle)
	if c.Handshake != 3 {
		t.Errorf("handshake flags are %#x, want fixed newstyle and no zeroes", c.Handshake)
	}
	c.Close()
	failed(t, done, io.EOF)
}

func TestUnknownClientFlags(t *testing.T) {
	for _, flags := range []uint32{4, 1 << 31, nbdtest.FixedNewstyle | 1<<16} {
		c, done := hello(t, flags)
		closed(t, c)
		failed(t, done, errClientFlags)
	}
}

func TestOptionBeyondLimit(t *testing.T) {
	for _, id := range []uint32{0, nbdtest.OptExportName, nbdtest.OptAbort, nbdtest.OptList, nbdtest.OptInfo, nbdtest.OptGo} {
		for _, length := range []uint32{defaultLimits.skip + 1, 1 << 31, 0xffffffff} {
			c, done := hello(t, nbdtest.FixedNewstyle)
			if err := c.SendOption(id, length, nil); err != nil {
				t.Fatal(err)
			}
			closed(t, c)
			failed(t, done, errOptionTooBig)
		}
	}
}

func TestTooManyOptions(t *testing.T) {
	c, done := start(t, testShelf, limits{options: 3, skip: 16})
	if err := c.Hello(nbdtest.FixedNewstyle); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if _, err := c.List(); err != nil {
			t.Fatal(err)
		}
	}
	closed(t, c)
	failed(t, done, errTooManyOptions)
}

func TestNotNBD(t *testing.T) {
	c, done := hello(t, nbdtest.FixedNewstyle)
	if _, err := c.Conn.Write([]byte("GET / HTTP/1.1\r\n")); err != nil {
		t.Fatal(err)
	}
	closed(t, c)
	failed(t, done, errNotNBD)
}

// A client may send its first requests together with its choice: they must
// still be in the socket.
func TestNothingIsReadAhead(t *testing.T) {
	request := bytes.Repeat([]byte("request"), 4)
	for name, option := range map[string][]byte{
		"go":          frame(nbdtest.OptGo, nbdtest.InfoData("demo", 0, 1, 2, 3)),
		"export name": frame(nbdtest.OptExportName, []byte("demo")),
	} {
		t.Run(name, func(t *testing.T) {
			in := bytes.NewBuffer(binary.BigEndian.AppendUint32(nil, nbdtest.FixedNewstyle))
			in.Write(frame(nbdtest.OptList, nil))
			in.Write(option)
			in.Write(request)
			res, err := negotiate(script{in, io.Discard}, testShelf, defaultLimits)
			if err != nil || res.offer != demo {
				t.Fatalf("got %+v, %v", res, err)
			}
			if !bytes.Equal(in.Bytes(), request) {
				t.Errorf("%q is left, want %q", in.Bytes(), request)
			}
		})
	}
}

// Every answer is one write, so that it is one packet.
func TestOneWritePerAnswer(t *testing.T) {
	in := bytes.NewBuffer(binary.BigEndian.AppendUint32(nil, nbdtest.FixedNewstyle))
	in.Write(frame(nbdtest.OptList, nil))
	in.Write(frame(nbdtest.OptStartTLS, nil))
	in.Write(frame(nbdtest.OptInfo, nbdtest.InfoData("other")))
	in.Write(frame(nbdtest.OptInfo, nbdtest.InfoData("demo", 1, 2, 3)))
	in.Write(frame(nbdtest.OptGo, nbdtest.InfoData("demo", 1, 2, 3)))
	var out counter
	if _, err := negotiate(script{in, &out}, testShelf, defaultLimits); err != nil {
		t.Fatal(err)
	}
	if want := 1 + 5; out.writes != want {
		t.Errorf("%d writes, want the greeting and 5 answers", out.writes)
	}
}

func TestVanishingClient(t *testing.T) {
	whole := binary.BigEndian.AppendUint32(nil, nbdtest.FixedNewstyle)
	edges := []int{0, len(whole)} // the ends of a message
	for _, option := range [][]byte{frame(nbdtest.OptList, nil), frame(99, make([]byte, 10)), frame(nbdtest.OptGo, nbdtest.InfoData("demo"))} {
		whole = append(whole, option...)
		edges = append(edges, len(whole))
	}
	for cut := range whole {
		want := io.ErrUnexpectedEOF
		if slices.Contains(edges, cut) {
			want = io.EOF
		}
		_, err := negotiate(script{bytes.NewReader(whole[:cut]), io.Discard}, testShelf, defaultLimits)
		if !errors.Is(err, want) {
			t.Errorf("cut at %d: got %v, want %v", cut, err, want)
		}
	}
}

// A client that stalls, wherever it does, is gone after the deadline: while it
// owes us bytes, and while it does not take ours.
func TestStallingClient(t *testing.T) {
	stall := func(t *testing.T, act func(c *nbdtest.Client)) {
		server, client := net.Pipe()
		defer server.Close()
		defer client.Close()
		if err := server.SetDeadline(time.Now().Add(50 * time.Millisecond)); err != nil {
			t.Fatal(err)
		}
		done := make(chan outcome, 1)
		go func() {
			res, err := negotiate(server, testShelf, defaultLimits)
			done <- outcome{res, err}
		}()
		act(nbdtest.New(client))
		failed(t, done, os.ErrDeadlineExceeded)
	}
	t.Run("at the greeting", func(t *testing.T) { stall(t, func(*nbdtest.Client) {}) })
	t.Run("before its flags", func(t *testing.T) {
		stall(t, func(c *nbdtest.Client) { _, _ = io.ReadFull(c.Conn, make([]byte, greetingSize)) })
	})
	t.Run("within an option", func(t *testing.T) {
		stall(t, func(c *nbdtest.Client) {
			_ = c.Hello(nbdtest.FixedNewstyle)
			_ = c.SendOption(nbdtest.OptGo, 100, []byte("half"))
		})
	})
	t.Run("at a reply", func(t *testing.T) {
		stall(t, func(c *nbdtest.Client) {
			_ = c.Hello(nbdtest.FixedNewstyle)
			_ = c.SendOption(nbdtest.OptList, 0, nil)
		})
	})
}

func TestErrorNamesTheClient(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	client, err := net.Dial("tcp", listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	server, err := listener.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	client.Close()
	_, err = negotiate(server, testShelf, defaultLimits)
	if want := "negotiate with client " + client.LocalAddr().String() + ": "; err == nil || !strings.HasPrefix(err.Error(), want) {
		t.Errorf("error is %v, want it to start with %q", err, want)
	}
}

// script is a connection whose client has said everything in advance.
type script struct {
	io.Reader
	io.Writer
}

// counter counts what is written to it.
type counter struct{ writes, bytes int }

func (c *counter) Write(p []byte) (int, error) {
	c.writes++
	c.bytes += len(p)
	return len(p), nil
}

// frame is an option as a client sends it.
func frame(id uint32, data []byte) []byte {
	b := binary.BigEndian.AppendUint64(nil, nbdtest.MagicOption)
	b = binary.BigEndian.AppendUint32(b, id)
	b = binary.BigEndian.AppendUint32(b, uint32(len(data)))
	return append(b, data...)
}
