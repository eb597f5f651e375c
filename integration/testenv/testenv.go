// Package testenv holds what tests share: the one way to skip, the tools and
// directories of the machine, and the platter binary with servers run from it.
//
// A skipped test is an exception: Skip fails the test when CI is set, because
// a test that silently runs nowhere proves nothing. Everything that is started
// here is bounded in time and ended, by its own process id, when its test ends.
package testenv

import (
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// InCI reports whether the tests run where nothing may be skipped.
func InCI() bool {
	return os.Getenv("CI") == "true"
}

// Skip ends the test because of what the machine lacks. Under CI=true it fails
// the test instead. It does not return.
func Skip(t testing.TB, reason string) {
	t.Helper()
	if InCI() {
		t.Fatalf("would be skipped, which CI does not allow: %s", reason)
	}
	t.Skip(reason)
}

// NeedTool returns the path of a program, or skips the test where it is missing.
func NeedTool(t testing.TB, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		Skip(t, name+" is not installed: run 'make deps' as root")
	}
	return path
}

// NeedPythonNBD returns a Python interpreter that has libnbd's module nbd. That
// is the distribution's own, which need not be the first in PATH.
func NeedPythonNBD(t testing.TB) string {
	t.Helper()
	for _, python := range []string{"/usr/bin/python3", "python3"} {
		if exec.Command(python, "-c", "import nbd").Run() == nil {
			return python
		}
	}
	Skip(t, "no python3 with libnbd's module nbd: run 'make deps' as root")
	return ""
}

// NeedRoot skips the test where it does not run as root.
func NeedRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		Skip(t, "only root can do this")
	}
}

// TmpfsDir returns a fresh directory on a memory file system.
func TmpfsDir(t testing.TB) string {
	t.Helper()
	return dirWhere(t, "memory file system", func(magic int64) bool {
		return magic == unix.TMPFS_MAGIC
	}, "/dev/shm", os.TempDir(), "/run")
}

// DiskDir returns a fresh directory on a file system that lives on a disk and
// has the io_uring NOWAIT path: ext4, xfs or btrfs.
func DiskDir(t testing.TB) string {
	t.Helper()
	return dirWhere(t, "disk file system", func(magic int64) bool {
		switch magic {
		case unix.EXT4_SUPER_MAGIC, unix.XFS_SUPER_MAGIC, unix.BTRFS_SUPER_MAGIC:
			return true
		}
		return false
	}, os.TempDir(), "/var/tmp", ModuleRoot(t))
}

// ShortDir returns a fresh directory whose path is short enough for a socket's
// name, which t.TempDir's need not be.
func ShortDir(t testing.TB) string {
	t.Helper()
	return freshDir(t, "/tmp")
}

// dirWhere makes a directory in the first of the parents whose file system is
// wanted, which it asks by the file system's magic number.
func dirWhere(t testing.TB, kind string, wanted func(magic int64) bool, parents ...string) string {
	t.Helper()
	for _, parent := range parents {
		var st unix.Statfs_t
		if unix.Statfs(parent, &st) == nil && wanted(st.Type) && unix.Access(parent, unix.W_OK) == nil {
			return freshDir(t, parent)
		}
	}
	Skip(t, "no "+kind+" in "+strings.Join(parents, ", "))
	return ""
}

func freshDir(t testing.TB, parent string) string {
	t.Helper()
	dir, err := os.MkdirTemp(parent, "platter-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Errorf("clean up: %v", err)
		}
	})
	return dir
}

// ModuleRoot returns the directory of platter's go.mod.
func ModuleRoot(t testing.TB) string {
	t.Helper()
	root, err := moduleRoot()
	if err != nil {
		t.Fatal(err)
	}
	return root
}

// moduleRoot looks upwards from the working directory, which is the package's
// under go test, and from this file for programs that are started elsewhere.
func moduleRoot() (string, error) {
	wd, err := os.Getwd()
	if err != nil {
		return "", err
	}
	_, file, _, _ := runtime.Caller(0)
	for _, start := range []string{wd, filepath.Dir(file)} {
		for dir := start; ; dir = filepath.Dir(dir) {
			text, err := os.ReadFile(filepath.Join(dir, "go.mod"))
			if err == nil && strings.HasPrefix(string(text), "module platter\n") {
				return dir, nil
			}
			if dir == filepath.Dir(dir) {
				break
			}
		}
	}
	return "", os.ErrNotExist
}
