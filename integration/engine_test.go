package integration

import (
	"fmt"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"platter/integration/testenv"
)

// withoutSyscall returns a launcher that makes a system call fail.
func withoutSyscall(t testing.TB, number int, errno syscall.Errno) []string {
	t.Helper()
	return []string{testenv.NeedPythonNBD(t), testdata(t, "without_syscall.py"), fmt.Sprint(number), fmt.Sprint(int(errno))}
}

// Containers forbid io_uring (EPERM) and old kernels lack it (ENOSYS).
func TestIOUringForbidden(t *testing.T) {
	t.Parallel()
	for name, errno := range map[string]syscall.Errno{"EPERM": syscall.EPERM, "ENOSYS": syscall.ENOSYS} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			launcher := withoutSyscall(t, unix.SYS_IO_URING_SETUP, errno)
			image := testenv.Image(t, testenv.DiskDir(t), "disk.raw", 32*mib, nil)
			server := testenv.StartServerUnder(t, launcher, "--nbd", testenv.UnixAddr(t), "--aio", "auto", image)
			python(t, "commands.py", server.URI, image, fmt.Sprint(32*mib))
			server.Stop()
			if log := server.Log(); !strings.Contains(log, "threads") {
				t.Errorf("the log does not name the engine that was chosen:\n%s", log)
			}

			argv := append(launcher[1:], testenv.Binary(t), "serve", "--nbd", testenv.UnixAddr(t), "--aio", "io_uring", image)
			wantClearError(t, testenv.Run(t, 20*time.Second, launcher[0], argv...), "io_uring", "--aio")
		})
	}
}

// Linux AIO may be missing, forbidden, or used up by other processes: the error
// says so, and what to do. auto does without it.
func TestNativeForbidden(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		errno syscall.Errno
		words []string
	}{
		{syscall.EAGAIN, []string{"Linux AIO", "fs.aio-max-nr", "raise", "--aio"}},
		{syscall.ENOSYS, []string{"Linux AIO", "--aio"}},
		{syscall.EPERM, []string{"Linux AIO", "seccomp", "--aio"}},
	} {
		t.Run(test.errno.Error(), func(t *testing.T) {
			t.Parallel()
			launcher := withoutSyscall(t, unix.SYS_IO_SETUP, test.errno)
			image := testenv.Image(t, testenv.DiskDir(t), "disk.raw", 32*mib, nil)
			argv := append(launcher[1:], testenv.Binary(t), "serve", "--nbd", testenv.UnixAddr(t), "--aio", "native", image)
			wantClearError(t, testenv.Run(t, 20*time.Second, launcher[0], argv...), test.words...)

			server := testenv.StartServerUnder(t, launcher, "--nbd", testenv.UnixAddr(t), image)
			python(t, "commands.py", server.URI, image, fmt.Sprint(32*mib))
			server.Stop()
		})
	}
}

// Every command of a real client does what it should when the page cache is left
// out and files go by way of Linux AIO.
func TestNativeDirect(t *testing.T) {
	t.Parallel()
	image := testenv.Image(t, testenv.DiskDir(t), "disk.raw", 32*mib, nil)
	server := serveUnix(t, "--aio", "native", "--cache", "none", image)
	python(t, "commands.py", server.URI, image, fmt.Sprint(32*mib))
	server.Stop()
}

func TestEngineIsLogged(t *testing.T) {
	t.Parallel()
	image := testenv.Image(t, testenv.DiskDir(t), "disk.raw", mib, nil)
	for _, engine := range []string{"io_uring", "native", "threads"} {
		server := serveUnix(t, "--aio", engine, image)
		server.Stop()
		if log := server.Log(); !strings.Contains(log, engine) {
			t.Errorf("--aio %s is not in the log:\n%s", engine, log)
		}
	}
}
