package cli

import (
	"bytes"
	"encoding/json"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"platter/integration/testenv"
)

// infoOf is what info says of an image as JSON.
func infoOf(t *testing.T, path string) map[string]any {
	t.Helper()
	var info map[string]any
	if err := json.Unmarshal([]byte(must(t, "info", "--output", "json", path)), &info); err != nil {
		t.Fatal(err)
	}
	return info
}

func TestCreateRaw(t *testing.T) {
	dir := testenv.DiskDir(t)
	for _, c := range []struct {
		name string
		args []string
		size int64
		used bool // all of the space is taken
	}{
		{"default", []string{"1M"}, 1 << 20, false},
		{"odd", []string{"1001"}, 1001, false},
		{"named", []string{"-f", "raw", "-o", "preallocation=off", "1.5M"}, 3 << 19, false},
		{"reserved", []string{"-o", "preallocation=falloc", "1M"}, 1 << 20, true},
		{"filled", []string{"-o", "preallocation=full", "3000000"}, 3000000, true},
		{"size as an option", []string{"-o", "size=2M"}, 2 << 20, false},
		{"empty", []string{"0"}, 0, false},
	} {
		path := filepath.Join(dir, strings.ReplaceAll(c.name, " ", "-"))
		must(t, append([]string{"create", path}, c.args...)...)
		var st unix.Stat_t
		if err := unix.Stat(path, &st); err != nil {
			t.Fatal(err)
		}
		if st.Size != c.size || st.Blocks*512 >= c.size && c.size > 4096 != c.used {
			t.Errorf("%s: %d bytes, %d blocks", c.name, st.Size, st.Blocks)
		}
	}
}

func TestCreateQcow2(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "disk.qcow2")
	must(t, "create", "-f", "qcow2", "-o", "cluster_size=4k,lazy_refcounts=on", "-o", "refcount_bits=1", path, "1000000")
	info := infoOf(t, path)
	data := info["format-specific"].(map[string]any)["data"].(map[string]any)
	if info["virtual-size"] != 1000448.0 || info["cluster-size"] != 4096.0 || data["lazy-refcounts"] != true || data["refcount-bits"] != 1.0 {
		t.Errorf("%v", info)
	}
	must(t, "check", path)
}

// Without a size an overlay has that of its backing file, and 0 is a size.
func TestCreateUponBackingFile(t *testing.T) {
	dir := t.TempDir()
	base := testenv.Image(t, dir, "base.raw", 3<<20, []byte("abc"))
	for name, c := range map[string]struct {
		args []string
		size float64
	}{
		"size of the backing file": {nil, 3 << 20},
		"size given":               {[]string{"1M"}, 1 << 20},
		"size 0":                   {[]string{"0"}, 0},
		"size as an option":        {[]string{"-o", "size=5M"}, 5 << 20},
	} {
		path := filepath.Join(dir, name)
		must(t, append([]string{"create", "-f", "qcow2", "-b", "base.raw", "-F", "raw", path}, c.args...)...)
		if info := infoOf(t, path); info["virtual-size"] != c.size || info["backing-filename"] != "base.raw" || info["backing-filename-format"] != "raw" {
			t.Errorf("%s: %v", name, info)
		}
	}
	path := filepath.Join(dir, "by-option")
	must(t, "create", "-f", "qcow2", "-o", "backing_file=base.raw,backing_fmt=raw", path)
	if got := readQcow2(t, path); len(got) != 3<<20 || !bytes.HasPrefix(got, []byte("abc\x00")) {
		t.Errorf("reads %d bytes, %q", len(got), got[:4])
	}
	if data, err := os.ReadFile(base); err != nil || !bytes.HasPrefix(data, []byte("abc\x00")) {
		t.Errorf("the backing file: %q, %v", data[:4], err)
	}
}

// A backing file elsewhere can be named, but whoever opens the image has to
// allow it: that is said at once.
func TestCreateUponBackingFileElsewhere(t *testing.T) {
	var log bytes.Buffer
	old := slog.Default()
	t.Cleanup(func() { slog.SetDefault(old) })
	elsewhere, dir := t.TempDir(), t.TempDir()
	base := testenv.Image(t, elsewhere, "base.raw", 1<<20, nil)
	path := filepath.Join(dir, "disk.qcow2")
	c, _, err := parse([]string{"create", "-f", "qcow2", "-b", base, "-F", "raw", path}, &app{stdout: &log}, func(int) {})
	if err != nil {
		t.Fatal(err)
	}
	slog.SetDefault(slog.New(slog.NewTextHandler(&log, nil)))
	if err := c.Create.Run(); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(log.String(), "allow-dir="+elsewhere) {
		t.Errorf("log: %q", &log)
	}
	refused(t, []string{"map", path}, base, "outside", "--allow-dir")
	must(t, "map", "--allow-dir", elsewhere, path)
}

func TestCreateRefuses(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "new")
	base := testenv.Image(t, dir, "base.raw", 1<<20, nil)
	used := makeQcow2(t, filepath.Join(dir, "used.qcow2"), 1<<20, "")
	lock(t, used)
	for args, words := range map[string][]string{
		"-f raw":                                    {path, "no size", "512M"},
		"-f qcow2":                                  {path, "no size", "512M"},
		"-f raw 1M -o size=1M":                      {path, "two sizes"},
		"-f qcow2 1M -o size=1M":                    {path, "two sizes"},
		"-f raw -b base.raw -F raw 1M":              {path, "raw image has no backing file", "qcow2"},
		"-f raw -o cluster_size=4k 1M":              {path, `"cluster_size"`, "preallocation"},
		"-f raw -o preallocation=metadata 1M":       {path, `"metadata"`, "falloc"},
		"-f raw -o size=many":                       {path, "many"},
		"-f raw 7E":                                 {path, "too large"},
		"-f qcow2 -o nosuch=1 1M":                   {path, `"nosuch"`, "cluster_size"},
		"-f qcow2 -o cluster_size=3 1M":             {path, "cluster_size=3", "power of two"},
		"-f qcow2 -b base.raw 1M":                   {path, "backing_file", "stated format"},
		"-f qcow2 -F raw 1M":                        {path, "backing_fmt", "needs a backing_file"},
		"-f qcow2 -b none.raw -F raw 1M":            {path, "none.raw", "no such file"},
		"-f qcow2 -b base.raw -F qcow2 1M":          {path, "base.raw", "not a qcow2 image"},
		"-f qcow2 -b base.raw -F nosuch 1M":         {path, `"nosuch"`, "vmdk"},
		"-f qcow2 -b base.raw -F vmdk":              {path, "size", "not known"},
		"-f qcow2 -b used.qcow2 -F qcow2":           {path, used, "in use"},
		"-f qcow2 -o encryption=on 1M":              {path, "encryption"},
		"-f qcow2 -o data_file=base.raw 1M":         {base, "file exists", "kept as it is"},
		"-f qcow2 many":                             {"not a size", "512M"},
		"-f qcow2 -o preallocation=metadata 1000P":  {path, "size"},
		"-f qcow2 -o cluster_size=512 -o size=200G": {path, "size=214748364800", "larger cluster_size"},
	} {
		refused(t, append([]string{"create", path}, strings.Fields(args)...), words...)
		missing(t, path)
	}
	for _, format := range []string{"raw", "qcow2"} {
		refused(t, []string{"create", "-f", format, base, "1M"}, base, "file exists", "kept as it is")
		refused(t, []string{"create", "-f", format, dir + "/none/x", "1M"}, dir+"/none/x", "no such file")
	}
	if st, err := os.Stat(base); err != nil || st.Size() != 1<<20 {
		t.Errorf("the file that existed: %v, %v", st, err)
	}
}

// A raw image that can't be filled is removed again.
func TestCreateRawWithoutSpace(t *testing.T) {
	path := filepath.Join(smallDir(t), "disk.raw")
	for _, mode := range []string{"falloc", "full"} {
		refused(t, []string{"create", "-o", "preallocation=" + mode, path, "16M"}, path, "no space", "free some space")
		missing(t, path)
	}
}
