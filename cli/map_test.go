package cli

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"platter/integration/testenv"
)

// mapEntry is what a map says of an extent as JSON.
type mapEntry struct {
	Start, Length, Depth            int64
	Present, Zero, Data, Compressed bool
	Offset                          *int64
}

func (e mapEntry) String() string {
	flags := ""
	for _, f := range []struct {
		on   bool
		name string
	}{{e.Present, "present"}, {e.Zero, "zero"}, {e.Data, "data"}, {e.Compressed, "compressed"}, {e.Offset != nil, "offset"}} {
		if f.on {
			flags += " " + f.name
		}
	}
	return fmt.Sprintf("%d+%d/%d%s", e.Start, e.Length, e.Depth, flags)
}

// mapOf is the map of an image, one extent a line.
func mapOf(t *testing.T, args ...string) string {
	t.Helper()
	out := must(t, append([]string{"map", "--output", "json"}, args...)...)
	var list []mapEntry
	if err := json.Unmarshal([]byte(out), &list); err != nil {
		t.Fatalf("%v in %q", err, out)
	}
	if n := strings.Count(out, "\n"); n != max(len(list), 1) {
		t.Errorf("%d lines for %d extents: %q", n, len(list), out)
	}
	lines := make([]string, len(list))
	for i, e := range list {
		lines[i] = e.String()
	}
	return strings.Join(lines, "\n")
}

func TestMap(t *testing.T) {
	dir := testenv.DiskDir(t)
	data := bytes.Repeat(testenv.Pattern(1<<10, 1), 64) // can be compressed
	base := makeQcow2(t, filepath.Join(dir, "base.qcow2"), 1<<20, "", piece{0, data}, piece{512 << 10, data})
	must(t, "create", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", filepath.Join(dir, "top.qcow2"), "1280k")
	packed := filepath.Join(dir, "packed.qcow2")
	must(t, "convert", "-q", "-c", "-O", "qcow2", base, packed)
	raw := testenv.Image(t, dir, "sparse.raw", 1<<20, data)
	empty := testenv.Image(t, dir, "empty.raw", 0, nil)
	for _, c := range []struct{ name, args, want string }{
		{"image", "base.qcow2", "0+65536/0 present data offset\n65536+458752/0 zero\n524288+65536/0 present data offset\n589824+458752/0 zero"},
		{"backing file", "top.qcow2", "0+65536/1 present data offset\n65536+458752/1 zero\n524288+65536/1 present data offset\n589824+458752/1 zero\n1048576+262144/0 zero"},
		{"compressed", "packed.qcow2", "0+65536/0 present data compressed\n65536+458752/0 zero\n524288+65536/0 present data compressed\n589824+458752/0 zero"},
		{"raw", "sparse.raw", "0+65536/0 present data offset\n65536+983040/0 present zero offset"},
		{"nothing", "empty.raw", ""},
		{"from an offset", "base.qcow2 --start-offset 60k", "61440+4096/0 present data offset\n65536+458752/0 zero\n524288+65536/0 present data offset\n589824+458752/0 zero"},
		{"up to a length", "base.qcow2 --start-offset 60k --max-length 8k", "61440+4096/0 present data offset\n65536+4096/0 zero"},
		{"more than there is", "base.qcow2 -s 1000k -l 1G", "1024000+24576/0 zero"},
		{"nothing of it", "base.qcow2 -l 0", ""},
		{"from the end", "base.qcow2 -s 1M", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			args := strings.Fields(c.args)
			args[0] = filepath.Join(dir, args[0])
			if got := mapOf(t, args...); got != c.want {
				t.Errorf("got\n%s\nwant\n%s", got, c.want)
			}
		})
	}
	refused(t, []string{"map", "--start-offset", "1025k", base}, base, "beyond the end")

	const head = "Offset          Length          Mapped to       File\n"
	for path, want := range map[string]string{
		raw:    head + "0               0x10000         0               " + raw + "\n",
		packed: head + "0               0x10000         compressed      " + packed + "\n0x80000         0x10000         compressed      " + packed + "\n",
		empty:  head,
	} {
		if got := must(t, "map", path); got != want {
			t.Errorf("got\n%s\nwant\n%s", got, want)
		}
	}
	// The data is where the map says.
	var list []mapEntry
	if err := json.Unmarshal([]byte(must(t, "map", "--output", "json", base)), &list); err != nil {
		t.Fatal(err)
	}
	file, err := os.ReadFile(base)
	if err != nil {
		t.Fatal(err)
	}
	for _, i := range []int{0, 2} {
		if at := *list[i].Offset; string(file[at:at+list[i].Length]) != string(data) {
			t.Errorf("%v: not at %#x", list[i], at)
		}
	}
}

// What was never written of preallocated clusters reads as zeroes, and a map
// says so; so does it of clusters whose zeroes have a place.
func TestMapHoles(t *testing.T) {
	dir := testenv.DiskDir(t)
	path := makeQcow2(t, filepath.Join(dir, "disk.qcow2"), 1<<20, "preallocation=metadata", piece{256 << 10, testenv.Pattern(64<<10, 1)})
	want := "0+262144/0 present zero data offset\n262144+65536/0 present data offset\n327680+720896/0 present zero data offset"
	if got := mapOf(t, path); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	if rows := strings.Count(must(t, "map", path), "\n0x"); rows != 1 {
		t.Errorf("%d rows, want that of the data alone", rows)
	}
	// Where all of the file is written nobody looks for holes.
	full := makeQcow2(t, filepath.Join(dir, "full.qcow2"), 1<<20, "preallocation=full")
	if got := mapOf(t, full); got != "0+1048576/0 present data offset" {
		t.Error(got)
	}
}

// An image with more extents than are asked for at once has none twice, and
// none left out.
func TestMapManyExtents(t *testing.T) {
	dir := t.TempDir()
	var pieces []piece
	var want []string
	const n = extentsAtOnce/2 + 10
	for i := range int64(n) {
		pieces = append(pieces, piece{i * 2 * 512, []byte{1}})
		want = append(want, fmt.Sprintf("%d+512/0 present data offset", i*2*512), fmt.Sprintf("%d+512/0 zero", (i*2+1)*512))
	}
	path := makeQcow2(t, filepath.Join(dir, "disk.qcow2"), n*2*512, "cluster_size=512", pieces...)
	if got := mapOf(t, path); got != strings.Join(want, "\n") {
		t.Errorf("%d extents, want %d", strings.Count(got, "\n")+1, len(want))
	}
}
