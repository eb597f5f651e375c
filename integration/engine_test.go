package integration

import (
	"fmt"
	"strings"
	"syscall"
	"testing"
	"time"

	"platter/integration/testenv"
)

// withoutIOUring returns a launcher that makes io_uring_setup fail.
func withoutIOUring(t testing.TB, errno syscall.Errno) []string {
	t.Helper()
	return []string{testenv.NeedPythonNBD(t), testdata(t, "without_io_uring.py"), fmt.Sprint(int(errno))}
}

// Containers forbid io_uring (EPERM) and old kernels lack it (ENOSYS).
func TestIOUringForbidden(t *testing.T) {
	t.Parallel()
	for name, errno := range map[string]syscall.Errno{"EPERM": syscall.EPERM, "ENOSYS": syscall.ENOSYS} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			launcher := withoutIOUring(t, errno)
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

func TestEngineIsLogged(t *testing.T) {
	t.Parallel()
	image := testenv.Image(t, testenv.DiskDir(t), "disk.raw", mib, nil)
	for _, engine := range []string{"io_uring", "threads"} {
		server := serveUnix(t, "--aio", engine, image)
		server.Stop()
		if log := server.Log(); !strings.Contains(log, engine) {
			t.Errorf("--aio %s is not in the log:\n%s", engine, log)
		}
	}
}
