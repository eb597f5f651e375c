package integration

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"platter/integration/testenv"
)

const diskSize = 8 * mib

// eachBadClient serves a disk whose every byte is the letter d, lets the test
// mistreat the server, and then wants it to serve others and to stop as ever.
func eachBadClient(t *testing.T, test func(t *testing.T, s *testenv.Server)) {
	eachSetup(t, func(t *testing.T, s setup) {
		image := testenv.Image(t, s.dir(t), "disk.raw", diskSize, bytes.Repeat([]byte("d"), int(diskSize)))
		server := s.serve(t, image)
		test(t, server)
		wantServing(t, server)
		server.Stop()
	})
}

func TestGarbageForAHandshake(t *testing.T) {
	eachBadClient(t, func(t *testing.T, s *testenv.Server) {
		for seed := range uint64(8) {
			c := dial(t, s)
			c.write(testenv.Pattern(4096, seed))
			c.wantClosed()
		}
		c := dial(t, s)
		c.write([]byte("GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"))
		c.wantClosed()
		c = dial(t, s)
		c.write(be(uint32(0xffffffff))) // client flags that do not exist
		c.wantClosed()
	})
}

func TestGarbageForARequest(t *testing.T) {
	eachBadClient(t, func(t *testing.T, s *testenv.Server) {
		c := ready(t, s)
		c.write(testenv.Pattern(4096, 1))
		c.wantClosed()
	})
}

func TestUnknownOption(t *testing.T) {
	eachBadClient(t, func(t *testing.T, s *testenv.Server) {
		c := start(t, s)
		c.option(0x7777, []byte("what is this"))
		if kind, _ := c.optionReply(0x7777); kind != repErrUnsup {
			t.Errorf("reply %#x to an unknown option, want ERR_UNSUP", kind)
		}
		c.option(optList, nil)
		for kind := uint32(0); kind != repAck; {
			if kind, _ = c.optionReply(optList); kind >= 1<<31 {
				t.Fatalf("reply %#x to LIST", kind)
			}
		}
		c.option(optAbort, nil)
		c.wantClosed()
	})
}

// An option too large to be meant is refused without room being made for it.
func TestOversizedOption(t *testing.T) {
	eachBadClient(t, func(t *testing.T, s *testenv.Server) {
		before := residentMemory(t, s.PID())
		for _, option := range []uint32{optExportName, optList, optInfo, optGo, 0x7777} {
			c := start(t, s)
			c.write(be(uint64(magicOption), option, uint32(math.MaxUint32)))
			c.conn.Close()

			c = start(t, s)
			c.write(be(uint64(magicOption), option, uint32(64*mib)))
			wantErrorOrClose(c, option)
		}
		if after := residentMemory(t, s.PID()); after > before+32*mib {
			t.Errorf("resident memory went from %d to %d bytes", before, after)
		}
	})
}

// wantErrorOrClose fails the test unless the server answers an option with an
// error, or with the end of the connection.
func wantErrorOrClose(c *wireClient, option uint32) {
	c.t.Helper()
	c.deadline()
	header := make([]byte, 20)
	n, err := c.conn.Read(header)
	switch {
	case os.IsTimeout(err):
		c.t.Errorf("no answer to option %d", option)
	case n == len(header):
		if kind := binary.BigEndian.Uint32(header[12:]); kind < 1<<31 {
			c.t.Errorf("reply %#x to option %d, want an error", kind, option)
		}
	}
	c.conn.Close()
}

// residentMemory returns the bytes of memory that a process has.
func residentMemory(t testing.TB, pid int) int64 {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", pid))
	if err != nil {
		t.Fatal(err)
	}
	var total, resident int64
	if _, err := fmt.Sscan(string(text), &total, &resident); err != nil {
		t.Fatal(err)
	}
	return resident * int64(os.Getpagesize())
}

func TestBadNames(t *testing.T) {
	eachBadClient(t, func(t *testing.T, s *testenv.Server) {
		for _, option := range []uint32{optInfo, optGo} {
			c := start(t, s)
			c.option(option, goPayload("no such export"))
			if kind, _ := c.optionReply(option); kind != repErrUnknwn {
				t.Errorf("reply %#x to an unknown name, want ERR_UNKNOWN", kind)
			}
			c.option(option, goPayload(strings.Repeat("n", 5000)))
			wantErrorOrClose(c, option)

			// Lengths inside the payload that do not fit it.
			for _, payload := range [][]byte{
				nil,
				be(uint32(4), []byte("ab")),
				be(uint32(math.MaxUint32), []byte("ab"), uint16(0)),
				be(uint32(0), uint16(9)),
				be(uint32(0), uint16(0), []byte("more")),
			} {
				c := start(t, s)
				c.option(option, payload)
				wantErrorOrClose(c, option)
			}
		}
		for _, name := range []string{"no such export", strings.Repeat("n", 5000)} {
			c := start(t, s)
			c.option(optExportName, []byte(name))
			c.wantClosed()
		}
	})
}

// A good INFO does not open the door for a bad GO.
func TestGoAfterInfo(t *testing.T) {
	eachBadClient(t, func(t *testing.T, s *testenv.Server) {
		c := start(t, s)
		c.option(optInfo, goPayload(""))
		for kind := uint32(0); kind != repAck; {
			if kind, _ = c.optionReply(optInfo); kind != repAck && kind != repInfo {
				t.Fatalf("reply %#x to INFO", kind)
			}
		}
		c.option(optGo, goPayload("no such export"))
		if kind, _ := c.optionReply(optGo); kind != repErrUnknwn {
			t.Errorf("reply %#x to GO, want ERR_UNKNOWN", kind)
		}
	})
}

// EXPORT_NAME is how old clients, and nbd's own tester, choose an export.
func TestExportNameOption(t *testing.T) {
	eachBadClient(t, func(t *testing.T, s *testenv.Server) {
		for _, clientFlags := range []uint32{1, 3} { // without and with no zeroes
			c := dial(t, s)
			c.write(be(clientFlags))
			c.option(optExportName, nil)
			info := c.read(10)
			if size := binary.BigEndian.Uint64(info); size != uint64(diskSize) {
				t.Fatalf("size %d, want %d", size, diskSize)
			}
			if clientFlags == 1 && !bytes.Equal(c.read(124), make([]byte, 124)) {
				t.Fatal("the padding is not zero")
			}
			if errno, data := c.call(0, cmdRead, 1, 3); errno != 0 || string(data) != "ddd" {
				t.Errorf("read: error %d, %q", errno, data)
			}
		}
	})
}

// A bad request fails alone: the connection goes on.
func TestBadRequests(t *testing.T) {
	eachBadClient(t, func(t *testing.T, s *testenv.Server) {
		c := ready(t, s)
		for _, bad := range []struct {
			name           string
			flags, command uint16
			offset         uint64
			length         uint32
			want           uint32
		}{
			{"unknown command", 0, 99, 0, 512, nbdEINVAL},
			{"unknown flag", 1 << 14, cmdRead, 0, 512, nbdEINVAL},
			{"read beyond the end", 0, cmdRead, uint64(diskSize), 512, nbdEINVAL},
			{"read across the end", 0, cmdRead, uint64(diskSize) - 1, 2, nbdEINVAL},
			{"read around the world", 0, cmdRead, math.MaxUint64 - 511, 1024, nbdEINVAL},
			{"trim beyond the end", 0, cmdTrim, uint64(diskSize), 512, nbdEINVAL},
		} {
			if errno, _ := c.call(bad.flags, bad.command, bad.offset, bad.length); errno != bad.want {
				t.Errorf("%s: error %d, want %d", bad.name, errno, bad.want)
			}
		}
		if errno, _ := c.call(0, cmdRead, 0, math.MaxUint32); errno == 0 {
			t.Error("a read of 4 GiB succeeded")
		}
		c.write(append(request(0, cmdWrite, 5, uint64(diskSize)-1, 2), 'x', 'x'))
		if errno := c.reply(5); errno != nbdENOSPC {
			t.Errorf("write across the end: error %d, want ENOSPC", errno)
		}
		if errno, data := c.call(0, cmdRead, uint64(diskSize)-2, 2); errno != 0 || string(data) != "dd" {
			t.Errorf("read after the bad requests: error %d, %q", errno, data)
		}
	})
}

// A write larger than any buffer ends its connection, or is read to its end and
// refused; here the payload never comes.
func TestOversizedWrite(t *testing.T) {
	eachBadClient(t, func(t *testing.T, s *testenv.Server) {
		before := residentMemory(t, s.PID())
		for range 4 {
			c := ready(t, s)
			c.write(request(0, cmdWrite, 1, 0, math.MaxUint32))
			c.conn.Close()
		}
		wantServing(t, s)
		if after := residentMemory(t, s.PID()); after > before+96*mib {
			t.Errorf("resident memory went from %d to %d bytes", before, after)
		}
	})
}

// Clients that stop halfway hold up neither others nor the end of the server.
func TestHalfAndThenNothing(t *testing.T) {
	eachSetup(t, func(t *testing.T, setup setup) {
		s := setup.serve(t, testenv.Image(t, setup.dir(t), "disk.raw", diskSize, nil))
		dial(t, s)
		start(t, s)
		start(t, s).write(be(uint64(magicOption), uint32(optGo))) // without its length
		start(t, s).write(be(uint64(magicOption), uint32(optGo), uint32(100), []byte("only this")))
		ready(t, s)
		ready(t, s).write(request(0, cmdRead, 1, 0, 512)[:11])
		ready(t, s).write(append(request(0, cmdWrite, 1, 0, 4096), 'h', 'a', 'l', 'f'))
		wantServing(t, s)
		// They stay connected while the server stops.
		begin := time.Now()
		s.Stop()
		if took := time.Since(begin); took > 10*time.Second {
			t.Errorf("the stop took %v", took)
		}
	})
}

// A client that asks and never reads the answers fills its socket, no more.
func TestNeverReads(t *testing.T) {
	eachBadClient(t, func(t *testing.T, s *testenv.Server) {
		before := residentMemory(t, s.PID())
		c := ready(t, s)
		for i := range uint64(256) {
			c.write(request(0, cmdRead, i, 0, uint32(mib)))
		}
		wantServing(t, s)
		if after := residentMemory(t, s.PID()); after > before+128*mib {
			t.Errorf("resident memory went from %d to %d bytes", before, after)
		}
	})
}

// What a vanished client had half sent harms nothing but the range it named.
func TestVanishesMidWrite(t *testing.T) {
	eachSetup(t, func(t *testing.T, s setup) {
		dir := s.dir(t)
		want := bytes.Repeat([]byte("d"), int(diskSize))
		server := s.serve(t, testenv.Image(t, dir, "disk.raw", diskSize, want))
		const offset, length, sent = mib, 256 * kib, 100 * kib
		for range 4 {
			c := ready(t, server)
			c.write(append(request(0, cmdWrite, 1, 0, 4096), bytes.Repeat([]byte("w"), 4096)...))
			if errno := c.reply(1); errno != 0 {
				t.Fatalf("write: error %d", errno)
			}
			c.write(append(request(0, cmdWrite, 2, uint64(offset), uint32(length)), bytes.Repeat([]byte("x"), int(sent))...))
			c.conn.Close()
		}
		wantServing(t, server)
		server.Stop()

		got, err := os.ReadFile(filepath.Join(dir, "disk.raw"))
		if err != nil {
			t.Fatal(err)
		}
		copy(want, bytes.Repeat([]byte("w"), 4096)) // acknowledged
		for i := offset; i < offset+length; i++ {
			if got[i] != 'd' && got[i] != 'x' {
				t.Fatalf("byte %d is %q, neither old nor sent", i, got[i])
			}
			if i >= offset+sent && got[i] != 'd' {
				t.Fatalf("byte %d was never sent and has changed", i)
			}
			want[i] = got[i]
		}
		if i := firstDifference(got, want); i >= 0 {
			t.Errorf("byte %d has changed", i)
		}
	})
}

// Connections that end give back what they held.
func TestManyConnections(t *testing.T) {
	eachBadClient(t, func(t *testing.T, s *testenv.Server) {
		wantServing(t, s)
		before := openFiles(t, s.PID())
		for i := range 200 {
			switch c := dial(t, s); i % 4 {
			case 0:
				c.conn.Close()
			case 1:
				c.write(be(uint32(3)))
				c.conn.Close()
			case 2:
				c.write(be(uint32(3)))
				c.option(optAbort, nil)
				c.wantClosed()
			case 3:
				c.conn.Close()
				c = ready(t, s)
				if errno, _ := c.call(0, cmdFlush, 0, 0); errno != 0 {
					t.Fatalf("flush: error %d", errno)
				}
				c.conn.Close()
			}
		}
		var after int
		for deadline := time.Now().Add(5 * time.Second); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
			if after = openFiles(t, s.PID()); after <= before {
				return
			}
		}
		t.Errorf("%d files open after 200 connections, %d before", after, before)
	})
}

func openFiles(t testing.TB, pid int) int {
	t.Helper()
	entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}
