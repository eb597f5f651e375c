package formats

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"platter/aio"
)

// MaxChain is how many files an image may consist of, backing files and data
// files included.
const MaxChain = 256

// What can be wrong with the files that an image names, for errors.Is.
var (
	// ErrChainLoop: a file is its own backing file, by whatever detour.
	ErrChainLoop = errors.New("backing files form a loop")
	// ErrChainDepth: there are more than MaxChain files.
	ErrChainDepth = fmt.Errorf("more than %d files", MaxChain)
	// ErrOutside: a file that an image names lies outside the folders that such
	// files may come from.
	ErrOutside = errors.New("outside the folders that an image's files may come from")
	// ErrNoFormat: an image doesn't state the format of its backing file, and
	// guessing is dangerous: a guest can make a raw image look like any other.
	ErrNoFormat = errors.New("format of the backing file is not stated")
	// ErrProtocol: the name isn't a path but something that QEMU would take for
	// a protocol or a JSON description.
	ErrProtocol = errors.New("not a plain file name")
)

// chain is the way from the image that the user named to a file of it.
type chain struct {
	parent   *chain
	path     string
	dev, ino uint64
	depth    int
}

func (c *chain) String() string {
	if c.parent == nil {
		return c.path
	}
	return c.parent.String() + " -> " + c.path
}

// root is the image that the user named.
func (c *chain) root() *chain {
	for c.parent != nil {
		c = c.parent
	}
	return c
}

// link adds a file to the chain.
func (c *chain) link(path string, fd int) (*chain, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, fmt.Errorf("stat: %w", err)
	}
	next := &chain{parent: c, path: path, dev: st.Dev, ino: st.Ino}
	for up := c; up != nil; up = up.parent {
		next.depth++
		if up.dev == next.dev && up.ino == next.ino {
			return nil, &Error{"open", c.root().path, fmt.Errorf("%w: %s", ErrChainLoop, next), "give the image another backing file"}
		}
	}
	if next.depth >= MaxChain {
		return nil, &Error{"open", c.root().path, fmt.Errorf("%w: %s", ErrChainDepth, c.tail()), "commit or convert some of them into one"}
	}
	return next, nil
}

// tail shows the last few files of a long chain.
func (c *chain) tail() string {
	text := c.String()
	if links := strings.Split(text, " -> "); len(links) > 4 {
		text = "… -> " + strings.Join(links[len(links)-3:], " -> ")
	}
	return text
}

// OpenBacking opens the backing file that the image in s names. The format must
// be stated. It is opened for reading only and locked as such.
func (s *Source) OpenBacking(name, format string) (Image, error) {
	o := s.Options
	o.ReadOnly, o.NotEmpty, o.Format, o.Snapshot = true, false, format, ""
	path, err := s.childPath(name)
	if err != nil {
		return nil, s.explain("backing file", name, err)
	}
	if format == "" {
		return nil, s.explain("backing file", name, ErrNoFormat)
	}
	if _, known := driver(format); !known || format == "auto" {
		return nil, s.explain("backing file", name, fmt.Errorf("%w: %q", ErrFormat, format))
	}
	image, err := openChain(path, o, s.chain)
	if err != nil {
		return nil, s.explain("backing file", name, err)
	}
	return image, nil
}

// OpenData opens and locks the external data file that the image in s names,
// for writing too unless the image is read-only. A relative name that leads to
// nothing from the folder of the image is tried from the working directory,
// where QEMU, unlike for backing files, has it start.
func (s *Source) OpenData(name string) (*aio.File, error) {
	path, err := s.childPath(name)
	if err != nil {
		return nil, s.explain("data file", name, err)
	}
	f, err := openStorage(path, s.Options, s.chain)
	if errors.Is(err, unix.ENOENT) {
		here := Beside("", name)
		if again, e := openStorage(here, s.Options, s.chain); !errors.Is(e, unix.ENOENT) {
			path, f, err = here, again, e
		}
	}
	if err != nil {
		return nil, s.explain("data file", name, err)
	}
	if _, err := s.chain.link(path, f.Fd()); err != nil {
		f.Close()
		return nil, s.explain("data file", name, err)
	}
	if !s.Options.ForceShare {
		if err := Lock(path, f.Fd(), !s.Options.ReadOnly); err != nil {
			f.Close()
			return nil, s.explain("data file", name, err)
		}
	}
	return f, nil
}

// explain names the file and the chain that led to it. The image that names a
// bad file does so; those above it pass on what it said.
func (s *Source) explain(what, name string, err error) error {
	first := s.chain.root().path
	remedy := s.remedy(what, name, err)
	var inner *Error
	if errors.As(err, &inner) {
		if inner.Path == first {
			return err
		}
		err = inner.Err
		if remedy == "" {
			remedy = inner.Remedy
		}
	}
	if remedy == "" {
		remedy = s.another(what)
	}
	return &Error{"open", first, fmt.Errorf("%s %q of %s: %w", what, name, s.chain, err), remedy}
}

// remedy is what to do about a file that an image names, "" if that is the same
// as for any other file.
func (s *Source) remedy(what, name string, err error) string {
	switch {
	case errors.Is(err, ErrOutside):
		return "if you trust the image, allow the folder with --allow-dir DIR"
	case errors.Is(err, ErrNoFormat), errors.Is(err, ErrFormat):
		return "state the right one in the image: qemu-img rebase -u -b " + name + " -F FORMAT " + s.Path
	case errors.Is(err, ErrProtocol):
		return "only files can be opened; " + s.another(what)
	case errors.Is(err, unix.ENOENT):
		return "bring the file back, or else " + s.another(what)
	}
	return ""
}

// another tells how an image comes to another file. QEMU changes the name of a
// data file only while that can be opened.
func (s *Source) another(what string) string {
	if what == "data file" {
		return "put the right file in its place"
	}
	return "give the image another: qemu-img rebase -u -b FILE -F FORMAT " + s.Path
}

// childPath is the path of a file that an image names, as seen from here:
// relative names are relative to the folder of the image.
func (s *Source) childPath(name string) (string, error) {
	if name == "" {
		return "", fmt.Errorf("%w: the name is empty", ErrProtocol)
	}
	plain := strings.TrimPrefix(name, "file:")
	if prefix, _, ok := strings.Cut(plain, ":"); ok && !strings.Contains(prefix, "/") {
		return "", fmt.Errorf("%w: %q", ErrProtocol, plain)
	}
	return Beside(s.Path, name), nil
}

// Beside is the path of a file that the image at path calls name: relative names
// start at the folder of the image. It is not shortened, as "folder/.." leads
// elsewhere if the folder is a symbolic link.
func Beside(path, name string) string {
	name = strings.TrimPrefix(name, "file:")
	if filepath.IsAbs(name) {
		return name
	}
	return path[:strings.LastIndexByte(path, '/')+1] + name
}

// openWithin opens a file that an image names: it must lie in one of the
// folders, wherever the way to it leads. The descriptor only names the file, so
// that it can be opened as wanted.
func openWithin(path string, dirs []string) (fd int, err error) {
	fd, where, err := locate(path, 0)
	if err != nil {
		return -1, err
	}
	for _, dir := range dirs {
		at, root, err := locate(dir, unix.O_DIRECTORY)
		if err != nil {
			unix.Close(fd)
			return -1, fmt.Errorf("open %s: %w", dir, err)
		}
		unix.Close(at)
		if strings.HasPrefix(where, strings.TrimSuffix(root, "/")+"/") {
			return fd, nil
		}
	}
	unix.Close(fd)
	return -1, fmt.Errorf("%w: %s", ErrOutside, strings.Join(dirs, ", "))
}

// locate finds a file, and where it is without symbolic links.
func locate(path string, flags int) (fd int, where string, err error) {
	fd, err = unix.Open(path, flags|unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, "", err
	}
	where, err = os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd))
	if err != nil {
		unix.Close(fd)
		return -1, "", err
	}
	return fd, where, nil
}
