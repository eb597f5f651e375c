package formats_test

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"platter/aio"
	"platter/formats"
)

// A toy image is a text file that names the files below it: enough to follow a
// chain.
func init() {
	formats.Register(formats.Driver{
		Name:  "toy",
		Probe: func(header []byte) bool { return bytes.HasPrefix(header, []byte("toy\n")) },
		Open:  openToy,
	})
}

// toy is what a toy image says.
type toy struct {
	backing, format string
	data            string
	noBacking       bool // as if the name were not there, not even empty
}

// write makes the image.
func (y toy) write(t *testing.T, path string) {
	t.Helper()
	text := "toy\n"
	if !y.noBacking {
		text += fmt.Sprintf("backing %s\nformat %s\n", y.backing, y.format)
	}
	if y.data != "" {
		text += fmt.Sprintf("data %s\n", y.data)
	}
	put(t, path, text)
}

// put writes a file, and makes its folder.
func put(t *testing.T, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

type toyImage struct {
	s     formats.Source
	below formats.Image // nil without a backing file
	data  *aio.File     // nil without a data file
}

func openToy(s formats.Source) (formats.Image, error) {
	if !bytes.HasPrefix(s.Header, []byte("toy\n")) {
		return nil, fmt.Errorf("%w: not a toy", formats.ErrFormat)
	}
	text, err := os.ReadFile(fmt.Sprintf("/proc/self/fd/%d", s.File.Fd()))
	if err != nil {
		return nil, err
	}
	says := map[string]string{}
	for line := range strings.Lines(string(text)) {
		key, value, _ := strings.Cut(strings.TrimSuffix(line, "\n"), " ")
		says[key] = value
	}
	im := &toyImage{s: s}
	if name, ok := says["backing"]; ok {
		if im.below, err = s.OpenBacking(name, says["format"]); err != nil {
			return nil, err
		}
	}
	if name, ok := says["data"]; ok {
		if im.data, err = s.OpenData(name); err != nil {
			if im.below != nil {
				im.below.Close()
			}
			return nil, err
		}
	}
	return im, nil
}

func (im *toyImage) Submit(_ *aio.Loop, batch []*aio.Request) {
	for _, r := range batch {
		r.Complete(unix.EIO)
	}
}
func (im *toyImage) Size() int64            { return 0 }
func (im *toyImage) ReadOnly() bool         { return im.s.Options.ReadOnly }
func (im *toyImage) Limits() formats.Limits { return formats.Limits{} }
func (im *toyImage) Format() string         { return "toy" }
func (im *toyImage) Close() error {
	errs := []error{im.s.File.Close()}
	if im.below != nil {
		errs = append(errs, im.below.Close())
	}
	if im.data != nil {
		errs = append(errs, im.data.Close())
	}
	return errors.Join(errs...)
}

// TestChain opens backing files by every kind of name. The raw file that it must
// come to has a length of its own.
func TestChain(t *testing.T) {
	const size = 1234
	for _, c := range []struct {
		name  string
		make  func(t *testing.T, dir string) // all but the base
		image string
		base  string
		allow []string // within the test's folder
	}{
		{"beside the image", func(t *testing.T, dir string) {
			toy{backing: "base", format: "raw"}.write(t, dir+"/image")
		}, "image", "base", nil},
		{"in a folder below", func(t *testing.T, dir string) {
			toy{backing: "sub/base", format: "raw"}.write(t, dir+"/image")
		}, "image", "sub/base", nil},
		{"relative to the file that names it, not to the first", func(t *testing.T, dir string) {
			toy{backing: "sub/middle", format: "toy"}.write(t, dir+"/image")
			toy{backing: "base", format: "raw"}.write(t, dir+"/sub/middle")
			put(t, dir+"/base", "another")
		}, "image", "sub/base", nil},
		{"up again, but not out", func(t *testing.T, dir string) {
			toy{backing: "sub/middle", format: "toy"}.write(t, dir+"/image")
			toy{backing: "../base", format: "raw"}.write(t, dir+"/sub/middle")
		}, "image", "base", nil},
		{"absolute", func(t *testing.T, dir string) {
			toy{backing: dir + "/base", format: "raw"}.write(t, dir+"/image")
		}, "image", "base", nil},
		{"file:", func(t *testing.T, dir string) {
			toy{backing: "file:base", format: "raw"}.write(t, dir+"/image")
		}, "image", "base", nil},
		{"file:///", func(t *testing.T, dir string) {
			toy{backing: "file://" + dir + "/base", format: "raw"}.write(t, dir+"/image")
		}, "image", "base", nil},
		{"colon that is no protocol's", func(t *testing.T, dir string) {
			toy{backing: "./nbd:base", format: "raw"}.write(t, dir+"/image")
		}, "image", "nbd:base", nil},
		{"symbolic link that stays inside", func(t *testing.T, dir string) {
			toy{backing: "link", format: "raw"}.write(t, dir+"/image")
			symlink(t, "sub/base", dir+"/link")
		}, "image", "sub/base", nil},
		{"image that is a symbolic link", func(t *testing.T, dir string) {
			toy{backing: "base", format: "raw"}.write(t, dir+"/elsewhere/real")
			symlink(t, "elsewhere/real", dir+"/image")
		}, "image", "base", nil},
		{"absolute, in a folder that is allowed", func(t *testing.T, dir string) {
			toy{backing: dir + "/store/base", format: "raw"}.write(t, dir+"/sub/image")
		}, "sub/image", "store/base", []string{"other", "store"}},
		{"../, in a folder that is allowed", func(t *testing.T, dir string) {
			toy{backing: "../store/base", format: "raw"}.write(t, dir+"/sub/image")
		}, "sub/image", "store/base", []string{"store"}},
		{"symbolic link within a folder that is allowed", func(t *testing.T, dir string) {
			toy{backing: "../store/link", format: "raw"}.write(t, dir+"/sub/image")
			symlink(t, "base", dir+"/store/link")
		}, "sub/image", "store/base", []string{"store"}},
		{"from a folder that is allowed back to the image's", func(t *testing.T, dir string) {
			toy{backing: "../store/middle", format: "toy"}.write(t, dir+"/sub/image")
			toy{backing: "../sub/base", format: "raw"}.write(t, dir+"/store/middle")
		}, "sub/image", "sub/base", []string{"store"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			put(t, filepath.Join(dir, c.base), strings.Repeat("x", size))
			if err := os.Mkdir(dir+"/other", 0o755); err != nil {
				t.Fatal(err)
			}
			c.make(t, dir)
			var o formats.Options
			for _, d := range c.allow {
				o.AllowDirs = append(o.AllowDirs, filepath.Join(dir, d))
			}
			image := mustOpen(t, filepath.Join(dir, c.image), o)
			bottom := image
			for toy, ok := bottom.(*toyImage); ok; toy, ok = bottom.(*toyImage) {
				bottom = toy.below
			}
			if bottom.Size() != size || !bottom.ReadOnly() || image.ReadOnly() {
				t.Errorf("a file of %d bytes, read-only %v, below an image that is read-only %v", bottom.Size(), bottom.ReadOnly(), image.ReadOnly())
			}
			if err := image.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}

func symlink(t *testing.T, to, path string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(to, path); err != nil {
		t.Fatal(err)
	}
}

// TestChainWorkingDirectory: where the program was started matters to the name
// of the image and to the folders that the user allows, not to what the image
// names.
func TestChainWorkingDirectory(t *testing.T) {
	dir := t.TempDir()
	toy{backing: "base", format: "raw"}.write(t, dir+"/sub/image")
	toy{backing: "../store/base", format: "raw"}.write(t, dir+"/sub/far")
	put(t, dir+"/sub/base", "12345")
	put(t, dir+"/store/base", "1234567")
	put(t, dir+"/base", "wrong")
	put(t, dir+"/other/base", "wrong")
	for _, c := range []struct{ in, image, allow string }{
		{"sub", "image", ""},
		{"sub", "./image", ""},
		{".", "sub/image", ""},
		{"other", "../sub/image", ""},
		{"other", dir + "/sub/image", ""},
		{"sub", "far", "../store"},
		{".", "sub/far", "store"},
		{"other", "../sub/far", dir + "/store"},
	} {
		t.Run(c.image+" in "+c.in, func(t *testing.T) {
			t.Chdir(filepath.Join(dir, c.in))
			var o formats.Options
			want := int64(5)
			if c.allow != "" {
				o.AllowDirs, want = []string{c.allow}, 7
			}
			image := mustOpen(t, c.image, o)
			defer image.Close()
			if got := image.(*toyImage).below.Size(); got != want {
				t.Errorf("the backing file has %d bytes, want %d", got, want)
			}
		})
	}
}

// TestChainErrors wants of every error its kind, and that the message names the
// image, the way to the file, the cause and the remedy.
func TestChainErrors(t *testing.T) {
	for _, c := range []struct {
		name string
		y    toy
		is   error
		says []string
	}{
		{"missing", toy{backing: "none", format: "raw"}, fs.ErrNotExist, []string{`backing file "none"`, "no such file", "qemu-img rebase -u"}},
		{"missing data file", toy{noBacking: true, data: "none"}, fs.ErrNotExist, []string{`data file "none"`, "no such file"}},
		{"format not stated", toy{backing: "raw"}, formats.ErrNoFormat, []string{"not stated", "qemu-img rebase -u -b raw -F FORMAT"}},
		{"format to be guessed", toy{backing: "raw", format: "auto"}, formats.ErrFormat, []string{`"auto"`, "-F FORMAT"}},
		{"unknown format", toy{backing: "raw", format: "floppy"}, formats.ErrFormat, []string{`"floppy"`, "-F FORMAT"}},
		{"format without a driver", toy{backing: "raw", format: "vmdk"}, formats.ErrFormat, []string{`"vmdk"`, "-F FORMAT"}},
		{"wrong format", toy{backing: "raw", format: "toy"}, formats.ErrFormat, []string{"not a toy", "-F FORMAT"}},
		{"empty name", toy{format: "raw"}, formats.ErrProtocol, []string{"the name is empty", "qemu-img rebase -u"}},
		{"json:", toy{backing: `json:{"driver":"nbd"}`, format: "raw"}, formats.ErrProtocol, []string{"json:", "only files"}},
		{"json: for a file", toy{backing: `json:{"file.filename":"raw"}`, format: "raw"}, formats.ErrProtocol, []string{"json:", "only files"}},
		{"nbd://", toy{backing: "nbd://localhost/disk", format: "raw"}, formats.ErrProtocol, []string{"nbd://", "only files"}},
		{"ssh:", toy{backing: "ssh:raw", format: "raw"}, formats.ErrProtocol, []string{"ssh:raw", "only files"}},
		{"fat:", toy{backing: "fat:/etc", format: "raw"}, formats.ErrProtocol, []string{"fat:/etc", "only files"}},
		{"file:json:", toy{backing: "file:json:{}", format: "raw"}, formats.ErrProtocol, []string{"json:{}", "only files"}},
		{"json: as data file", toy{noBacking: true, data: "json:{}"}, formats.ErrProtocol, []string{"data file", "only files"}},
		{"directory", toy{backing: "folder", format: "raw"}, formats.ErrIsDirectory, []string{"is a directory"}},
		{"directory as data file", toy{noBacking: true, data: "folder"}, formats.ErrIsDirectory, []string{"data file", "is a directory"}},
		{"fifo", toy{backing: "fifo", format: "raw"}, formats.ErrNotImage, []string{"neither a regular file nor a block device"}},
		{"fifo as data file", toy{noBacking: true, data: "fifo"}, formats.ErrNotImage, []string{"neither a regular file nor a block device"}},
		{"socket", toy{backing: "socket", format: "raw"}, formats.ErrNotImage, []string{"neither a regular file nor a block device"}},
		{"character device", toy{backing: "/dev/null", format: "raw"}, formats.ErrNotImage, []string{"/dev/null", "neither a regular file"}},
		{"absolute", toy{backing: "/etc/passwd", format: "raw"}, formats.ErrOutside, []string{"/etc/passwd", "--allow-dir"}},
		{"absolute data file", toy{noBacking: true, data: "/etc/passwd"}, formats.ErrOutside, []string{`data file "/etc/passwd"`, "--allow-dir"}},
		{"absolute by detour", toy{backing: "file:///etc/passwd", format: "raw"}, formats.ErrOutside, []string{"/etc/passwd", "--allow-dir"}},
		{"../", toy{backing: "../secret", format: "raw"}, formats.ErrOutside, []string{`"../secret"`, "--allow-dir"}},
		{"../ on the way", toy{backing: "folder/../../secret", format: "raw"}, formats.ErrOutside, []string{"--allow-dir"}},
		{"../ into a folder of like name", toy{backing: "../images2/secret", format: "raw"}, formats.ErrOutside, []string{"--allow-dir"}},
		{"symbolic link that leads out", toy{backing: "out", format: "raw"}, formats.ErrOutside, []string{`"out"`, "--allow-dir"}},
		{"absolute symbolic link", toy{backing: "absolute", format: "raw"}, formats.ErrOutside, []string{"--allow-dir"}},
		{"symbolic link to a folder outside", toy{backing: "up/secret", format: "raw"}, formats.ErrOutside, []string{"--allow-dir"}},
		{"symbolic link of the process", toy{backing: "/proc/self/root/etc/passwd", format: "raw"}, formats.ErrOutside, nil},
		{"data file by a symbolic link that leads out", toy{noBacking: true, data: "out"}, formats.ErrOutside, []string{"--allow-dir"}},
		{"dangling symbolic link", toy{backing: "dangling", format: "raw"}, fs.ErrNotExist, []string{"no such file"}},
		{"symbolic link to itself", toy{backing: "round", format: "raw"}, unix.ELOOP, []string{`"round"`}},
		{"name with a zero byte", toy{backing: "ra\x00w", format: "raw"}, unix.EINVAL, []string{"invalid argument"}},
		{"name that is too long", toy{backing: strings.Repeat("n", 300), format: "raw"}, unix.ENAMETOOLONG, []string{"file name too long"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "images")
			put(t, dir+"/raw", "a raw image")
			put(t, dir+"/folder/file", "")
			put(t, dir+"/../secret", "")
			put(t, dir+"/../images2/secret", "")
			symlink(t, "../secret", dir+"/out")
			symlink(t, filepath.Join(dir, "../secret"), dir+"/absolute")
			symlink(t, "..", dir+"/up")
			symlink(t, "none", dir+"/dangling")
			symlink(t, "round", dir+"/round")
			if err := unix.Mkfifo(dir+"/fifo", 0o600); err != nil {
				t.Fatal(err)
			}
			if err := unix.Mknod(dir+"/socket", unix.S_IFSOCK|0o600, 0); err != nil {
				t.Fatal(err)
			}
			// At the top, and as the last of three.
			top, over, middle := dir+"/image", dir+"/over", dir+"/middle"
			c.y.write(t, top)
			toy{backing: "middle", format: "toy"}.write(t, over)
			c.y.write(t, middle)
			for image, way := range map[string]string{top: top, over: over + " -> " + middle} {
				o := formats.Options{}
				if strings.HasPrefix(c.y.backing, "/dev/") {
					o.AllowDirs = []string{"/dev"}
				}
				opened, err := formats.Open(image, o)
				if err == nil {
					opened.Close()
					t.Fatal("opened")
				}
				var typed *formats.Error
				if !errors.Is(err, c.is) || !errors.As(err, &typed) || typed.Path != image {
					t.Errorf("%#v, want %v for %s", err, c.is, image)
				}
				for _, text := range append(c.says, " of "+way+":", "(") {
					if !strings.Contains(err.Error(), text) {
						t.Errorf("%q does not say %q", err, text)
					}
				}
				if strings.Contains(err.Error(), "/proc/self/fd") {
					t.Errorf("%q names the file as nobody knows it", err)
				}
				if n := strings.Count(err.Error(), "("); n != 1 {
					t.Errorf("%q has %d remedies", err, n)
				}
				mustOpen(t, image, formats.Options{Format: "raw"}).Close() // nothing is left locked
			}
		})
	}
}

// TestChainOutsideNamesFolders: who reads the message sees where files may come
// from.
func TestChainOutsideNamesFolders(t *testing.T) {
	dir, store := t.TempDir(), t.TempDir()
	toy{backing: "/etc/passwd", format: "raw"}.write(t, dir+"/image")
	_, err := formats.Open(dir+"/image", formats.Options{AllowDirs: []string{store}})
	if !errors.Is(err, formats.ErrOutside) || !strings.Contains(err.Error(), dir+", "+store) {
		t.Errorf("%v does not name %s and %s", err, dir, store)
	}
	_, err = formats.Open(dir+"/image", formats.Options{AllowDirs: []string{store + "/none"}})
	if err == nil || !strings.Contains(err.Error(), "--allow-dir") && !strings.Contains(err.Error(), store+"/none") {
		t.Errorf("a folder that doesn't exist: %v", err)
	}
}

// TestChainAllowedFolderLeadsOut: a folder that is allowed is no door to others.
func TestChainAllowedFolderLeadsOut(t *testing.T) {
	dir := t.TempDir()
	toy{backing: "../store/link", format: "raw"}.write(t, dir+"/sub/image")
	put(t, dir+"/secret", "")
	symlink(t, "../secret", dir+"/store/link")
	image, err := formats.Open(dir+"/sub/image", formats.Options{AllowDirs: []string{dir + "/store"}})
	if !errors.Is(err, formats.ErrOutside) {
		t.Errorf("%v, %v", image, err)
	}
}

// TestChainLoop: a file that is its own backing file, at once or by a detour, by
// its name or by another.
func TestChainLoop(t *testing.T) {
	for _, length := range []int{1, 2, 3} {
		for _, way := range []string{"name", "symbolic link", "hard link", "data file"} {
			t.Run(fmt.Sprintf("%d by %s", length, way), func(t *testing.T) {
				dir := t.TempDir()
				name := func(i int) string { return fmt.Sprintf("image%d", i) }
				for i := range length {
					y := toy{backing: name(i + 1), format: "toy"}
					if i == length-1 {
						switch way {
						case "name":
							y.backing = name(0)
						case "symbolic link":
							symlink(t, name(0), filepath.Join(dir, name(length)))
						case "data file":
							y = toy{noBacking: true, data: name(0)}
						}
					}
					y.write(t, filepath.Join(dir, name(i)))
				}
				if way == "hard link" {
					if err := os.Link(filepath.Join(dir, name(0)), filepath.Join(dir, name(length))); err != nil {
						t.Fatal(err)
					}
				}
				first := filepath.Join(dir, name(0))
				chain := first
				for i := 1; i < length; i++ {
					chain += " -> " + filepath.Join(dir, name(i))
				}
				last := first
				if way == "symbolic link" || way == "hard link" {
					last = filepath.Join(dir, name(length))
				}
				chain += " -> " + last
				for _, o := range []formats.Options{{}, {ReadOnly: true}, {ReadOnly: true, ForceShare: true}} {
					image, err := formats.Open(first, o)
					if err == nil {
						image.Close()
						t.Fatalf("%+v: opened", o)
					}
					if !errors.Is(err, formats.ErrChainLoop) {
						t.Errorf("%+v: %v", o, err)
					}
					for _, text := range []string{chain, "loop", "give the image another"} {
						if !strings.Contains(err.Error(), text) {
							t.Errorf("%+v: %q does not say %q", o, err, text)
						}
					}
				}
			})
		}
	}
}

// makeChain makes an image with so many files, the last of which is raw, and
// returns the path of the first.
func makeChain(t *testing.T, files int) string {
	t.Helper()
	dir := t.TempDir()
	for i := range files - 1 {
		y := toy{backing: fmt.Sprint(i + 1), format: "toy"}
		if i == files-2 {
			y.format = "raw"
		}
		y.write(t, filepath.Join(dir, fmt.Sprint(i)))
	}
	put(t, filepath.Join(dir, fmt.Sprint(files-1)), "the end")
	return filepath.Join(dir, "0")
}

// TestChainDepth: an image may have MaxChain files and no more.
func TestChainDepth(t *testing.T) {
	for _, files := range []int{2, 30, formats.MaxChain} {
		if err := mustOpen(t, makeChain(t, files), formats.Options{}).Close(); err != nil {
			t.Errorf("%d files: %v", files, err)
		}
	}
	path := makeChain(t, formats.MaxChain+1)
	image, err := formats.Open(path, formats.Options{})
	if err == nil {
		image.Close()
		t.Fatalf("opened %d files", formats.MaxChain+1)
	}
	if !errors.Is(err, formats.ErrChainDepth) {
		t.Error(err)
	}
	for _, text := range []string{path, fmt.Sprint(formats.MaxChain), " -> ", filepath.Join(filepath.Dir(path), fmt.Sprint(formats.MaxChain-1)), "commit"} {
		if !strings.Contains(err.Error(), text) {
			t.Errorf("%q does not say %q", err, text)
		}
	}
	if len(err.Error()) > 4096 {
		t.Errorf("a message of %d bytes", len(err.Error()))
	}
	mustOpen(t, path, formats.Options{Format: "raw"}).Close() // all of it was closed
}

// TestChainDepthData: a data file counts, too.
func TestChainDepthData(t *testing.T) {
	for files, fine := range map[int]bool{formats.MaxChain: true, formats.MaxChain + 1: false} {
		path := makeChain(t, files-1)
		last := filepath.Join(filepath.Dir(path), fmt.Sprint(files-3))
		toy{noBacking: true, data: fmt.Sprint(files - 2)}.write(t, last)
		toy{backing: fmt.Sprint(files - 3), format: "toy"}.write(t, filepath.Join(filepath.Dir(path), fmt.Sprint(files-4)))
		// One more between the first and the second.
		toy{backing: "between", format: "toy"}.write(t, path)
		toy{backing: "1", format: "toy"}.write(t, filepath.Join(filepath.Dir(path), "between"))
		image, err := formats.Open(path, formats.Options{})
		if err == nil {
			image.Close()
		}
		if fine != (err == nil) || err != nil && !errors.Is(err, formats.ErrChainDepth) {
			t.Errorf("%d files: %v", files, err)
		}
	}
}

// TestChainLongMessage: what is wrong far down is told once, not by every file
// above.
func TestChainLongMessage(t *testing.T) {
	path := makeChain(t, 100)
	end := filepath.Join(filepath.Dir(path), "99")
	if err := os.Remove(end); err != nil {
		t.Fatal(err)
	}
	_, err := formats.Open(path, formats.Options{})
	if !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), `backing file "99"`) {
		t.Error(err)
	}
	for i, most := range map[string]int{"0": 2, "50": 1, "97": 1, "98": 2} { // the first and the one to change twice
		file := filepath.Join(filepath.Dir(path), i)
		if n := strings.Count(err.Error()+" ", file+" ") + strings.Count(err.Error(), file+":") + strings.Count(err.Error(), file+")"); n < 1 || n > most {
			t.Errorf("%q names %s %d times, want %d at most", err, file, n, most)
		}
	}
}

// TestChainLocks: backing files are shared, but not with who writes to them.
func TestChainLocks(t *testing.T) {
	dir := t.TempDir()
	put(t, dir+"/base", "a raw image")
	for _, name := range []string{"one", "two"} {
		toy{backing: "base", format: "raw"}.write(t, filepath.Join(dir, name))
	}
	raw := formats.Options{Format: "raw"}

	writer := mustOpen(t, dir+"/base", raw)
	for _, o := range []formats.Options{{}, {ReadOnly: true}} {
		image, err := formats.Open(dir+"/one", o)
		if err == nil {
			image.Close()
			t.Fatalf("%+v: opened while the backing file is written to", o)
		}
		if !errors.Is(err, formats.ErrLocked) {
			t.Error(err)
		}
		for _, text := range []string{`backing file "base" of ` + dir + "/one", "in use by this very process", "stop that program"} {
			if !strings.Contains(err.Error(), text) {
				t.Errorf("%q does not say %q", err, text)
			}
		}
	}
	mustOpen(t, dir+"/one", formats.Options{ReadOnly: true, ForceShare: true}).Close()
	writer.Close()

	one := mustOpen(t, dir+"/one", formats.Options{})
	two := mustOpen(t, dir+"/two", formats.Options{})
	if image, err := formats.Open(dir+"/base", raw); !errors.Is(err, formats.ErrLocked) {
		t.Errorf("the base of open images is opened for writing: %v, %v", image, err)
	}
	one.Close()
	if image, err := formats.Open(dir+"/base", raw); !errors.Is(err, formats.ErrLocked) {
		t.Errorf("the base of an open image is opened for writing: %v, %v", image, err)
	}
	two.Close()
	mustOpen(t, dir+"/base", raw).Close()
}

// TestChainLocksData: a data file is its image's alone, unless both only read.
func TestChainLocksData(t *testing.T) {
	dir := t.TempDir()
	put(t, dir+"/data", "bytes")
	for _, name := range []string{"one", "two"} {
		toy{noBacking: true, data: "data"}.write(t, filepath.Join(dir, name))
	}
	for _, c := range []struct {
		first, second formats.Options
		fine          bool
	}{
		{formats.Options{}, formats.Options{}, false},
		{formats.Options{}, formats.Options{ReadOnly: true}, false},
		{formats.Options{ReadOnly: true}, formats.Options{}, false},
		{formats.Options{ReadOnly: true}, formats.Options{ReadOnly: true}, true},
		{formats.Options{}, formats.Options{ReadOnly: true, ForceShare: true}, true},
	} {
		one := mustOpen(t, dir+"/one", c.first)
		two, err := formats.Open(dir+"/two", c.second)
		if err == nil {
			two.Close()
		}
		if c.fine != (err == nil) || err != nil && !errors.Is(err, formats.ErrLocked) {
			t.Errorf("%+v beside %+v: %v", c.second, c.first, err)
		}
		if err != nil && !strings.Contains(err.Error(), `data file "data" of `+dir+"/two") {
			t.Errorf("%q does not say whose it is", err)
		}
		one.Close()
	}
}

// TestChainOptions: past the page cache or not, all files of an image are opened
// alike, and what can't be is told by the name that the image gives it.
func TestChainOptions(t *testing.T) {
	base := diskFile(t, 1234) // no multiple of a sector
	image := filepath.Join(filepath.Dir(base), "image")
	toy{backing: "disk.img", format: "raw", data: "data"}.write(t, image)
	put(t, filepath.Join(filepath.Dir(base), "data"), "odd")
	if err := os.Truncate(image, 512); err != nil {
		t.Fatal(err)
	}
	if err := mustOpen(t, image, formats.Options{ReadOnly: true}).Close(); err != nil {
		t.Error(err)
	}
	_, err := formats.Open(image, formats.Options{Direct: true})
	if !errors.Is(err, aio.ErrUnalignedSize) || !strings.Contains(err.Error(), `data file "data" of `+image) || strings.Contains(err.Error(), "/proc/") {
		t.Errorf("%v, want %v", err, aio.ErrUnalignedSize)
	}
}
