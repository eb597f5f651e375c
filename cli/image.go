package cli

import (
	"fmt"

	"platter/config"
	"platter/formats"
	_ "platter/formats/qcow2" // formats that images may have
	_ "platter/formats/raw"
)

// imageFlags are those of every verb that looks at an image.
type imageFlags struct {
	Format     string `short:"f" default:"auto" placeholder:"F" help:"Format of the image, raw or qcow2. By default it is found out."`
	ForceShare bool   `short:"U" help:"Read an image that is in use, without a lock."`
}

// chainFlags are those of verbs that open the files which an image names.
type chainFlags struct {
	AllowDir []string `sep:"none" placeholder:"DIR" help:"A folder that backing files and data files may come from, besides the image's own. May be repeated."`
}

// contentFlags are those of verbs that read what is in an image.
type contentFlags struct {
	chainFlags
	MetadataCache config.Size `placeholder:"SIZE" help:"How much memory the mapping tables of an image may take (64M). By default 32M."`
}

// openImage opens an image and refuses what its driver would pass over.
func openImage(path string, o formats.Options) (formats.Image, error) {
	image, err := formats.Open(path, o)
	if err != nil {
		return nil, err
	}
	if o.Snapshot != "" && image.Format() == formats.RawName {
		image.Close()
		return nil, &formats.Error{Op: "open", Path: path, Err: fmt.Errorf("%w: a snapshot of a raw image", formats.ErrBadOptions),
			Remedy: "leave --snapshot out: only qcow2 images have snapshots"}
	}
	return image, nil
}

// readOptions are for an image that is only read.
func readOptions(f imageFlags, c contentFlags) formats.Options {
	return formats.Options{ReadOnly: true, Format: f.Format, ForceShare: f.ForceShare,
		AllowDirs: c.AllowDir, MetadataCache: int64(c.MetadataCache)}
}
