package cli

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strings"

	"platter/formats"
	"platter/formats/qcow2/check"
	"platter/formats/qcow2/layout"
)

type checkCmd struct {
	imageFlags
	Output string `enum:"human,json" default:"human" placeholder:"human|json" help:"How to print the result: human or json, which has the names of qemu-img's."`
	Repair string `short:"r" enum:"no,leaks,all" default:"no" placeholder:"leaks|all" help:"Correct what is wrong: leaks, which only waste space, or all. Make a copy of a corrupt image first."`
	Quiet  bool   `short:"q" help:"Print no progress, no findings, and no result for people: the exit status tells it."`
	Image  string `arg:"" help:"The image."`
}

// Help is what --help adds.
func (*checkCmd) Help() string {
	return "Exit status: 0 if the image is clean, 1 if the check could not be completed, 2 if the image is corrupt, 3 if it only has leaked clusters, 63 if its format has nothing to check."
}

// noChecks is the exit status for a format that has nothing to check.
const noChecks = 63

var repairs = map[string]check.Repair{"no": check.RepairNone, "leaks": check.RepairLeaks, "all": check.RepairAll}

// checkResult is what qemu-img check prints as JSON.
type checkResult struct {
	check.Report
	Filename string `json:"filename"`
	Format   string `json:"format"`
}

// Run checks the image. The exit status tells the result.
func (c *checkCmd) Run(a *app) error {
	f, format, err := c.open()
	if err != nil {
		return formats.Explain("check", c.Image, err)
	}
	defer f.Close()
	if format == formats.RawName {
		return &exitError{noChecks, &formats.Error{Op: "check", Path: c.Image, Err: errors.New("a raw image has nothing to check"),
			Remedy: "if it is a qcow2 image with a damaged header, --format qcow2 tells more"}}
	}
	bar := a.progress("check", c.Quiet)
	o := check.Options{Repair: repairs[c.Repair], Progress: bar.set}
	if !c.Quiet {
		o.Log = func(message string) {
			bar.clear()
			fmt.Fprintln(a.stderr, message)
		}
	}
	report, err := check.Run(f, o)
	bar.clear()
	if err != nil {
		return explainCheck(c.Image, err)
	}
	switch {
	case c.Output == "json":
		err = a.printJSON(checkResult{*report, c.Image, format})
	case !c.Quiet:
		_, err = io.WriteString(a.stdout, checkText(report))
	}
	if err != nil {
		return err
	}
	if code := report.ExitCode(); code != 0 {
		return &exitError{code: code}
	}
	return nil
}

// explainCheck tells what kept a check from being finished.
func explainCheck(path string, err error) error {
	var remedy string
	switch {
	case errors.Is(err, layout.ErrNotQcow2):
		remedy = "name its format, or let it be found out: --format auto"
	case errors.Is(err, layout.ErrUnsupported):
		remedy = "check it with the program that made it"
	case errors.Is(err, layout.ErrInvalid), errors.Is(err, check.ErrTangled), errors.Is(err, check.ErrBeyondRepair):
		remedy = "it can't be repaired: go back to a copy of the image"
	default:
		return formats.Explain("check", path, err)
	}
	return &formats.Error{Op: "check", Path: path, Err: err, Remedy: remedy}
}

// checkFile is the file of an image.
type checkFile struct{ *os.File }

// Size is that of a block device, too.
func (f checkFile) Size() (int64, error) { return f.Seek(0, io.SeekEnd) }

// open opens and locks the image's file, for writing if it is to be repaired,
// and finds its format. A damaged image is none that formats.Open would open.
func (c *checkCmd) open() (f checkFile, format string, err error) {
	flags, write := os.O_RDONLY, c.Repair != "no"
	if write {
		flags = os.O_RDWR
	}
	if write && c.ForceShare {
		return f, "", fmt.Errorf("%w: an image that is in use can't be repaired; leave --force-share out", formats.ErrBadOptions)
	}
	if c.Format != "auto" && !slices.Contains(formats.Names(), c.Format) {
		return f, "", fmt.Errorf("%w: %q; formats: auto, %s", formats.ErrFormat, c.Format, strings.Join(formats.Names(), ", "))
	}
	if err := checkKind(c.Image); err != nil {
		return f, "", err
	}
	file, err := os.OpenFile(c.Image, flags, 0)
	if err != nil {
		return f, "", err
	}
	f = checkFile{file}
	defer func() {
		if err != nil {
			f.Close()
		}
	}()
	if !c.ForceShare {
		if err := formats.Lock(c.Image, int(f.Fd()), write); err != nil {
			return f, "", err
		}
	}
	if format = c.Format; format != "auto" {
		return f, format, nil
	}
	header := make([]byte, formats.ProbeSize)
	n, err := f.ReadAt(header, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return f, "", err
	}
	if format = formats.Probe(header[:n]); !slices.Contains(formats.Names(), format) {
		return f, "", fmt.Errorf("%w: this is a %s image", formats.ErrFormat, format)
	}
	return f, format, nil
}

// checkKind refuses what is no image before it is opened: opening a FIFO would
// wait.
func checkKind(path string) error {
	st, err := os.Stat(path)
	switch {
	case err != nil:
		return err
	case st.IsDir():
		return formats.ErrIsDirectory
	case !st.Mode().IsRegular() && st.Mode()&(fs.ModeDevice|fs.ModeCharDevice) != fs.ModeDevice:
		return formats.ErrNotImage
	}
	return nil
}

// checkText is the result for people, like that of qemu-img check.
func checkText(r *check.Report) string {
	var b strings.Builder
	if r.LeaksFixed > 0 || r.CorruptionsFixed > 0 {
		fmt.Fprintf(&b, "Repaired: %d leaked clusters, %d corruptions. What is left:\n", r.LeaksFixed, r.CorruptionsFixed)
	}
	if r.Corruptions > 0 {
		fmt.Fprintf(&b, "%d errors were found on the image.\nData may be corrupted, or further writes to the image may corrupt it.\n", r.Corruptions)
	}
	if r.Leaks > 0 {
		fmt.Fprintf(&b, "%d leaked clusters were found on the image.\nThis means waste of disk space, but no harm to data.\n", r.Leaks)
	}
	if r.CheckErrors > 0 {
		fmt.Fprintf(&b, "%d errors kept parts of the image from being checked.\n", r.CheckErrors)
	}
	if r.ExitCode() == 0 {
		fmt.Fprintf(&b, "No errors were found on the image.\n")
	}
	if r.TotalClusters > 0 && r.AllocatedClusters > 0 {
		percent := func(n, of int64) float64 { return 100 * float64(n) / float64(of) }
		fmt.Fprintf(&b, "%d/%d = %.2f%% allocated, %.2f%% fragmented, %.2f%% compressed clusters\n",
			r.AllocatedClusters, r.TotalClusters, percent(r.AllocatedClusters, r.TotalClusters),
			percent(r.FragmentedClusters, r.AllocatedClusters), percent(r.CompressedClusters, r.AllocatedClusters))
	}
	if r.ImageEndOffset > 0 {
		fmt.Fprintf(&b, "Image end offset: %d\n", r.ImageEndOffset)
	}
	return b.String()
}
