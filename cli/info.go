package cli

import (
	"fmt"
	"io"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"platter/formats"
	"platter/formats/qcow2"
)

type infoCmd struct {
	imageFlags
	chainFlags
	Output       string `enum:"human,json" default:"human" placeholder:"human|json" help:"How to print it: human or json, which has the names of qemu-img's."`
	BackingChain bool   `help:"Tell about the backing files too, one after the other."`
	Snapshot     string `short:"l" placeholder:"NAME" help:"Tell about the disk as it was in this snapshot: a name or an ID."`
	Image        string `arg:"" help:"The image."`
}

// imageInfo is what is known of an image, with the names and the structure that
// qemu-img info prints.
type imageInfo struct {
	Children            []child         `json:"children"`
	BackingFormat       string          `json:"backing-filename-format,omitempty"`
	Snapshots           []snapshotInfo  `json:"snapshots,omitempty"`
	VirtualSize         int64           `json:"virtual-size"`
	Filename            string          `json:"filename"`
	ClusterSize         int64           `json:"cluster-size,omitempty"`
	Format              string          `json:"format"`
	ActualSize          int64           `json:"actual-size"`
	FormatSpecific      *formatSpecific `json:"format-specific,omitempty"`
	FullBackingFilename string          `json:"full-backing-filename,omitempty"`
	BackingFilename     string          `json:"backing-filename,omitempty"`
	Encrypted           bool            `json:"encrypted,omitempty"`
	DirtyFlag           bool            `json:"dirty-flag"`
}

type child struct {
	Name string    `json:"name"`
	Info imageInfo `json:"info"`
}

type formatSpecific struct {
	Type string `json:"type"`
	Data any    `json:"data"`
}

// Run prints what is known of the image.
func (c *infoCmd) Run(a *app) error {
	list, err := c.collect()
	if err != nil {
		return err
	}
	switch {
	case c.Output == "json" && c.BackingChain:
		return a.printJSON(list)
	case c.Output == "json":
		return a.printJSON(list[0])
	}
	texts := make([]string, len(list))
	for i, info := range list {
		texts[i] = info.human()
	}
	_, err = io.WriteString(a.stdout, strings.Join(texts, "\n"))
	return err
}

// collect describes the image and, if asked for, its backing files.
func (c *infoCmd) collect() ([]imageInfo, error) {
	o := readOptions(c.imageFlags, contentFlags{chainFlags: c.chainFlags})
	o.Snapshot = c.Snapshot
	if c.BackingChain {
		// Opening all of it for once sees to every rule for files that an image
		// names: where they may be, that there are no loops, and so on.
		image, err := openImage(c.Image, o)
		if err != nil {
			return nil, err
		}
		image.Close()
	}
	o.InfoOnly = true
	var list []imageInfo
	for path := c.Image; ; {
		info, err := describe(path, o)
		if err != nil {
			return nil, err
		}
		list = append(list, info)
		if !c.BackingChain || info.BackingFilename == "" || len(list) == formats.MaxChain {
			return list, nil
		}
		path = formats.Beside(path, info.BackingFilename)
		o.Format, o.Snapshot = info.BackingFormat, ""
	}
}

// describe tells about one image.
func describe(path string, o formats.Options) (imageInfo, error) {
	image, err := openImage(path, o)
	if err != nil {
		return imageInfo{}, err
	}
	defer image.Close()
	f, err := os.Open(path)
	if err != nil {
		return imageInfo{}, formats.Explain("open", path, err)
	}
	defer f.Close()
	file, err := describeFile(path, f)
	if err != nil {
		return imageInfo{}, formats.Explain("open", path, err)
	}
	info := imageInfo{Children: []child{{"file", file}}, VirtualSize: image.Size(), Filename: path,
		Format: image.Format(), ActualSize: file.ActualSize}
	if im, ok := image.(*qcow2.Image); ok {
		if err := info.addQcow2(im, f, o.Snapshot); err != nil {
			return imageInfo{}, err
		}
	}
	return info, nil
}

// describeFile tells about the file that an image is in.
func describeFile(path string, f *os.File) (imageInfo, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return imageInfo{}, fmt.Errorf("read size on disk: %w", err)
	}
	length, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return imageInfo{}, fmt.Errorf("read length: %w", err)
	}
	kind := "file"
	if st.Mode&unix.S_IFMT == unix.S_IFBLK {
		kind = "host_device"
	}
	return imageInfo{Children: []child{}, VirtualSize: length, Filename: path, Format: kind, ActualSize: st.Blocks * 512,
		FormatSpecific: &formatSpecific{Type: "file", Data: struct{}{}}}, nil
}
