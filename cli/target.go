package cli

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"platter/formats"
	"platter/formats/qcow2"
	"platter/formats/qcow2/create"
)

// target is a new image, which reads as zeroes where nothing was written. Any
// number of goroutines may write.
type target struct {
	io.WriterAt
	io.Closer
	size int64 // of the disk

	// compressed writes a whole cluster, or what the disk has of the last one;
	// nil when nothing is to be compressed.
	compressed  func(p []byte, off int64) error
	clusterSize int64

	files []string // that were made
}

// WriteAt says what can't be written.
func (t *target) WriteAt(p []byte, off int64) (int, error) {
	n, err := t.WriterAt.WriteAt(p, off)
	return n, t.explain(err)
}

func (t *target) explain(err error) error { return formats.Explain("write", t.files[0], err) }

// finish makes the image durable and closes it. When there is an error, this
// one or one from before, it removes the image.
func (t *target) finish(err error) error {
	if closeErr := t.Close(); err == nil {
		err = t.explain(closeErr)
	}
	for _, path := range t.files {
		if err == nil {
			err = formats.Explain("write", path, syncFile(path))
		}
	}
	if err == nil {
		return nil
	}
	return errors.Join(err, t.remove())
}

func (t *target) remove() error {
	var errs []error
	for _, path := range t.files {
		errs = append(errs, os.Remove(path))
	}
	return errors.Join(errs...)
}

func syncFile(path string) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// createTarget makes the new image for a disk of size bytes.
func (c *convertCmd) createTarget(size int64) (*target, error) {
	if c.OutputFormat != formats.RawName {
		return c.createQcow2(size)
	}
	if c.Compress {
		return nil, &formats.Error{Op: "create", Path: c.Destination, Err: fmt.Errorf("%w: a raw image can't be compressed", formats.ErrBadOptions), Remedy: "use -O qcow2"}
	}
	o, err := parseRawOptions(c.Options)
	if err != nil {
		return nil, &formats.Error{Op: "create", Path: c.Destination, Err: err}
	}
	if o.size != nil {
		return nil, c.errSize()
	}
	if err := makeRaw(c.Destination, size, o); err != nil {
		return nil, err
	}
	t := &target{size: size, files: []string{c.Destination}}
	f, err := os.OpenFile(c.Destination, os.O_RDWR, 0)
	if err == nil {
		t.WriterAt, t.Closer = f, f
		if err = formats.Lock(c.Destination, int(f.Fd()), true); err != nil {
			f.Close()
		}
	}
	if err != nil {
		return nil, errors.Join(t.explain(err), t.remove())
	}
	return t, nil
}

func (c *convertCmd) errSize() error {
	return &formats.Error{Op: "create", Path: c.Destination, Err: fmt.Errorf("%w: the size is that of the source", formats.ErrBadOptions), Remedy: "leave the size out"}
}

func (c *convertCmd) createQcow2(size int64) (*target, error) {
	refuse := func(why, remedy string) (*target, error) {
		return nil, &formats.Error{Op: "create", Path: c.Destination, Err: fmt.Errorf("%w: %s", formats.ErrBadOptions, why), Remedy: remedy}
	}
	o, err := create.ParseOptions(c.Options...)
	switch {
	case err != nil:
		return nil, &formats.Error{Op: "create", Path: c.Destination, Err: err}
	case o.Size != 0:
		return nil, c.errSize()
	case o.BackingFile != "":
		return refuse("the new image has all of the data and needs no backing file", "leave backing_file out, or make an overlay: platter create -b")
	case c.Compress && o.DataFile != "":
		return refuse("an image with a data file can't be compressed", "leave out --compress or data_file")
	}
	if err := create.Create(c.Destination, size, o); err != nil {
		return nil, err
	}
	t := &target{files: []string{c.Destination}}
	// Until all is written nothing has to be durable.
	open := formats.Options{NoFlush: true, MetadataCache: int64(c.MetadataCache)}
	if o.DataFile != "" {
		data := formats.Beside(c.Destination, o.DataFile)
		t.files = append(t.files, data)
		open.AllowDirs = []string{filepath.Dir(data)}
	}
	image, err := qcow2.Open(c.Destination, open)
	if err != nil {
		return nil, errors.Join(err, t.remove())
	}
	t.WriterAt, t.Closer, t.size = image, image, image.Size()
	if c.Compress {
		t.compressed = image.WriteCompressed
		t.clusterSize = int64(image.Limits().DiscardGranularity)
	}
	return t, nil
}
