package integration

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"platter/integration/testenv"
)

func TestReadyLine(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	tests := []struct {
		name string
		args []string
		want string // a regular expression
	}{
		{"tcp", []string{"--nbd", "tcp://127.0.0.1:0", "--create", "1G", filepath.Join(dir, "demo.raw")},
			`^platter: serving /[^ ]+/demo\.raw \(1 GiB, raw\) at nbd://127\.0\.0\.1:[1-9][0-9]*/$`},
		{"unix", []string{"--create", "1M", filepath.Join(dir, "small.raw")},
			`^platter: serving /[^ ]+/small\.raw \(1 MiB, raw\) at nbd\+unix:///\?socket=/[^ ]+$`},
		{"two", []string{testenv.Image(t, dir, "a.raw", mib, nil), testenv.Image(t, dir, "b.raw", mib, nil)},
			`^platter: serving 2 images at nbd\+unix:///[^ ]*\?socket=/[^ ]+$`},
	}
	for _, test := range tests {
		args := test.args
		if args[0] != "--nbd" {
			args = append([]string{"--nbd", testenv.UnixAddr(t)}, args...)
		}
		server := testenv.StartServer(t, args...)
		if !regexp.MustCompile(test.want).MatchString(server.Ready) {
			t.Errorf("%s: ready line %q, want %s", test.name, server.Ready, test.want)
		}
		if server.Took > 2*time.Second {
			t.Errorf("%s: ready after %v", test.name, server.Took)
		}
		server.Stop()
	}
}

func TestSeveralAddresses(t *testing.T) {
	t.Parallel()
	dir := testenv.ShortDir(t)
	image := testenv.Image(t, dir, "disk.raw", mib, nil)
	socket := filepath.Join(dir, "second.sock")
	server := testenv.StartServer(t, "--nbd", "tcp://127.0.0.1:0", "--nbd", "unix://"+socket, image)
	for _, uri := range []string{server.URI, "nbd+unix:///?socket=" + socket} {
		if got := testenv.Tool(t, "nbdinfo", "--size", uri); got != fmt.Sprintf("%d\n", mib) {
			t.Errorf("%s: size %q", uri, got)
		}
	}
}

// What was written and acknowledged is there after SIGTERM and a restart,
// flushed or not.
func TestStopKeepsWrites(t *testing.T) {
	eachSetup(t, func(t *testing.T, s setup) {
		image := testenv.Image(t, s.dir(t), "disk.raw", diskSize, nil)
		server := s.serve(t, image)
		c := ready(t, server)
		data := testenv.Pattern(64<<10, 41)
		c.write(append(request(0, cmdWrite, 1, 4096, uint32(len(data))), data...))
		if errno := c.reply(1); errno != 0 {
			t.Fatalf("write: error %d", errno)
		}
		server.Stop()
		c.wantClosed()

		server = s.serve(t, image)
		c = ready(t, server)
		if errno, got := c.call(0, cmdRead, 4096, uint32(len(data))); errno != 0 || !bytes.Equal(got, data) {
			t.Errorf("after the restart: error %d, equal %v", errno, bytes.Equal(got, data))
		}
	})
}

// SIGTERM in the middle of many writes: each one that was acknowledged stands,
// each other one is whole, or old, block by block.
func TestStopDrains(t *testing.T) {
	eachSetup(t, func(t *testing.T, s setup) {
		const blocks, blockSize = 1024, 4096
		image := testenv.Image(t, s.dir(t), "disk.raw", blocks*blockSize, nil)
		server := s.serve(t, image)
		c := ready(t, server)
		data := testenv.Pattern(blocks*blockSize, 43)
		block := func(i uint64) []byte { return data[i*blockSize : (i+1)*blockSize] }
		go func() {
			for i := range uint64(blocks) {
				// The stop may cut this short.
				if _, err := c.conn.Write(append(request(0, cmdWrite, i, i*blockSize, blockSize), block(i)...)); err != nil {
					return
				}
			}
		}()
		acknowledged := make(map[uint64]bool)
		header := make([]byte, 16)
		c.deadline()
		for len(acknowledged) < blocks {
			if _, err := io.ReadFull(c.conn, header); err != nil {
				if errors.Is(err, os.ErrDeadlineExceeded) {
					t.Fatalf("no reply and no end after %d replies", len(acknowledged))
				}
				break
			}
			if errno := header[7]; errno == 0 {
				acknowledged[uint64(header[14])<<8|uint64(header[15])] = true
			}
			if len(acknowledged) == blocks/8 {
				server.Signal(syscall.SIGTERM)
			}
		}
		if code := server.Wait(); code != 0 {
			t.Errorf("exit code %d after SIGTERM", code)
		}
		got, err := os.ReadFile(image)
		if err != nil {
			t.Fatal(err)
		}
		empty := make([]byte, blockSize)
		for i := range uint64(blocks) {
			is := got[i*blockSize : (i+1)*blockSize]
			switch {
			case bytes.Equal(is, block(i)):
			case acknowledged[i]:
				t.Fatalf("block %d was acknowledged and is lost", i)
			case !bytes.Equal(is, empty):
				t.Fatalf("block %d is torn", i)
			}
		}
	})
}

// A kill loses nothing that was flushed or written with FUA.
func TestKillKeepsFlushed(t *testing.T) {
	eachSetup(t, func(t *testing.T, s setup) {
		image := testenv.Image(t, s.dir(t), "disk.raw", diskSize, nil)
		server := s.serve(t, image)
		c := ready(t, server)
		data := testenv.Pattern(8192, 47)
		c.write(append(request(0, cmdWrite, 1, 0, 4096), data[:4096]...))
		if errno := c.reply(1); errno != 0 {
			t.Fatalf("write: error %d", errno)
		}
		if errno, _ := c.call(0, cmdFlush, 0, 0); errno != 0 {
			t.Fatalf("flush: error %d", errno)
		}
		c.write(append(request(1, cmdWrite, 2, 4096, 4096), data[4096:]...)) // FUA
		if errno := c.reply(2); errno != 0 {
			t.Fatalf("write with FUA: error %d", errno)
		}
		server.Kill()
		got, err := os.ReadFile(image)
		if err != nil {
			t.Fatal(err)
		}
		if i := firstDifference(got[:len(data)], data); i >= 0 {
			t.Errorf("byte %d is lost", i)
		}
	})
}

// A second SIGTERM, or an interrupt after it, waits for nothing.
func TestSecondSignal(t *testing.T) {
	eachSetup(t, func(t *testing.T, s setup) {
		server := s.serve(t, testenv.Image(t, s.dir(t), "disk.raw", diskSize, nil))
		// Much to do, for a client that takes none of it.
		c := ready(t, server)
		for i := range uint64(256) {
			c.write(request(0, cmdRead, i, 0, uint32(mib)))
		}
		server.Signal(syscall.SIGTERM)
		time.Sleep(50 * time.Millisecond)
		// The first may have ended it already.
		if err := syscall.Kill(server.PID(), syscall.SIGTERM); err != nil && !errors.Is(err, syscall.ESRCH) {
			t.Fatal(err)
		}
		begin := time.Now()
		server.Wait()
		if took := time.Since(begin); took > 2*time.Second {
			t.Errorf("the end took %v after the second SIGTERM", took)
		}
	})
}

func TestInterrupt(t *testing.T) {
	t.Parallel()
	server := serveUnix(t, testenv.Image(t, t.TempDir(), "disk.raw", mib, nil))
	server.Signal(os.Interrupt)
	if code := server.Wait(); code != 0 {
		t.Errorf("exit code %d after an interrupt, want 0", code)
	}
}

func TestInfo(t *testing.T) {
	t.Parallel()
	image := testenv.Image(t, testenv.DiskDir(t), "disk.raw", 16*mib, testenv.Pattern(int(mib), 51))
	type info struct {
		Filename    string `json:"filename"`
		Format      string `json:"format"`
		VirtualSize int64  `json:"virtual-size"`
		ActualSize  int64  `json:"actual-size"`
		DirtyFlag   bool   `json:"dirty-flag"`
	}
	var ours, theirs info
	r := testenv.Platter(t, "info", "--output", "json", image)
	if r.Code != 0 {
		t.Fatalf("platter info: exit code %d: %s", r.Code, r.Stderr)
	}
	parse(t, r.Stdout, &ours)
	parse(t, testenv.Tool(t, "qemu-img", "info", "-f", "raw", "--output=json", image), &theirs)
	if ours != theirs {
		t.Errorf("platter info  %+v\nqemu-img info %+v", ours, theirs)
	}

	r = testenv.Platter(t, "info", image)
	for _, word := range []string{image, "raw", "16 MiB"} {
		if r.Code != 0 || !strings.Contains(r.Stdout, word) {
			t.Errorf("platter info does not say %q: exit code %d\n%s%s", word, r.Code, r.Stdout, r.Stderr)
		}
	}
	missing := filepath.Join(t.TempDir(), "missing.raw")
	wantClearError(t, testenv.Platter(t, "info", missing), missing, "no such file")
	wantClearError(t, testenv.Platter(t, "info", t.TempDir()), "directory")
	wantClearError(t, testenv.Platter(t, "info", "--output", "nosuch", image), "nosuch", "json")
}

func TestVersion(t *testing.T) {
	t.Parallel()
	r := testenv.Platter(t, "version")
	if r.Code != 0 || !strings.HasPrefix(r.Stdout, "platter ") {
		t.Errorf("platter version: exit code %d, %q", r.Code, r.Stdout)
	}
}

// The binary that is shipped needs nothing of the machine.
func TestBinaryIsStatic(t *testing.T) {
	t.Parallel()
	out := testenv.Tool(t, "go", "version", "-m", testenv.Binary(t))
	if !strings.Contains(out, "CGO_ENABLED=0") {
		t.Errorf("built with cgo:\n%s", out)
	}
}
