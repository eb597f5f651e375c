package integration

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"platter/integration/testenv"
)

func TestQemuImgConvertAndCompare(t *testing.T) {
	eachSetup(t, func(t *testing.T, s setup) {
		const size = 24 * mib
		dir := s.dir(t)
		data := sparsePattern(size, 21)
		source := testenv.Image(t, dir, "source.raw", size, data)
		image := testenv.Image(t, dir, "disk.raw", size, nil)
		server := s.serve(t, image)

		testenv.Tool(t, "qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", source, server.URI)
		testenv.Tool(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", source, server.URI)

		qcow2 := filepath.Join(dir, "back.qcow2")
		testenv.Tool(t, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", server.URI, qcow2)
		testenv.Tool(t, "qemu-img", "compare", "-f", "qcow2", "-F", "raw", qcow2, server.URI)
		server.Stop()
		sameContent(t, image, data)
	})
}

// A comparison must also see a difference, or the test above proves nothing.
func TestQemuImgCompareSeesDifference(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	data := testenv.Pattern(int(mib), 3)
	image := testenv.Image(t, dir, "disk.raw", mib, data)
	data[mib/2]++
	other := testenv.Image(t, dir, "other.raw", mib, data)
	server := serveUnix(t, image)
	r := testenv.Run(t, time.Minute, testenv.NeedTool(t, "qemu-img"),
		"compare", "-f", "raw", "-F", "raw", other, server.URI)
	if r.Code != 1 {
		t.Errorf("qemu-img compare: exit code %d, want 1\n%s%s", r.Code, r.Stdout, r.Stderr)
	}
}

func TestQemuImgInfoAndMap(t *testing.T) {
	eachSetup(t, func(t *testing.T, s setup) {
		const size = 16 * mib
		image := testenv.Image(t, s.dir(t), "disk.raw", size, testenv.Pattern(int(mib), 5))
		server := s.serve(t, image)

		var info struct {
			Size   int64  `json:"virtual-size"`
			Format string `json:"format"`
		}
		parse(t, testenv.Tool(t, "qemu-img", "info", "-f", "raw", "--output=json", server.URI), &info)
		if info.Size != size || info.Format != "raw" {
			t.Errorf("qemu-img info: %+v, want %d bytes of raw", info, size)
		}

		var extents []struct {
			Start  int64 `json:"start"`
			Length int64 `json:"length"`
			Data   bool  `json:"data"`
		}
		parse(t, testenv.Tool(t, "qemu-img", "map", "-f", "raw", "--output=json", server.URI), &extents)
		next := int64(0)
		for _, e := range extents {
			if e.Start != next {
				t.Errorf("map: an extent starts at %d, want %d", e.Start, next)
			}
			if e.Start < mib && !e.Data {
				t.Errorf("map: %+v is data, not a hole", e)
			}
			next = e.Start + e.Length
		}
		if next != size {
			t.Errorf("map ends at %d, want %d", next, size)
		}
	})
}

func parse(t testing.TB, text string, into any) {
	t.Helper()
	if err := json.Unmarshal([]byte(text), into); err != nil {
		t.Fatalf("%v in %q", err, text)
	}
}

// An image that platter serves is locked as QEMU locks it, and the other way round.
func TestQemuLocks(t *testing.T) {
	eachSetup(t, func(t *testing.T, s setup) {
		image := testenv.Image(t, s.dir(t), "disk.raw", mib, nil)
		server := s.serve(t, image)
		qemuImg := testenv.NeedTool(t, "qemu-img")

		// qemu-img info and map don't lock raw images, so they tell nothing.
		back := image + ".copy"
		r := testenv.Run(t, time.Minute, qemuImg, "convert", "-f", "raw", "-O", "raw", image, back)
		if r.Code == 0 || !strings.Contains(r.Stderr, "lock") {
			t.Errorf("qemu-img convert of a served image: exit code %d: %s%s", r.Code, r.Stdout, r.Stderr)
		}
		testenv.Tool(t, "qemu-img", "convert", "-U", "-f", "raw", "-O", "raw", image, back)
		server.Stop()
		testenv.Tool(t, "qemu-img", "convert", "-f", "raw", "-O", "raw", image, back)
	})
}

func TestLockedByQemu(t *testing.T) {
	t.Parallel()
	dir := testenv.ShortDir(t)
	image := testenv.Image(t, dir, "disk.raw", mib, []byte("hello"))
	pidFile := filepath.Join(dir, "pid")
	startHolder(t, pidFile, testenv.NeedTool(t, "qemu-storage-daemon"),
		"--pidfile", pidFile,
		"--blockdev", "raw,node-name=disk,file.driver=file,file.filename="+image,
		"--nbd-server", "addr.type=unix,addr.path="+filepath.Join(dir, "qsd.sock"),
		"--export", "nbd,id=e,node-name=disk,writable=on")

	wantClearError(t, testenv.Platter(t, "serve", "--nbd", testenv.UnixAddr(t), image), image, "lock")
	wantClearError(t, testenv.Platter(t, "serve", "--nbd", testenv.UnixAddr(t), "--read-only", image), image, "lock", "--force-share")

	server := serveUnix(t, "--read-only", "--force-share", image)
	back := filepath.Join(dir, "back.raw")
	testenv.Tool(t, "nbdcopy", server.URI, back)
	if got, err := os.ReadFile(back); err != nil || string(got[:5]) != "hello" {
		t.Errorf("shared read: %q, %v", got[:5], err)
	}
}

func TestLockedByPlatter(t *testing.T) {
	t.Parallel()
	image := testenv.Image(t, t.TempDir(), "disk.raw", mib, nil)
	first := serveUnix(t, image)
	wantClearError(t, testenv.Platter(t, "serve", "--nbd", testenv.UnixAddr(t), image), image, "lock")
	first.Kill()
	second := serveUnix(t, image) // a crash leaves no lock behind
	second.Stop()

	// Readers do not exclude each other.
	serveUnix(t, "--read-only", image)
	serveUnix(t, "--read-only", image)
	wantClearError(t, testenv.Platter(t, "serve", "--nbd", testenv.UnixAddr(t), image), image, "lock")
}

func TestQemuIO(t *testing.T) {
	eachSetup(t, func(t *testing.T, s setup) {
		image := testenv.Image(t, s.dir(t), "disk.raw", 16*mib, nil)
		server := s.serve(t, image)
		steps := []string{
			"write -P 0xab 0 1M", "read -P 0xab 0 1M",
			"write -P 0xcd 1001 5003", "read -P 0xcd 1001 5003",
			"read -P 0xab 0 1001", "read -P 0xab 6004 64k",
			"write -f -P 0x11 2M 64k", "read -P 0x11 2M 64k",
			"write -z 0 64k", "read -P 0 0 64k",
			"write -z -u 64k 64k", "read -P 0 64k 64k",
			"read -P 0xab 128k 64k",
			"discard 2M 64k", "flush",
			"aio_write -P 0x22 4M 1M", "aio_write -P 0x33 5M 1M", "aio_flush",
			"read -P 0x22 4M 1M", "read -P 0x33 5M 1M",
			"writev -P 0x44 8M 4k 512 64k", "readv -P 0x44 8M 4k 512 64k",
			"flush",
		}
		args := []string{"-f", "raw"}
		for _, step := range steps {
			args = append(args, "-c", step)
		}
		out := testenv.Tool(t, "qemu-io", append(args, server.URI)...)
		if strings.Contains(out, "Pattern verification failed") || strings.Contains(out, "failed: ") {
			t.Errorf("qemu-io:\n%s", out)
		}
		if got := strings.Count(out, "read "); got < 10 {
			t.Errorf("only %d reads:\n%s", got, out)
		}
	})
}

// qemu-io reports a wrong pattern by its exit code, which TestQemuIO relies on.
func TestQemuIOSeesDifference(t *testing.T) {
	t.Parallel()
	server := serveUnix(t, testenv.Image(t, t.TempDir(), "disk.raw", mib, nil))
	r := testenv.Run(t, time.Minute, testenv.NeedTool(t, "qemu-io"), "-f", "raw", "-c", "read -P 1 0 4k", server.URI)
	if r.Code == 0 {
		t.Errorf("a wrong pattern went unseen:\n%s", r.Stdout)
	}
}
