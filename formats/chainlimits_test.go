package formats_test

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"platter/aio"
	"platter/formats"
)

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
