package nbdtest_test

import (
	"bytes"
	"errors"
	"net"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/pojntfx/go-nbd/pkg/backend"
	"github.com/pojntfx/go-nbd/pkg/server"

	"platter/export/nbd/nbdtest"
	"platter/integration/testenv"
)

// The client has to speak the protocol of servers that are not ours.

const size = 1 << 20

// nbdkit starts a server with a disk in memory and returns its socket.
func nbdkit(t *testing.T, args ...string) string {
	t.Helper()
	path := filepath.Join(testenv.ShortDir(t), "nbd.sock")
	cmd := exec.Command(testenv.NeedTool(t, "nbdkit"), append([]string{"--foreground", "--exit-with-parent", "--unix", path}, args...)...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		conn, err := net.Dial("unix", path)
		if err == nil {
			conn.Close()
			return path
		}
		if time.Now().After(deadline) {
			t.Fatalf("nbdkit does not listen: %v\n%s", err, stderr.Bytes())
		}
	}
}

func TestAgainstNbdkit(t *testing.T) {
	path := nbdkit(t, "memory", "1M")
	dials := map[string]func() (*nbdtest.Client, error){
		"go": func() (*nbdtest.Client, error) { return nbdtest.Dial("unix", path, "") },
		"export name": func() (*nbdtest.Client, error) {
			return nbdtest.DialExportName("unix", path, "", nbdtest.FixedNewstyle)
		},
		"export name, no zeroes": func() (*nbdtest.Client, error) {
			return nbdtest.DialExportName("unix", path, "", nbdtest.FixedNewstyle|nbdtest.NoZeroes)
		},
	}
	for name, dial := range dials {
		t.Run(name, func(t *testing.T) {
			c, err := dial()
			if err != nil {
				t.Fatal(err)
			}
			if c.Size != size || c.Flags&nbdtest.HasFlags == 0 {
				t.Errorf("size %d, flags %#x", c.Size, c.Flags)
			}
			data := bytes.Repeat([]byte("platter!"), 512)
			must(t, c.Write(8192, data))
			must(t, c.WriteZeroes(8192, 8, nbdtest.NoHole))
			must(t, c.Write(8200, []byte("FUA"), nbdtest.FUA))
			must(t, c.Flush())
			must(t, c.Trim(100_000, 4096))
			must(t, c.Cache(8192, 4096))
			got := make([]byte, len(data))
			must(t, c.Read(8192, got))
			copy(data, make([]byte, 8))
			copy(data[8:], "FUA")
			if !bytes.Equal(got, data) {
				t.Errorf("read %q...", got[:16])
			}
			if err := c.Read(size, got); !errors.Is(err, nbdtest.EINVAL) {
				t.Errorf("read beyond the end gave %v", err)
			}
			if err := c.Write(size, got); !errors.Is(err, nbdtest.ENOSPC) {
				t.Errorf("write beyond the end gave %v", err)
			}
			pipelined(t, c)
			must(t, c.Disc())
		})
	}
}

func TestOptionsAgainstNbdkit(t *testing.T) {
	path := nbdkit(t, "memory", "1M")
	c, err := nbdtest.DialRaw("unix", path)
	must(t, err)
	defer c.Close()
	must(t, c.Hello(nbdtest.FixedNewstyle))
	if list, err := c.List(); err != nil || len(list) != 1 {
		t.Errorf("list is %v, %v", list, err)
	}
	infos, err := c.Info(nbdtest.OptInfo, "", nbdtest.InfoName)
	if err != nil || len(infos[nbdtest.InfoExport]) != 10 {
		t.Errorf("information is %v, %v", infos, err)
	}
	var refusal *nbdtest.OptionError
	if _, err := c.Option(0x7777, nil); !errors.As(err, &refusal) || refusal.Type != nbdtest.RepErrUnsupported {
		t.Errorf("an unknown option gave %v", err)
	}
	must(t, c.Abort())
}

// go-nbd's server knows only reads, writes and the disconnect.
func TestAgainstGoNBD(t *testing.T) {
	there, here := net.Pipe()
	done := make(chan error, 1)
	go func() {
		done <- server.Handle(there, []*server.Export{{Name: "demo", Backend: backend.NewMemoryBackend(make([]byte, size))}}, nil)
		there.Close()
	}()
	c := nbdtest.New(here)
	must(t, c.Hello(nbdtest.FixedNewstyle))
	var refusal *nbdtest.OptionError
	if err := c.Go("other"); !errors.As(err, &refusal) || refusal.Type != nbdtest.RepErrUnknown {
		t.Errorf("a wrong name gave %v", err)
	}
	must(t, c.Go("demo"))
	if c.Size != size || c.MaxBlock != 32<<20 {
		t.Errorf("size %d, longest block %d", c.Size, c.MaxBlock)
	}
	must(t, c.Write(1000, []byte("hello")))
	got := make([]byte, 7)
	must(t, c.Read(999, got))
	if string(got) != "\x00hello\x00" {
		t.Errorf("read %q", got)
	}
	if err := c.Flush(); !errors.Is(err, nbdtest.EINVAL) {
		t.Errorf("flush gave %v", err)
	}
	must(t, c.Disc())
	must(t, <-done)
}

// pipelined sends requests ahead and takes the replies in any order.
func pipelined(t *testing.T, c *nbdtest.Client) {
	t.Helper()
	const n = 32
	for i := range uint64(n) {
		must(t, c.Send(nbdtest.CmdWrite, 0, i, i*512, 512, bytes.Repeat([]byte{byte(i)}, 512)))
	}
	for range n {
		if _, errno, data, err := c.Recv(); err != nil || errno != 0 || len(data) != 0 {
			t.Fatalf("reply %v, %v", errno, err)
		}
	}
	for i := range uint64(n) {
		must(t, c.Send(nbdtest.CmdRead, 0, i, i*512, uint32(1+i), nil))
	}
	for range n {
		cookie, errno, data, err := c.Recv()
		if err != nil || errno != 0 {
			t.Fatalf("reply %v, %v", errno, err)
		}
		if !bytes.Equal(data, bytes.Repeat([]byte{byte(cookie)}, int(1+cookie))) {
			t.Errorf("read %d brought % x", cookie, data)
		}
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
