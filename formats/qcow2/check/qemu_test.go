package check

import (
	"encoding/json"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"platter/integration/testenv"
)

// osFile is an image file on disk.
type osFile struct{ *os.File }

func (f osFile) Size() (int64, error) {
	st, err := f.Stat()
	if err != nil {
		return 0, err
	}
	return st.Size(), nil
}

func openFile(t testing.TB, path string) osFile {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return osFile{f}
}

// logTo logs some findings.
func logTo(t testing.TB) func(string) {
	lines := 0
	return func(line string) {
		if lines++; lines <= 50 {
			t.Log(line)
		}
	}
}

// check checks the image at path and logs what it finds.
func check(t testing.TB, path string, r Repair) *Report {
	t.Helper()
	report, err := Run(openFile(t, path), Options{Repair: r, Log: logTo(t)})
	if err != nil {
		t.Fatalf("Run: %v", err)
	}
	return report
}

func qemuImg(t testing.TB, args ...string) string {
	t.Helper()
	return testenv.Tool(t, "qemu-img", args...)
}

// qemuIO runs commands of qemu-io on an image, whose options may be given in
// front of the path.
func qemuIO(t testing.TB, path string, commands ...string) {
	t.Helper()
	args := []string{"-f", "qcow2"}
	for _, command := range commands {
		args = append(args, "-c", command)
	}
	out := testenv.Tool(t, "qemu-io", append(args, path)...)
	if strings.Contains(out, "failed") || strings.Contains(out, "rror") {
		t.Fatalf("qemu-io %q: %s", commands, out)
	}
}

// qemuCheck is what `qemu-img check` says of an image; ok is false if it gave up
// and printed no report.
func qemuCheck(t testing.TB, path string, args ...string) (report Report, code int, ok bool) {
	t.Helper()
	tool := testenv.NeedTool(t, "qemu-img")
	args = append([]string{"check", "--output", "json", "-f", "qcow2"}, args...)
	r := testenv.Run(t, time.Minute, tool, append(args, path)...)
	if !strings.HasPrefix(r.Stdout, "{") {
		t.Logf("qemu-img %q: exit code %d, %.2000s", args, r.Code, r.Stderr)
		return report, r.Code, false
	}
	if err := json.Unmarshal([]byte(r.Stdout), &report); err != nil {
		t.Fatalf("qemu-img check: %v\n%s", err, r.Stdout)
	}
	if report.ExitCode() != 0 {
		t.Logf("qemu-img %q: exit code %d, %.2000s", args, r.Code, r.Stderr)
	}
	return report, r.Code, true
}

// expectSame compares our report with that of qemu-img.
func expectSame(t testing.TB, path string) *Report {
	t.Helper()
	ours := check(t, path, RepairNone)
	theirs, code, ok := qemuCheck(t, path)
	if !ok || *ours != theirs || ours.ExitCode() != code {
		t.Errorf("our report, exit code %d:\n%+v\nqemu-img's, exit code %d:\n%+v", ours.ExitCode(), *ours, code, theirs)
	}
	return ours
}

// flavour is a kind of image.
type flavour struct {
	name    string
	options string // of qemu-img create
	size    string
	backing bool
}

func (v flavour) dataFile() bool { return strings.Contains(v.options, "data_file=") }
func (v flavour) version2() bool { return strings.Contains(v.options, "compat=0.10") }

// compresses reports whether compressed clusters are to be had, also beside
// snapshots: many of them share a cluster, which small refcounts can't count.
func (v flavour) compresses() bool {
	return !v.dataFile() && !strings.Contains(v.options, "preallocation") && !strings.HasSuffix(v.options, "refcount_bits=2") && !strings.HasSuffix(v.options, "refcount_bits=4")
}

var flavours = []flavour{
	{name: "v2", options: "compat=0.10", size: "48M"},
	{name: "v2, 512 byte clusters", options: "compat=0.10,cluster_size=512", size: "5M"},
	{name: "v3", options: "compat=1.1", size: "48M"},
	{name: "512 byte clusters", options: "cluster_size=512", size: "5M"},
	{name: "4K clusters", options: "cluster_size=4096", size: "48M"},
	{name: "2M clusters", options: "cluster_size=2M", size: "100M"},
	{name: "1 bit refcounts", options: "cluster_size=4096,refcount_bits=1", size: "48M"},
	{name: "2 bit refcounts", options: "cluster_size=4096,refcount_bits=2", size: "48M"},
	{name: "4 bit refcounts", options: "cluster_size=4096,refcount_bits=4", size: "48M"},
	{name: "8 bit refcounts", options: "cluster_size=4096,refcount_bits=8", size: "48M"},
	{name: "32 bit refcounts", options: "cluster_size=4096,refcount_bits=32", size: "48M"},
	{name: "64 bit refcounts", options: "cluster_size=4096,refcount_bits=64", size: "48M"},
	{name: "64 bit refcounts, 512 byte clusters", options: "cluster_size=512,refcount_bits=64", size: "5M"},
	{name: "extended L2", options: "extended_l2=on", size: "48M"},
	{name: "extended L2, 16K clusters", options: "extended_l2=on,cluster_size=16k", size: "48M"},
	{name: "lazy refcounts", options: "lazy_refcounts=on", size: "48M"},
	{name: "zstd", options: "compression_type=zstd", size: "48M"},
	{name: "data file", options: "data_file=DIR/data.raw", size: "48M"},
	{name: "raw data file", options: "data_file=DIR/data.raw,data_file_raw=on", size: "48M"},
	{name: "backing file", options: "cluster_size=4096", size: "48M", backing: true},
	{name: "extended L2 with backing file", options: "extended_l2=on", size: "48M", backing: true},
	{name: "preallocated metadata", options: "preallocation=metadata", size: "48M"},
	{name: "odd size", options: "compat=1.1", size: "1234567"},
	{name: "empty disk", options: "compat=1.1", size: "0"},
}

// create makes an image in a fresh directory and returns its path.
func (v flavour) create(t testing.TB) string {
	t.Helper()
	testenv.NeedTool(t, "qemu-img")
	testenv.NeedTool(t, "qemu-io")
	dir := t.TempDir()
	path := filepath.Join(dir, "image.qcow2")
	args := []string{"create", "-q", "-f", "qcow2", "-o", strings.ReplaceAll(v.options, "DIR", dir)}
	if v.backing {
		base := filepath.Join(dir, "base.raw")
		qemuImg(t, "create", "-q", "-f", "raw", base, "24M")
		testenv.Tool(t, "qemu-io", "-f", "raw", "-c", "write -P 9 0 3M", base)
		args = append(args, "-b", base, "-F", "raw")
	}
	qemuImg(t, append(args, path, v.size)...)
	return path
}

// fill writes data, zeroes and holes of many sorts, all within the first 4 MiB
// where the image is small.
func (v flavour) fill(t testing.TB, path string) {
	t.Helper()
	if v.size == "0" {
		return
	}
	commands := []string{
		"write -P 1 0 100k", "write -P 2 300k 4k", "write -P 3 1000k 128k", "write -P 4 200k 5k",
		"write -z 64k 64k", "write -z -u 1024k 64k", "discard 300k 64k",
	}
	if v.size == "48M" || v.size == "100M" {
		commands = append(commands, "write -P 5 40M 200k", "write -P 6 33M 64k", "write -z 34M 1M")
	}
	if v.compresses() {
		commands = append(commands, "write -c -P 7 640k 64k", "write -c -P 8 704k 64k")
		if v.size == "100M" {
			commands[len(commands)-2], commands[len(commands)-1] = "write -c -P 7 8M 2M", "write -c -P 8 10M 2M"
		}
	}
	qemuIO(t, path, commands...)
}

// bitmaps adds two bitmaps, and some bits.
func (v flavour) bitmaps(t testing.TB, path string) {
	t.Helper()
	qemuImg(t, "bitmap", "--add", "-g", "4096", path, "one")
	qemuImg(t, "bitmap", "--add", path, "another")
	qemuIO(t, path, "write -P 14 80k 4k")
}

// snapshots takes two snapshots and writes some more.
func (v flavour) snapshots(t testing.TB, path string) {
	t.Helper()
	if v.dataFile() || strings.HasSuffix(v.options, "refcount_bits=1") {
		return // not to be had
	}
	qemuImg(t, "snapshot", "-c", "first", path)
	if v.size != "0" {
		qemuIO(t, path, "write -P 11 10k 4k", "write -P 12 1000k 10k", "write -z 500k 100k")
	}
	qemuImg(t, "snapshot", "-c", "second one", path)
	if v.size != "0" {
		qemuIO(t, path, "write -P 13 310k 20k", "discard 0 64k")
	}
}

func TestReportEqualsThatOfQemuImg(t *testing.T) {
	for _, v := range flavours {
		t.Run(v.name, func(t *testing.T) {
			t.Parallel()
			path := v.create(t)
			expectSame(t, path)
			v.fill(t, path)
			expectSame(t, path)
			if !v.version2() && v.size != "0" {
				v.bitmaps(t, path)
				expectSame(t, path)
			}
			v.snapshots(t, path)
			report := expectSame(t, path)
			if report.ExitCode() != 0 {
				t.Errorf("an image as qemu-img made it is not clean: %+v", report)
			}
		})
	}
}

func TestReportOfALUKSImageEqualsThatOfQemuImg(t *testing.T) {
	testenv.NeedTool(t, "qemu-img")
	path := filepath.Join(t.TempDir(), "image.qcow2")
	secret := "secret,id=key,data=open sesame"
	qemuImg(t, "create", "-q", "--object", secret, "-f", "qcow2", "-o", "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10", path, "16M")
	image := "driver=qcow2,file.filename=" + path + ",encrypt.key-secret=key"
	testenv.Tool(t, "qemu-io", "--object", secret, "--image-opts", "-c", "write -P 1 0 1M", image)
	ours := check(t, path, RepairNone)
	var theirs Report
	if err := json.Unmarshal([]byte(qemuImg(t, "check", "--output", "json", "--object", secret, "--image-opts", image)), &theirs); err != nil {
		t.Fatal(err)
	}
	if *ours != theirs || ours.ExitCode() != 0 {
		t.Errorf("our report:\n%+v\nqemu-img's:\n%+v", *ours, theirs)
	}
}

// copyFile copies an image to a new path in the same directory.
func copyFile(t testing.TB, path, name string) string {
	t.Helper()
	from, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer from.Close()
	copied := filepath.Join(filepath.Dir(path), name)
	to, err := os.Create(copied)
	if err != nil {
		t.Fatal(err)
	}
	defer to.Close()
	if _, err := io.Copy(to, from); err != nil {
		t.Fatal(err)
	}
	return copied
}
