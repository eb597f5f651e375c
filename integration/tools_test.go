package integration

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"
	"time"

	"platter/integration/testenv"
)

// The verbs that look at images, beside qemu-img: what they print and how they
// end is the same.

// toolImage is a way to make an image; DIR in it is the folder of the image.
type toolImage struct {
	name     string
	options  string     // of qemu-img create; raw when there are none
	size     string     // of the disk; that of the backing file when there is none
	commands []string   // for qemu-io
	then     [][]string // qemu-img with these arguments and the image behind them
	patch    func(t testing.TB, path string)
	refused  bool // qemu-img can't read it without its key
	exact    bool // every hole is looked for, or there are none
}

// scattered writes data, zeroes and holes in several places.
var scattered = []string{
	"write -P 1 0 200k", "write -P 2 1M 4k", "write -z 1536k 128k", "write -P 3 2M 64k", "write -z 2M 64k", "write -P 4 3M 512",
	"write -P 5 5M 1M", "discard 5248k 128k", "write -P 6 7M 1M",
}

// toolImages have every option and every content that an image can have.
var toolImages = []toolImage{
	{name: "raw", size: "8M", commands: scattered, exact: true},
	{name: "empty raw", size: "0"},
	{name: "new", options: "compat=1.1", size: "8M", exact: true},
	{name: "empty", options: "compat=1.1", size: "0"},
	{name: "v3", options: "compat=1.1", size: "8M", commands: scattered},
	{name: "v2", options: "compat=0.10", size: "8M", commands: scattered},
	{name: "odd size", options: "compat=1.1", size: "8388609", commands: scattered},
	{name: "512 byte clusters", options: "cluster_size=512", size: "8M", commands: scattered},
	{name: "2M clusters", options: "cluster_size=2M", size: "8M", commands: scattered, exact: true},
	{name: "1 bit refcounts", options: "refcount_bits=1", size: "8M", commands: scattered},
	{name: "64 bit refcounts", options: "refcount_bits=64", size: "8M", commands: scattered},
	{name: "lazy refcounts", options: "lazy_refcounts=on", size: "8M", commands: scattered},
	{name: "extended L2", options: "extended_l2=on", size: "8M", commands: append(scattered, "write -P 7 3100k 2k", "write -z 3110k 4k", "discard 3104k 2k")},
	{name: "zlib", options: "compat=1.1", size: "8M", commands: append(scattered, "write -c -P 7 4M 128k", "write -c -P 8 6656k 64k")},
	{name: "zstd", options: "compression_type=zstd", size: "8M", commands: append(scattered, "write -c -P 7 4M 128k")},
	{name: "metadata", options: "preallocation=metadata", size: "8M", exact: true},
	{name: "metadata in part", options: "preallocation=metadata", size: "8M", commands: scattered[:4], exact: true},
	{name: "extended metadata", options: "preallocation=metadata,extended_l2=on", size: "8M", commands: []string{"write -P 1 64k 2k"}},
	{name: "zeroes in places", options: "compat=1.1", size: "8M", commands: []string{
		"write -P 1 192k 64k", "write -P 1 0 64k", "write -P 1 64k 64k", "write -z 0 256k",
	}, exact: true},
	{name: "falloc", options: "preallocation=falloc", size: "8M", exact: true},
	{name: "full", options: "preallocation=full", size: "8M", exact: true},
	{name: "data file", options: "data_file=DIR/data,lazy_refcounts=on", size: "8M", commands: scattered},
	{name: "raw data file", options: "data_file=DIR/data,data_file_raw=on", size: "8M", commands: scattered},
	{name: "backing file", options: "backing_file=base.raw,backing_fmt=raw", commands: scattered[:4], exact: true},
	{name: "absolute backing file", options: "backing_file=DIR/base.raw,backing_fmt=raw", commands: scattered[:4]},
	{name: "longer than its backing file", options: "backing_file=base.raw,backing_fmt=raw,extended_l2=on", size: "8M", commands: []string{"write -P 1 64k 2k", "write -z 128k 2k", "write -P 1 7M 1k"}},
	{name: "chain", options: "backing_file=mid.qcow2,backing_fmt=qcow2", size: "7M", commands: []string{"write -P 9 100k 300k", "write -z 3M 1M"}, exact: true},
	{name: "snapshots", options: "cluster_size=4k", size: "8M", commands: scattered, then: [][]string{
		{"snapshot", "-c", "one"}, {"resize", "-q", "-f", "qcow2", "IMAGE", "9M"}, {"snapshot", "-c", "two words and more"},
	}},
	{name: "bitmaps", options: "compat=1.1", size: "8M", commands: scattered, then: [][]string{
		{"bitmap", "--add", "-g", "32k", "IMAGE", "first"}, {"bitmap", "--add", "--disable", "IMAGE", "second"},
	}},
	{name: "dirty", options: "lazy_refcounts=on", size: "8M", commands: scattered, patch: setIncompatible(1)},
	{name: "corrupt bit", options: "compat=1.1", size: "8M", commands: scattered, patch: setIncompatible(2)},
	{name: "luks", options: "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10", size: "8M", refused: true},
	{name: "aes", options: "encrypt.format=aes,encrypt.key-secret=s", size: "8M", refused: true},
}

// setIncompatible sets a bit of the incompatible features.
func setIncompatible(bit byte) func(t testing.TB, path string) {
	return func(t testing.TB, path string) { overwrite(t, path, 79, bit) }
}

// overwrite changes bytes of a file.
func overwrite(t testing.TB, path string, off int64, b ...byte) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(b, off); err != nil {
		t.Fatal(err)
	}
}

// make makes the image in a fresh folder, and returns its path.
func (m toolImage) make(t testing.TB) string {
	t.Helper()
	dir := testenv.DiskDir(t)
	path, format := filepath.Join(dir, "disk.qcow2"), "qcow2"
	args := []string{"create", "-q", "--object", "secret,id=s,data=abc", "-f", format, "-o", strings.ReplaceAll(m.options, "DIR", dir)}
	if m.options == "" {
		path, format = filepath.Join(dir, "disk.raw"), "raw"
		args = []string{"create", "-q", "-f", format}
	}
	if strings.Contains(m.options, "backing_file") {
		testenv.Tool(t, "qemu-img", "create", "-q", "-f", "raw", filepath.Join(dir, "base.raw"), "6M")
		qemuWrites(t, filepath.Join(dir, "base.raw"), "raw", "write -P 9 0 100k", "write -P 9 2M 2M")
		mid := filepath.Join(dir, "mid.qcow2")
		testenv.Tool(t, "qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", mid)
		qemuWrites(t, mid, "qcow2", "write -P 8 128k 128k", "write -z 3M 64k", "write -P 7 5M 1M")
	}
	args = append(args, path)
	if m.size != "" {
		args = append(args, m.size)
	}
	testenv.Tool(t, "qemu-img", args...)
	qemuWrites(t, path, format, m.commands...)
	for _, args := range m.then {
		args := append([]string{}, args...)
		at := false
		for i := range args {
			if args[i] == "IMAGE" {
				args[i], at = path, true
			}
		}
		if !at {
			args = append(args, path)
		}
		testenv.Tool(t, "qemu-img", args...)
	}
	if m.patch != nil {
		m.patch(t, path)
	}
	syncAll(t, dir)
	return path
}

// qemuWrites runs commands of qemu-io.
func qemuWrites(t testing.TB, path, format string, commands ...string) {
	t.Helper()
	if len(commands) == 0 {
		return
	}
	args := []string{"-d", "unmap", "-f", format}
	for _, c := range commands {
		args = append(args, "-c", c)
	}
	testenv.Tool(t, "qemu-io", append(args, path)...)
}

// syncAll writes files back, so that where their holes are, and how much they
// take, is settled.
func syncAll(t testing.TB, dir string) {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(dir, "*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		f, err := os.Open(name)
		if err != nil {
			t.Fatal(err)
		}
		if err := f.Sync(); err != nil {
			t.Error(err)
		}
		f.Close()
	}
}

// eachToolImage runs a test with every image.
func eachToolImage(t *testing.T, test func(t *testing.T, m toolImage, path string)) {
	t.Helper()
	t.Parallel()
	testenv.NeedTool(t, "qemu-img")
	testenv.NeedTool(t, "qemu-io")
	for _, m := range toolImages {
		t.Run(m.name, func(t *testing.T) {
			t.Parallel()
			test(t, m, m.make(t))
		})
	}
}

// Completion knows every verb and its flags.
func TestCompletion(t *testing.T) {
	for line, want := range map[string]string{
		"platter con": "convert\n", "platter cr": "create\n", "platter check --re": "--repair\n", "platter map --start": "--start-offset\n",
		"platter info --output ": "human\njson\n", "platter convert --output-format ": "raw\nqcow2\n", "platter serve --allow": "--allow-dir\n",
	} {
		t.Setenv("COMP_LINE", line)
		t.Setenv("COMP_POINT", fmt.Sprint(len(line)))
		if got := testenv.Platter(t).Stdout; got != want {
			t.Errorf("%q: %q, want %q", line, got, want)
		}
	}
}

// succeed runs platter, which must succeed and say nothing on standard error.
func succeed(t testing.TB, args ...string) string {
	t.Helper()
	r := testenv.Platter(t, args...)
	if r.Code != 0 || r.Stderr != "" {
		t.Fatalf("platter %q: exit code %d\nstdout: %s\nstderr: %s", args, r.Code, r.Stdout, r.Stderr)
	}
	return r.Stdout
}

// normal is a JSON text as values, without what qemu-img rounds up: the lengths
// of files, which it tells in sectors.
func normal(t testing.TB, text string) any {
	t.Helper()
	var v any
	if err := json.Unmarshal([]byte(text), &v); err != nil {
		t.Fatalf("%v in %q", err, text)
	}
	var walk func(v any)
	walk = func(v any) {
		switch v := v.(type) {
		case []any:
			for _, e := range v {
				walk(e)
			}
		case map[string]any:
			if size, ok := v["virtual-size"].(float64); ok {
				v["virtual-size"] = float64((int64(size) + 511) &^ 511)
			}
			for _, e := range v {
				walk(e)
			}
		}
	}
	walk(v)
	return v
}

var fileLength = regexp.MustCompile(`(?m)^    file length: .*$`)

func TestInfoLikeQemuImg(t *testing.T) {
	eachToolImage(t, func(t *testing.T, m toolImage, path string) {
		chains := [][]string{nil, {"--backing-chain"}}
		if m.refused || strings.Contains(m.options, "DIR/base") {
			chains = chains[:1] // qemu-img reads encrypted images' names only; ours asks for leave
		}
		for _, chain := range chains {
			ours := succeed(t, append([]string{"info", "--output", "json", path}, chain...)...)
			theirs := testenv.Tool(t, "qemu-img", append([]string{"info", "--output", "json", path}, chain...)...)
			if a, b := normal(t, ours), normal(t, theirs); !reflect.DeepEqual(a, b) {
				t.Errorf("%v: got\n%s\nqemu-img prints\n%s", chain, ours, theirs)
			}
			ours = succeed(t, append([]string{"info", path}, chain...)...)
			theirs = testenv.Tool(t, "qemu-img", append([]string{"info", path}, chain...)...)
			if a, b := fileLength.ReplaceAllString(ours, ""), fileLength.ReplaceAllString(theirs, ""); a != b {
				t.Errorf("%v: got\n%s\nqemu-img prints\n%s", chain, ours, theirs)
			}
		}
	})
}

// A block device is told from a file.
func TestInfoOfBlockDevice(t *testing.T) {
	t.Parallel()
	testenv.NeedRoot(t)
	losetup := testenv.NeedTool(t, "losetup")
	for _, m := range toolImages[:5] {
		if m.size == "0" {
			continue
		}
		path := m.make(t)
		if err := os.Truncate(path, 16*mib); err != nil {
			t.Fatal(err)
		}
		r := testenv.Run(t, time.Minute, losetup, "--find", "--show", path)
		if r.Code != 0 {
			testenv.Skip(t, "no loop device to be had: "+r.Stderr)
		}
		device := strings.TrimSpace(r.Stdout)
		t.Cleanup(func() {
			if out, err := exec.Command(losetup, "--detach", device).CombinedOutput(); err != nil {
				t.Errorf("detach: %v: %s", err, out)
			}
		})
		for _, verb := range []string{"info", "map"} {
			ours := succeed(t, verb, "--output", "json", device)
			theirs := testenv.Tool(t, "qemu-img", verb, "--output", "json", device)
			if a, b := normal(t, ours), normal(t, theirs); !reflect.DeepEqual(a, b) {
				t.Errorf("%s: got\n%s\nqemu-img prints\n%s", m.name, ours, theirs)
			}
		}
	}
}

func TestMapLikeQemuImg(t *testing.T) {
	eachToolImage(t, func(t *testing.T, m toolImage, path string) {
		if m.refused {
			wantClearError(t, testenv.Platter(t, "map", path), path, "encrypted")
			return
		}
		if m.name == "empty raw" || m.name == "empty" {
			// qemu-img tells of an extent of no length.
			if ours := succeed(t, "map", "--output", "json", path); ours != "[]\n" {
				t.Errorf("got %s", ours)
			}
			return
		}
		for _, part := range [][]string{nil, {"--start-offset", "70000", "--max-length", "3000000"}} {
			ours := succeed(t, append([]string{"map", "--output", "json", path}, part...)...)
			theirs := testenv.Tool(t, "qemu-img", append([]string{"map", "--output", "json", path}, part...)...)
			if ours != theirs && (m.exact || !reflect.DeepEqual(withoutHoles(t, ours), withoutHoles(t, theirs))) {
				t.Errorf("%v: got\n%s\nqemu-img prints\n%s", part, ours, theirs)
			}
			if !m.exact {
				continue
			}
			ours = succeed(t, append([]string{"map", path}, part...)...)
			r := testenv.Run(t, time.Minute, testenv.NeedTool(t, "qemu-img"), append([]string{"map", path}, part...)...)
			if strings.Contains(r.Stderr, "compressed clusters") {
				continue // it has no words for them, and gives up
			}
			if ours != r.Stdout {
				t.Errorf("%v: got\n%s\nqemu-img prints\n%s%s", part, ours, r.Stdout, r.Stderr)
			}
		}
	})
}

// mapEntry is an extent as a map has it.
type mapEntry struct {
	Start, Length, Depth            int64
	Present, Zero, Data, Compressed bool
	Offset                          int64
}

// withoutHoles is a map that doesn't tell data from holes in the data. Both
// programs look for those only if the file takes much less than it should. That
// is by the refcounts for qemu-img, and by the file's length for us, which looks
// more often.
func withoutHoles(t testing.TB, text string) []mapEntry {
	t.Helper()
	var list, joined []mapEntry
	parse(t, text, &list)
	for _, e := range list {
		e.Zero = e.Zero && !e.Data
		if n := len(joined) - 1; n >= 0 && e.Data && !e.Compressed {
			last := joined[n]
			last.Start, last.Offset, last.Length = last.Start+last.Length, last.Offset+last.Length, e.Length
			if last == e {
				joined[n].Length += e.Length
				continue
			}
		}
		joined = append(joined, e)
	}
	return joined
}
