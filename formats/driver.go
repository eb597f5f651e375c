package formats

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"platter/aio"
)

// Options tell how to open an image. The zero value opens it for reading and
// writing, through the page cache, with its format probed and the file locked.
type Options struct {
	Format     string // a driver's name; "" and "auto" probe
	ReadOnly   bool
	Direct     bool // O_DIRECT: past the page cache
	Sync       bool // O_DSYNC: every write is durable when it completes
	NoFlush    bool // flushes do nothing: fast, and all is lost with the power
	ForceShare bool // take no lock, so that an image in use can be read; only with ReadOnly
	NotEmpty   bool // refuse an image of size 0 with ErrEmpty, as whoever serves it wants

	// InfoOnly opens an image only to see what it says of itself: backing files
	// and data files stay closed, and what can't be read, as an encrypted image,
	// is no error. Requests to it fail; only with ReadOnly.
	InfoOnly bool
	// Snapshot is the ID or the name of an internal snapshot to read instead of
	// the image's present state; only with ReadOnly.
	Snapshot string
	// AllowDirs are the folders that the files an image names may come from,
	// besides the folder of the image itself: an image from a stranger could
	// otherwise make us serve any file that we may read.
	AllowDirs []string
	// MetadataCache bounds the memory for mapping tables, in bytes; 0 is the
	// format's default.
	MetadataCache int64
	// MergeGap is how many bytes between writes of a batch may be filled with
	// zeroes, where that saves the file writes; 0 is the format's default, and a
	// negative number fills none.
	MergeGap int64
	// NoMerge has the format join no requests.
	NoMerge bool
}

// Source is an opened and locked file on its way to a driver.
type Source struct {
	Path    string
	File    *aio.File
	Header  []byte // the first bytes of the file, up to ProbeSize
	Options Options
	Probed  bool // the format was not stated by the user but found in Header
	chain   *chain
}

// Driver is one image format. Format packages register theirs when they are
// imported, as drivers of database/sql do.
type Driver struct {
	// Name is what --format takes.
	Name string
	// Probe reports whether the first bytes of a file (up to ProbeSize, fewer
	// in a smaller file) are the format's own. It is nil for a format without
	// a signature, which is then opened by name, or, for "raw", when nothing
	// else matches.
	Probe func(header []byte) bool
	// Open makes an image of the file. When it succeeds the image owns
	// Source.File and closes it; when it fails Open in this package closes it.
	Open func(s Source) (Image, error)
}

// RawName is the format without a signature: what a file is when it is nothing
// else.
const RawName = "raw"

// ProbeSize is how many bytes at the start of a file decide its format.
const ProbeSize = 512

var registry struct {
	sync.RWMutex
	drivers []Driver // sorted by name
}

// Register makes a format known. It is meant for init functions and panics
// when the name is taken, empty or has no Open: that is a mistake in the build.
func Register(d Driver) {
	registry.Lock()
	defer registry.Unlock()
	i, taken := slices.BinarySearchFunc(registry.drivers, d.Name, byName)
	if taken || d.Name == "" || d.Name == "auto" || d.Open == nil {
		panic(fmt.Sprintf("formats: cannot register driver %q", d.Name))
	}
	registry.drivers = slices.Insert(registry.drivers, i, d)
}

// Names lists the registered formats in alphabetical order.
func Names() []string {
	registry.RLock()
	defer registry.RUnlock()
	names := make([]string, len(registry.drivers))
	for i, d := range registry.drivers {
		names[i] = d.Name
	}
	return names
}

func byName(d Driver, name string) int { return strings.Compare(d.Name, name) }

func driver(name string) (Driver, bool) {
	registry.RLock()
	defer registry.RUnlock()
	i, ok := slices.BinarySearchFunc(registry.drivers, name, byName)
	if !ok {
		return Driver{}, false
	}
	return registry.drivers[i], true
}

// Open opens the image at path. The lock that it takes (see Lock) lasts until
// the image is closed. An empty file is a raw image of size 0, unless
// Options.NotEmpty refuses it. Every error is an *Error.
func Open(path string, o Options) (Image, error) {
	image, err := open(path, o)
	if err != nil {
		return nil, Explain("open", path, err)
	}
	return image, nil
}

func open(path string, o Options) (Image, error) {
	if o.ForceShare && !o.ReadOnly {
		return nil, &Error{"open", path, fmt.Errorf("%w: force-share without read-only", ErrBadOptions),
			"open it read-only: an image that others may write can only be read"}
	}
	if o.Format == "" {
		o.Format = "auto"
	}
	if _, known := driver(o.Format); !known && o.Format != "auto" {
		return nil, &Error{"open", path, fmt.Errorf("%w: %q", ErrFormat, o.Format),
			"formats: auto, " + strings.Join(Names(), ", ")}
	}
	return openChain(path, o, nil)
}

// openChain opens an image; parent is the way that led to it, nil for the one
// that the user named.
func openChain(path string, o Options, parent *chain) (Image, error) {
	f, err := openStorage(path, o, parent)
	if err != nil {
		return nil, err
	}
	image, err := openFile(path, f, o, parent)
	if err != nil {
		f.Close()
		return nil, err
	}
	if o.NotEmpty && image.Size() == 0 {
		image.Close()
		return nil, &Error{"open", path, ErrEmpty, "give it a size: truncate -s SIZE, or remove it and serve --create SIZE"}
	}
	return image, nil
}

// openStorage opens the file at path: any, if the user named it, else only
// where an image may name files.
func openStorage(path string, o Options, parent *chain) (*aio.File, error) {
	options := aio.FileOptions{ReadOnly: o.ReadOnly, Direct: o.Direct, Sync: o.Sync, NoFlush: o.NoFlush}
	if parent == nil {
		if err := checkKind(path); err != nil {
			return nil, err
		}
		return aio.OpenFile(path, options)
	}
	fd, err := openWithin(path, append([]string{filepath.Dir(parent.root().path)}, o.AllowDirs...))
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	// The very file that was found, whatever the path leads to by now.
	found := fmt.Sprintf("/proc/self/fd/%d", fd)
	if err := checkKind(found); err != nil {
		return nil, err
	}
	f, err := aio.OpenFile(found, options)
	var named *fs.PathError
	if errors.As(err, &named) {
		err = named.Err // nobody knows the file by that name
	}
	return f, err
}

// checkKind refuses what is no image before it is opened: opening a FIFO would
// wait, and opening a character device can have effects.
func checkKind(path string) error {
	st, err := os.Stat(path)
	if err != nil {
		return err
	}
	switch m := st.Mode(); {
	case m.IsDir():
		return ErrIsDirectory
	case m.IsRegular(), m&os.ModeDevice != 0 && m&os.ModeCharDevice == 0:
		return nil
	}
	return ErrNotImage
}

func openFile(path string, f *aio.File, o Options, parent *chain) (Image, error) {
	links, err := parent.link(path, f.Fd())
	if err != nil {
		return nil, err
	}
	if !o.ForceShare {
		if err := Lock(path, f.Fd(), !o.ReadOnly); err != nil {
			return nil, err
		}
	}
	header, err := readHeader(f.Fd())
	if err != nil {
		return nil, fmt.Errorf("read the first bytes: %w", err)
	}
	s := Source{Path: path, File: f, Header: header, Options: o, chain: links}
	if o.Format == "auto" {
		s.Probed = true
		o.Format = Probe(header)
	}
	d, ok := driver(o.Format)
	if !ok {
		return nil, &Error{"open", path, fmt.Errorf("%w: this is a %s image", ErrFormat, o.Format),
			"convert it, or use --format raw to take its bytes as they are"}
	}
	s.Options.Format = d.Name
	return d.Open(s)
}

// readHeader reads into memory that O_DIRECT accepts: a whole page on its own.
func readHeader(fd int) ([]byte, error) {
	m, err := aio.NewMemory(os.Getpagesize())
	if err != nil {
		return nil, err
	}
	defer m.Close()
	n, err := unix.Pread(fd, m.Bytes(), 0)
	if err != nil {
		return nil, err
	}
	return slices.Clone(m.Bytes()[:min(n, ProbeSize)]), nil
}
