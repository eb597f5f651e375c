package qcow2_test

import (
	"bytes"
	"encoding/binary"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"platter/aio"
	"platter/formats/qcow2"
	"platter/formats/qcow2/layout"
)

// victim is an image in memory that is going to be damaged. Of its disk the
// third quarter is a hole; the rest has data.
type victim struct {
	t     testing.TB
	data  []byte
	disk  []byte // as the guest sees it
	outer []byte // the data file, if there is one
	h     *layout.Header
	g     layout.Geometry
}

// made are the images that victims are copies of.
var made sync.Map // of *victim, by how they were made

// newVictim has QEMU make an image of size bytes. With "compressed" among the
// ways its clusters are, and with "snapshot" there is one of the empty disk. With
// "data file" it has one.
func newVictim(t testing.TB, options string, size int, ways ...string) *victim {
	t.Helper()
	key := strings.Join(append(ways, options, string(rune(size))), "/")
	v, ok := made.Load(key)
	if !ok {
		v = makeVictim(t, options, size, strings.Join(ways, " "))
		made.Store(key, v)
	}
	c := *v.(*victim)
	c.t, c.data, c.disk, c.outer = t, bytes.Clone(c.data), bytes.Clone(c.disk), bytes.Clone(c.outer)
	c.parse()
	return &c
}

func makeVictim(t testing.TB, options string, size int, ways string) *victim {
	t.Helper()
	path := filepath.Join(t.TempDir(), "image")
	disk := make([]byte, size)
	for i := range disk {
		disk[i] = byte(i>>9)*7 + byte(i)%3 + 1
	}
	clear(disk[size/2 : size/4*3])
	writeFile(t, path+".raw", disk)
	if strings.Contains(ways, "data file") {
		options += ",data_file=" + path + ".data"
	}
	qemuCreate(t, path, int64(size), options)
	if strings.Contains(ways, "snapshot") {
		qemuImg(t, "snapshot", "-c", "empty", path)
	}
	convert := []string{"convert", "-n", "--target-is-zero", "-f", "raw", "-O", "qcow2"}
	if strings.Contains(ways, "compressed") {
		convert = append(convert, "-c")
	}
	qemuImg(t, append(convert, path+".raw", path)...)
	v := &victim{t: t, disk: disk}
	var err error
	if v.data, err = os.ReadFile(path); err != nil {
		t.Fatal(err)
	}
	if strings.Contains(ways, "data file") {
		if v.outer, err = os.ReadFile(path + ".data"); err != nil {
			t.Fatal(err)
		}
	}
	v.parse()
	// Whole clusters, as they are once the image has grown.
	v.data = append(v.data, make([]byte, -len(v.data)&int(v.g.ClusterSize()-1))...)
	return v
}

func (v *victim) parse() {
	v.t.Helper()
	h, err := layout.ParseHeader(v.data)
	if err != nil {
		v.t.Fatal(err)
	}
	v.h, v.g = h, h.Geometry()
}

func (v *victim) word(off int64) uint64        { return binary.BigEndian.Uint64(v.data[off:]) }
func (v *victim) set(off int64, word uint64)   { binary.BigEndian.PutUint64(v.data[off:], word) }
func (v *victim) set32(off int64, word uint32) { binary.BigEndian.PutUint32(v.data[off:], word) }

// l1 is where an entry of the L1 table stands.
func (v *victim) l1(i int64) int64 { return v.h.L1Offset + 8*i }

// table is where an L2 table stands.
func (v *victim) table(i int64) int64 {
	v.t.Helper()
	off := layout.EntryOffset(v.word(v.l1(i)))
	if off == 0 {
		v.t.Fatalf("there is no L2 table %d", i)
	}
	return off
}

// l2 is where the L2 entry of a guest offset stands.
func (v *victim) l2(guest int64) int64 {
	v.t.Helper()
	cluster := guest >> v.g.ClusterBits
	return v.table(cluster>>v.g.L2Bits()) + cluster&(1<<v.g.L2Bits()-1)*int64(v.g.L2EntrySize())
}

// refcounts is where a refcount block stands.
func (v *victim) refcounts(i int64) int64 { return int64(v.word(v.h.RefcountTableOffset + 8*i)) }

// setRefcount changes the refcount of the cluster at an offset of the file.
func (v *victim) setRefcount(off int64, n uint64) {
	cluster := off >> v.g.ClusterBits
	block := v.data[v.refcounts(cluster>>v.g.RefcountBlockBits()):]
	v.g.SetRefcount(block, int(cluster&(1<<v.g.RefcountBlockBits()-1)), n)
}

// snapshot is the only snapshot.
func (v *victim) snapshot() layout.Snapshot {
	v.t.Helper()
	list, err := layout.ReadSnapshots(bytes.NewReader(v.data), v.h)
	if err != nil || len(list) != 1 {
		v.t.Fatal(list, err)
	}
	return list[0]
}

// end is the length of the file.
func (v *victim) end() int64 { return int64(len(v.data)) }

// open opens a copy of the image as it is now.
func (v *victim) open(o qcow2.Options) (*qcow2.Image, *memory) {
	v.t.Helper()
	if v.outer != nil {
		o.OpenData = func(string) (aio.Storage, error) {
			m := newMemory(bytes.Clone(v.outer))
			m.readOnly = o.ReadOnly
			return m, nil
		}
	}
	return openMemory(v.t, bytes.Clone(v.data), o)
}

// refused opens the image, which must fail, and returns the error.
func (v *victim) refused(o qcow2.Options) error {
	v.t.Helper()
	m := newMemory(bytes.Clone(v.data))
	o.Path = "image"
	im, err := qcow2.New(m, o)
	if err == nil {
		im.Close()
		v.t.Fatal("opened")
	}
	sameBytes(v.t, "the file after a refusal", m.content(v.t), v.data)
	return err
}

// same wants the file to be what it was before an image was opened, but for the
// corrupt bit.
func (v *victim) same(m *memory, corrupt bool) {
	v.t.Helper()
	got, want := m.content(v.t), bytes.Clone(v.data)
	if corrupt {
		want[79] |= byte(layout.Corrupt)
	}
	sameBytes(v.t, "the file", got, want)
}

// sameMetadata wants the first piece of each table to be what it was, but for
// refcounts, and the header but for its features.
func (v *victim) sameMetadata(m *memory) {
	v.t.Helper()
	got := m.content(v.t)
	same := func(what string, from, to int64) {
		v.t.Helper()
		sameBytes(v.t, what, got[from:to], v.data[from:to])
	}
	same("the header before its features", 0, 72)
	same("the header behind its features", 96, v.g.ClusterSize())
	for _, table := range tables {
		if table.name == "an L2 table" && layout.EntryOffset(v.word(v.l1(0))) == 0 {
			continue
		}
		if v.h.Snapshots == 0 && strings.Contains(table.name, "snapshot") {
			continue
		}
		at := table.at(v)
		if at+v.g.ClusterSize() <= v.end() && !strings.Contains(table.name, "refcount") {
			same(table.name, at, at+v.g.ClusterSize())
		}
	}
}

// captureLog collects what is logged until the test ends.
func captureLog(t testing.TB) *logged {
	t.Helper()
	var l logged
	before := slog.Default()
	slog.SetDefault(slog.New(slog.NewTextHandler(&l, nil)))
	t.Cleanup(func() { slog.SetDefault(before) })
	return &l
}

type logged struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (l *logged) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

// says wants all of the texts in the log.
func (l *logged) says(t testing.TB, texts ...string) {
	t.Helper()
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, text := range texts {
		if !strings.Contains(l.text.String(), text) {
			t.Errorf("the log does not say %q: %s", text, &l.text)
		}
	}
}

// request carries out a request on a loop of its own.
func request(t testing.TB, im *qcow2.Image, r aio.Request) error {
	t.Helper()
	l, err := aio.NewLoop(aio.LoopOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	done := make(chan unix.Errno, 1)
	r.Done = func(r *aio.Request) { done <- r.Errno }
	l.Post(func() { im.Submit(l, []*aio.Request{&r}) })
	if errno := <-done; errno != 0 {
		return errno
	}
	return nil
}

func discard(t testing.TB, im *qcow2.Image, off, length int64) error {
	t.Helper()
	return request(t, im, aio.Request{Op: aio.OpDiscard, Offset: off, Length: length})
}
