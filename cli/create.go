package cli

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"platter/config"
	"platter/formats"
	"platter/formats/qcow2/create"
	"platter/formats/raw"
)

type createCmd struct {
	Format        string       `short:"f" enum:"raw,qcow2" default:"raw" placeholder:"raw|qcow2" help:"Format of the new image. Default: ${default}."`
	Options       []string     `short:"o" sep:"none" placeholder:"KEY=VALUE,…" help:"Options of the format, those of qemu-img create. May be repeated."`
	Backing       string       `short:"b" placeholder:"FILE" help:"The image to build upon, as it is to be written into the new one: relative to its folder. Needs --backing-format."`
	BackingFormat string       `short:"F" placeholder:"F" help:"Format of the backing file."`
	Image         string       `arg:"" help:"The new image. A file that exists is kept and refused."`
	Size          *config.Size `arg:"" optional:"" help:"Size of the disk (512M, 1.5G). By default that of the backing file."`
}

// Run makes the image.
func (c *createCmd) Run() error {
	if c.Format == formats.RawName {
		return c.createRaw()
	}
	return c.createQcow2()
}

func (c *createCmd) createRaw() error {
	o, err := parseRawOptions(c.Options)
	switch {
	case err != nil:
		return &formats.Error{Op: "create", Path: c.Image, Err: err}
	case c.Backing != "" || c.BackingFormat != "":
		return &formats.Error{Op: "create", Path: c.Image, Err: fmt.Errorf("%w: a raw image has no backing file", formats.ErrBadOptions), Remedy: "make it --format qcow2"}
	case c.Size != nil && o.size != nil:
		return errTwoSizes(c.Image)
	case c.Size != nil:
		o.size = c.Size
	case o.size == nil:
		return errNoSize(c.Image)
	}
	return makeRaw(c.Image, int64(*o.size), o)
}

func (c *createCmd) createQcow2() error {
	o, err := create.ParseOptions(c.Options...)
	if err != nil {
		return &formats.Error{Op: "create", Path: c.Image, Err: err}
	}
	if c.Backing != "" {
		o.BackingFile = c.Backing
	}
	if c.BackingFormat != "" {
		o.BackingFormat = c.BackingFormat
	}
	size := int64(0)
	switch {
	case c.Size != nil && o.Size != 0:
		return errTwoSizes(c.Image)
	case c.Size != nil:
		size = int64(*c.Size)
		o.BackingSize = func() (int64, error) { return 0, nil } // asked for only when the size was stated as 0
	case o.BackingFile == "" && o.Size == 0:
		return errNoSize(c.Image)
	}
	if o.BackingFile != "" && slices.Contains(formats.Names(), o.BackingFormat) {
		backing, err := c.backingSize(o)
		if err != nil {
			return err
		}
		if c.Size == nil {
			o.BackingSize = func() (int64, error) { return backing, nil }
		}
	}
	return create.Create(c.Image, size, o)
}

// backingSize opens the backing file, to see that it is what the new image will
// say it is, and returns the size of its disk.
func (c *createCmd) backingSize(o create.Options) (int64, error) {
	path := formats.Beside(c.Image, o.BackingFile)
	image, err := formats.Open(path, formats.Options{Format: o.BackingFormat, ReadOnly: true, InfoOnly: true})
	if err != nil {
		return 0, fmt.Errorf("backing file of %s: %w", c.Image, err)
	}
	defer image.Close()
	if folder := filepath.Dir(path); !within(filepath.Dir(c.Image), path) {
		slog.Warn("the backing file lies outside the image's folder: opening the image will take --allow-dir", "image", c.Image, "allow-dir", folder)
	}
	return image.Size(), nil
}

// within reports whether a path leads into a folder, going by the names.
func within(dir, path string) bool {
	dir, errDir := filepath.Abs(dir)
	path, errPath := filepath.Abs(path)
	if errDir != nil || errPath != nil {
		return false
	}
	rel, err := filepath.Rel(dir, path)
	return err == nil && rel != ".." && !strings.HasPrefix(rel, "../")
}

func errNoSize(path string) error {
	return &formats.Error{Op: "create", Path: path, Err: fmt.Errorf("%w: no size is given", formats.ErrBadOptions), Remedy: "write one behind the image's name: 512M, 1.5G, 2T"}
}

func errTwoSizes(path string) error {
	return &formats.Error{Op: "create", Path: path, Err: fmt.Errorf("%w: two sizes are given", formats.ErrBadOptions), Remedy: "give the size once"}
}

// rawOptions are what -o takes for raw images.
type rawOptions struct {
	size    *config.Size
	reserve bool // take the space
	fill    bool // and write zeroes to all of it
}

func parseRawOptions(lists []string) (rawOptions, error) {
	var o rawOptions
	for _, item := range strings.Split(strings.Join(lists, ","), ",") {
		name, value, _ := strings.Cut(item, "=")
		switch {
		case item == "":
		case name == "size":
			size, err := config.ParseSize(value)
			if err != nil {
				return o, err
			}
			o.size = &size
		case name == "preallocation" && slices.Contains([]string{"off", "falloc", "full"}, value):
			o.reserve, o.fill = value != "off", value == "full"
		case name == "preallocation":
			return o, fmt.Errorf("%w: preallocation is %q, must be one of off, falloc, full", formats.ErrBadOptions, value)
		default:
			return o, fmt.Errorf("%w: %q is no option of a raw image (options: preallocation, size)", formats.ErrBadOptions, name)
		}
	}
	return o, nil
}

// makeRaw makes a raw image. What can't be finished is removed.
func makeRaw(path string, size int64, o rawOptions) error {
	if err := raw.Create(path, size, raw.CreateOptions{Preallocate: o.reserve}); err != nil || !o.fill {
		return err
	}
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err == nil {
		err = errors.Join(writeZeroes(f, size), f.Close())
	}
	if err != nil {
		return formats.Explain("create", path, errors.Join(err, os.Remove(path)))
	}
	return nil
}

func writeZeroes(f *os.File, size int64) error {
	zeroes := make([]byte, min(size, 1<<20))
	for off := int64(0); off < size; off += int64(len(zeroes)) {
		if _, err := f.WriteAt(zeroes[:min(size-off, int64(len(zeroes)))], off); err != nil {
			return err
		}
	}
	return f.Sync()
}
