package testenv

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

const (
	readyTimeout = 15 * time.Second
	stopTimeout  = 15 * time.Second
	// lifeTimeout ends a server whose test hangs.
	lifeTimeout = 5 * time.Minute
)

// Server is a running `platter serve`. Its methods are for one goroutine at a
// time, but for Log.
type Server struct {
	URI   string        // where the first export is, as the ready line says
	Ready string        // the ready line
	Took  time.Duration // from the start of the process to the ready line

	t      testing.TB
	cmd    *exec.Cmd
	stdout syncBuffer // all of it, the ready line too
	stderr syncBuffer
	done   chan struct{} // closed when the process has been waited for
	ended  bool          // a test has taken the exit code
}

// StartServer runs `platter serve` with the arguments and returns when it has
// said that it is ready. When the test ends, a server that still runs is
// stopped as Stop does.
func StartServer(t testing.TB, args ...string) *Server {
	t.Helper()
	return StartServerUnder(t, nil, args...)
}

// StartServerUnder is StartServer through a launcher: a program and its
// arguments that replaces itself by the command it is given after them.
func StartServerUnder(t testing.TB, launcher []string, args ...string) *Server {
	t.Helper()
	argv := append(append([]string{}, launcher...), Binary(t), "serve")
	argv = append(argv, args...)

	ctx, cancel := context.WithTimeout(context.Background(), lifeTimeout)
	s := &Server{t: t, done: make(chan struct{})}
	s.cmd = exec.CommandContext(ctx, argv[0], argv[1:]...)
	s.cmd.Stderr = &s.stderr
	s.cmd.WaitDelay = time.Second
	// A server must not outlive a test process that dies.
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	pipeReader, pipeWriter := io.Pipe()
	s.cmd.Stdout = pipeWriter

	start := time.Now()
	if err := s.cmd.Start(); err != nil {
		cancel()
		t.Fatalf("start platter: %v", err)
	}
	ready := make(chan string, 1)
	go s.readStdout(pipeReader, ready)
	go func() {
		_ = s.cmd.Wait() // the exit code is in ProcessState
		pipeWriter.Close()
		cancel()
		close(s.done)
	}()
	t.Cleanup(func() {
		if !s.ended {
			s.Stop()
		}
		if t.Failed() {
			t.Logf("log of %q:\n%s", argv, s.Log())
		}
	})

	select {
	case s.Ready = <-ready:
		s.Took = time.Since(start)
	case <-s.done:
		s.ended = true
		t.Fatalf("platter serve %q ended with code %d before it was ready\n%s", args, s.cmd.ProcessState.ExitCode(), s.Log())
	case <-time.After(readyTimeout):
		s.Kill()
		t.Fatalf("platter serve %q is not ready after %v\n%s", args, readyTimeout, s.Log())
	}
	words := strings.Fields(s.Ready)
	if len(words) == 0 || !strings.HasPrefix(s.Ready, "platter: serving ") {
		t.Fatalf("ready line is %q", s.Ready)
	}
	s.URI = words[len(words)-1]
	return s
}

// readStdout keeps what the server prints and hands over the first line.
func (s *Server) readStdout(r io.Reader, ready chan<- string) {
	lines := bufio.NewReader(r)
	first, err := lines.ReadString('\n')
	_, _ = s.stdout.Write([]byte(first)) // it never fails
	if err == nil {
		ready <- strings.TrimSuffix(first, "\n")
	}
	_, _ = io.Copy(&s.stdout, lines) // ends with the process
}

// ExportURI returns the URI of the export of that name on the server.
func (s *Server) ExportURI(name string) string {
	u, err := url.Parse(s.URI)
	if err != nil {
		s.t.Fatalf("ready line %q: %v", s.Ready, err)
	}
	u.Path = "/" + name
	return u.String()
}

// Addr returns the network and address of the server, as net.Dial takes them.
func (s *Server) Addr() (network, address string) {
	u, err := url.Parse(s.URI)
	if err != nil {
		s.t.Fatalf("ready line %q: %v", s.Ready, err)
	}
	if u.Scheme == "nbd+unix" {
		return "unix", u.Query().Get("socket")
	}
	return "tcp", u.Host
}

// PID is the server's process id.
func (s *Server) PID() int { return s.cmd.Process.Pid }

// Log returns what the server has written to standard error so far.
func (s *Server) Log() string { return s.stderr.String() }

// Signal sends the server a signal.
func (s *Server) Signal(sig os.Signal) {
	s.t.Helper()
	if err := s.cmd.Process.Signal(sig); err != nil {
		s.t.Fatalf("signal platter: %v", err)
	}
}

// Stop ends the server by SIGTERM and fails the test unless it exits with 0 in
// time, without a trace of a panic.
func (s *Server) Stop() {
	s.t.Helper()
	s.Signal(syscall.SIGTERM)
	if code := s.Wait(); code != 0 {
		s.t.Errorf("platter exited with %d after SIGTERM\n%s", code, s.Log())
	}
	if got := s.stdout.String(); strings.Count(got, "\n") != 1 {
		s.t.Errorf("standard output is not the ready line alone: %q", got)
	}
}

// Kill ends the server by SIGKILL, as a crash would.
func (s *Server) Kill() {
	s.t.Helper()
	s.Signal(syscall.SIGKILL)
	s.Wait()
}

// Wait returns the server's exit code, -1 when a signal ended it. A server that
// does not end in time, or that panicked, fails the test.
func (s *Server) Wait() int {
	s.t.Helper()
	s.ended = true
	select {
	case <-s.done:
	case <-time.After(stopTimeout):
		_ = s.cmd.Process.Kill() // it may end by itself just now
		<-s.done
		s.t.Errorf("platter did not end within %v", stopTimeout)
	}
	if trace := FindTrace(s.Log()); trace != "" {
		s.t.Errorf("platter left a stack trace: %s\n%s", trace, s.Log())
	}
	return s.cmd.ProcessState.ExitCode()
}

// FindTrace returns the line of a log that shows a panic or a stack trace of
// the Go runtime, or "".
func FindTrace(log string) string {
	for line := range strings.Lines(log) {
		for _, mark := range []string{"panic: ", "goroutine ", "fatal error: ", "SIGSEGV", "SIGBUS"} {
			if strings.HasPrefix(line, mark) || strings.Contains(line, "runtime error: ") {
				return strings.TrimSpace(line)
			}
		}
	}
	return ""
}

// UnixAddr returns an address for --nbd with a fresh socket path.
func UnixAddr(t testing.TB) string {
	t.Helper()
	return "unix://" + filepath.Join(ShortDir(t), "nbd.sock")
}

// Image makes a raw image of the given size in the directory. Its first bytes
// are data, repeated and cut as needed when data is longer or shorter.
func Image(t testing.TB, dir, name string, size int64, data []byte) string {
	t.Helper()
	path := filepath.Join(dir, name)
	if err := os.WriteFile(path, data, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, size); err != nil {
		t.Fatal(err)
	}
	return path
}

// Pattern returns n bytes that differ from place to place and from seed to
// seed, and that hold no run of zeroes.
func Pattern(n int, seed uint64) []byte {
	out := make([]byte, 0, n+8)
	for x := seed*2862933555777941757 + 3037000493; len(out) < n; {
		x ^= x << 13
		x ^= x >> 7
		x ^= x << 17
		out = fmt.Appendf(out, "%016x", x)
	}
	return out[:n]
}

// syncBuffer is a bytes.Buffer that one goroutine writes while others read.
type syncBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *syncBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}
