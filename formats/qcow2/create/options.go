package create

import (
	"fmt"
	"io/fs"
	"slices"
	"strconv"
	"strings"

	"platter/config"
	"platter/formats"
	"platter/formats/qcow2/layout"
)

// Options tell how Create makes an image: everything that
// qemu-img create -f qcow2 -o takes. The zero value is QEMU's default
// throughout.
type Options struct {
	Size         int64 // of the disk in bytes; only when Create's own size is 0
	Version      int   // 2 (compat=0.10) or 3 (compat=1.1); 0 means 3
	ClusterSize  int64 // in bytes; 0 means 64 KiB
	RefcountBits int   // width of a refcount; 0 means 16

	LazyRefcounts bool                   // let refcounts lag behind until the image is closed
	ExtendedL2    bool                   // allocate clusters in 32 parts
	Compression   layout.CompressionType // how clusters will be packed
	Preallocation Preallocation

	// BackingFile is stored as it is written here. A relative name is relative
	// to the folder of the image, for whoever opens it. BackingFormat must go
	// with it: a format that is guessed can be forged by a guest.
	BackingFile   string
	BackingFormat string
	// BackingSize tells the size of the backing file's disk in bytes. It is
	// called when no size is given.
	BackingSize func() (int64, error)

	// DataFile is where guest clusters will stand: a file that must not exist
	// yet. It is stored as it is written here, and a relative name is relative
	// to the folder of the image.
	DataFile    string
	DataFileRaw bool // the data file is to be a raw image by itself, always

	NoCOW bool        // no copy-on-write below the image, where the file system can do that
	Perm  fs.FileMode // of new files, before the umask; 0 means 0o644
}

// Preallocation is what a new image has already: how much of its later growth
// is done, or paid for, when it is made.
type Preallocation uint8

const (
	// PreallocateOff makes an image that grows as it is written to.
	PreallocateOff Preallocation = iota
	// PreallocateMetadata maps every cluster, in a sparse file.
	PreallocateMetadata
	// PreallocateFalloc maps every cluster and reserves its space.
	PreallocateFalloc
	// PreallocateFull maps every cluster and fills it with zeroes.
	PreallocateFull
)

var preallocationNames = []string{"off", "metadata", "falloc", "full"}

func (p Preallocation) String() string {
	if int(p) < len(preallocationNames) {
		return preallocationNames[p]
	}
	return strconv.Itoa(int(p))
}

// OptionError tells which option cannot be. It is formats.ErrBadOptions.
type OptionError struct {
	Option string // its name for qemu-img
	Value  string // as it would be written; may be empty
	Want   string // what is wrong with it, as in "must be a power of two"
	Remedy string // may be empty
}

func (e *OptionError) Error() string {
	text := formats.ErrBadOptions.Error() + ": " + e.Option
	if e.Value != "" {
		text += "=" + e.Value
	}
	text += " " + e.Want
	if e.Remedy != "" {
		text += " (" + e.Remedy + ")"
	}
	return text
}

func (e *OptionError) Unwrap() error { return formats.ErrBadOptions }

// parsers are the options that ParseOptions knows, by name.
var parsers = []struct {
	name  string
	parse func(o *Options, value string) error
}{
	{"backing_file", func(o *Options, v string) error { return parseName(&o.BackingFile, "backing_file", v) }},
	{"backing_fmt", func(o *Options, v string) error {
		o.BackingFormat = v
		return checkBackingFormat(v)
	}},
	{"cluster_size", func(o *Options, v string) (err error) {
		if o.ClusterSize, err = parseSize("cluster_size", v); err != nil {
			return err
		}
		return checkClusterSize(o.ClusterSize)
	}},
	{"compat", func(o *Options, v string) error { return parseChoice(&o.Version, "compat", v, compats) }},
	{"compression_type", func(o *Options, v string) error {
		return parseChoice(&o.Compression, "compression_type", v, compressions)
	}},
	{"data_file", func(o *Options, v string) error { return parseName(&o.DataFile, "data_file", v) }},
	{"data_file_raw", func(o *Options, v string) error { return parseBool(&o.DataFileRaw, "data_file_raw", v) }},
	{"encryption", parseEncryption},
	{"extended_l2", func(o *Options, v string) error { return parseBool(&o.ExtendedL2, "extended_l2", v) }},
	{"lazy_refcounts", func(o *Options, v string) error { return parseBool(&o.LazyRefcounts, "lazy_refcounts", v) }},
	{"nocow", func(o *Options, v string) error { return parseBool(&o.NoCOW, "nocow", v) }},
	{"preallocation", func(o *Options, v string) error {
		return parseChoice(&o.Preallocation, "preallocation", v, preallocations)
	}},
	{"refcount_bits", func(o *Options, v string) error {
		n, err := strconv.Atoi(v)
		if err != nil {
			return &OptionError{"refcount_bits", strconv.Quote(v), "is not a number", ""}
		}
		o.RefcountBits = n
		return checkRefcountBits(n)
	}},
	{"size", func(o *Options, v string) (err error) {
		o.Size, err = parseSize("size", v)
		return err
	}},
}

// ParseOptions reads lists of options as -o of qemu-img takes them:
// "key=value,key=value", where ",," is a comma within a value. Of an option that
// is given twice the last value counts. Every error is an *OptionError. What
// options mean for each other is for Create to see.
func ParseOptions(lists ...string) (Options, error) {
	var o Options
	for _, list := range lists {
		for _, item := range splitList(list) {
			if err := o.set(item); err != nil {
				return Options{}, err
			}
		}
	}
	return o, nil
}

// splitList splits at single commas and makes double ones single.
func splitList(list string) []string {
	items, item := []string(nil), []byte(nil)
	for i := 0; i < len(list); i++ {
		switch {
		case list[i] != ',':
			item = append(item, list[i])
		case i+1 < len(list) && list[i+1] == ',':
			item = append(item, ',')
			i++
		default:
			items, item = append(items, string(item)), nil
		}
	}
	return append(items, string(item))
}

func (o *Options) set(item string) error {
	name, value, ok := strings.Cut(item, "=")
	for _, p := range parsers {
		switch {
		case p.name != name:
		case !ok:
			return &OptionError{name, "", "needs a value", fmt.Sprintf("write %s=VALUE", name)}
		default:
			return p.parse(o, value)
		}
	}
	if strings.HasPrefix(name, "encrypt.") {
		return encrypted(name)
	}
	names := make([]string, len(parsers))
	for i, p := range parsers {
		names[i] = p.name
	}
	return &OptionError{strconv.Quote(name), "", "is no option of a qcow2 image", "options: " + strings.Join(names, ", ")}
}

func parseSize(option, value string) (int64, error) {
	n, err := config.ParseSize(value)
	if err != nil {
		return 0, &OptionError{option, strconv.Quote(value), "is not a size", "write a number of bytes, or one with a suffix: 64k, 1.5G"}
	}
	return int64(n), nil
}

func parseName(to *string, option, value string) error {
	if value == "" {
		return &OptionError{option, "", "must not be empty", ""}
	}
	*to = value
	return nil
}

func parseBool(to *bool, option, value string) error {
	switch value {
	case "on", "yes", "true", "y":
		*to = true
	case "off", "no", "false", "n":
		*to = false
	default:
		return &OptionError{option, strconv.Quote(value), "must be on or off", ""}
	}
	return nil
}

// choice is a word that an option can be.
type choice[T any] struct {
	word  string
	value T
}

var (
	compats        = []choice[int]{{"0.10", 2}, {"1.1", 3}, {"v2", 2}, {"v3", 3}}
	compressions   = []choice[layout.CompressionType]{{"zlib", layout.Zlib}, {"zstd", layout.Zstd}}
	preallocations = []choice[Preallocation]{
		{"off", PreallocateOff}, {"metadata", PreallocateMetadata}, {"falloc", PreallocateFalloc}, {"full", PreallocateFull},
	}
)

func parseChoice[T any](to *T, option, value string, choices []choice[T]) error {
	i := slices.IndexFunc(choices, func(c choice[T]) bool { return c.word == value })
	if i < 0 {
		words := make([]string, len(choices))
		for i, c := range choices {
			words[i] = c.word
		}
		return &OptionError{option, strconv.Quote(value), "must be one of " + strings.Join(words, ", "), ""}
	}
	*to = choices[i].value
	return nil
}

// parseEncryption accepts that there is none.
func parseEncryption(_ *Options, value string) error {
	var on bool
	if err := parseBool(&on, "encryption", value); err != nil || !on {
		return err
	}
	return encrypted("encryption")
}

func encrypted(option string) error {
	return &OptionError{option, "", "is not supported: encrypted images cannot be made here", "make it with qemu-img, or encrypt the disk below the image"}
}
