package raw_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"platter/aio"
	"platter/formats"
	"platter/formats/raw"
	"platter/integration/testenv"
)

// sparse makes a file with 64 KiB of data at each of the places.
func sparse(t *testing.T, size int64, data ...int64) string {
	t.Helper()
	path := filepath.Join(testenv.DiskDir(t), "sparse.raw")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	for _, at := range data {
		if _, err := f.WriteAt(bytes.Repeat([]byte{1}, 64<<10), at); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	return path
}

func extentsOf(t *testing.T, image formats.Image, off, length int64, most int) []formats.Extent {
	t.Helper()
	list, err := image.(formats.Mapper).Extents(nil, off, length, most)
	if err != nil {
		t.Fatal(err)
	}
	return list
}

func TestExtents(t *testing.T) {
	const m = 1 << 20
	path := sparse(t, 4*m+100, m, 3*m, 3*m+64<<10)
	image := openImage(t, path, formats.Options{ReadOnly: true})
	hole := func(start, length int64) formats.Extent {
		return formats.Extent{Start: start, Length: length, Present: true, Zero: true, Offset: start, File: path}
	}
	data := func(start, length int64) formats.Extent {
		return formats.Extent{Start: start, Length: length, Present: true, Data: true, Offset: start, File: path}
	}
	for _, c := range []struct {
		off, length int64
		most        int
		want        []formats.Extent
	}{
		{0, 4*m + 100, 0, []formats.Extent{hole(0, m), data(m, 64<<10), hole(m+64<<10, 2*m-64<<10), data(3*m, 128<<10), hole(3*m+128<<10, m-128<<10+100)}},
		{0, 4*m + 100, 2, []formats.Extent{hole(0, m), data(m, 64<<10)}},
		{m + 10, 20, 0, []formats.Extent{data(m+10, 20)}},
		{m - 10, 20, 0, []formats.Extent{hole(m-10, 10), data(m, 10)}},
		{4 * m, 100, 0, []formats.Extent{hole(4*m, 100)}},
		{4*m + 100, 0, 0, nil},
	} {
		if got := extentsOf(t, image, c.off, c.length, c.most); fmt.Sprint(got) != fmt.Sprint(c.want) {
			t.Errorf("%d+%d:\ngot  %+v\nwant %+v", c.off, c.length, got, c.want)
		}
	}
}

// TestExtentsQEMU compares with qemu-img map.
func TestExtentsQEMU(t *testing.T) {
	path := sparse(t, 8<<20, 0, 1<<20, 5<<20)
	out, err := exec.Command(testenv.NeedTool(t, "qemu-img"), "map", "-f", "raw", "--output", "json", path).Output()
	if err != nil {
		t.Fatal(err)
	}
	var theirs []struct {
		Start, Length, Offset int64
		Present, Zero, Data   bool
	}
	if err := json.Unmarshal(out, &theirs); err != nil {
		t.Fatal(err)
	}
	image := openImage(t, path, formats.Options{ReadOnly: true})
	ours := extentsOf(t, image, 0, image.Size(), 0)
	if len(ours) != len(theirs) {
		t.Fatalf("%d extents, qemu-img has %d: %s", len(ours), len(theirs), out)
	}
	for i, e := range ours {
		if q := theirs[i]; e.Start != q.Start || e.Length != q.Length || e.Offset != q.Offset || e.Zero != q.Zero || e.Data != q.Data || e.Present != q.Present {
			t.Errorf("extent %d: %+v, qemu-img has %+v", i, e, q)
		}
	}
}

// TestExtentsShrunk: a file that lost its end is an error, not a hole.
func TestExtentsShrunk(t *testing.T) {
	path := sparse(t, 4<<20, 0)
	image := openImage(t, path, formats.Options{ReadOnly: true})
	if err := os.Truncate(path, 1<<20); err != nil {
		t.Fatal(err)
	}
	if _, err := image.(formats.Mapper).Extents(nil, 0, image.Size(), 0); !errors.Is(err, unix.EIO) || !strings.Contains(err.Error(), "shrank") {
		t.Error(err)
	}
}

// TestExtentsWithoutFile: a storage without a descriptor is all data.
func TestExtentsWithoutFile(t *testing.T) {
	image := newImage(t, &instant{size: 4096}, raw.Options{})
	if list := extentsOf(t, image, 0, 4096, 0); len(list) != 1 || !list[0].Data || list[0].Zero {
		t.Errorf("%+v", list)
	}
}

// TestBlockDevice opens a loop device: all of it is data, it is locked like a
// file, and requests beyond its end are refused.
func TestBlockDevice(t *testing.T) {
	testenv.NeedRoot(t)
	tool := testenv.NeedTool(t, "losetup")
	out, err := exec.Command(tool, "--find", "--show", sparse(t, 4<<20, 1<<20)).CombinedOutput()
	if err != nil {
		testenv.Skip(t, "no loop device to be had: "+string(out))
	}
	device := strings.TrimSpace(string(out))
	t.Cleanup(func() {
		if out, err := exec.Command(tool, "--detach", device).CombinedOutput(); err != nil {
			t.Errorf("detach: %v: %s", err, out)
		}
	})
	for _, direct := range []bool{false, true} {
		image, err := formats.Open(device, formats.Options{Direct: direct})
		if err != nil {
			t.Fatal(err)
		}
		if image.Size() != 4<<20 || image.Limits().BlockSize != 1 {
			t.Errorf("size %d, limits %+v", image.Size(), image.Limits())
		}
		if list := extentsOf(t, image, 0, image.Size(), 0); len(list) != 1 || !list[0].Data {
			t.Errorf("extents: %+v", list)
		}
		if _, err := formats.Open(device, formats.Options{}); !errors.Is(err, formats.ErrLocked) {
			t.Errorf("opened twice: %v", err)
		}
		c := newClient(t)
		if errno := c.do(image, aio.OpWrite, 1000, 0, "hello"); errno != 0 {
			t.Errorf("write: %v", errno)
		}
		if errno := c.do(image, aio.OpFlush, 0, 0, ""); errno != 0 {
			t.Errorf("flush: %v", errno)
		}
		if errno := c.do(image, aio.OpWrite, 4<<20-1, 0, "hello"); errno != unix.ENOSPC {
			t.Errorf("write beyond the end: %v", errno)
		}
		for _, op := range []aio.Op{aio.OpDiscard, aio.OpWriteZeroes} {
			if errno := c.do(image, op, 4096, 64<<10, ""); errno != 0 {
				t.Errorf("%v: %v", op, errno)
			}
		}
		if err := image.Close(); err != nil {
			t.Error(err)
		}
		content, err := os.ReadFile(device)
		if err != nil {
			t.Fatal(err)
		}
		if string(content[1000:1005]) != "hello" {
			t.Errorf("the device holds %q", content[1000:1005])
		}
	}
}
