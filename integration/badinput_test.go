package integration

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"platter/integration/testenv"
)

func TestBadImages(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	good := filepath.Join(dir, "good.raw") // stands for an image that can be served
	missing := filepath.Join(dir, "missing.raw")
	empty := testenv.Image(t, dir, "empty.raw", 0, nil)
	fifo := filepath.Join(dir, "fifo")
	if err := mkfifo(fifo); err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		name  string
		args  []string
		words []string
	}{
		{"missing", []string{missing}, []string{missing, "no such file", "--create"}},
		{"missing folder", []string{missing + "/below.raw", "--create", "1M"}, []string{missing, "no such file"}},
		{"empty", []string{empty}, []string{empty, "empty"}},
		{"directory", []string{dir}, []string{dir, "directory"}},
		{"fifo", []string{fifo}, []string{fifo}},
		{"character device", []string{"/dev/null"}, []string{"/dev/null"}},
		{"none", nil, []string{"image"}},
		{"one bad of two", []string{good, missing}, []string{missing}},
		{"name taken twice", []string{"--read-only", "a=" + good, "a=" + good}, []string{"two exports", `"a"`}},
		{"unknown format", []string{"--format", "nosuch", good}, []string{"nosuch", "raw"}},
		{"unknown engine", []string{"--aio", "nosuch", good}, []string{"nosuch", "native", "threads"}},
		{"unknown cache", []string{"--cache", "nosuch", good}, []string{"nosuch", "writeback"}},
		{"unknown merge", []string{"--merge", "nosuch", good}, []string{"nosuch"}},
		{"unknown flag", []string{"--nosuch", good}, []string{"--nosuch"}},
		{"loops", []string{"--loops", "-1", good}, []string{"loops"}},
		{"too many loops", []string{"--loops", "1000000", good}, []string{"loops"}},
		{"long name", []string{"--name", strings.Repeat("n", 4097), good}, []string{"name", "4096"}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			// An image of its own, or the lock of another case might be the error.
			own := testenv.Image(t, t.TempDir(), "good.raw", mib, nil)
			args := []string{"serve", "--nbd", testenv.UnixAddr(t)}
			for _, arg := range test.args {
				args = append(args, strings.ReplaceAll(arg, good, own))
			}
			wantClearError(t, testenv.Platter(t, args...), test.words...)
			if _, err := os.Stat(missing); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("the missing image was made: %v", err)
			}
		})
	}
}

// An image that may not be read or written says so. Root may everything, so the
// server runs as somebody else.
func TestForbiddenImages(t *testing.T) {
	t.Parallel()
	dir := testenv.ShortDir(t)
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	binary := filepath.Join(dir, "platter")
	copyFile(t, testenv.Binary(t), binary, 0o755)
	var as []string
	if os.Geteuid() == 0 {
		as = []string{testenv.NeedTool(t, "setpriv"), "--reuid=65534", "--regid=65534", "--clear-groups"}
	}
	run := func(args ...string) testenv.Result {
		argv := append(append(append([]string{}, as...), binary, "serve", "--nbd", "unix://"+filepath.Join(dir, "nbd.sock")), args...)
		return testenv.Run(t, 20*time.Second, argv[0], argv[1:]...)
	}

	unreadable := testenv.Image(t, dir, "unreadable.raw", mib, nil)
	if err := os.Chmod(unreadable, 0); err != nil {
		t.Fatal(err)
	}
	wantClearError(t, run(unreadable), unreadable, "permission denied")
	wantClearError(t, run("--read-only", unreadable), unreadable, "permission denied")

	unwritable := testenv.Image(t, dir, "unwritable.raw", mib, nil)
	if err := os.Chmod(unwritable, 0o444); err != nil {
		t.Fatal(err)
	}
	wantClearError(t, run(unwritable), unwritable, "permission denied", "--read-only")

	closed := filepath.Join(dir, "closed")
	if err := os.Mkdir(closed, 0o555); err != nil {
		t.Fatal(err)
	}
	wantClearError(t, run("--create", "1M", filepath.Join(closed, "new.raw")), closed, "permission denied")
}

func copyFile(t testing.TB, from, to string, mode os.FileMode) {
	t.Helper()
	in, err := os.Open(from)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_EXCL|os.O_WRONLY, mode)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(out, in); err != nil {
		t.Fatal(err)
	}
	if err := out.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestBadSizes(t *testing.T) {
	t.Parallel()
	for _, size := range []string{"", "x", "12Q", "-1", "0", "1.5", "1G junk", "99999999999999999999", "16E", "0x10"} {
		t.Run(size, func(t *testing.T) {
			t.Parallel()
			image := filepath.Join(t.TempDir(), "new.raw")
			r := testenv.Platter(t, "serve", "--nbd", testenv.UnixAddr(t), "--create="+size, image)
			wantClearError(t, r, "size", size)
			if _, err := os.Stat(image); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("an image was made: %v", err)
			}
		})
	}
}

func TestCreate(t *testing.T) {
	t.Parallel()
	for text, size := range map[string]int64{"1048576": mib, "64K": 64 * kib, "3M": 3 * mib, "1G": gib} {
		image := filepath.Join(t.TempDir(), "new.raw")
		server := serveUnix(t, "--create", text, image)
		if got := testenv.Tool(t, "nbdinfo", "--size", server.URI); got != fmt.Sprintf("%d\n", size) {
			t.Errorf("--create %s: size %q, want %d", text, got, size)
		}
		server.Stop()
		if st, err := os.Stat(image); err != nil || st.Size() != size {
			t.Errorf("--create %s: %v, %v", text, st, err)
		}
	}
}

// --create is for an image that is not there: an existing one stays as it is.
func TestCreateKeepsExisting(t *testing.T) {
	t.Parallel()
	data := testenv.Pattern(int(mib), 31)
	image := testenv.Image(t, t.TempDir(), "disk.raw", mib, data)
	for _, size := range []string{"1M", "4K", "1G"} {
		server := serveUnix(t, "--create", size, image)
		if got := testenv.Tool(t, "nbdinfo", "--size", server.URI); got != fmt.Sprintf("%d\n", mib) {
			t.Errorf("--create %s: size %q, want the old %d", size, got, mib)
		}
		server.Stop()
		sameContent(t, image, data)
	}
}

func TestBadAddresses(t *testing.T) {
	t.Parallel()
	image := testenv.Image(t, t.TempDir(), "disk.raw", mib, nil)
	long := "/tmp/" + strings.Repeat("s", 120)
	nowhere := filepath.Join(t.TempDir(), "nowhere", "nbd.sock")
	tests := []struct {
		addr  string
		words []string
	}{
		{"nonsense", []string{"nonsense", "tcp://", "unix://"}},
		{"localhost:10809", []string{"localhost:10809", "tcp://"}},
		{"http://127.0.0.1:10809", []string{"http", "tcp://"}},
		{"tcp://127.0.0.1:99999", []string{"99999"}},
		{"tcp://127.0.0.1:port", []string{"port"}},
		{"tcp://192.0.2.1:10809", []string{"192.0.2.1"}}, // an address no machine has
		{"unix://", []string{"unix://"}},
		{"unix://relative.sock", []string{"relative.sock"}},
		{"unix://" + nowhere, []string{nowhere, "no such file"}},
		{"unix://" + long, []string{long, "long"}},
	}
	for _, test := range tests {
		t.Run(test.addr[:min(len(test.addr), 24)], func(t *testing.T) {
			t.Parallel()
			wantClearError(t, testenv.Platter(t, "serve", "--nbd", test.addr, image), test.words...)
		})
	}
}

func TestAddressInUse(t *testing.T) {
	t.Parallel()
	image := testenv.Image(t, t.TempDir(), "disk.raw", mib, nil)

	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	taken := l.Addr().String()
	wantClearError(t, testenv.Platter(t, "serve", "--nbd", "tcp://"+taken, image), taken, "in use", "--nbd")

	path := filepath.Join(testenv.ShortDir(t), "nbd.sock")
	other := testenv.Image(t, t.TempDir(), "other.raw", mib, nil)
	server := testenv.StartServer(t, "--nbd", "unix://"+path, other)
	wantClearError(t, testenv.Platter(t, "serve", "--nbd", "unix://"+path, image), path, "in use")
	// The one that was refused took nothing from the one that serves.
	testenv.Tool(t, "nbdinfo", "--size", server.URI)
	server.Stop()
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the socket is still there after the stop: %v", err)
	}
}

// A server that was killed leaves its socket behind; the next one takes it over.
func TestStaleSocket(t *testing.T) {
	t.Parallel()
	image := testenv.Image(t, t.TempDir(), "disk.raw", mib, nil)
	addr := testenv.UnixAddr(t)
	testenv.StartServer(t, "--nbd", addr, image).Kill()
	server := testenv.StartServer(t, "--nbd", addr, image)
	testenv.Tool(t, "nbdinfo", "--size", server.URI)
}

// A file that is no socket is never removed to make room for one.
func TestSocketPathIsAFile(t *testing.T) {
	t.Parallel()
	dir := testenv.ShortDir(t)
	image := testenv.Image(t, dir, "disk.raw", mib, nil)
	precious := testenv.Image(t, dir, "precious", 5, []byte("bytes"))
	wantClearError(t, testenv.Platter(t, "serve", "--nbd", "unix://"+precious, image), precious)
	sameContent(t, precious, []byte("bytes"))
}
