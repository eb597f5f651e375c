package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"

	"golang.org/x/sys/unix"

	"platter/formats"
)

type convertCmd struct {
	imageFlags
	contentFlags
	OutputFormat string   `short:"O" enum:"raw,qcow2" default:"raw" placeholder:"raw|qcow2" help:"Format of the new image. Default: ${default}."`
	Options      []string `short:"o" sep:"none" placeholder:"KEY=VALUE,…" help:"Options of the new image's format, those of qemu-img create. May be repeated."`
	Compress     bool     `short:"c" help:"Compress the new image, which must be qcow2."`
	Snapshot     string   `short:"l" placeholder:"NAME" help:"Copy the disk as it was in this snapshot: a name or an ID."`
	Quiet        bool     `short:"q" help:"Show no progress."`
	Source       string   `arg:"" help:"The image to copy."`
	Destination  string   `arg:"" help:"The new image. A file that exists is kept and refused."`
}

// Run copies the image. Interrupted, it leaves nothing behind.
func (c *convertCmd) Run(a *app) error {
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, stop) // a second signal ends at once
	bar := a.progress("convert", c.Quiet)
	defer bar.clear()
	return c.convert(ctx, bar)
}

// convert makes the new image and fills it. If that fails or the context ends,
// there is no new image.
func (c *convertCmd) convert(ctx context.Context, bar *progress) error {
	src, err := c.openSource()
	if err != nil {
		return err
	}
	defer src.Close()
	dst, err := c.createTarget(src.Size())
	if err != nil {
		return err
	}
	bar.set(0, src.Size())
	err = copyDisk(ctx, dst, src, bar.add)
	if errors.Is(err, context.Canceled) {
		err = fmt.Errorf("convert %s: interrupted; %s is removed again", c.Source, c.Destination)
	}
	return dst.finish(err)
}

// source is an image to read: any number of goroutines may do so.
type source interface {
	io.ReaderAt
	formats.Mapper
	Size() int64
}

// openedSource is a source with what must be closed.
type openedSource struct {
	formats.Image
	formats.Mapper
	io.ReaderAt
	file *os.File // nil when the image reads by itself
	path string
}

// Close lets go of the image.
func (s *openedSource) Close() error {
	if s.file != nil {
		s.file.Close()
	}
	return s.Image.Close()
}

// ReadAt says what can't be read.
func (s *openedSource) ReadAt(p []byte, off int64) (int, error) {
	n, err := s.ReaderAt.ReadAt(p, off)
	if err != nil {
		err = formats.Explain("read", s.path, fmt.Errorf("%d bytes of the disk at %d: %w", len(p), off, err))
	}
	return n, err
}

func (c *convertCmd) openSource() (_ *openedSource, err error) {
	o := readOptions(c.imageFlags, c.contentFlags)
	o.Snapshot = c.Snapshot
	image, err := openImage(c.Source, o)
	if err != nil {
		return nil, err
	}
	s := &openedSource{Image: image, path: c.Source}
	defer func() {
		if err != nil {
			s.Close()
		}
	}()
	mapper, ok := image.(formats.Mapper)
	if !ok {
		return nil, &formats.Error{Op: "convert", Path: c.Source, Err: fmt.Errorf("%w: a %s image doesn't tell data from holes", formats.ErrFormat, image.Format())}
	}
	s.Mapper = mapper
	if s.ReaderAt, ok = image.(io.ReaderAt); ok {
		return s, nil
	}
	// A raw image is its file.
	if s.file, err = os.Open(c.Source); err != nil {
		return nil, formats.Explain("open", c.Source, err)
	}
	s.ReaderAt = s.file
	return s, nil
}
