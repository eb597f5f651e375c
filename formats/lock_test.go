package formats_test

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"strings"
	"testing"
	"time"

	"platter/formats"
	"platter/integration/testenv"
)

var (
	writing = formats.Options{Format: "raw"}
	reading = formats.Options{Format: "raw", ReadOnly: true}
	sharing = formats.Options{Format: "raw", ReadOnly: true, ForceShare: true}
)

func mustOpen(t *testing.T, path string, o formats.Options) formats.Image {
	t.Helper()
	image, err := formats.Open(path, o)
	if err != nil {
		t.Fatal(err)
	}
	return image
}

// TestLock opens an image twice in every pair of ways.
func TestLock(t *testing.T) {
	path := makeFile(t, 1<<20, "")
	for _, c := range []struct {
		first, second formats.Options
		fine          bool
	}{
		{writing, writing, false},
		{writing, reading, false},
		{writing, sharing, true},
		{reading, writing, false},
		{reading, reading, true},
		{reading, sharing, true},
		{sharing, writing, true},
		{sharing, reading, true},
	} {
		first := mustOpen(t, path, c.first)
		second, err := formats.Open(path, c.second)
		if (err == nil) != c.fine || err != nil && !errors.Is(err, formats.ErrLocked) {
			t.Errorf("%+v beside %+v: %v", c.second, c.first, err)
		}
		if err != nil && !strings.Contains(err.Error(), "this very process") {
			t.Errorf("does not say who: %v", err)
		}
		if second != nil {
			second.Close()
		}
		first.Close()
		mustOpen(t, path, writing).Close() // and now it is free
	}
}

// qemu runs a QEMU tool and reports what it said and whether it succeeded.
func qemu(t *testing.T, tool string, args ...string) (string, bool) {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), testenv.NeedTool(t, tool), args...).CombinedOutput()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return string(out), err == nil
}

// TestLockQEMUComes has QEMU's tools come to an image that is open here.
func TestLockQEMUComes(t *testing.T) {
	path := makeFile(t, 1<<20, "")
	write := []string{"qemu-io", "-f", "raw", "-c", "write 0 4k", path}
	read := []string{"qemu-io", "-r", "-f", "raw", "-c", "read 0 4k", path}
	copyIt := []string{"qemu-img", "convert", "-f", "raw", "-O", "raw", path, path + ".copy"}
	copyShared := []string{"qemu-img", "convert", "-U", "-f", "raw", "-O", "raw", path, path + ".copy"}
	resize := []string{"qemu-img", "resize", "-f", "raw", path, "2M"}
	for _, c := range []struct {
		here  formats.Options
		tool  []string
		fine  bool
		about string
	}{
		{writing, write, false, "a writer beside a writer"},
		{writing, copyIt, false, "a copy beside a writer"},
		{writing, copyShared, true, "a copy that was forced beside a writer"},
		{writing, resize, false, "a resize beside a writer"},
		{reading, write, false, "a writer beside a reader"},
		{reading, resize, false, "a resize beside a reader"},
		{reading, read, true, "a reader beside a reader"},
		{reading, copyIt, true, "a copy beside a reader"},
		{sharing, write, true, "a writer beside one who shares"},
	} {
		image := mustOpen(t, path, c.here)
		out, fine := qemu(t, c.tool[0], c.tool[1:]...)
		if fine != c.fine || !fine && !strings.Contains(out, "lock") {
			t.Errorf("%s: success %v, want %v: %s", c.about, fine, c.fine, out)
		}
		image.Close()
	}
	if out, fine := qemu(t, write[0], write[1:]...); !fine {
		t.Errorf("a writer after all have gone: %s", out)
	}
}

// TestLockQEMUHolds comes to an image that QEMU has open.
func TestLockQEMUHolds(t *testing.T) {
	path := makeFile(t, 1<<20, "")
	pid := holdWithQEMU(t, "-f", "raw", path)
	for _, o := range []formats.Options{writing, reading} {
		image, err := formats.Open(path, o)
		if err == nil {
			image.Close()
			t.Fatalf("%+v: opened although qemu-io writes to it", o)
		}
		if !errors.Is(err, formats.ErrLocked) {
			t.Fatal(err)
		}
		for _, text := range []string{path, "in use by qemu-io", fmt.Sprintf("pid %d", pid), "--force-share"} {
			if !strings.Contains(err.Error(), text) {
				t.Errorf("%q does not say %q", err, text)
			}
		}
	}
	mustOpen(t, path, sharing).Close()

	other := makeFile(t, 1<<20, "")
	holdWithQEMU(t, "-r", "-f", "raw", other)
	mustOpen(t, other, reading).Close()
}

// holdWithQEMU has qemu-io keep an image open until the test ends.
func holdWithQEMU(t *testing.T, args ...string) (pid int) {
	t.Helper()
	cmd := exec.Command(testenv.NeedTool(t, "qemu-io"), args...)
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	stop := time.AfterFunc(30*time.Second, func() { _ = cmd.Process.Kill() })
	t.Cleanup(func() {
		stdin.Close() // qemu-io quits
		if err := cmd.Wait(); err != nil {
			t.Errorf("qemu-io: %v", err)
		}
		stop.Stop()
	})
	if _, err := io.WriteString(stdin, "length\n"); err != nil {
		t.Fatal(err)
	}
	for lines := bufio.NewScanner(stdout); lines.Scan(); {
		if strings.Contains(lines.Text(), "1 MiB") {
			return cmd.Process.Pid
		}
	}
	t.Fatal("qemu-io did not open the image")
	return 0
}
