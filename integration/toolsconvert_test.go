package integration

import (
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"platter/integration/testenv"
)

// conversions are the kinds of images that are made here, with the flags for
// them; DIR is the folder of the new image.
var conversions = []struct{ name, format, flags string }{
	{"raw", "raw", "-O raw"},
	{"full raw", "raw", "-O raw -o preallocation=full"},
	{"qcow2", "qcow2", "-O qcow2"},
	{"v2", "qcow2", "-O qcow2 -o compat=0.10,cluster_size=512"},
	{"extended L2", "qcow2", "-O qcow2 -o extended_l2=on,lazy_refcounts=on"},
	{"preallocated", "qcow2", "-O qcow2 -o preallocation=metadata -o cluster_size=2M"},
	{"zlib", "qcow2", "-O qcow2 -c"},
	{"zstd", "qcow2", "-O qcow2 -c -o compression_type=zstd,cluster_size=4k"},
	{"raw data file", "qcow2", "-O qcow2 -o data_file=DIR/data,data_file_raw=on"},
}

// TestConvertFromQemuImg: whatever qemu-img makes is converted without a
// difference, to raw and to something else, in turn.
func TestConvertFromQemuImg(t *testing.T) {
	next := make(chan int, 1)
	next <- 0
	eachToolImage(t, func(t *testing.T, m toolImage, path string) {
		new := filepath.Join(testenv.DiskDir(t), "new")
		if m.refused {
			wantClearError(t, testenv.Platter(t, "convert", path, new), path, "encrypted")
			return
		}
		n := <-next
		next <- n + 1
		for _, c := range []int{0, 2 + n%(len(conversions)-2)} {
			expectConverted(t, path, fmt.Sprint(new, c), c, nil)
		}
	})
}

// TestConvertInAllDirections: each kind of image is made of a raw one and of a
// chain.
func TestConvertInAllDirections(t *testing.T) {
	t.Parallel()
	for _, m := range toolImages {
		if m.name != "raw" && m.name != "chain" && m.name != "zlib" {
			continue
		}
		for i, c := range conversions {
			t.Run(m.name+" to "+c.name, func(t *testing.T) {
				t.Parallel()
				expectConverted(t, m.make(t), filepath.Join(testenv.DiskDir(t), "new"), i, nil)
			})
		}
	}
}

// expectConverted converts an image; qemu-img must find no difference, and
// nothing wrong. more are flags, for which image is what has the same disk.
func expectConverted(t *testing.T, image, new string, conversion int, more []string) {
	t.Helper()
	c := conversions[conversion]
	flags := strings.Fields(strings.ReplaceAll(c.flags, "DIR", filepath.Dir(new)))
	source := image
	if len(more) > 0 {
		source, more = more[0], more[1:]
	}
	args := append(append([]string{"convert"}, flags...), more...)
	if out := succeed(t, append(args, source, new)...); out != "" {
		t.Errorf("%s: printed %q", c.name, out)
	}
	testenv.Tool(t, "qemu-img", "compare", "-F", c.format, image, new)
	if c.format == "qcow2" {
		testenv.Tool(t, "qemu-img", "check", "-q", new)
	}
}

// A snapshot is a disk of its own, which may have had another size.
func TestSnapshots(t *testing.T) {
	t.Parallel()
	dir := testenv.DiskDir(t)
	path, want := filepath.Join(dir, "disk.qcow2"), filepath.Join(dir, "want.raw")
	testenv.Tool(t, "qemu-img", "create", "-q", "-f", "qcow2", path, "8M")
	qemuWrites(t, path, "qcow2", scattered...)
	testenv.Tool(t, "qemu-img", "snapshot", "-c", "before", path)
	testenv.Tool(t, "qemu-img", "resize", "-q", path, "12M")
	qemuWrites(t, path, "qcow2", "write -P 77 0 12M")
	testenv.Tool(t, "qemu-img", "convert", "-l", "before", "-O", "raw", path, want)
	for _, name := range []string{"before", "1"} {
		for c := range conversions {
			new := filepath.Join(testenv.DiskDir(t), "new")
			expectConverted(t, want, new, c, []string{path, "--snapshot", name})
		}
		out := succeed(t, "info", "--snapshot", name, path)
		if !strings.Contains(out, "virtual size: 8 MiB") || strings.Count(out, "before") != 1 {
			t.Errorf("info --snapshot %s: %s", name, out)
		}
		server := serveUnix(t, "--read-only", "--snapshot", name, path)
		testenv.Tool(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", want, server.URI)
		server.Stop()
	}
	wantClearError(t, testenv.Platter(t, "convert", "--snapshot", "after", path, filepath.Join(dir, "none")), path, `"after"`)
	wantClearError(t, testenv.Platter(t, "serve", "--snapshot", "before", "--nbd", testenv.UnixAddr(t), path), "--read-only")
}

// A chain whose files lie elsewhere is served when that is allowed.
func TestAllowDir(t *testing.T) {
	t.Parallel()
	below, dir := testenv.DiskDir(t), testenv.DiskDir(t)
	base := testenv.Image(t, below, "base.raw", 4*mib, testenv.Pattern(int(mib), 1))
	overlay := func(name string) string {
		path := filepath.Join(dir, name)
		r := testenv.Platter(t, "create", "-f", "qcow2", "-b", base, "-F", "raw", path)
		if r.Code != 0 || !strings.Contains(r.Stderr, "allow-dir="+below) {
			t.Errorf("exit code %d, %q", r.Code, r.Stderr)
		}
		return path
	}
	for _, verb := range []string{"map", "info --backing-chain", "convert", "serve --nbd " + testenv.UnixAddr(t)} {
		top := overlay(strings.Fields(verb)[0])
		args := append(strings.Fields(verb), top)
		if verb == "convert" {
			args = append(args, filepath.Join(dir, "none"))
		}
		wantClearError(t, testenv.Platter(t, args...), top, base, "--allow-dir")
	}
	top := overlay("top.qcow2")
	server := serveUnix(t, "--allow-dir", below, "--metadata-cache", "1M", top)
	testenv.Tool(t, "qemu-img", "compare", "-U", "-f", "raw", "-F", "raw", base, server.URI)
	server.Stop()
	succeed(t, "convert", "--allow-dir", below, "--metadata-cache", "1M", top, filepath.Join(dir, "new.raw"))
	testenv.Tool(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", base, filepath.Join(dir, "new.raw"))
}

// What create makes is what qemu-img makes of the same words.
func TestCreateLikeQemuImg(t *testing.T) {
	t.Parallel()
	testenv.NeedTool(t, "qemu-img")
	for _, words := range []string{
		"disk 5M", "-f raw disk 5000000", "-f raw -o preallocation=full disk 1M",
		"-f qcow2 disk 5M", "-f qcow2 -o compat=0.10,cluster_size=4k disk 3G", "-f qcow2 -o refcount_bits=1 -o lazy_refcounts=on disk 1T",
		"-f qcow2 -o extended_l2=on,compression_type=zstd disk 5M", "-f qcow2 -o preallocation=full disk 5M", "-f qcow2 -o size=7M disk",
		"-f qcow2 -b base.raw -F raw disk", "-f qcow2 -b base.raw -F raw disk 7M", "-f qcow2 -o backing_file=base.raw,backing_fmt=raw disk",
		"-f qcow2 -o data_file=data.raw disk 5M", "-f qcow2 -o data_file=data.raw,data_file_raw=on disk 5M",
	} {
		t.Run(words, func(t *testing.T) {
			t.Parallel()
			var infos, maps [2]any
			for i, name := range []string{testenv.Binary(t), "qemu-img"} {
				dir := testenv.DiskDir(t)
				testenv.Image(t, dir, "base.raw", 4*mib, testenv.Pattern(1000, 1))
				args := append([]string{"create"}, strings.Fields(words)...)
				if i == 1 {
					args = append([]string{"create", "-q"}, strings.Fields(words)...)
				}
				runIn(t, dir, name, args...)
				info := normal(t, runIn(t, dir, "qemu-img", "info", "--output", "json", "disk")).(map[string]any)
				delete(info, "actual-size")
				delete(info, "children")
				infos[i] = info
				if info["format"] == "qcow2" {
					runIn(t, dir, "qemu-img", "check", "-q", "disk")
					maps[i] = normal(t, runIn(t, dir, "qemu-img", "map", "--output", "json", "disk"))
				}
			}
			if fmt.Sprint(infos[0]) != fmt.Sprint(infos[1]) {
				t.Errorf("info is\n%v\nqemu-img's\n%v", infos[0], infos[1])
			}
			// Of clusters that were never written qemu-img tells holes only when they
			// are many, which depends on how sparse the tables are too.
			if !strings.Contains(words, "preallocation") && !strings.Contains(words, "data_file_raw") && fmt.Sprint(maps[0]) != fmt.Sprint(maps[1]) {
				t.Errorf("map is\n%v\nqemu-img's\n%v", maps[0], maps[1])
			}
		})
	}
}

// runIn runs a program in a folder; it must succeed.
func runIn(t *testing.T, dir, name string, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), name, args...)
	cmd.Dir = dir
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s %q: %v\n%s%s", name, args, err, out, &stderr)
	}
	return string(out)
}

// A conversion that a signal interrupts leaves nothing behind.
func TestConvertInterrupted(t *testing.T) {
	t.Parallel()
	dir := testenv.DiskDir(t)
	// Compressing this takes seconds.
	source := testenv.Image(t, dir, "source.raw", 512*mib, nil)
	f, err := os.OpenFile(source, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	block := testenv.Pattern(int(mib), 1)
	for off := int64(0); off < 512*mib; off += mib {
		if _, err := f.WriteAt(block, off); err != nil {
			t.Fatal(err)
		}
	}
	for _, signal := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM} {
		for _, more := range []string{"", ",data"} {
			interruptConvert(t, signal, source, filepath.Join(dir, "new.qcow2"), more != "")
		}
	}
}

func interruptConvert(t *testing.T, signal os.Signal, source, new string, dataFile bool) {
	t.Helper()
	args := []string{"convert", "-c", "-O", "qcow2", "-o", "cluster_size=2M", source, new}
	if dataFile {
		args = []string{"convert", "-O", "qcow2", "-o", "data_file=" + new + ".data", source, new}
	}
	var stderr strings.Builder
	cmd := exec.Command(testenv.Binary(t), args...)
	cmd.Stderr = &stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	kill := time.AfterFunc(time.Minute, func() { _ = cmd.Process.Kill() })
	defer kill.Stop()
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		if _, err := os.Stat(new); err == nil {
			break
		}
	}
	if err := cmd.Process.Signal(signal); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait() // the exit code is in ProcessState
	if code := cmd.ProcessState.ExitCode(); code != 1 || !strings.Contains(stderr.String(), "interrupted") || !strings.Contains(stderr.String(), new) {
		t.Errorf("%v: exit code %d: %s", signal, code, &stderr)
	}
	for _, path := range []string{new, new + ".data"} {
		if _, err := os.Lstat(path); !os.IsNotExist(err) {
			t.Errorf("%v: %s is left behind: %v", signal, path, err)
		}
	}
}

// A file that exists is never written to.
func TestToolsKeepWhatExists(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	source := testenv.Image(t, dir, "source.raw", mib, []byte("source"))
	precious := testenv.Image(t, dir, "precious", 8, []byte("precious"))
	for _, args := range [][]string{
		{"create", precious, "1M"}, {"create", "-f", "qcow2", precious, "1M"}, {"create", "-f", "qcow2", "-o", "data_file=precious", filepath.Join(dir, "new"), "1M"},
		{"convert", source, precious}, {"convert", "-O", "qcow2", source, precious}, {"convert", "-O", "qcow2", "-c", source, precious},
		{"convert", "-O", "qcow2", "-o", "data_file=precious", source, filepath.Join(dir, "new")}, {"convert", source, source},
	} {
		wantClearError(t, testenv.Platter(t, args...), "file exists", "kept as it is")
	}
	sameContent(t, precious, []byte("precious"))
	names, err := fs.Glob(os.DirFS(dir), "*")
	if err != nil || len(names) != 2 {
		t.Errorf("left behind: %q, %v", names, err)
	}
}
