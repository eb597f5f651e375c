package layout_test

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"platter/formats/qcow2/layout"
	"platter/integration/testenv"
)

// qemuCreate makes an image of 1 GiB with qemu-img and returns its path.
func qemuCreate(t *testing.T, options string, more ...string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk.qcow2")
	args := append([]string{"create", "-q", "-f", "qcow2", "-o", options}, more...)
	testenv.Tool(t, "qemu-img", append(args, path, "1G")...)
	return path
}

// qemuInfo is what qemu-img tells of an image; of the file itself nothing.
func qemuInfo(t *testing.T, path string) map[string]any {
	t.Helper()
	var info map[string]any
	if err := json.Unmarshal([]byte(testenv.Tool(t, "qemu-img", "info", "--output=json", path)), &info); err != nil {
		t.Fatal(err)
	}
	for _, key := range []string{"actual-size", "children", "dirty-flag"} {
		delete(info, key)
	}
	return info
}

// qemuCheck fails the test unless qemu-img finds the image clean.
func qemuCheck(t *testing.T, path string) {
	t.Helper()
	testenv.Tool(t, "qemu-img", "check", "-q", path)
}

// openFile opens an image and reads its header.
func openFile(t *testing.T, path string) (*os.File, *layout.Header) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	})
	st, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	h, err := layout.ReadHeader(f, st.Size())
	if err != nil {
		t.Fatal(err)
	}
	return f, h
}

func write(t *testing.T, f *os.File, b []byte, off int64) {
	t.Helper()
	if _, err := f.WriteAt(b, off); err != nil {
		t.Fatal(err)
	}
}

// TestHeadersOfQEMU parses what qemu-img writes with every option and encodes it
// again, to the very same bytes.
func TestHeadersOfQEMU(t *testing.T) {
	data := filepath.Join(t.TempDir(), "data.raw")
	base := filepath.Join(t.TempDir(), "base.img")
	testenv.Tool(t, "qemu-img", "create", "-q", "-f", "qcow2", base, "2G")
	secret := []string{"--object", "secret,id=key,data=password"}
	type header = layout.Header
	for _, c := range []struct {
		options string
		more    []string
		holds   func(h *header) bool
	}{
		{"compat=0.10", nil, func(h *header) bool { return h.Version == 2 && h.RefcountOrder == 4 && len(h.Extensions) == 0 }},
		{"compat=1.1", nil, func(h *header) bool {
			names, _ := h.Extension(layout.ExtensionFeatureNames)
			return h.Version == 3 && h.Incompatible|h.Compatible|h.Autoclear == 0 && bytes.Equal(names, layout.FeatureNames())
		}},
		{"cluster_size=512", nil, func(h *header) bool { return h.ClusterBits == 9 && h.L1Entries == 32768 }},
		{"cluster_size=4k", nil, func(h *header) bool { return h.ClusterBits == 12 && len(h.Extensions) == 0 }},
		{"cluster_size=64k", nil, func(h *header) bool { return h.ClusterBits == 16 && h.L1Entries == 2 && h.Size == 1<<30 }},
		{"cluster_size=2M", nil, func(h *header) bool { return h.ClusterBits == 21 && h.L1Entries == 1 }},
		{"cluster_size=512,compat=0.10", nil, func(h *header) bool { return h.ClusterBits == 9 && h.Version == 2 }},
		{"refcount_bits=1", nil, func(h *header) bool { return h.RefcountOrder == 0 }},
		{"refcount_bits=2", nil, func(h *header) bool { return h.RefcountOrder == 1 }},
		{"refcount_bits=4", nil, func(h *header) bool { return h.RefcountOrder == 2 }},
		{"refcount_bits=8", nil, func(h *header) bool { return h.RefcountOrder == 3 }},
		{"refcount_bits=16", nil, func(h *header) bool { return h.RefcountOrder == 4 }},
		{"refcount_bits=32", nil, func(h *header) bool { return h.RefcountOrder == 5 }},
		{"refcount_bits=64", nil, func(h *header) bool { return h.RefcountOrder == 6 }},
		{"lazy_refcounts=on", nil, func(h *header) bool { return h.Compatible == layout.LazyRefcounts }},
		{"extended_l2=on", nil, func(h *header) bool { return h.Incompatible == layout.ExtendedL2 && h.L1Entries == 4 }},
		{"extended_l2=on,cluster_size=16k", nil, func(h *header) bool { return h.Has(layout.ExtendedL2) && h.ClusterBits == 14 }},
		{"compression_type=zlib", nil, func(h *header) bool { return h.CompressionType == layout.Zlib && h.Incompatible == 0 }},
		{"compression_type=zstd", nil, func(h *header) bool { return h.CompressionType == layout.Zstd && h.Incompatible == layout.Compression }},
		{"data_file=" + data, nil, func(h *header) bool {
			return h.Incompatible == layout.ExternalData && h.Autoclear == 0 && h.DataFile() == data
		}},
		{"data_file=" + data + ",data_file_raw=on", nil, func(h *header) bool {
			return h.Incompatible == layout.ExternalData && h.Autoclear == layout.RawExternal && h.DataFile() == data
		}},
		{"cluster_size=64k", []string{"-b", base, "-F", "qcow2"}, func(h *header) bool {
			return h.BackingFile == base && h.BackingFormat() == "qcow2"
		}},
		{"compat=0.10", []string{"-b", base, "-F", "qcow2"}, func(h *header) bool {
			return h.BackingFile == base && h.BackingFormat() == "qcow2"
		}},
		{"cluster_size=64k", []string{"-u", "-b", "nbd://localhost/disk", "-F", "raw"}, func(h *header) bool {
			return h.BackingFile == "nbd://localhost/disk" && h.BackingFormat() == "raw"
		}},
		{"preallocation=metadata", nil, func(h *header) bool { return h.Size == 1<<30 }},
		{"encrypt.format=luks,encrypt.iter-time=10,encrypt.key-secret=key", secret, func(h *header) bool {
			b, _ := h.Extension(layout.ExtensionEncryption)
			return h.Encryption == layout.LUKS && len(b) == 16
		}},
		{"encrypt.format=aes,encrypt.key-secret=key", secret, func(h *header) bool { return h.Encryption == layout.AES }},
	} {
		t.Run(strings.Join(append([]string{strings.ReplaceAll(c.options, data, "data")}, c.more...), " "), func(t *testing.T) {
			path := qemuCreate(t, c.options, c.more...)
			f, h := openFile(t, path)
			if !c.holds(h) {
				t.Errorf("parsed %+v", h)
			}
			before := qemuInfo(t, path)
			cluster := make([]byte, h.Geometry().ClusterSize())
			if _, err := f.ReadAt(cluster, 0); err != nil && err != io.EOF {
				t.Fatal(err)
			}
			again := encode(t, h)
			if !bytes.Equal(again, cluster) {
				t.Errorf("encoded again it differs: %+v", parse(t, again))
			}
			write(t, f, again, 0)
			if after := qemuInfo(t, path); !reflect.DeepEqual(before, after) {
				t.Errorf("qemu-img says %v, before %v", after, before)
			}
			if h.Encryption == layout.Plain && !strings.Contains(h.BackingFile, "://") {
				qemuCheck(t, path) // without a key, and with the backing file
			}
		})
	}
}

// TestHeadersThatWeChange are understood by qemu-img.
func TestHeadersThatWeChange(t *testing.T) {
	base := filepath.Join(t.TempDir(), "base.raw")
	testenv.Tool(t, "qemu-img", "create", "-q", "-f", "raw", base, "1G")
	path := qemuCreate(t, "compat=1.1")
	f, h := openFile(t, path)
	h.Compatible |= layout.LazyRefcounts
	h.BackingFile = base
	h.SetExtension(layout.ExtensionBackingFormat, []byte("raw"))
	h.SetExtension(0x12345678, []byte("of a program that QEMU doesn't know"))
	h.Extra = append(make([]byte, 7), "newer field of 20 bytes"[:16]...)
	write(t, f, encode(t, h), 0)
	qemuCheck(t, path)
	info := qemuInfo(t, path)
	specific := info["format-specific"].(map[string]any)["data"].(map[string]any)
	if info["backing-filename"] != base || info["backing-filename-format"] != "raw" || specific["lazy-refcounts"] != true {
		t.Errorf("qemu-img says %v", info)
	}
	// QEMU rewrites the header and keeps what it doesn't know.
	testenv.Tool(t, "qemu-img", "amend", "-o", "lazy_refcounts=off", path)
	_, again := openFile(t, path)
	h.Compatible = 0
	sortExtensions(h)
	sortExtensions(again)
	if !reflect.DeepEqual(h, again) {
		t.Errorf("qemu-img made %+v of %+v", again, h)
	}
	// The bits that say how the image was left.
	for _, c := range []struct {
		bits uint64
		key  string
	}{{layout.Dirty, "dirty-flag"}, {layout.Corrupt, "corrupt"}} {
		again.Incompatible = c.bits
		write(t, f, encode(t, again), 0)
		out := testenv.Tool(t, "qemu-img", "info", "--output=json", path)
		if want := fmt.Sprintf("%q: true", c.key); !strings.Contains(out, want) {
			t.Errorf("%s is missing in %s", want, out)
		}
	}
}

// sortExtensions puts a header's extensions in the order of their types.
func sortExtensions(h *layout.Header) {
	for i := range h.Extensions {
		for k := i; k > 0 && h.Extensions[k].Type < h.Extensions[k-1].Type; k-- {
			h.Extensions[k], h.Extensions[k-1] = h.Extensions[k-1], h.Extensions[k]
		}
	}
}

// TestHostileHeadersInQEMU shows which of them QEMU refuses, too: what it accepts
// we refuse only where the table says so.
func TestHostileHeadersInQEMU(t *testing.T) {
	qemu := testenv.NeedTool(t, "qemu-img")
	path := qemuCreate(t, "compat=1.1")
	f, h := openFile(t, path)
	for _, c := range hostileHeaders {
		if c.version == 2 {
			continue
		}
		t.Run(c.name, func(t *testing.T) {
			write(t, f, patched(encode(t, h), c.patches...), 0)
			r := testenv.Run(t, time.Minute, qemu, "info", "-f", "qcow2", path)
			if refused := r.Code != 0; refused != c.qemuToo {
				t.Errorf("QEMU refuses it: %v, want %v\n%s%s", refused, c.qemuToo, r.Stdout, r.Stderr)
			}
		})
	}
}

// TestSnapshotsOfQEMU reads the table of qemu-img's snapshots and has qemu-img
// read ours.
func TestSnapshotsOfQEMU(t *testing.T) {
	for _, options := range []string{"compat=1.1", "compat=0.10", "cluster_size=512", "cluster_size=2M,refcount_bits=64", "extended_l2=on"} {
		t.Run(options, func(t *testing.T) {
			path := qemuCreate(t, options)
			for _, name := range []string{"first", "second one", "third: ä", strings.Repeat("n", 255)} {
				testenv.Tool(t, "qemu-io", "-c", "write -P 1 0 128k", path)
				testenv.Tool(t, "qemu-img", "snapshot", "-c", name, path)
			}
			info := qemuInfo(t, path)
			f, h := openFile(t, path)
			list, size, err := layout.ReadSnapshotTable(f, h)
			if err != nil {
				t.Fatal(err)
			}
			compareSnapshots(t, list, info["snapshots"].([]any))
			end := h.SnapshotsOffset + size
			if st, err := f.Stat(); err != nil || st.Size() < end {
				t.Errorf("the table ends at %d, the file at %d (%v)", end, st.Size(), err)
			}
			table := layout.AppendSnapshots(nil, list)
			onDisk := make([]byte, size)
			if _, err := f.ReadAt(onDisk, h.SnapshotsOffset); err != nil || !bytes.Equal(table[:size], onDisk) {
				t.Errorf("encoded again the table differs, or it can't be read: %v", err)
			}
			for i := range list {
				list[i].Name = "renamed " + list[i].Name[:5]
				list[i].Seconds += 3600
			}
			write(t, f, layout.AppendSnapshots(nil, list), h.SnapshotsOffset)
			after := qemuInfo(t, path)
			compareSnapshots(t, list, after["snapshots"].([]any))
			qemuCheckLeaks(t, path)
		})
	}
}

// qemuCheckLeaks is qemuCheck where a table has become shorter.
func qemuCheckLeaks(t *testing.T, path string) {
	t.Helper()
	r := testenv.Run(t, time.Minute, testenv.NeedTool(t, "qemu-img"), "check", path)
	if r.Code != 0 && r.Code != 3 {
		t.Errorf("qemu-img check: exit code %d\n%s%s", r.Code, r.Stdout, r.Stderr)
	}
}

func compareSnapshots(t *testing.T, list []layout.Snapshot, info []any) {
	t.Helper()
	if len(list) != len(info) {
		t.Fatalf("got %d snapshots, want %d", len(list), len(info))
	}
	for i, s := range list {
		want := info[i].(map[string]any)
		for key, got := range map[string]any{
			"id": s.ID, "name": s.Name, "date-sec": s.Seconds, "date-nsec": s.Nanoseconds, "vm-state-size": s.VMState,
			"vm-clock-sec": s.VMClock / 1e9, "vm-clock-nsec": s.VMClock % 1e9,
		} {
			if n, ok := want[key].(float64); fmt.Sprint(got) != fmt.Sprint(want[key]) && (!ok || fmt.Sprint(got) != fmt.Sprint(int64(n))) {
				t.Errorf("%s of snapshot %d is %v, want %v", key, i, got, want[key])
			}
		}
		if s.Size != 1<<30 || s.ICount != layout.NoICount && s.ICount != 0 {
			t.Errorf("snapshot %d: size %d, %d instructions", i, s.Size, s.ICount)
		}
	}
}

// TestBitmapsOfQEMU reads the directory of qemu-img's bitmaps and has qemu-img
// read ours.
func TestBitmapsOfQEMU(t *testing.T) {
	for _, options := range []string{"compat=1.1", "cluster_size=512", "cluster_size=2M"} {
		t.Run(options, func(t *testing.T) {
			path := qemuCreate(t, options)
			for _, args := range [][]string{
				{"--add", "-g", "64k", path, "plain"},
				{"--add", "-g", "512", path, "fine"},
				{"--add", "-g", "2G", path, "coarse"},
				{"--add", "--disable", path, "disabled"},
				{"--add", path, strings.Repeat("l", 1000)},
			} {
				testenv.Tool(t, "qemu-img", append([]string{"bitmap"}, args...)...)
			}
			testenv.Tool(t, "qemu-io", "-c", "write 1M 1M", path)
			f, h := openFile(t, path)
			if h.Autoclear&layout.BitmapsValid == 0 {
				t.Fatal("the bitmaps aren't valid")
			}
			list, err := layout.ReadBitmaps(f, h)
			if err != nil {
				t.Fatal(err)
			}
			compareBitmaps(t, list, qemuInfo(t, path))
			checkBitmapTables(t, f, h.Geometry(), list)
			x, err := h.Bitmaps()
			if err != nil {
				t.Fatal(err)
			}
			onDisk := make([]byte, x.DirectorySize)
			if _, err := f.ReadAt(onDisk, x.DirectoryOffset); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(layout.AppendBitmaps(nil, list), onDisk) {
				t.Error("encoded again the directory differs")
			}
			list[0].Name, list[0].Flags = "PLAIN", layout.BitmapInUse
			list[3].Flags = layout.BitmapAuto
			write(t, f, layout.AppendBitmaps(nil, list), x.DirectoryOffset)
			compareBitmaps(t, list, qemuInfo(t, path))
			qemuCheck(t, path)
		})
	}
}

func compareBitmaps(t *testing.T, list []layout.Bitmap, info map[string]any) {
	t.Helper()
	var got []any
	for _, m := range list {
		flags := []any{}
		if m.Flags&layout.BitmapInUse != 0 {
			flags = append(flags, "in-use")
		}
		if m.Flags&layout.BitmapAuto != 0 {
			flags = append(flags, "auto")
		}
		got = append(got, map[string]any{"name": m.Name, "granularity": float64(int64(1) << m.GranularityBits), "flags": flags})
	}
	if want := info["format-specific"].(map[string]any)["data"].(map[string]any)["bitmaps"]; !reflect.DeepEqual(any(got), want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

// checkBitmapTables checks the entries of the tables, some of which must name
// clusters.
func checkBitmapTables(t *testing.T, f *os.File, g layout.Geometry, list []layout.Bitmap) {
	t.Helper()
	clusters := 0
	for _, m := range list {
		b := make([]byte, 8*m.TableEntries)
		if _, err := f.ReadAt(b, m.TableOffset); err != nil {
			t.Fatal(err)
		}
		for ; len(b) > 0; b = b[8:] {
			word := binary.BigEndian.Uint64(b)
			if err := g.CheckBitmapTable(word); err != nil {
				t.Error(err)
			}
			if layout.EntryOffset(word) != 0 {
				clusters++
			}
		}
	}
	if clusters == 0 {
		t.Error("no bitmap has a cluster")
	}
}

// TestTablesOfQEMU walks from the header to the L2 entries and refcounts of an
// image with every kind of cluster.
func TestTablesOfQEMU(t *testing.T) {
	for _, options := range []string{"compat=1.1", "cluster_size=4k,refcount_bits=1", "extended_l2=on,refcount_bits=64", "cluster_size=2M,refcount_bits=8"} {
		t.Run(options, func(t *testing.T) {
			path := qemuCreate(t, options)
			f, h := openFile(t, path)
			g := h.Geometry()
			size := g.ClusterSize()
			at := func(n int64) string { return fmt.Sprintf(" %d %d", n*size, size) }
			testenv.Tool(t, "qemu-io", "-c", "write -P 1"+at(1), "-c", "write -z"+at(2), "-c", "write -P 1"+at(3),
				"-c", "write -z"+at(3), "-c", "write -c -P 1"+at(4), path)
			word := func(off int64) uint64 {
				b := make([]byte, 8)
				if _, err := f.ReadAt(b, off); err != nil && err != io.EOF {
					t.Fatal(err)
				}
				return binary.BigEndian.Uint64(b)
			}
			l1 := word(h.L1Offset)
			if err := g.CheckL1(l1); err != nil || layout.EntryOffset(l1) == 0 || l1&layout.Copied == 0 {
				t.Fatalf("L1 entry %#x: %v", l1, err)
			}
			want := []layout.Kind{layout.Unallocated, layout.Data, layout.ZeroPlain, layout.ZeroAllocated, layout.Compressed, layout.Unallocated}
			if g.Extended {
				want[2], want[3] = layout.Unallocated, layout.Data // the bitmap says that they are zero
			}
			for i, kind := range want {
				at := layout.EntryOffset(l1) + int64(i*g.L2EntrySize())
				entry, bitmap := word(at), uint64(0)
				if g.Extended {
					bitmap = word(at + 8)
				}
				if err := g.CheckL2(entry, bitmap, int64(i)*size); err != nil || g.Kind(entry) != kind {
					t.Errorf("L2 entry %d, %#x: %v, %v, want %v", i, entry, g.Kind(entry), err, kind)
				}
				if zero := i == 2 || i == 3; g.Extended && zero != (bitmap>>32 == 1<<32-1) {
					t.Errorf("L2 entry %d: subclusters %#x", i, bitmap)
				}
			}
			table := word(h.RefcountTableOffset)
			if err := g.CheckRefcountTable(table); err != nil {
				t.Fatal(err)
			}
			block := make([]byte, size)
			if _, err := f.ReadAt(block, int64(table)); err != nil {
				t.Fatal(err)
			}
			st, err := f.Stat()
			if err != nil {
				t.Fatal(err)
			}
			for i := range g.Clusters(st.Size()) {
				if n := g.Refcount(block, int(i)); n != 1 {
					t.Errorf("cluster %d has refcount %d", i, n)
				}
			}
			if n := g.Refcount(block, int(g.Clusters(st.Size()))); n != 0 {
				t.Errorf("the cluster behind the end has refcount %d", n)
			}
		})
	}
}
