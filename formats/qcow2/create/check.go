package create

import (
	"fmt"
	"math/bits"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"platter/formats/qcow2/layout"
)

const (
	defaultVersion      = 3
	defaultClusterSize  = 64 << 10
	defaultRefcountBits = 16
	defaultPerm         = 0o644
)

// withDefaults fills in what the zero values stand for.
func (o Options) withDefaults() Options {
	if o.Version == 0 {
		o.Version = defaultVersion
	}
	if o.ClusterSize == 0 {
		o.ClusterSize = defaultClusterSize
	}
	if o.RefcountBits == 0 {
		o.RefcountBits = defaultRefcountBits
	}
	if o.Perm == 0 {
		o.Perm = defaultPerm
	}
	return o
}

// check reports what QEMU refuses, too, of options that have their defaults
// filled in. path is where the image is to be.
func (o *Options) check(path string) error {
	for _, err := range []error{
		o.checkValues(), checkClusterSize(o.ClusterSize), checkRefcountBits(o.RefcountBits), o.checkVersion(), o.checkBacking(path), o.checkDataFile(path),
	} {
		if err != nil {
			return err
		}
	}
	if o.ExtendedL2 && o.ClusterSize < 1<<layout.MinExtendedClusterBits {
		return &OptionError{"extended_l2", "on", fmt.Sprintf("needs clusters of at least 16384 bytes, cluster_size is %d", o.ClusterSize), "use cluster_size=16k or larger"}
	}
	return nil
}

// checkValues looks at what ParseOptions cannot get wrong but a caller can.
func (o *Options) checkValues() error {
	switch {
	case o.Version != 2 && o.Version != 3:
		return &OptionError{"compat", strconv.Itoa(o.Version), "must be 2 (0.10) or 3 (1.1)", ""}
	case o.Compression > layout.Zstd:
		return &OptionError{"compression_type", o.Compression.String(), "must be zlib or zstd", ""}
	case o.Preallocation > PreallocateFull:
		return &OptionError{"preallocation", o.Preallocation.String(), "must be one of " + strings.Join(preallocationNames, ", "), ""}
	}
	return nil
}

func checkClusterSize(n int64) error {
	if n < 1<<layout.MinClusterBits || n > 1<<layout.MaxClusterBits || bits.OnesCount64(uint64(n)) != 1 {
		return &OptionError{"cluster_size", strconv.FormatInt(n, 10), "must be a power of two from 512 to 2097152 (2M)", ""}
	}
	return nil
}

func checkRefcountBits(n int) error {
	if n < 1 || n > 1<<layout.MaxRefcountOrder || bits.OnesCount(uint(n)) != 1 {
		return &OptionError{"refcount_bits", strconv.Itoa(n), "must be a power of two from 1 to 64", ""}
	}
	return nil
}

// checkVersion refuses in version 2 what came with version 3.
func (o *Options) checkVersion() error {
	if o.Version >= 3 {
		return nil
	}
	for _, x := range []struct {
		used          bool
		option, value string
	}{
		{o.RefcountBits != defaultRefcountBits, "refcount_bits", strconv.Itoa(o.RefcountBits)},
		{o.LazyRefcounts, "lazy_refcounts", "on"},
		{o.ExtendedL2, "extended_l2", "on"},
		{o.Compression != layout.Zlib, "compression_type", o.Compression.String()},
		{o.DataFile != "", "data_file", strconv.Quote(o.DataFile)},
	} {
		if x.used {
			return &OptionError{x.option, x.value, "needs version 3 of the format", "use compat=1.1, or leave " + x.option + " out"}
		}
	}
	return nil
}

// backingFormats are the image formats that QEMU knows and so an image may
// name. Whoever opens the image need not know all of them.
var backingFormats = []string{"bochs", "cloop", "dmg", "luks", "parallels", "qcow", "qcow2", "qed", "raw", "vdi", "vhdx", "vmdk", "vpc"}

func checkBackingFormat(name string) error {
	if !slices.Contains(backingFormats, name) {
		return &OptionError{"backing_fmt", strconv.Quote(name), "is not an image format", "formats: " + strings.Join(backingFormats, ", ")}
	}
	return nil
}

func (o *Options) checkBacking(path string) error {
	switch {
	case o.BackingFile == "" && o.BackingFormat != "":
		return &OptionError{"backing_fmt", o.BackingFormat, "needs a backing_file", ""}
	case o.BackingFile == "":
		return nil
	case o.BackingFormat == "":
		return &OptionError{"backing_file", strconv.Quote(o.BackingFile), "needs a stated format", "add backing_fmt=raw or backing_fmt=qcow2, as the file is"}
	case o.Preallocation != PreallocateOff && !o.ExtendedL2:
		return &OptionError{"preallocation", o.Preallocation.String(), "would hide the backing_file", "use extended_l2=on, or leave preallocation off"}
	case samePath(o.BackingFile, path):
		return &OptionError{"backing_file", strconv.Quote(o.BackingFile), "is the new image itself", "name the image to build upon"}
	}
	if err := checkName("backing_file", o.BackingFile, layout.MaxBackingName); err != nil {
		return err
	}
	return checkBackingFormat(o.BackingFormat)
}

func (o *Options) checkDataFile(path string) error {
	name := strings.TrimPrefix(o.DataFile, "file:")
	prefix, _, colon := strings.Cut(name, ":")
	switch {
	case o.DataFileRaw && o.DataFile == "":
		return &OptionError{"data_file_raw", "on", "needs a data_file", ""}
	case o.DataFile == "":
		return nil
	case o.DataFileRaw && o.BackingFile != "":
		return &OptionError{"data_file_raw", "on", "cannot be used with a backing_file: a raw image has none", "leave one of them out"}
	case name == "" || colon && !strings.Contains(prefix, "/"):
		return &OptionError{"data_file", strconv.Quote(o.DataFile), "is not a plain file name", "name a file; write ./ before a name with a colon"}
	case samePath(name, path):
		return &OptionError{"data_file", strconv.Quote(o.DataFile), "is the new image itself", "name another file"}
	}
	return checkName("data_file", name, layout.MaxDataFileName)
}

func checkName(option, name string, limit int) error {
	switch {
	case len(name) > limit:
		return &OptionError{option, "", fmt.Sprintf("has %d bytes, must have at most %d", len(name), limit), "choose a shorter name, such as one relative to the image's folder"}
	case strings.ContainsRune(name, 0):
		return &OptionError{option, strconv.Quote(name), "must not contain a zero byte", ""}
	}
	return nil
}

// beside is where a file that an image names is: relative names are relative to
// the folder of the image.
func beside(name, path string) string {
	if filepath.IsAbs(name) {
		return filepath.Clean(name)
	}
	return filepath.Join(filepath.Dir(path), name)
}

// samePath reports whether an image at path names itself.
func samePath(name, path string) bool {
	a, errA := filepath.Abs(beside(name, path))
	b, errB := filepath.Abs(path)
	return errA == nil && errB == nil && a == b
}
