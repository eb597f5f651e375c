package create

import (
	"errors"
	"fmt"
	"reflect"
	"strings"
	"testing"

	"platter/formats"
	"platter/formats/qcow2/layout"
)

func TestParseOptions(t *testing.T) {
	all := "backing_file=b,backing_fmt=raw,cluster_size=1M,compat=v3,compression_type=zstd,data_file=d,data_file_raw=on," +
		"encryption=off,extended_l2=on,lazy_refcounts=on,nocow=on,preallocation=falloc,refcount_bits=1,size=1.5G"
	for _, c := range []struct {
		lists []string
		want  Options
	}{
		{nil, Options{}},
		{[]string{all}, Options{
			BackingFile: "b", BackingFormat: "raw", ClusterSize: 1 << 20, Version: 3, Compression: layout.Zstd, DataFile: "d", DataFileRaw: true,
			ExtendedL2: true, LazyRefcounts: true, NoCOW: true, Preallocation: PreallocateFalloc, RefcountBits: 1, Size: 3 << 29,
		}},
		{strings.Split(all, ",encryption=off,"), Options{
			BackingFile: "b", BackingFormat: "raw", ClusterSize: 1 << 20, Version: 3, Compression: layout.Zstd, DataFile: "d", DataFileRaw: true,
			ExtendedL2: true, LazyRefcounts: true, NoCOW: true, Preallocation: PreallocateFalloc, RefcountBits: 1, Size: 3 << 29,
		}},
		{[]string{"backing_file=a,,b=c,,,data_file=,,,,d"}, Options{BackingFile: "a,b=c,", DataFile: ",,d"}},
		{[]string{"cluster_size=4k,cluster_size=8192"}, Options{ClusterSize: 8192}},
		{[]string{"compat=0.10"}, Options{Version: 2}},
		{[]string{"compat=1.1"}, Options{Version: 3}},
		{[]string{"compat=v2"}, Options{Version: 2}},
		{[]string{"preallocation=off"}, Options{}},
		{[]string{"preallocation=metadata"}, Options{Preallocation: PreallocateMetadata}},
		{[]string{"preallocation=full"}, Options{Preallocation: PreallocateFull}},
		{[]string{"nocow=yes,extended_l2=true,lazy_refcounts=y"}, Options{NoCOW: true, ExtendedL2: true, LazyRefcounts: true}},
		{[]string{"nocow=on,extended_l2=on,lazy_refcounts=on", "nocow=no,extended_l2=false,lazy_refcounts=n"}, Options{}},
		{[]string{"size=0"}, Options{}},
	} {
		got, err := ParseOptions(c.lists...)
		if err != nil || !reflect.DeepEqual(got, c.want) {
			t.Errorf("%q: %+v, %v, want %+v", c.lists, got, err, c.want)
		}
	}
}

// TestParseOptionsRefuses has what is no list of options; TestRefused has the
// values.
func TestParseOptionsRefuses(t *testing.T) {
	for list, want := range map[string]string{
		"":                      `invalid options: "" is no option of a qcow2 image`,
		",":                     `"" is no option`,
		"nocow=on,":             `"" is no option`,
		",nocow=on":             `"" is no option`,
		",,nocow=on":            `",nocow" is no option`,
		"nocow":                 "invalid options: nocow needs a value (write nocow=VALUE)",
		"nocow=":                `nocow="" must be on or off`,
		"Nocow=on":              `"Nocow" is no option`,
		"encryption=maybe":      `encryption="maybe" must be on or off`,
		"encrypt.format":        "encrypt.format is not supported",
		"size=1.5":              `size="1.5" is not a size`,
		"size=8E":               `size="8E" is not a size`,
		"refcount_bits=0x10":    `refcount_bits="0x10" is not a number`,
		"nocow=on\x00,size=1":   `nocow="on\x00" must be on or off`,
		"extent_size_hint=1M":   `"extent_size_hint" is no option`,
		"nocow=on,cluster_size": "cluster_size needs a value",
	} {
		o, err := ParseOptions(list)
		var bad *OptionError
		if !errors.Is(err, formats.ErrBadOptions) || !errors.As(err, &bad) || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %s", list, err, want)
		}
		if !reflect.DeepEqual(o, Options{}) {
			t.Errorf("%q: %+v besides an error", list, o)
		}
	}
}

// write renders options as ParseOptions takes them.
func (o Options) write() string {
	var list []string
	add := func(name string, value any, zero bool) {
		if !zero {
			list = append(list, name+"="+strings.ReplaceAll(fmt.Sprint(value), ",", ",,"))
		}
	}
	add("backing_file", o.BackingFile, o.BackingFile == "")
	add("backing_fmt", o.BackingFormat, o.BackingFormat == "")
	add("cluster_size", o.ClusterSize, o.ClusterSize == 0)
	add("compat", fmt.Sprint("v", o.Version), o.Version == 0)
	add("compression_type", o.Compression, o.Compression == layout.Zlib)
	add("data_file", o.DataFile, o.DataFile == "")
	add("data_file_raw", o.DataFileRaw, !o.DataFileRaw)
	add("extended_l2", o.ExtendedL2, !o.ExtendedL2)
	add("lazy_refcounts", o.LazyRefcounts, !o.LazyRefcounts)
	add("nocow", o.NoCOW, !o.NoCOW)
	add("preallocation", o.Preallocation, o.Preallocation == PreallocateOff)
	add("refcount_bits", o.RefcountBits, o.RefcountBits == 0)
	add("size", o.Size, o.Size == 0)
	return strings.Join(list, ",")
}

// FuzzParseOptions: whatever is typed is refused, or means options that can be
// written down again and that make a header that reads back.
func FuzzParseOptions(f *testing.F) {
	for _, seed := range []string{
		"", ",", "size=1G", "compat=0.10,cluster_size=512", "refcount_bits=64,extended_l2=on,compression_type=zstd",
		"backing_file=a,,b,backing_fmt=raw", "data_file=./a:b,data_file_raw=on,size=10T", "preallocation=full,lazy_refcounts=y,size=5E,cluster_size=2M",
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, list string) {
		o, err := ParseOptions(list)
		if err != nil {
			var bad *OptionError
			if !errors.As(err, &bad) || bad.Option == "" || bad.Want == "" {
				t.Fatalf("%q: %v", list, err)
			}
			return
		}
		if text := o.write(); text != "" {
			if again, err := ParseOptions(text); err != nil || !reflect.DeepEqual(again, o) {
				t.Fatalf("%q: %+v, written %q and read %+v, %v", list, o, text, again, err)
			}
		}
		o = o.withDefaults()
		if o.check("disk.qcow2") != nil {
			return
		}
		p, err := newPlan("disk.qcow2", o.Size, &o)
		if err != nil {
			return
		}
		h, err := layout.ParseHeader(append(p.head, make([]byte, p.ClusterSize()-int64(len(p.head)))...))
		if err != nil || h.BackingFile != o.BackingFile || h.Size < o.Size || h.Size >= o.Size+sector || p.length < h.L1Offset {
			t.Fatalf("%q: %+v, %v", list, h, err)
		}
	})
}
