// Package check finds what is wrong with a qcow2 image, and repairs it, with
// the categories, the counts and the limits of `qemu-img check`.
//
// Every cluster of the image file has a refcount: how many tables and entries
// refer to it. The checker reads the stored refcounts, then walks everything
// that refers to clusters (header, L1 and L2 tables of the disk and of its
// snapshots, snapshot table, refcount table and blocks, bitmaps, encryption
// header), counts the references itself, and compares. A refcount below the
// references is a corruption, since the cluster may be given away while it is in
// use; one above them is a leak, which only wastes space. On its way it looks at
// the entries themselves.
//
// Three things count as corruption here that qemu-img passes over, because who
// reads the image fails on them: the zero flag in an image of version 2 and
// other bits that only the specification reserves, an entry that doesn't name
// the guest offset although the image has a data file, and a cluster that is the
// metadata of two owners although its refcount agrees.
//
// A table is read once, however many snapshots share it, in the order of the
// file. Memory is bounded by the file's length, not by what the image claims:
// usually 2 to 3 bytes for each cluster that is in use, at most 17 for each that
// the file has, and 20 MiB for reading ahead.
//
// A repair is ordered so that a power cut in its middle leaves the image no
// worse than it was: no cluster's refcount falls below its references that was
// not below them before, and no entry gets the copied flag whose cluster is
// shared. First refcounts rise, then copied flags that are wrong go, then
// refcounts fall, and at last copied flags are set, each step durable before the
// next. New refcount tables are written behind the end of the file, where nobody
// looks, until one sector of the header switches to them.
package check

import (
	"errors"
	"fmt"
	"io"

	"platter/formats/qcow2/layout"
)

// File is the image file to be checked. Offsets are in bytes from its start.
// ReadAt is called from several goroutines at a time, the rest from one, WriteAt
// also while other parts are read. Sync returns when everything written before
// is durable. WriteAt, Sync and Truncate are only called to repair.
type File interface {
	io.ReaderAt
	io.WriterAt
	Size() (int64, error)
	Sync() error
	Truncate(size int64) error
}

// Repair says what may be changed in the image.
type Repair int

const (
	// RepairNone only looks.
	RepairNone Repair = iota
	// RepairLeaks lowers refcounts that are too high, and corrects copied flags if
	// nothing else is wrong.
	RepairLeaks
	// RepairAll does what qemu-img does to every inconsistency: it corrects
	// refcounts and copied flags, writes new refcount tables when the old ones
	// are damaged, completes the snapshot table, and takes impossible offsets out
	// of entries that only read as zeroes. An entry whose data is lost stays.
	RepairAll
)

// Options are what Run may be told. The zero value only looks.
type Options struct {
	Repair Repair
	// Progress is told how many bytes of metadata have been read, and how many
	// are known to be there; both grow. A repair that changed something reads
	// them all again and starts over. May be nil. It is called on the goroutine
	// that called Run, at least once for each few MiB.
	Progress func(done, total int64)
	// Log is given a line for each finding, without a line feed, as in "ERROR
	// cluster 5 refcount=0 reference=1". May be nil. After MaxLog lines a last one
	// says that there are more.
	Log func(message string)
}

// MaxLog is the most lines that one pass over the image logs. A repair that
// changed something is followed by a second pass.
const MaxLog = 1000

// What keeps a check or a repair from being finished, for errors.Is.
var (
	// ErrTangled: the image's tables overlap so much that reading all of them
	// would take many times the length of the file. No program makes such an
	// image by accident.
	ErrTangled = errors.New("tables of the image overlap each other: it is badly damaged, or was made to do harm")
	// ErrBeyondRepair: the refcounts must be written anew, and can't be.
	ErrBeyondRepair = errors.New("image can't be repaired")
)

// Run checks the image and, if told to, repairs it. Nobody else may write the
// file meanwhile. What it wrote is durable on return.
//
// The report tells what was found or, after a repair, what is left. Findings are
// not errors. An error means that the check could not be finished: the file
// can't be read or written, the header is invalid (errors of package layout), or
// one of the errors above. The report then tells how far it came and counts a
// check error; what a repair had written by then left the image no worse.
func Run(f File, o Options) (*Report, error) {
	c, err := inspect(f, o)
	if err == nil && o.Repair != RepairNone {
		c, err = c.repair()
	}
	if err != nil {
		c.report.CheckErrors++
	}
	return &c.report, err
}

// checker is one pass over an image.
type checker struct {
	f       File
	options Options
	report  Report
	logged  int
	meter   meter

	h         *layout.Header
	g         layout.Geometry
	most      uint64 // the largest refcount
	size      int64  // of the file in bytes, up to a multiple of 512
	clusters  int64  // that the file has, a last one that is cut off included
	snapshots snapshotTable
	bitmaps   []layout.Bitmap

	table  []uint64 // the refcount table; entries beyond its end are 0
	stored counts   // the refcounts in the file
	refs   counts   // the references that were found
	owners counts   // how many metadata structures a cluster belongs to, up to 3
	beyond spans    // clusters behind the file's end that something refers to
	l2     l2Tables

	found findings
	done  *repairs
}

// findings are what decides how to repair.
type findings struct {
	refcounts  int64 // clusters whose refcount is too low
	structure  int64 // faults of the refcount table and its blocks
	flags      int64 // wrong copied flags
	zeroes     int64 // entries that read as zeroes and have an impossible offset
	unreadable bool  // there are refcounts that can't be told
	rebuild    bool  // refcounts can't be corrected where they stand
}

// inspect looks at everything once. It always returns a checker, with whatever
// it found until an error stopped it.
func inspect(f File, o Options) (*checker, error) {
	c := &checker{f: f, options: o, done: new(repairs)}
	if err := c.open(); err != nil {
		return c, err
	}
	if err := c.loadRefcounts(); err != nil {
		return c, err
	}
	if err := c.count(); err != nil {
		return c, err
	}
	c.compare()
	c.meter.finish()
	return c, nil
}

// open reads the header and what else must be known before the tables.
func (c *checker) open() error {
	size, err := c.f.Size()
	if err != nil {
		return fmt.Errorf("find size of image: %w", err)
	}
	if c.h, err = layout.ReadHeader(c.f, size); err != nil {
		return err
	}
	c.g = c.h.Geometry()
	c.most = c.g.MaxRefcount()
	size = min(size, layout.MaxOffset) // no entry names what is behind that
	c.size = (size + 511) &^ 511
	c.clusters = c.g.Clusters(c.size)
	c.meter = meter{limit: 4*size + 16<<20, report: c.options.Progress}
	c.report.TotalClusters = c.g.Clusters((c.h.Size + 511) &^ 511)
	if c.snapshots, err = c.readSnapshots(); err != nil {
		return err
	}
	if c.h.Autoclear&layout.BitmapsValid != 0 {
		if c.bitmaps, err = layout.ReadBitmaps(c.f, c.h); err != nil {
			return err
		}
	}
	return nil
}
