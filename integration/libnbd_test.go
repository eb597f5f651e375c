package integration

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"platter/integration/testenv"
)

// python runs a script of testdata that ends with "ok".
func python(t testing.TB, script string, args ...string) {
	t.Helper()
	r := testenv.Run(t, time.Minute, testenv.NeedPythonNBD(t), append([]string{testdata(t, script)}, args...)...)
	if r.Code != 0 || r.Stdout != "ok\n" {
		t.Fatalf("%s: exit code %d\n%s%s", script, r.Code, r.Stdout, r.Stderr)
	}
}

func TestEveryCommand(t *testing.T) {
	eachSetup(t, func(t *testing.T, s setup) {
		image := testenv.Image(t, s.dir(t), "disk.raw", 32*mib, nil)
		server := s.serve(t, image)
		python(t, "commands.py", server.URI, image, fmt.Sprint(32*mib))
	})
}

func TestReadOnlyExport(t *testing.T) {
	eachSetup(t, func(t *testing.T, s setup) {
		data := bytes.Repeat([]byte("r"), int(mib))
		image := testenv.Image(t, s.dir(t), "disk.raw", mib, data)
		server := s.serve(t, "--read-only", image)
		python(t, "readonly.py", server.URI, fmt.Sprint(mib))
		server.Stop()
		sameContent(t, image, data)
	})
}

func TestOptions(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	one := testenv.Image(t, dir, "one.raw", mib, nil)
	two := testenv.Image(t, dir, "two.raw", 2*mib, nil)
	server := serveUnix(t, one, "second="+two)
	uri := server.ExportURI("one.raw")
	python(t, "options.py", uri, "one.raw", "second")
}

// exportInfo is one export as nbdinfo --json shows it.
type exportInfo struct {
	Name          string `json:"export-name"`
	Size          int64  `json:"export-size"`
	ReadOnly      bool   `json:"is_read_only"`
	CanCache      bool   `json:"can_cache"`
	CanFlush      bool   `json:"can_flush"`
	CanFUA        bool   `json:"can_fua"`
	CanMultiConn  bool   `json:"can_multi_conn"`
	CanTrim       bool   `json:"can_trim"`
	CanZero       bool   `json:"can_zero"`
	BlockMinimum  int64  `json:"block_size_minimum"`
	BlockMaximum  int64  `json:"block_size_maximum"`
	PreferredSize int64  `json:"block_size_preferred"`
}

func nbdinfo(t testing.TB, args ...string) []exportInfo {
	t.Helper()
	out := testenv.Tool(t, "nbdinfo", append([]string{"--json"}, args...)...)
	var info struct {
		Protocol string       `json:"protocol"`
		Exports  []exportInfo `json:"exports"`
	}
	if err := json.Unmarshal([]byte(out), &info); err != nil {
		t.Fatalf("nbdinfo: %v\n%s", err, out)
	}
	if info.Protocol != "newstyle-fixed" {
		t.Errorf("protocol %q, want newstyle-fixed", info.Protocol)
	}
	return info.Exports
}

func TestNbdinfo(t *testing.T) {
	eachSetup(t, func(t *testing.T, s setup) {
		server := s.serve(t, testenv.Image(t, s.dir(t), "disk.raw", 64*mib, nil))
		if got := testenv.Tool(t, "nbdinfo", "--size", server.URI); got != fmt.Sprintf("%d\n", 64*mib) {
			t.Errorf("size %q, want %d", got, 64*mib)
		}
		exports := nbdinfo(t, server.URI)
		if len(exports) != 1 {
			t.Fatalf("%d exports, want 1", len(exports))
		}
		want := exportInfo{
			Size: 64 * mib, CanCache: true, CanFlush: true, CanFUA: true, CanMultiConn: true,
			CanTrim: true, CanZero: true, BlockMinimum: 1,
			BlockMaximum: exports[0].BlockMaximum, PreferredSize: exports[0].PreferredSize,
		}
		if exports[0] != want {
			t.Errorf("got  %+v\nwant %+v", exports[0], want)
		}
		if exports[0].BlockMaximum < 32*mib || exports[0].PreferredSize < 512 {
			t.Errorf("sizes: %+v", exports[0])
		}
		if out := testenv.Tool(t, "nbdinfo", "--list", server.URI); !strings.Contains(out, "export=") {
			t.Errorf("nbdinfo --list: %q", out)
		}
	})
}

// One image answers to the empty name and to the one it was given.
func TestExportNames(t *testing.T) {
	t.Parallel()
	image := testenv.Image(t, t.TempDir(), "disk.raw", mib, nil)
	server := serveUnix(t, "--name", "system", image)
	for _, name := range []string{"", "system"} {
		if got := testenv.Tool(t, "nbdinfo", "--size", server.ExportURI(name)); got != fmt.Sprintf("%d\n", mib) {
			t.Errorf("size of %q: %q", name, got)
		}
	}
	r := testenv.Run(t, time.Minute, testenv.NeedTool(t, "nbdinfo"), "--size", server.ExportURI("other"))
	if r.Code == 0 {
		t.Error("an export with a wrong name was found")
	}
}

func TestSeveralImages(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	server := serveUnix(t,
		testenv.Image(t, dir, "a.raw", mib, nil),
		testenv.Image(t, dir, "b.raw", 2*mib, nil),
		"third="+testenv.Image(t, dir, "c.raw", 3*mib, nil))
	want := map[string]int64{"a.raw": mib, "b.raw": 2 * mib, "third": 3 * mib}
	for name, size := range want {
		if got := testenv.Tool(t, "nbdinfo", "--size", server.ExportURI(name)); got != fmt.Sprintf("%d\n", size) {
			t.Errorf("size of %s: %q, want %d", name, got, size)
		}
	}
	for _, e := range nbdinfo(t, "--list", server.ExportURI("a.raw")) {
		if want[e.Name] != e.Size {
			t.Errorf("listed %q with %d bytes", e.Name, e.Size)
		}
		delete(want, e.Name)
	}
	if len(want) > 0 {
		t.Errorf("not listed: %v", want)
	}
}

// A size need not be a multiple of anything.
func TestOddSizes(t *testing.T) {
	t.Parallel()
	for _, cache := range []string{"writeback", "none"} {
		for _, size := range []int64{1, 511, 1000, 4097, mib + 1} {
			t.Run(fmt.Sprint(cache, size), func(t *testing.T) {
				t.Parallel()
				dir := testenv.DiskDir(t)
				data := testenv.Pattern(int(size), uint64(size))
				image := testenv.Image(t, dir, "disk.raw", size, data)
				args := []string{"--cache", cache, image}
				if cache == "none" { // the end of such an image can't be written past the page cache
					wantClearError(t, testenv.Platter(t, append([]string{"serve", "--nbd", testenv.UnixAddr(t)}, args...)...), image, "multiple", "--cache writeback")
					args = append([]string{"--read-only"}, args...)
				}
				server := serveUnix(t, args...)
				if got := testenv.Tool(t, "nbdinfo", "--size", server.URI); strings.TrimSpace(got) != strconv.FormatInt(size, 10) {
					t.Fatalf("size %q, want %d", got, size)
				}
				copied := filepath.Join(dir, "copy.raw")
				testenv.Tool(t, "nbdcopy", server.URI, copied)
				sameContent(t, copied, data)
			})
		}
	}
}

// sparsePattern returns n bytes with data and runs of zeroes in turn.
func sparsePattern(n int64, seed uint64) []byte {
	data := make([]byte, n)
	for off := int64(0); off < n; off += 192 * kib {
		copy(data[off:], testenv.Pattern(int(min(128*kib, n-off)), seed+uint64(off)))
	}
	return data
}

func TestNbdcopy(t *testing.T) {
	eachSetup(t, func(t *testing.T, s setup) {
		const size = 48 * mib
		for _, connections := range []string{"1", "4"} {
			dir := s.dir(t)
			data := sparsePattern(size, 7)
			source := testenv.Image(t, dir, "source.raw", size, data)
			// What was in the image must be gone after the copy.
			image := testenv.Image(t, dir, "disk.raw", size, bytes.Repeat([]byte("old"), int(mib)))
			server := s.serve(t, image)
			testenv.Tool(t, "nbdcopy", "--connections="+connections, "--flush", source, server.URI)
			sameContent(t, image, data)

			back := filepath.Join(dir, "back.raw")
			testenv.Tool(t, "nbdcopy", "--connections="+connections, server.URI, back)
			sameContent(t, back, data)
			server.Stop()
			sameContent(t, image, data)
		}
	})
}

// Whatever is chosen for speed or safety, the bytes are the same.
func TestServeOptions(t *testing.T) {
	t.Parallel()
	variants := [][]string{
		{"--cache", "writeback"},
		{"--cache", "none"},
		{"--cache", "writethrough"},
		{"--cache", "directsync"},
		{"--cache", "unsafe"},
		{"--cache", "none", "--aio", "threads"},
		{"--cache", "none", "--aio", "native"},
		{"--cache", "directsync", "--aio", "native", "--merge", "off"},
		{"--loops", "1"},
		{"--loops", "3"},
		{"--merge", "off"},
		{"--merge", "on", "--loops", "2"},
		{"--merge", "off", "--aio", "threads"},
		{"--format", "raw"},
	}
	const size = 8 * mib
	data := sparsePattern(size, 11)
	for _, variant := range variants {
		t.Run(strings.Join(variant, " "), func(t *testing.T) {
			t.Parallel()
			dir := testenv.DiskDir(t)
			source := testenv.Image(t, dir, "source.raw", size, data)
			image := testenv.Image(t, dir, "disk.raw", size, nil)
			server := serveUnix(t, append(variant, image)...)
			testenv.Tool(t, "nbdcopy", "--connections=4", "--flush", source, server.URI)
			back := filepath.Join(dir, "back.raw")
			testenv.Tool(t, "nbdcopy", "--connections=4", server.URI, back)
			sameContent(t, back, data)
			server.Stop()
			sameContent(t, image, data)
			if st, err := os.Stat(image); err != nil || st.Size() != size {
				t.Errorf("image after the copy: %v, %v", st, err)
			}
		})
	}
}
