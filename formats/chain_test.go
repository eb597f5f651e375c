package formats_test

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"platter/formats"
)

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
		{"../ of a folder that is a symbolic link", func(t *testing.T, dir string) {
			toy{backing: "link/../base", format: "raw"}.write(t, dir+"/image")
			put(t, dir+"/sub/deep/file", "")
			symlink(t, "sub/deep", dir+"/link")
			put(t, dir+"/base", "another")
		}, "image", "sub/base", nil},
		{"image in a folder that is a symbolic link", func(t *testing.T, dir string) {
			toy{backing: "../base", format: "raw"}.write(t, dir+"/sub/deep/image")
			symlink(t, "sub/deep", dir+"/link")
			put(t, dir+"/base", "another")
		}, "link/image", "sub/base", []string{"sub"}},
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

// TestDataFileFromWorkingDirectory: QEMU takes a relative name of a data file
// from there, so an image may have such a name.
func TestDataFileFromWorkingDirectory(t *testing.T) {
	dir := t.TempDir()
	t.Chdir(dir)
	toy{noBacking: true, data: "sub/data"}.write(t, "sub/image")
	put(t, "sub/data", "")
	mustOpen(t, "sub/image", formats.Options{}).Close()
	toy{noBacking: true, data: "far/data"}.write(t, "sub/image")
	put(t, "far/data", "")
	if image, err := formats.Open("sub/image", formats.Options{}); !errors.Is(err, formats.ErrOutside) {
		t.Errorf("a data file in another folder: %v, %v", image, err)
	}
	// The folder of the image comes first.
	put(t, "sub/far/data", "")
	mustOpen(t, "sub/image", formats.Options{}).Close()
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
		{"symbolic link of the process", toy{backing: "/proc/self/exe", format: "raw"}, formats.ErrOutside, nil},
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
