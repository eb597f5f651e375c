package create_test

import (
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"platter/formats"
	"platter/formats/qcow2/create"
	"platter/formats/qcow2/layout"
	"platter/integration/testenv"
)

// names lists what is in a folder.
func names(t *testing.T, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var list []string
	for _, e := range entries {
		list = append(list, e.Name())
	}
	return list
}

func readHeader(t *testing.T, path string) *layout.Header {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	h, err := layout.ParseHeader(b)
	if err != nil {
		t.Fatal(err)
	}
	return h
}

// TestRefused has every option, or pair of options, that cannot be. QEMU
// refuses them all.
func TestRefused(t *testing.T) {
	t.Parallel()
	qemuImg := testenv.NeedTool(t, "qemu-img")
	long := strings.Repeat("a", 1024)
	for _, c := range []struct {
		list string
		size int64
		want string
	}{
		{"cluster_size=1000", 1 << 20, "cluster_size=1000 must be a power of two from 512 to 2097152 (2M)"},
		{"cluster_size=256", 1 << 20, "cluster_size=256 must be a power of two from 512"},
		{"cluster_size=4M", 1 << 20, "cluster_size=4194304 must be a power of two from 512"},
		{"cluster_size=0", 1 << 20, "cluster_size=0 must be a power of two from 512"},
		{"cluster_size=big", 1 << 20, `cluster_size="big" is not a size (write a number of bytes`},
		{"refcount_bits=0", 1 << 20, "refcount_bits=0 must be a power of two from 1 to 64"},
		{"refcount_bits=3", 1 << 20, "refcount_bits=3 must be a power of two"},
		{"refcount_bits=128", 1 << 20, "refcount_bits=128 must be a power of two"},
		{"refcount_bits=-1", 1 << 20, "refcount_bits=-1 must be a power of two"},
		{"refcount_bits=16k", 1 << 20, `refcount_bits="16k" is not a number`},
		{"compat=1.2", 1 << 20, `compat="1.2" must be one of 0.10, 1.1, v2, v3`},
		{"compat=0.10,refcount_bits=8", 1 << 20, "refcount_bits=8 needs version 3 of the format (use compat=1.1, or leave refcount_bits out)"},
		{"compat=0.10,lazy_refcounts=on", 1 << 20, "lazy_refcounts=on needs version 3 of the format"},
		{"compat=0.10,extended_l2=on", 1 << 20, "extended_l2=on needs version 3 of the format"},
		{"compat=0.10,compression_type=zstd", 1 << 20, "compression_type=zstd needs version 3 of the format"},
		{"compat=0.10,data_file=d.raw", 1 << 20, `data_file="d.raw" needs version 3 of the format`},
		{"compression_type=lzo", 1 << 20, `compression_type="lzo" must be one of zlib, zstd`},
		{"preallocation=some", 1 << 20, `preallocation="some" must be one of off, metadata, falloc, full`},
		{"lazy_refcounts=maybe", 1 << 20, `lazy_refcounts="maybe" must be on or off`},
		{"extended_l2=on,cluster_size=8k", 1 << 20, "extended_l2=on needs clusters of at least 16384 bytes, cluster_size is 8192 (use cluster_size=16k or larger)"},
		{"data_file_raw=on", 1 << 20, "data_file_raw=on needs a data_file"},
		{"data_file=d.raw,data_file_raw=on,backing_file=base.raw,backing_fmt=raw", 1 << 20, "data_file_raw=on cannot be used with a backing_file"},
		{"data_file=disk.qcow2", 1 << 20, `data_file="disk.qcow2" is the new image itself`},
		{"data_file=nbd:unix:x", 1 << 20, `data_file="nbd:unix:x" is not a plain file name (name a file; write ./ before a name with a colon)`},
		{"data_file=", 1 << 20, "data_file must not be empty"},
		{"data_file=" + strings.Repeat("./", 300) + "d.raw,cluster_size=512", 1 << 20, "data_file has 605 bytes, too many for the header, which must fit in a cluster of 512 (choose a shorter name or a larger cluster_size)"},
		{"data_file=" + strings.Repeat("./", 2046) + "d.raw", 1 << 20, "data_file has 4097 bytes, must have at most 4095"},
		{"backing_file=base.raw", 1 << 20, `backing_file="base.raw" needs a stated format (add backing_fmt=raw or`},
		{"backing_fmt=raw", 1 << 20, "backing_fmt=raw needs a backing_file"},
		{"backing_file=,backing_fmt=raw", 1 << 20, "backing_file must not be empty"},
		{"backing_file=base.raw,backing_fmt=", 1 << 20, `backing_fmt="" is not an image format`},
		{"backing_file=base.raw,backing_fmt=qcow3", 1 << 20, `backing_fmt="qcow3" is not an image format (formats: bochs, cloop`},
		{"backing_file=disk.qcow2,backing_fmt=qcow2", 1 << 20, `backing_file="disk.qcow2" is the new image itself`},
		{"backing_file=base.raw,backing_fmt=raw,preallocation=metadata", 1 << 20, "preallocation=metadata would hide the backing_file (use extended_l2=on, or leave preallocation off)"},
		{"backing_file=" + long + ",backing_fmt=raw", 1 << 20, "backing_file has 1024 bytes, must have at most 1023 (choose a shorter name"},
		{"backing_file=" + long[:500] + ",backing_fmt=raw,cluster_size=512", 1 << 20, "backing_file has 500 bytes, too many for the header, which must fit in a cluster of 512"},
		{"encryption=on", 1 << 20, "encryption is not supported: encrypted images cannot be made here (make it with qemu-img"},
		{"encrypt.format=luks", 1 << 20, "encrypt.format is not supported"},
		{"encrypt.key-secret=sec0", 1 << 20, "encrypt.key-secret is not supported"},
		{"nope=1", 1 << 20, `"nope" is no option of a qcow2 image (options: backing_file, backing_fmt, cluster_size, compat, compression_type, data_file, data_file_raw, encryption, extended_l2, lazy_refcounts, nocow, preallocation, refcount_bits, size)`},
		{"=1", 1 << 20, `"" is no option of a qcow2 image`},
		{"cluster_size=4k,", 1 << 20, `"" is no option of a qcow2 image`},
		{"size=1M", 1 << 20, "size=1048576 is given besides a size of 1048576 (give the size once)"},
		{"size=-1", 0, `size="-1" is not a size`},
		{"cluster_size=64k", 2<<50 + 1, "size=2251799813685249 must be from 0 to 2251799813685248 with clusters of 65536 bytes: more would take an L1 table of over 32 MiB (use a larger cluster_size, or make a smaller image)"},
		{"cluster_size=512", 128<<30 + 1, "size=137438953473 must be from 0 to 137438953472 with clusters of 512 bytes"},
		{"cluster_size=2M", math.MaxInt64, "size=9223372036854775807 must be from 0 to 2305843009213693952 with clusters of 2097152 bytes: more would take an L1 table of over 32 MiB"},
		{"extended_l2=on", 1<<50 + 1, "size=1125899906842625 must be from 0 to 1125899906842624 with clusters of 65536 bytes"},
	} {
		t.Run(c.list[:min(len(c.list), 60)]+fmt.Sprint(c.size), func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			path := filepath.Join(dir, "disk.qcow2")
			var bad *create.OptionError
			o, err := create.ParseOptions(c.list)
			if err == nil {
				err = create.Create(path, c.size, o)
				var typed *formats.Error
				if !errors.As(err, &typed) || typed.Path != path || strings.Count(fmt.Sprint(err), path) != 1 {
					t.Errorf("not explained: %v", err)
				} else if typed.Remedy != "" && strings.Count(err.Error(), typed.Remedy) != 1 {
					t.Errorf("the remedy is not there once: %v", err)
				}
			}
			if !errors.Is(err, formats.ErrBadOptions) || !errors.As(err, &bad) || !strings.Contains(err.Error(), "invalid options: "+c.want) {
				t.Errorf("error is %v\nwant %s", err, c.want)
			}
			if left := names(t, dir); left != nil {
				t.Errorf("left behind: %v", left)
			}

			testenv.Image(t, dir, "base.raw", 1<<20, nil)
			args := []string{"-C", dir, qemuImg, "create", "-q", "-f", "qcow2", "-o", c.list, "disk.qcow2"}
			if c.size != 0 {
				args = append(args, fmt.Sprint(c.size))
			}
			if r := testenv.Run(t, time.Minute, "env", args...); r.Code == 0 {
				t.Error("qemu-img takes it")
			}
		})
	}
}

// TestRefusedValues: what ParseOptions cannot return is refused as well, and
// what QEMU finds out only when it runs out of refcounts or offsets.
func TestRefusedValues(t *testing.T) {
	for _, c := range []struct {
		name string
		size int64
		o    create.Options
		want string
	}{
		{"version", 1, create.Options{Version: 4}, "compat=4 must be 2 (0.10) or 3 (1.1)"},
		{"compression", 1, create.Options{Compression: 2}, "compression_type=type 2 must be zlib or zstd"},
		{"preallocation", 1, create.Options{Preallocation: 4}, "preallocation=4 must be one of off, metadata, falloc, full"},
		{"cluster size", 1, create.Options{ClusterSize: math.MinInt64}, "must be a power of two"},
		{"refcount bits", 1, create.Options{RefcountBits: math.MinInt}, "must be a power of two"},
		{"negative size", -1, create.Options{}, "size=-1 must be from 0 to"},
		{"negative size option", 0, create.Options{Size: -1}, "size=-1 must be from 0 to"},
		{"zero byte in backing file", 1, create.Options{BackingFile: "a\x00b", BackingFormat: "raw"}, "must not contain a zero byte"},
		{"zero byte in data file", 1, create.Options{DataFile: "a\x00b"}, "must not contain a zero byte"},
		{"format without its file", 1, create.Options{BackingFormat: "raw"}, "needs a backing_file"},
		{"no size", 0, create.Options{BackingFile: "b", BackingFormat: "raw"}, "size is not given, and the backing file's is not known (give a size)"},
		{"refcount table", 33 << 30, create.Options{ClusterSize: 512, RefcountBits: 64, Preallocation: create.PreallocateMetadata},
			"preallocation of 35433480192 bytes in clusters of 512 would take a refcount table of over 8 MiB"},
		{"file length", 1 << 57, create.Options{ClusterSize: 2 << 20, RefcountBits: 1, Preallocation: create.PreallocateFull},
			"preallocation of 144115188075855872 bytes in clusters of 2097152 would take a file of over 64 PiB"},
		{"data file length", 1<<56 + 512, create.Options{ClusterSize: 2 << 20, DataFile: "d.raw"}, "must be from 0 to 72057594037927936 with clusters of 2097152 bytes: a data_file has its clusters below 64 PiB"},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			err := create.Create(filepath.Join(dir, "disk.qcow2"), c.size, c.o)
			var bad *create.OptionError
			if !errors.Is(err, formats.ErrBadOptions) || !errors.As(err, &bad) || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error is %v, want %s", err, c.want)
			}
			if left := names(t, dir); left != nil {
				t.Errorf("left behind: %v", left)
			}
		})
	}
}

// TestSize: the size comes from the call, the options or the backing file, in
// this order.
func TestSize(t *testing.T) {
	backing := func(size int64, err error) create.Options {
		return create.Options{BackingFile: "base", BackingFormat: "raw", BackingSize: func() (int64, error) { return size, err }}
	}
	both := backing(1<<20, nil)
	both.Size = 5 << 20
	broken := errors.New("broken")
	for _, c := range []struct {
		name string
		size int64
		o    create.Options
		want int64
		err  error
	}{
		{"call", 3 << 20, create.Options{}, 3 << 20, nil},
		{"call before backing file", 3 << 20, backing(0, broken), 3 << 20, nil},
		{"options", 0, create.Options{Size: 5 << 20}, 5 << 20, nil},
		{"options before backing file", 0, both, 5 << 20, nil},
		{"backing file", 0, backing(1<<20+1, nil), 1<<20 + 512, nil},
		{"empty backing file", 0, backing(0, nil), 0, nil},
		{"no size", 0, create.Options{}, 0, nil},
		{"backing file fails", 0, backing(0, broken), 0, broken},
		{"both", 1, create.Options{Size: 1}, 0, formats.ErrBadOptions},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "disk.qcow2")
			err := create.Create(path, c.size, c.o)
			if !errors.Is(err, c.err) {
				t.Fatalf("error is %v, want %v", err, c.err)
			}
			if err != nil {
				return
			}
			if h := readHeader(t, path); h.Size != c.want {
				t.Errorf("the disk has %d bytes, want %d", h.Size, c.want)
			}
		})
	}
}

// TestKeepsWhatExists: neither an image nor a data file is ever overwritten,
// and nothing else is made then.
func TestKeepsWhatExists(t *testing.T) {
	dir := t.TempDir()
	path, data := filepath.Join(dir, "disk.qcow2"), filepath.Join(dir, "data.raw")
	precious := func(path string) {
		t.Helper()
		if err := os.WriteFile(path, []byte("precious"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	kept := func(err error, path string) {
		t.Helper()
		var typed *formats.Error
		if !errors.Is(err, fs.ErrExist) || !errors.As(err, &typed) || typed.Path != path || !strings.Contains(err.Error(), "kept as it is") {
			t.Errorf("create: %v, want that %s exists", err, path)
		}
		if got, err := os.ReadFile(path); err != nil || string(got) != "precious" {
			t.Errorf("%s holds %q, %v", path, got, err)
		}
		if left := names(t, dir); len(left) != 1 {
			t.Errorf("the folder holds %v", left)
		}
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
	}
	precious(path)
	kept(create.Create(path, 1<<20, create.Options{DataFile: "data.raw"}), path)
	precious(data)
	kept(create.Create(path, 1<<20, create.Options{DataFile: "data.raw"}), data)

	if err := os.Symlink(filepath.Join(dir, "nowhere"), path); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{path, dir} {
		if err := create.Create(name, 1<<20, create.Options{}); !errors.Is(err, fs.ErrExist) {
			t.Errorf("create %s: %v", name, err)
		}
	}
	if left := names(t, dir); len(left) != 1 {
		t.Errorf("a file was made through a dangling link: %v", left)
	}
}

// TestOneCreates: of many that make the same image, one does.
func TestOneCreates(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk.qcow2")
	errs := make([]error, 8)
	var wg sync.WaitGroup
	for i := range errs {
		wg.Go(func() { errs[i] = create.Create(path, 1<<20, create.Options{DataFile: "data.raw"}) })
	}
	wg.Wait()
	made := 0
	for _, err := range errs {
		switch {
		case err == nil:
			made++
		case !errors.Is(err, fs.ErrExist):
			t.Error(err)
		}
	}
	if made != 1 {
		t.Errorf("%d made the image", made)
	}
	readHeader(t, path)
}

// TestLeavesNothing: what cannot be finished is taken away again, wherever the
// space ends.
func TestLeavesNothing(t *testing.T) {
	testenv.NeedRoot(t)
	for _, c := range []struct {
		name string
		o    create.Options
		need int // more pages than this are needed
	}{
		{"tables", create.Options{Preallocation: create.PreallocateMetadata}, 4},
		{"falloc", create.Options{Preallocation: create.PreallocateFalloc, ClusterSize: 512}, 16},
		{"full", create.Options{Preallocation: create.PreallocateFull, ClusterSize: 4096}, 16},
		{"data file", create.Options{Preallocation: create.PreallocateFalloc, ClusterSize: 512, DataFile: "data.raw"}, 16},
		{"raw data file", create.Options{ClusterSize: 512, DataFile: "data.raw", DataFileRaw: true}, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			for pages := 1; ; pages++ {
				err := createWithin(t, pages, c.o)
				if err == nil {
					if pages <= c.need {
						t.Errorf("%d pages are enough", pages)
					}
					return
				}
				if !errors.Is(err, unix.ENOSPC) || !strings.Contains(err.Error(), "free some space") || pages > 64 {
					t.Fatalf("in %d pages: %v", pages, err)
				}
			}
		})
	}
}

// createWithin makes an image of 64 KiB on a file system of so many pages.
func createWithin(t *testing.T, pages int, o create.Options) error {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, fmt.Sprintf("size=%d", pages*os.Getpagesize())); err != nil {
		testenv.Skip(t, "no file system can be mounted here: "+err.Error())
	}
	defer func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	}()
	path := filepath.Join(dir, "disk.qcow2")
	err := create.Create(path, 64<<10, o)
	if err == nil {
		readHeader(t, path)
		return nil
	}
	if left := names(t, dir); left != nil {
		t.Errorf("in %d pages: left behind: %v", pages, left)
	}
	return err
}

// TestOtherFailures have nothing to do with space.
func TestOtherFailures(t *testing.T) {
	disk := testenv.DiskDir(t)
	nowhere := filepath.Join(t.TempDir(), "none", "disk.qcow2")
	beside := filepath.Join(t.TempDir(), "disk.qcow2")
	for _, c := range []struct {
		name, path, blamed string
		size               int64
		o                  create.Options
		is                 error
	}{
		{"no folder", nowhere, nowhere, 1, create.Options{}, fs.ErrNotExist},
		{"no folder for the data file", beside, filepath.Join(filepath.Dir(beside), "none", "d.raw"), 1, create.Options{DataFile: "none/d.raw"}, fs.ErrNotExist},
		{"too large for the file system", filepath.Join(disk, "a"), filepath.Join(disk, "a"), 1 << 55,
			create.Options{ClusterSize: 2 << 20, RefcountBits: 1, Preallocation: create.PreallocateMetadata}, unix.EFBIG},
		{"data file too large for the file system", filepath.Join(disk, "b"), filepath.Join(disk, "b.raw"), 1 << 55,
			create.Options{ClusterSize: 2 << 20, DataFile: "b.raw"}, unix.EFBIG},
	} {
		t.Run(c.name, func(t *testing.T) {
			err := create.Create(c.path, c.size, c.o)
			var typed *formats.Error
			if !errors.Is(err, c.is) || !errors.As(err, &typed) || typed.Path != c.blamed || typed.Remedy == "" {
				t.Errorf("error is %v, want %v", err, c.is)
			}
			for _, path := range []string{c.path, c.blamed} {
				if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
					t.Errorf("left behind: %s: %v", path, err)
				}
			}
		})
	}
}

// TestFiles: where the files are, what they are called in the image, how much
// space they have and who may read them.
func TestFiles(t *testing.T) {
	dir := testenv.DiskDir(t)
	if err := os.Mkdir(filepath.Join(dir, "sub"), 0o755); err != nil {
		t.Fatal(err)
	}
	const size = 3<<20 + 512
	for i, c := range []struct {
		preallocation create.Preallocation
		image, data   bool // have space for the whole disk
	}{
		{create.PreallocateOff, false, false},
		{create.PreallocateMetadata, false, false},
		{create.PreallocateFalloc, true, true},
		{create.PreallocateFull, true, true},
	} {
		image := filepath.Join(dir, fmt.Sprintf("%d.qcow2", i))
		split := filepath.Join(dir, fmt.Sprintf("split%d.qcow2", i))
		data := fmt.Sprintf("sub/%d.raw", i)
		o := create.Options{Preallocation: c.preallocation, Perm: 0o600}
		if err := create.Create(image, size, o); err != nil {
			t.Fatal(err)
		}
		o.DataFile = data
		if err := create.Create(split, size, o); err != nil {
			t.Fatal(err)
		}
		if got := readHeader(t, split).DataFile(); got != data {
			t.Errorf("the data file is called %q, want %q", got, data)
		}
		check := func(path string, least, most int64) {
			var st unix.Stat_t
			if err := unix.Stat(path, &st); err != nil {
				t.Fatal(err)
			}
			if space := st.Blocks * 512; space < least || space > most || st.Mode&0o777 != 0o600 {
				t.Errorf("%s: %s has %d bytes, want %d to %d, mode %o", c.preallocation, path, space, least, most, st.Mode)
			}
		}
		space := func(all bool) (least, most int64) {
			if all {
				return size, size + 1<<20
			}
			return 0, 64 << 10
		}
		least, most := space(c.image)
		check(image, least, most)
		least, most = space(c.data)
		check(filepath.Join(dir, data), least, most)
		check(split, 0, 512<<10)
	}
	absolute := filepath.Join(dir, "absolute.raw")
	path := filepath.Join(dir, "absolute.qcow2")
	if err := create.Create(path, size, create.Options{DataFile: absolute}); err != nil {
		t.Fatal(err)
	}
	if st, err := os.Stat(absolute); err != nil || st.Size() != size || readHeader(t, path).DataFile() != absolute {
		t.Errorf("data file %v: %v, called %q", st, err, readHeader(t, path).DataFile())
	}
}

func Example() {
	dir, err := os.MkdirTemp("", "example")
	if err != nil {
		panic(err)
	}
	defer os.RemoveAll(dir)

	o, err := create.ParseOptions("cluster_size=2M,extended_l2=on", "compression_type=zstd")
	if err != nil {
		panic(err)
	}
	path := filepath.Join(dir, "disk.qcow2")
	if err := create.Create(path, 10<<40, o); err != nil {
		panic(err)
	}
	st, err := os.Stat(path)
	if err != nil {
		panic(err)
	}
	fmt.Println(st.Size())
	// Output: 6291776
}
