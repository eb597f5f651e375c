package formats_test

import (
	"bytes"
	"errors"
	"fmt"
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
