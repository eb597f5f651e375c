package nbd

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"platter/aio"
	"platter/export"
	"platter/export/nbd/nbdtest"
)

// FuzzTransmission sends anything at all after the handshake. The connection
// ends, every reply is one, what was held is given back, and the image is asked
// for nothing that it doesn't have (fakeImage sees to that).
func FuzzTransmission(f *testing.F) {
	join := func(parts ...[]byte) []byte { return bytes.Join(parts, nil) }
	f.Add([]byte{})
	f.Add([]byte("GET / HTTP/1.1\r\n\r\n"))
	f.Add(wire(nbdtest.CmdDisc, 0, 0, 0, 0, nil))
	f.Add(join(wire(nbdtest.CmdRead, 0, 1, 0, 4096, nil), wire(nbdtest.CmdRead, 0, 2, 4096, 4096, nil), wire(nbdtest.CmdFlush, 0, 3, 0, 0, nil)))
	f.Add(join(wire(nbdtest.CmdWrite, 1, 1, 100, 5, []byte("hello")), wire(nbdtest.CmdWriteZeroes, 3, 2, 0, 1<<20, nil), wire(nbdtest.CmdTrim, 0, 3, 9, 1, nil)))
	f.Add(join(wire(nbdtest.CmdWrite, 0xffff, 1, 1<<63, 5, []byte("hello")), wire(nbdtest.CmdCache, 0, 3, 1, 1<<31, nil), wire(9, 1, 2, 3, 4, nil)))
	f.Add(wire(nbdtest.CmdWrite, 0, 1, 0, 64<<20, []byte("half")))
	f.Add(wire(nbdtest.CmdWrite, 0, 1, 0, 1<<31, []byte("too long")))
	f.Add(wire(nbdtest.CmdRead, 0, 1, 1<<64-1, 64<<20, nil))
	f.Add(join(wire(nbdtest.CmdRead, 0, 1, 0, 1<<20, nil), wire(nbdtest.CmdRead, 0, 1, 0, 1<<20, nil), []byte{0x25, 0x60}))

	var loops [2]*aio.Loop
	for i := range loops {
		l, err := aio.NewLoop(aio.LoopOptions{})
		if err != nil {
			f.Fatal(err)
		}
		f.Cleanup(func() { l.Close() })
		loops[i] = l
	}
	log := slog.New(slog.NewTextHandler(io.Discard, nil))
	f.Fuzz(func(t *testing.T, stream []byte) {
		e := export.New(newFake(t, mib), export.Options{})
		must(t, e.Move(loops[:1]))
		var ls lanes
		for _, l := range loops {
			ls.on(l).stays = true
		}
		fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		must(t, err)
		file := os.NewFile(uintptr(fds[0]), "client")
		client, err := net.FileConn(file)
		must(t, err)
		must(t, file.Close())
		defer client.Close()
		gone := make(chan struct{})
		q, err := e.OpenQueue()
		must(t, err)
		q.Post(func() { newConn(fds[1], q, &ls, log, func() { close(gone) }) })

		must(t, client.SetDeadline(time.Now().Add(20*time.Second)))
		go func() {
			_, _ = client.Write(stream) // the server may have closed
			_ = client.(*net.UnixConn).CloseWrite()
		}()
		moved := make(chan error)
		go func() {
			var errs []error
			for i := range 4 { // it may end meanwhile
				errs = append(errs, e.Move(loops[(i+1)%2:][:1]))
			}
			moved <- errors.Join(errs...)
		}()
		replies, err := io.ReadAll(client)
		if os.IsTimeout(err) {
			t.Fatal("the connection doesn't end")
		}
		<-gone
		must(t, <-moved)
		checkStream(t, stream, replies)
		for i, l := range loops {
			l.Call(func() {
				b := &ls.all[i].budget
				if b.left != loopBudget || len(b.waiting) != 0 || len(b.conns) != 0 {
					t.Errorf("budget: %d bytes left, %d waiting, %d connections", b.left, len(b.waiting), len(b.conns))
				}
			})
		}
	})
}

// checkStream fails the test unless the replies are answers, in any order, to
// requests of the stream. It gives up where a cookie means several lengths.
func checkStream(t *testing.T, stream, replies []byte) {
	t.Helper()
	reads := map[uint64]uint32{}
	asked := map[uint64]int{}
	for len(stream) >= requestSize && binary.BigEndian.Uint32(stream) == nbdtest.MagicRequest {
		cmd, cookie, length := binary.BigEndian.Uint16(stream[6:]), binary.BigEndian.Uint64(stream[8:]), binary.BigEndian.Uint32(stream[24:])
		stream = stream[requestSize:]
		asked[cookie]++
		if cmd == nbdtest.CmdRead {
			reads[cookie] = length
		}
		if cmd == nbdtest.CmdWrite {
			stream = stream[min(uint64(length), uint64(len(stream))):]
		}
	}
	for _, n := range asked {
		if n > 1 {
			return
		}
	}
	for len(replies) > 0 {
		if len(replies) < simpleSize || binary.BigEndian.Uint32(replies) != nbdtest.MagicSimple {
			t.Fatalf("% x is no reply", replies[:min(len(replies), simpleSize)])
		}
		errno, cookie := binary.BigEndian.Uint32(replies[4:]), binary.BigEndian.Uint64(replies[8:])
		replies = replies[simpleSize:]
		if asked[cookie]--; asked[cookie] < 0 {
			t.Fatalf("a reply to %d, which was not asked", cookie)
		}
		if errno == 0 {
			n := reads[cookie]
			if uint64(n) > uint64(len(replies)) {
				t.Fatalf("the reply to %d is short", cookie)
			}
			replies = replies[n:]
		}
	}
}
