package testenv

import (
	"bytes"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// recorder is a test that only notes how it ended.
type recorder struct {
	testing.TB
	failed, skipped bool
}

func (r *recorder) Helper()               {}
func (r *recorder) Fatalf(string, ...any) { r.failed = true }
func (r *recorder) Skip(...any)           { r.skipped = true }

func TestSkipFailsInCI(t *testing.T) {
	for _, test := range []struct {
		ci                  string
		wantFail, wantSkips bool
	}{{"true", true, false}, {"", false, true}, {"false", false, true}} {
		t.Setenv("CI", test.ci)
		// A real test does not come back from Fatalf; this one does, and is
		// then skipped as well.
		r := &recorder{TB: t}
		Skip(r, "a reason")
		if r.failed != test.wantFail || (!r.failed && r.skipped != test.wantSkips) {
			t.Errorf("CI=%q: failed %v, skipped %v", test.ci, r.failed, r.skipped)
		}
	}
}

func TestFindTrace(t *testing.T) {
	for log, want := range map[string]string{
		"":                                      "",
		"level=INFO msg=\"goroutine panic: \"":  "",
		"panic: oops\n\ngoroutine 1 [running]:": "panic: oops",
		"level=INFO\nfatal error: all goroutines are asleep": "fatal error: all goroutines are asleep",
		"err=\"runtime error: index out of range\"":          "err=\"runtime error: index out of range\"",
	} {
		if got := FindTrace(log); got != want {
			t.Errorf("FindTrace(%q) = %q, want %q", log, got, want)
		}
	}
}

func TestPattern(t *testing.T) {
	for _, n := range []int{0, 1, 15, 4097} {
		if got := len(Pattern(n, 1)); got != n {
			t.Errorf("%d bytes, want %d", got, n)
		}
	}
	a, b := Pattern(4096, 1), Pattern(4096, 2)
	if bytes.Equal(a, b) || bytes.Equal(a[:2048], a[2048:]) {
		t.Error("patterns repeat")
	}
	if bytes.IndexByte(a, 0) >= 0 {
		t.Error("a pattern holds zeroes")
	}
}

func TestDirectories(t *testing.T) {
	var st unix.Statfs_t
	if err := unix.Statfs(TmpfsDir(t), &st); err != nil || st.Type != unix.TMPFS_MAGIC {
		t.Errorf("TmpfsDir: type %#x, %v", st.Type, err)
	}
	if err := unix.Statfs(DiskDir(t), &st); err != nil || st.Type == unix.TMPFS_MAGIC {
		t.Errorf("DiskDir: type %#x, %v", st.Type, err)
	}
	path, _ := strings.CutPrefix(UnixAddr(t), "unix://")
	if len(path) > 100 {
		t.Errorf("socket path of %d bytes", len(path))
	}
	if _, err := os.Stat(ModuleRoot(t) + "/go.mod"); err != nil {
		t.Error(err)
	}
}
