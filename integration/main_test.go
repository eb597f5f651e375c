// Package integration holds the tests that run the built platter binary against
// real clients: libnbd's tools and Python module, QEMU's tools and fio, over
// Unix sockets and TCP, on memory and disk file systems, with every engine.
// wire_test.go has the client that misbehaves, which no real one does.
package integration

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"platter/integration/testenv"
)

func TestMain(m *testing.M) { testenv.Main(m) }

const (
	kib = int64(1) << 10
	mib = int64(1) << 20
	gib = int64(1) << 30
)

// setup is one way to run a server.
type setup struct {
	name   string
	engine string // --aio
	addr   func(t testing.TB) string
	dir    func(t testing.TB) string // where the image lives
}

func tcpAddr(testing.TB) string { return "tcp://127.0.0.1:0" }

// setups pairs transports, engines and file systems so that each two meet. native
// isn't among them: it is threads, unless the page cache is left out, which tests
// of its own do.
var setups = []setup{
	{"unix-auto-disk", "auto", testenv.UnixAddr, testenv.DiskDir},
	{"tcp-auto-tmpfs", "auto", tcpAddr, testenv.TmpfsDir},
	{"unix-threads-tmpfs", "threads", testenv.UnixAddr, testenv.TmpfsDir},
	{"tcp-threads-disk", "threads", tcpAddr, testenv.DiskDir},
}

// serve starts a server for the arguments, which end with the images.
func (s setup) serve(t testing.TB, args ...string) *testenv.Server {
	t.Helper()
	return testenv.StartServer(t, append([]string{"--nbd", s.addr(t), "--aio", s.engine}, args...)...)
}

// eachSetup runs a test once for every setup, side by side.
func eachSetup(t *testing.T, test func(t *testing.T, s setup)) {
	t.Helper()
	t.Parallel()
	for _, s := range setups {
		t.Run(s.name, func(t *testing.T) {
			t.Parallel()
			test(t, s)
		})
	}
}

// serveUnix starts a server with default options on a fresh Unix socket.
func serveUnix(t testing.TB, args ...string) *testenv.Server {
	t.Helper()
	return testenv.StartServer(t, append([]string{"--nbd", testenv.UnixAddr(t)}, args...)...)
}

// testdata returns the path of a file in testdata.
func testdata(t testing.TB, name string) string {
	t.Helper()
	return filepath.Join(testenv.ModuleRoot(t), "integration", "testdata", name)
}

// sameContent fails the test unless the file holds exactly want.
func sameContent(t testing.TB, path string, want []byte) {
	t.Helper()
	got, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if len(got) != len(want) {
		t.Fatalf("%s has %d bytes, want %d", path, len(got), len(want))
	}
	if i := firstDifference(got, want); i >= 0 {
		t.Fatalf("%s differs from what was written at byte %d", path, i)
	}
}

func firstDifference(a, b []byte) int {
	if bytes.Equal(a, b) {
		return -1
	}
	for i := range a {
		if a[i] != b[i] {
			return i
		}
	}
	return len(a)
}

// wantClearError fails the test unless a run of platter ended as bad input must:
// exit code 1, nothing on standard output, and an error that holds each word.
func wantClearError(t testing.TB, r testenv.Result, words ...string) {
	t.Helper()
	if r.Code != 1 {
		t.Errorf("exit code %d, want 1", r.Code)
	}
	if r.Stdout != "" {
		t.Errorf("standard output of a failed run: %q", r.Stdout)
	}
	if trace := testenv.FindTrace(r.Stderr); trace != "" {
		t.Errorf("stack trace: %s", trace)
	}
	message := ""
	for line := range strings.Lines(r.Stderr) {
		if strings.HasPrefix(line, "platter: error: ") {
			message = line
		}
	}
	if message == "" {
		t.Errorf("no line that starts with 'platter: error: '")
	}
	for _, word := range words {
		if !strings.Contains(strings.ToLower(message), strings.ToLower(word)) {
			t.Errorf("the error does not mention %q", word)
		}
	}
	if t.Failed() {
		t.Logf("standard error:\n%s", r.Stderr)
	}
}
