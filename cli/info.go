package cli

import (
	"encoding/json"
	"fmt"

	"golang.org/x/sys/unix"

	"platter/config"
	"platter/formats"
)

type infoCmd struct {
	Format     string `short:"f" default:"auto" placeholder:"F" help:"Format of the image. By default it is found out."`
	Output     string `enum:"human,json" default:"human" placeholder:"human|json" help:"How to print it: human or json, which has the names of qemu-img's."`
	ForceShare bool   `short:"U" help:"Read an image that is in use."`
	Image      string `arg:"" help:"The image."`
}

// imageInfo is what is known of an image, with the names and the structure that
// qemu-img info prints.
type imageInfo struct {
	Children       []child         `json:"children"`
	VirtualSize    int64           `json:"virtual-size"`
	Filename       string          `json:"filename"`
	Format         string          `json:"format"`
	ActualSize     int64           `json:"actual-size"`
	FormatSpecific *formatSpecific `json:"format-specific,omitempty"`
	DirtyFlag      bool            `json:"dirty-flag"`
}

type child struct {
	Name string    `json:"name"`
	Info imageInfo `json:"info"`
}

type formatSpecific struct {
	Type string   `json:"type"`
	Data struct{} `json:"data"`
}

// Run prints what is known of the image.
func (c *infoCmd) Run(a *app) error {
	image, err := formats.Open(c.Image, formats.Options{Format: c.Format, ReadOnly: true, ForceShare: c.ForceShare})
	if err != nil {
		return err
	}
	defer image.Close()
	info, err := describe(c.Image, image)
	if err != nil {
		return err
	}
	if c.Output == "json" {
		e := json.NewEncoder(a.stdout)
		e.SetEscapeHTML(false)
		e.SetIndent("", "    ")
		return e.Encode(info)
	}
	_, err = fmt.Fprintf(a.stdout, "image: %s\nfile format: %s\nvirtual size: %s (%d bytes)\ndisk size: %s\n",
		info.Filename, info.Format, config.Size(info.VirtualSize), info.VirtualSize, config.Size(info.ActualSize))
	return err
}

func describe(path string, image formats.Image) (imageInfo, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return imageInfo{}, fmt.Errorf("read size on disk of %s: %w", path, err)
	}
	used, kind := st.Blocks*512, "file"
	if st.Mode&unix.S_IFMT == unix.S_IFBLK {
		kind = "host_device"
	}
	file := imageInfo{Children: []child{}, VirtualSize: max(st.Size, image.Size()), Filename: path, Format: kind,
		ActualSize: used, FormatSpecific: &formatSpecific{Type: kind}}
	return imageInfo{Children: []child{{"file", file}}, VirtualSize: image.Size(), Filename: path,
		Format: image.Format(), ActualSize: used}, nil
}
