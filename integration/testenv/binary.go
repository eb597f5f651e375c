package testenv

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"
)

// BinaryVariable names the environment variable with the path of a finished
// platter binary, which is then tested instead of one built from the sources.
const BinaryVariable = "PLATTER_BINARY"

var built struct {
	once sync.Once
	dir  string // to be removed by Main; "" when nothing was built
	path string
	err  error
}

// Binary returns the path of the platter binary, built once for all tests of a
// process as it is shipped: static, without cgo.
func Binary(t testing.TB) string {
	t.Helper()
	built.once.Do(func() {
		built.path, built.dir, built.err = build()
	})
	if built.err != nil {
		t.Fatalf("build platter: %v", built.err)
	}
	return built.path
}

func build() (path, dir string, err error) {
	if given := os.Getenv(BinaryVariable); given != "" {
		path, err = filepath.Abs(given)
		if err == nil {
			_, err = os.Stat(path)
		}
		return path, "", err
	}
	root, err := moduleRoot()
	if err != nil {
		return "", "", err
	}
	dir, err = os.MkdirTemp("", "platter-binary-")
	if err != nil {
		return "", "", err
	}
	path = filepath.Join(dir, "platter")
	cmd := exec.Command("go", "build", "-trimpath", "-o", path, ".")
	cmd.Dir = root
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", dir, fmt.Errorf("%w\n%s", err, out)
	}
	return path, dir, nil
}

// Main runs a package's tests and removes what Binary built. A package whose
// tests use Binary calls it from TestMain.
func Main(m *testing.M) {
	code := m.Run()
	if built.dir != "" {
		if err := os.RemoveAll(built.dir); err != nil {
			fmt.Fprintln(os.Stderr, "clean up:", err)
		}
	}
	os.Exit(code)
}

// Result is what a program left behind.
type Result struct {
	Stdout string
	Stderr string
	Code   int // exit code; -1 when a signal ended it
}

// Run runs a program to its end, which must come before the timeout, and
// returns what it said whatever its exit code was.
func Run(t testing.TB, timeout time.Duration, name string, args ...string) Result {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	var stdout, stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	cmd.WaitDelay = time.Second
	err := cmd.Run()
	if ctx.Err() != nil {
		t.Fatalf("%s %q did not end within %v\nstdout: %s\nstderr: %s", name, args, timeout, &stdout, &stderr)
	}
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatalf("run %s: %v", name, err)
	}
	return Result{Stdout: stdout.String(), Stderr: stderr.String(), Code: cmd.ProcessState.ExitCode()}
}

// Tool runs one of the machine's programs, which must succeed within a minute,
// and returns its standard output. It skips the test where the program is missing.
func Tool(t testing.TB, name string, args ...string) string {
	t.Helper()
	path := NeedTool(t, name)
	r := Run(t, time.Minute, path, args...)
	if r.Code != 0 {
		t.Fatalf("%s %q: exit code %d\nstdout: %s\nstderr: %s", name, args, r.Code, r.Stdout, r.Stderr)
	}
	return r.Stdout
}

// Platter runs the platter binary to its end, within 20 seconds.
func Platter(t testing.TB, args ...string) Result {
	t.Helper()
	return Run(t, 20*time.Second, Binary(t), args...)
}
