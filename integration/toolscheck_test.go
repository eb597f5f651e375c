package integration

import (
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"platter/integration/testenv"
)

// Where the tables of a small image with clusters of 64 KiB stand that qemu-img
// has made: one cluster each, in this order.
const (
	refcountBlock = 2 << 16
	l1Table       = 3 << 16
	l2Table       = 4 << 16
)

// damages are what can be wrong with an image.
var damages = []struct {
	name  string
	patch func(t testing.TB, path string)
}{
	{"nothing", func(testing.TB, string) {}},
	{"leak", func(t testing.TB, path string) { overwrite(t, path, refcountBlock+2*5, 0, 2) }},
	{"leaked cluster behind the end", func(t testing.TB, path string) {
		if err := os.Truncate(path, 100<<16); err != nil {
			t.Fatal(err)
		}
		overwrite(t, path, refcountBlock+2*99, 0, 1)
	}},
	{"refcount too low", func(t testing.TB, path string) { overwrite(t, path, refcountBlock+2*6, 0, 0) }},
	{"refcount of a table too low", func(t testing.TB, path string) { overwrite(t, path, refcountBlock+2*3, 0, 0) }},
	{"copied flag missing", func(t testing.TB, path string) { overwrite(t, path, l2Table, 0) }},
	{"copied flag missing in L1", func(t testing.TB, path string) { overwrite(t, path, l1Table, 0) }},
	{"two entries for one cluster", func(t testing.TB, path string) { overwrite(t, path, l2Table+8*50, 0x80, 0, 0, 0, 0, 5, 0, 0) }},
	{"entry behind the end", func(t testing.TB, path string) { overwrite(t, path, l2Table+8*50, 0x80, 0, 0, 0, 0x70, 0, 0, 0) }},
	{"entry that is not aligned", func(t testing.TB, path string) { overwrite(t, path, l2Table+8*50, 0x80, 0, 0, 0, 0, 5, 2, 0) }},
	{"leaks and corruptions", func(t testing.TB, path string) {
		overwrite(t, path, refcountBlock+2*5, 0, 2, 0, 0)
	}},
	{"refcount block lost", func(t testing.TB, path string) { overwrite(t, path, 1<<16, make([]byte, 8)...) }},
}

// TestCheckLikeQemuImg: sound images give the same report in every form.
func TestCheckLikeQemuImg(t *testing.T) {
	eachToolImage(t, func(t *testing.T, m toolImage, path string) {
		if m.refused {
			succeed(t, "check", path) // needs no key
			return
		}
		expectSameCheck(t, path)
		ours := testenv.Platter(t, "check", path)
		theirs := testenv.Run(t, time.Minute, testenv.NeedTool(t, "qemu-img"), "check", path)
		if ours.Code != theirs.Code || ours.Stdout != theirs.Stdout {
			t.Errorf("got %d\n%s%s\nqemu-img has %d\n%s%s", ours.Code, ours.Stdout, ours.Stderr, theirs.Code, theirs.Stdout, theirs.Stderr)
		}
	})
}

// TestCheckDamageLikeQemuImg: so do damaged ones, and repairing them helps as
// much.
func TestCheckDamageLikeQemuImg(t *testing.T) {
	t.Parallel()
	for _, d := range damages {
		t.Run(d.name, func(t *testing.T) {
			t.Parallel()
			m := toolImage{options: "compat=1.1", size: "8M", commands: scattered, patch: d.patch}
			path := m.make(t)
			expectSameCheck(t, path)
			for _, repair := range []string{"leaks", "all"} {
				ours, theirs := path+"."+repair+".ours", path+"."+repair+".theirs"
				copyFile(t, path, ours, 0o644)
				copyFile(t, path, theirs, 0o644)
				expectSameRepair(t, repair, ours, theirs)
			}
		})
	}
}

// expectSameCheck compares our report with that of qemu-img.
func expectSameCheck(t *testing.T, path string, more ...string) {
	t.Helper()
	args := append([]string{"check", "--output", "json", path}, more...)
	ours := testenv.Platter(t, args...)
	theirs := testenv.Run(t, time.Minute, testenv.NeedTool(t, "qemu-img"), args...)
	if ours.Code != theirs.Code {
		t.Errorf("exit code %d, qemu-img's is %d\n%s%s\n%s%s", ours.Code, theirs.Code, ours.Stdout, ours.Stderr, theirs.Stdout, theirs.Stderr)
	}
	if (ours.Stdout == "") != (theirs.Stdout == "") {
		t.Errorf("got %q, qemu-img prints %q", ours.Stdout, theirs.Stdout)
	}
	if ours.Stdout == "" || theirs.Stdout == "" {
		return
	}
	if a, b := normal(t, ours.Stdout), normal(t, theirs.Stdout); !reflect.DeepEqual(a, b) {
		t.Errorf("got\n%s%s\nqemu-img prints\n%s%s", ours.Stdout, ours.Stderr, theirs.Stdout, theirs.Stderr)
	}
}

// expectSameRepair repairs one copy of an image with each program. Both then say
// the same of ours as qemu-img says of its own.
func expectSameRepair(t *testing.T, repair, ours, theirs string) {
	t.Helper()
	qemuImg := testenv.NeedTool(t, "qemu-img")
	a := testenv.Platter(t, "check", "--output", "json", "--repair", repair, ours)
	b := testenv.Run(t, time.Minute, qemuImg, "check", "--output", "json", "-r", repair, theirs)
	gaveUp := b.Stdout == "" && repair == "leaks" && a.Code == 2 // which a look at the leaks alone is no reason for
	if a.Code != b.Code && !gaveUp {
		t.Errorf("repair %s: exit code %d, qemu-img's is %d\n%s%s\n%s%s", repair, a.Code, b.Code, a.Stdout, a.Stderr, b.Stdout, b.Stderr)
	}
	after := testenv.Run(t, time.Minute, qemuImg, "check", theirs)
	if r := testenv.Platter(t, "check", ours); r.Code != after.Code {
		t.Errorf("repair %s: exit code %d afterwards, qemu-img's image has %d\n%s%s", repair, r.Code, after.Code, r.Stdout, r.Stderr)
	}
	if r := testenv.Run(t, time.Minute, qemuImg, "check", ours); r.Code != after.Code {
		t.Errorf("repair %s: qemu-img has exit code %d afterwards, %d for its own\n%s%s", repair, r.Code, after.Code, r.Stdout, r.Stderr)
	}
}

// A check neither shares an image with its writer nor repairs what others read.
func TestCheckLocks(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "disk.qcow2")
	succeed(t, "create", "-f", "qcow2", path, "8M")
	server := serveUnix(t, path)
	wantClearError(t, testenv.Platter(t, "check", path), path, "in use", "--force-share")
	wantClearError(t, testenv.Platter(t, "check", "--repair", "leaks", path), path, "in use")
	if r := testenv.Platter(t, "check", "-U", path); r.Code != 0 && r.Code != 3 {
		t.Errorf("--force-share: exit code %d\n%s%s", r.Code, r.Stdout, r.Stderr)
	}
	server.Stop()
	reader := serveUnix(t, "--read-only", path)
	succeed(t, "check", path)
	wantClearError(t, testenv.Platter(t, "check", "--repair", "leaks", path), path, "in use")
	reader.Stop()
	succeed(t, "check", "--repair", "leaks", path)
}

// What has nothing to check has an exit code of its own, and what can't be
// checked another.
func TestCheckExitCodes(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	raw := testenv.Image(t, dir, "disk.raw", mib, nil)
	for _, args := range [][]string{{raw}, {"--output", "json", raw}, {"--repair", "all", raw}} {
		r := testenv.Platter(t, append([]string{"check"}, args...)...)
		if r.Code != 63 || r.Stdout != "" || !strings.Contains(r.Stderr, raw) {
			t.Errorf("%q: exit code %d, %q, %q", args, r.Code, r.Stdout, r.Stderr)
		}
	}
	wantClearError(t, testenv.Platter(t, "check", "-f", "qcow2", raw), raw, "not a qcow2 image")
	wantClearError(t, testenv.Platter(t, "check", filepath.Join(dir, "none")), "none", "no such file")
}
