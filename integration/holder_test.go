package integration

import (
	"bytes"
	"os"
	"os/exec"
	"syscall"
	"testing"
	"time"
)

// startHolder runs a program that holds something until the test ends, and
// returns when the file appears that it makes once it is ready.
func startHolder(t testing.TB, readyFile, name string, args ...string) {
	t.Helper()
	var output bytes.Buffer
	cmd := exec.Command(name, args...)
	cmd.Stdout, cmd.Stderr = &output, &output
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		_ = cmd.Wait() // it ends by the signal below
		close(done)
	}()
	t.Cleanup(func() {
		_ = cmd.Process.Kill() // it may have ended
		<-done
	})
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		if _, err := os.Stat(readyFile); err == nil {
			return
		}
		select {
		case <-done:
			t.Fatalf("%s ended: %s", name, &output)
		default:
		}
	}
	t.Fatalf("%s did not get ready", name)
}

func mkfifo(path string) error { return syscall.Mkfifo(path, 0o600) }
