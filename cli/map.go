package cli

import (
	"bufio"
	"fmt"
	"io"

	"platter/config"
	"platter/formats"
)

type mapCmd struct {
	imageFlags
	contentFlags
	Output      string       `enum:"human,json" default:"human" placeholder:"human|json" help:"How to print it: human, which lists the data alone, or json, which has the names of qemu-img's."`
	StartOffset config.Size  `short:"s" placeholder:"OFFSET" help:"Where on the disk to begin."`
	MaxLength   *config.Size `short:"l" placeholder:"LENGTH" help:"How much of the disk to look at. By default all of it."`
	Image       string       `arg:"" help:"The image."`
}

// extentsAtOnce bounds how many extents are in memory.
const extentsAtOnce = 4096

// Run prints where the image has data.
func (c *mapCmd) Run(a *app) error {
	image, err := openImage(c.Image, readOptions(c.imageFlags, c.contentFlags))
	if err != nil {
		return err
	}
	defer image.Close()
	mapper, ok := image.(formats.Mapper)
	if !ok {
		return &formats.Error{Op: "map", Path: c.Image, Err: fmt.Errorf("%w: a %s image doesn't tell data from holes", formats.ErrFormat, image.Format())}
	}
	off, end := int64(c.StartOffset), image.Size()
	if off > end {
		return &formats.Error{Op: "map", Path: c.Image, Err: fmt.Errorf("--start-offset %d is beyond the end of the disk, %d", off, end),
			Remedy: "choose a smaller one"}
	}
	if c.MaxLength != nil {
		end = off + min(end-off, int64(*c.MaxLength))
	}
	out := bufio.NewWriter(a.stdout)
	p := printers[c.Output]
	fmt.Fprint(out, p.begin)
	var list []formats.Extent
	for first := true; off < end; {
		if list, err = mapper.Extents(list[:0], off, end-off, extentsAtOnce); err != nil {
			return err
		}
		for _, e := range list {
			p.extent(out, e, first)
			first = false
			off = e.Start + e.Length
		}
	}
	fmt.Fprint(out, p.end)
	return out.Flush()
}

// printers are the forms of a map.
var printers = map[string]struct {
	begin, end string
	extent     func(w io.Writer, e formats.Extent, first bool)
}{
	"human": {fmt.Sprintf("%-16s%-16s%-16s%s\n", "Offset", "Length", "Mapped to", "File"), "", printRow},
	"json":  {"[", "]\n", printObject},
}

// printRow prints an extent that has data.
func printRow(w io.Writer, e formats.Extent, _ bool) {
	if !e.Data || e.Zero {
		return
	}
	place := "compressed"
	if !e.Packed {
		place = hex(e.Offset)
	}
	fmt.Fprintf(w, "%-16s%-16s%-16s%s\n", hex(e.Start), hex(e.Length), place, printable(e.File))
}

// hex writes a number as C's %#x does.
func hex(n int64) string {
	if n == 0 {
		return "0"
	}
	return fmt.Sprintf("%#x", n)
}

// printObject prints an extent on a line of its own.
func printObject(w io.Writer, e formats.Extent, first bool) {
	if !first {
		fmt.Fprint(w, ",\n")
	}
	fmt.Fprintf(w, `{ "start": %d, "length": %d, "depth": %d, "present": %t, "zero": %t, "data": %t, "compressed": %t`,
		e.Start, e.Length, e.Depth, e.Present, e.Zero, e.Data, e.Packed)
	if e.Offset >= 0 {
		fmt.Fprintf(w, `, "offset": %d`, e.Offset)
	}
	fmt.Fprint(w, "}")
}
