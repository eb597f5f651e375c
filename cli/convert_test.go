package cli

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"platter/formats"
	"platter/formats/qcow2/layout"
	"platter/integration/testenv"
)

// diskSize is that of the disks that are converted here: more than two windows,
// and no multiple of a cluster.
const diskSize = 2*window + 100<<10 + 512

// diskPieces cover what matters: the first and last byte, a window's end, zeroes
// amid data, a sector alone.
func diskPieces() []piece {
	text := bytes.Repeat(testenv.Pattern(1<<10, 3), 128)
	gap := bytes.Clone(text)
	clear(gap[10<<10 : 50<<10])
	return []piece{
		{0, []byte("first")}, {100 << 10, text}, {window - 5000, testenv.Pattern(10000, 4)}, {window + 512<<10, gap},
		{2*window - 512, testenv.Pattern(512, 5)}, {diskSize - 1, []byte("l")},
	}
}

// sources makes an image of the same disk in each way that there is, and returns
// their paths.
func sources(t *testing.T, dir string) map[string]string {
	t.Helper()
	pieces := diskPieces()
	paths := map[string]string{"raw": testenv.Image(t, dir, "source.raw", diskSize, nil)}
	for _, p := range pieces {
		patch(t, paths["raw"], p.off, p.data)
	}
	at := func(name string) string { return filepath.Join(dir, name+".qcow2") }
	for name, options := range map[string]string{
		"v2": "compat=0.10", "small": "cluster_size=512", "large": "cluster_size=2M", "extended": "extended_l2=on",
		"preallocated": "preallocation=metadata", "data": "data_file=source.data", "rawdata": "data_file=source.raw.data,data_file_raw=on",
	} {
		paths[name] = makeQcow2(t, at(name), diskSize, options, pieces...)
	}
	for name, options := range map[string]string{"zlib": "compression_type=zlib", "zstd": "compression_type=zstd,cluster_size=4k"} {
		paths[name] = at(name)
		must(t, "convert", "-q", "-c", "-O", "qcow2", "-o", options, paths["raw"], paths[name])
	}
	// A chain, of whose files each has a part, and some of what lies above it.
	base := testenv.Image(t, dir, "base.raw", window, []byte("to be overwritten"))
	patch(t, base, pieces[1].off, pieces[1].data)
	mid := makeQcow2(t, at("mid"), diskSize, "backing_file=base.raw,backing_fmt=raw", piece{0, make([]byte, 64<<10)}, pieces[2], pieces[5])
	paths["chain"] = makeQcow2(t, at("chain"), diskSize, "backing_file="+filepath.Base(mid)+",backing_fmt=qcow2,cluster_size=4k", pieces[0], pieces[3], pieces[4])
	return paths
}

// Every kind of image can be read and be made, and the disk stays what it is.
func TestConvert(t *testing.T) {
	dir := testenv.DiskDir(t)
	want := disk(diskSize, diskPieces()...)
	for from, source := range sources(t, dir) {
		for to, flags := range map[string]string{
			"raw": "-O raw", "full": "-O raw -o preallocation=full", "qcow2": "-O qcow2", "v2": "-O qcow2 -o compat=0.10,cluster_size=512",
			"extended": "-O qcow2 -o extended_l2=on", "preallocated": "-O qcow2 -o preallocation=metadata", "data": "-O qcow2 -o data_file=NAME.data",
			"rawdata": "-O qcow2 -o data_file=NAME.data,data_file_raw=on", "zlib": "-O qcow2 -c", "zstd": "-c -O qcow2 -o compression_type=zstd,cluster_size=2M",
		} {
			if from != "raw" && from != "chain" && to != "raw" && to != "zlib" {
				continue
			}
			t.Run(from+" to "+to, func(t *testing.T) {
				name := from + "-" + to
				path := filepath.Join(dir, name)
				args := strings.Fields("convert " + strings.ReplaceAll(flags, "NAME", name))
				if out := must(t, append(args, source, path)...); out != "" {
					t.Errorf("printed %q", out)
				}
				var got []byte
				var err error
				if strings.Contains(flags, "raw ") || to == "raw" {
					got, err = os.ReadFile(path)
				} else {
					got = readQcow2(t, path)
					must(t, "check", path)
				}
				if err != nil || !bytes.Equal(got, want) {
					t.Errorf("%d bytes, want %d: %v", len(got), len(want), err)
				}
				if to == "rawdata" {
					if data, err := os.ReadFile(path + ".data"); err != nil || !bytes.Equal(data, want) {
						t.Errorf("the data file differs: %v", err)
					}
				}
				if packed := strings.Contains(mapOf(t, path), "compressed"); packed != strings.Contains(flags, "-c") && to != "raw" && to != "full" {
					t.Errorf("compressed clusters: %v", packed)
				}
			})
		}
	}
}

// Zeroes take no space in the new image, whether the source tells of them or not.
func TestConvertIsSparse(t *testing.T) {
	dir := testenv.DiskDir(t)
	source := filepath.Join(dir, "source.raw")
	must(t, "create", "-o", "preallocation=full", source, "64M")
	patch(t, source, 30<<20, []byte("abc"))
	for _, flags := range []string{"-O raw", "-O qcow2", "-O qcow2 -c"} {
		path := filepath.Join(dir, strings.ReplaceAll(flags, " ", ""))
		must(t, append(strings.Fields("convert "+flags), source, path)...)
		var st unix.Stat_t
		if err := unix.Stat(path, &st); err != nil {
			t.Fatal(err)
		}
		if st.Blocks*512 > 1<<20 {
			t.Errorf("%s: takes %d bytes", flags, st.Blocks*512)
		}
	}
}

// A raw disk needs no whole sectors; a qcow2 one is rounded up.
func TestConvertSizes(t *testing.T) {
	dir := t.TempDir()
	for _, size := range []int64{0, 1, 511, 513, 65536, 65537} {
		want := testenv.Pattern(int(size), 1)
		source := testenv.Image(t, dir, fmt.Sprint(size), size, want)
		must(t, "convert", source, source+".raw")
		if got, err := os.ReadFile(source + ".raw"); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%d bytes of raw: %v", size, err)
		}
		for _, flag := range []string{"-q", "-c"} {
			must(t, "convert", flag, "-O", "qcow2", source, source+flag)
			got := readQcow2(t, source+flag)
			if int64(len(got)) != (size+511)&^511 || !bytes.Equal(got[:size], want) || !isZero(got[size:]) {
				t.Errorf("%d bytes, %s: %d bytes of qcow2 differ", size, flag, len(got))
			}
		}
	}
}

func TestConvertRefuses(t *testing.T) {
	dir := t.TempDir()
	source := testenv.Image(t, dir, "source.raw", 1<<20, []byte("abc"))
	there := testenv.Image(t, dir, "there", 7, []byte("kept"))
	path := filepath.Join(dir, "new")
	for args, words := range map[string][]string{
		"-c":                               {path, "raw image can't be compressed", "-O qcow2"},
		"-o cluster_size=4k":               {path, `"cluster_size"`},
		"-o size=1M":                       {path, "size is that of the source"},
		"-O qcow2 -o size=1M":              {path, "size is that of the source"},
		"-O qcow2 -o cluster_size=5":       {path, "cluster_size=5"},
		"-O qcow2 -c -o data_file=new.raw": {path, "data file can't be compressed"},
		"-O qcow2 -o data_file=there":      {there, "file exists", "kept"},
		"-O qcow2 -o backing_file=source.raw,backing_fmt=raw": {path, "needs no backing file", "platter create -b"},
		"--snapshot one":    {source, "snapshot of a raw image"},
		"-f qcow2":          {source, "not a qcow2 image"},
		"--allow-dir x -fx": {source, `"x"`},
	} {
		refused(t, append(append([]string{"convert"}, strings.Fields(args)...), source, path), words...)
		missing(t, path, path+".raw")
	}
	for _, format := range []string{"raw", "qcow2"} {
		for _, file := range []string{there, source, dir} {
			refused(t, []string{"convert", "-O", format, source, file}, file, "file exists", "kept as it is")
		}
	}
	if data, err := os.ReadFile(there); err != nil || string(data) != "kept\x00\x00\x00" {
		t.Errorf("the file that existed: %q, %v", data, err)
	}
}

// A conversion that fails half-way leaves nothing behind, and says where it
// failed.
func TestConvertFails(t *testing.T) {
	dir := t.TempDir()
	raw := testenv.Image(t, dir, "source.raw", 32<<20, bytes.Repeat(testenv.Pattern(1<<10, 1), 31<<10))
	short, damaged := filepath.Join(dir, "short.qcow2"), filepath.Join(dir, "damaged.qcow2")
	must(t, "convert", "-O", "qcow2", raw, short)
	must(t, "convert", "-c", "-O", "qcow2", raw, damaged)
	st, err := os.Stat(short)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(short, st.Size()/2); err != nil { // what maps the second half leads nowhere
		t.Fatal(err)
	}
	patch(t, damaged, packedAt(t, damaged, 200), bytes.Repeat([]byte{0xff}, 100))
	path := filepath.Join(dir, "new")
	for source, words := range map[string][]string{
		short:   {"map " + short, "input/output error", "platter check"},
		damaged: {"read " + damaged, "bytes of the disk at ", "input/output error"},
	} {
		for _, flags := range []string{"-O raw", "-O qcow2", "-O qcow2 -c", "-O qcow2 -o data_file=new.data"} {
			refused(t, append(strings.Fields("convert "+flags), source, path), words...)
			missing(t, path, path+".data")
		}
	}
}

// packedAt tells where the data of a compressed cluster begins in a small image
// with clusters of 64 KiB.
func packedAt(t *testing.T, path string, cluster int64) int64 {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	word := func(at int64) uint64 {
		b := make([]byte, 8)
		if _, err := f.ReadAt(b, at); err != nil {
			t.Fatal(err)
		}
		return binary.BigEndian.Uint64(b)
	}
	l2 := layout.EntryOffset(word(l1Cluster << 16))
	off, _ := layout.Geometry{ClusterBits: 16}.CompressedRange(word(l2 + 8*cluster))
	return off
}

// So does one that runs out of space.
func TestConvertWithoutSpace(t *testing.T) {
	source := testenv.Image(t, t.TempDir(), "source.raw", 16<<20, bytes.Repeat(testenv.Pattern(1<<20, 1), 16))
	path := filepath.Join(smallDir(t), "new")
	for _, flags := range []string{"-O raw", "-O raw -o preallocation=full", "-O qcow2", "-O qcow2 -c", "-O qcow2 -o preallocation=full", "-O qcow2 -o data_file=new.data"} {
		refused(t, append(strings.Fields("convert "+flags), source, path), path, "no space left", "free some space")
		missing(t, path, path+".data")
	}
	if err := makeRaw(path, 16<<20, rawOptions{fill: true}); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("fill a raw image: %v", err)
	}
	missing(t, path)
}

// An interrupted conversion leaves nothing behind.
func TestConvertInterrupted(t *testing.T) {
	dir := t.TempDir()
	source := testenv.Image(t, dir, "source.raw", 16<<20, bytes.Repeat(testenv.Pattern(1<<20, 1), 16))
	path := filepath.Join(dir, "new")
	for _, flags := range []string{"-O raw", "-O qcow2", "-O qcow2 -c", "-O qcow2 -o data_file=new.data"} {
		c, _, err := parse(append(strings.Fields("convert "+flags), source, path), &app{}, func(int) {})
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if err := c.Convert.convert(ctx, &progress{}); err == nil || !strings.Contains(err.Error(), "interrupted") || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: %v", flags, err)
		}
		missing(t, path, path+".data")
	}
}

// Nobody else opens the new image while it is made.
func TestConvertLocksTheNewImage(t *testing.T) {
	dir := t.TempDir()
	for _, format := range []string{"raw", "qcow2"} {
		path := filepath.Join(dir, format)
		dst, err := (&convertCmd{OutputFormat: format, Destination: path}).createTarget(1 << 20)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := formats.Open(path, formats.Options{ReadOnly: true}); !errors.Is(err, formats.ErrLocked) {
			t.Errorf("%s: %v", format, err)
		}
		if err := dst.finish(nil); err != nil {
			t.Error(err)
		}
		must(t, "info", path)
	}
}
