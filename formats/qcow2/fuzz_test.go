package qcow2_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime/metrics"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"platter/aio"
	"platter/formats"
	"platter/formats/qcow2"
	"platter/formats/qcow2/check"
	"platter/formats/qcow2/layout"
)

// patience is far longer than an image of a few kilobytes takes for anything.
const patience = time.Minute

// player carries out requests on images, many at a time.
type player struct {
	loop *aio.Loop
	mem  *aio.Memory
}

// pieceSize is how much memory a request gets, in bytes.
const pieceSize, pieces = 64 << 10, 4

func newPlayer(f *testing.F) *player {
	f.Helper()
	l, err := aio.NewLoop(aio.LoopOptions{})
	if err != nil {
		f.Fatal(err)
	}
	m, err := aio.NewMemory(pieceSize * pieces)
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() {
		if err := errors.Join(l.Close(), m.Close()); err != nil {
			f.Error(err)
		}
	})
	return &player{l, m}
}

// piece is the memory of a request of a batch.
func (p *player) piece(i int) []byte { return p.mem.Bytes()[i*pieceSize:][:pieceSize] }

// submit carries out a batch and returns when all of it is over.
func (p *player) submit(im formats.Image, batch []aio.Request) {
	done := make(chan struct{}, len(batch))
	list := make([]*aio.Request, len(batch))
	for i := range batch {
		r := &batch[i]
		if r.Op == aio.OpRead || r.Op == aio.OpWrite {
			r.Vec = []aio.Iovec{p.mem.Iovec(i*pieceSize, int(r.Length))}
		}
		r.Done = func(*aio.Request) { done <- struct{}{} }
		list[i] = r
	}
	p.loop.Post(func() { im.Submit(p.loop, list) })
	for range list {
		<-done
	}
}

// limits has the program end with the stacks of all goroutines when f takes too
// long, and the test fail when it takes too much memory.
func limits(t *testing.T, bound uint64, f func()) {
	t.Helper()
	guard := time.AfterFunc(patience, func() { panic("this should have been over long ago") })
	defer guard.Stop()
	before := heapAllocated()
	f()
	if took := heapAllocated() - before; took > bound {
		t.Errorf("it took %d MiB of memory, more than %d MiB", took>>20, bound>>20)
	}
}

// heapAllocated is how much was ever allocated, in bytes.
func heapAllocated() uint64 {
	sample := []metrics.Sample{{Name: "/gc/heap/allocs:bytes"}}
	metrics.Read(sample)
	return sample[0].Value.Uint64()
}

// front is how much of an image's start is used: tables may be small and the disk
// large.
const front = 256 << 10

// roam does a little of everything anywhere in the image. Whatever fails has to
// do so with an error of the kind that a guest or a user gets.
func (p *player) roam(t *testing.T, im *qcow2.Image, rng *rand.Rand) {
	t.Helper()
	size := im.Size()
	if info, err := im.Info(); err != nil {
		explained(t, "info", err)
	} else if info.Header.Validate() != nil {
		t.Errorf("the image was opened although its header is invalid: %v", info.Header.Validate())
	}
	if _, err := im.Extents(nil, 0, size, 1000); err != nil {
		explained(t, "map", err)
	}
	for off := int64(0); off < min(size, front); {
		var batch []aio.Request
		for ; len(batch) < pieces && off < size; off += pieceSize {
			batch = append(batch, aio.Request{Op: aio.OpRead, Offset: off, Length: min(pieceSize, size-off)})
		}
		p.submit(im, batch)
	}
	for range 6 {
		batch := make([]aio.Request, 1+rng.IntN(pieces))
		for i := range batch {
			r := &batch[i]
			r.Op = aio.Op(rng.IntN(aio.OpCount))
			if r.Op == aio.OpFlush {
				continue
			}
			r.Flags = aio.Flags(rng.IntN(4))
			r.Length = min(1+rng.Int64N(int64(1)<<rng.IntN(17)), pieceSize, size)
			r.Offset = min(rng.Int64N(front), size-r.Length)
			if rng.IntN(4) == 0 {
				r.Offset = size - r.Length
			}
		}
		p.submit(im, batch)
		for _, r := range batch {
			switch r.Errno {
			case 0, unix.EIO, unix.ENOSPC, unix.EPERM:
			default:
				t.Errorf("%v %d+%d of %d: %v", r.Op, r.Offset, r.Length, size, r.Errno)
			}
		}
	}
	if info, err := im.Info(); err == nil {
		cluster := int64(1) << info.Header.ClusterBits
		off := min(rng.Int64N(front), size) &^ (cluster - 1)
		if err := im.WriteCompressed(make([]byte, min(cluster, size-off)), off); err != nil {
			explained(t, "compressed write", err)
		}
	}
}

// explained wants an error that tells more than that something failed.
func explained(t *testing.T, what string, err error) {
	t.Helper()
	var typed *formats.Error
	var errno unix.Errno
	if !errors.As(err, &typed) && !errors.As(err, &errno) && !errors.Is(err, qcow2.ErrNoCompression) {
		t.Errorf("%s: %#v", what, err)
	}
}

// openFuzzed opens an image with all that it may want.
func openFuzzed(t *testing.T, data []byte, readOnly bool) (*qcow2.Image, *memory) {
	t.Helper()
	m := newMemory(bytes.Clone(data))
	m.limit, m.readOnly = m.opened+16<<20, readOnly
	im, err := qcow2.New(m, qcow2.Options{Path: "image", ReadOnly: readOnly, MetadataCache: 1, OpenData: func(string) (aio.Storage, error) {
		d := newMemory(make([]byte, 10_000))
		d.limit, d.readOnly = 4<<20, readOnly
		return d, nil
	}})
	if err != nil {
		var typed *formats.Error
		if !errors.As(err, &typed) || typed.Path != "image" {
			t.Errorf("open: %#v", err)
		}
		_ = m.content(t)
		return nil, m
	}
	return im, m
}

// FuzzImage changes bytes anywhere in images of all kinds, cuts them off, opens
// what comes of it for reading and for writing, and uses it. An edit takes four
// bytes: an offset and what is written there.
func FuzzImage(f *testing.F) {
	images := smallImages(f)
	for i := range images {
		f.Add(byte(i), uint16(0), []byte{})
		f.Add(byte(i), uint16(5000), []byte("\x00\x18\x00\x00\x00\x4f\x01\x80"))
	}
	p := newPlayer(f)
	f.Fuzz(func(t *testing.T, image byte, cut uint16, edits []byte) {
		quiet(t)
		data := bytes.Clone(images[int(image)%len(images)])
		sum := fnv.New64a()
		for sum.Write(edits[:min(len(edits), 4*32)]); len(edits) >= 4; edits = edits[4:] {
			copy(data[int(binary.BigEndian.Uint16(edits))%len(data):], edits[2:4])
		}
		if cut > 0 {
			data = data[:min(int(cut), len(data))]
		}
		limits(t, 192<<20, func() {
			for _, readOnly := range []bool{true, false} {
				im, m := openFuzzed(t, data, readOnly)
				if im == nil {
					continue
				}
				p.roam(t, im, rand.New(rand.NewPCG(sum.Sum64(), 0)))
				if err := im.Close(); err != nil {
					explained(t, "close", err)
				}
				after := m.content(t)
				if readOnly {
					sameBytes(t, "a file that was only read", after, data)
					continue
				}
				if data[7] == 2 || data[79]&byte(layout.Dirty) == 0 { // and so it was not repaired
					sameHeader(t, after, data)
				}
				if im, _ = openFuzzed(t, after, true); im == nil {
					t.Error("it can't be opened again")
				} else if err := im.Close(); err != nil {
					t.Errorf("close again: %v", err)
				}
			}
		})
	})
}

// quiet keeps what is logged from the output.
func quiet(t *testing.T) {
	t.Helper()
	captureLog(t)
}

// sameHeader wants the first sector to be what it was, but for what changes while
// an image is open: where the refcount table stands, and features.
func sameHeader(t testing.TB, got, want []byte) {
	t.Helper()
	got, want = bytes.Clone(got[:min(512, len(want))]), bytes.Clone(want[:min(512, len(want))])
	for _, r := range [][2]int{{48, 60}, {72, 80}, {88, 96}} {
		if r[0] < 72 || want[7] >= 3 {
			clear(got[r[0]:r[1]])
			clear(want[r[0]:r[1]])
		}
	}
	sameBytes(t, "the header", got, want)
}

// smallImages are images of all kinds, a few kilobytes each.
func smallImages(f *testing.F) [][]byte {
	f.Helper()
	var list [][]byte
	dir := f.TempDir()
	for i, c := range []struct {
		options string
		ways    []string
	}{
		{"cluster_size=512", nil},
		{"cluster_size=512,compat=0.10", []string{"snapshot"}},
		{"cluster_size=512,refcount_bits=1", nil},
		{"cluster_size=512,refcount_bits=64", []string{"snapshot"}},
		{"cluster_size=512,lazy_refcounts=on", nil},
		{"cluster_size=4K", []string{"compressed", "snapshot"}},
		{"cluster_size=4K,compression_type=zstd", []string{"compressed"}},
		{"extended_l2=on,cluster_size=16K", nil},
		{"cluster_size=512", []string{"data file"}},
	} {
		v := newVictim(f, c.options, 48<<10, c.ways...)
		list = append(list, v.data)
		if c.options == "cluster_size=512,lazy_refcounts=on" {
			dirty := bytes.Clone(v.data)
			dirty[79] |= byte(layout.Dirty)
			list = append(list, dirty)
		}
		path := filepath.Join(dir, fmt.Sprint(i))
		if i == 0 {
			writeFile(f, path, v.data)
			qemuImg(f, "bitmap", "--add", path, "marks")
			qemuImg(f, "rebase", "-u", "-f", "qcow2", "-b", "base", "-F", "raw", path)
			data, err := os.ReadFile(path)
			if err != nil {
				f.Fatal(err)
			}
			list = append(list, data)
		}
	}
	return list
}

// guestMark is what a guest writes: it stands nowhere else.
const guestMark = "\xa5guest\x5a!"

// FuzzL1L2 changes single words in the tables of images that are whole otherwise,
// and lets a guest write. Each word is given in four bytes: which table, which
// entry of it, flags, and the number of the cluster that it names. Operations take
// three each. No guest's byte may come to stand where a table is; and an image
// that wasn't changed has to hold what was written.
func FuzzL1L2(f *testing.F) {
	bases := []*victim{
		newVictim(f, "cluster_size=1K", 256<<10, "snapshot"),
		newVictim(f, "cluster_size=1K,compat=0.10", 256<<10),
		newVictim(f, "cluster_size=1K,refcount_bits=1", 256<<10),
		newVictim(f, "cluster_size=4K,lazy_refcounts=on", 256<<10, "compressed", "snapshot"),
		newVictim(f, "cluster_size=16K,extended_l2=on", 256<<10, "snapshot"),
	}
	everything := []byte("\x00\x00\x00\x01\x60\x01\x02\x80\x01\x03\x00\x00\x00\x80\x10\x01\xff\xff\x04\x40\x40\x05\x00\x00\x00\x88\x40\x02\x80\x80\x00\x80\x00")
	for base := range bases {
		f.Add(byte(base), []byte{}, everything)
		for table := range byte(6) {
			for _, flags := range []byte{0, 1, 2, 4, 8, 16, 64, 129} {
				f.Add(byte(base), []byte{table, 0, flags, table}, everything)
			}
		}
	}
	p := newPlayer(f)
	f.Fuzz(func(t *testing.T, base byte, words, ops []byte) {
		quiet(t)
		v := *bases[int(base)%len(bases)]
		v.t, v.data = t, bytes.Clone(v.data)
		words, ops = words[:min(len(words), 4*16)], ops[:min(len(ops), 3*64)]
		for ; len(words) >= 4 && base < 128; words = words[4:] {
			v.mutate(words[0], words[1], words[2], words[3])
		}
		whole := bytes.Equal(v.data, bases[int(base)%len(bases)].data)
		limits(t, 192<<20, func() {
			im, m := openFuzzed(t, v.data, false)
			if im == nil {
				return
			}
			p.operate(t, &v, im, ops, whole)
			if err := im.Close(); err != nil {
				explained(t, "close", err)
			}
			after := v
			after.data = m.content(t)
			after.noMarks(&v)
			if whole {
				after.isWhole()
			}
		})
	})
}

// mutate changes a word of a table.
func (v *victim) mutate(table, index, flags, cluster byte) {
	word := uint64(cluster) << v.g.ClusterBits
	for i, bit := range []uint64{layout.Copied, layout.CompressedL2, layout.ZeroFlag, 1 << 3, 1 << 9, 1 << 58, 1 << 40} {
		if flags>>i&1 != 0 {
			word |= bit
		}
	}
	at := int64(0)
	switch i := int64(index); table % 7 {
	case 0:
		at = v.h.L1Offset + 8*(i%int64(v.h.L1Entries))
	case 1, 2:
		n := int64(v.h.L1Entries)
		off := layout.EntryOffset(v.word(v.h.L1Offset + 8*(i/128%n)))
		if off == 0 || off+v.g.ClusterSize() > v.end() {
			return
		}
		// Those that the guest uses first.
		at = off&^7 + 8*(i%128)
		if table%7 == 2 && v.g.Extended {
			at, word = at|8, word<<24|word>>8
		}
	case 3:
		at = v.h.RefcountTableOffset + 8*(i%16)
	case 4:
		block := int64(v.word(v.h.RefcountTableOffset)) &^ 511
		if block > 0 && block+v.g.ClusterSize() <= v.end() {
			v.g.SetRefcount(v.data[block:], int(i)%128, uint64(flags)&3&v.g.MaxRefcount())
		}
		return
	case 5:
		if v.h.Snapshots == 0 {
			return
		}
		at = v.h.SnapshotsOffset + 8*(i%8)
	case 6:
		if v.h.Snapshots == 0 || index%2 == 0 {
			return
		}
		at = v.h.SnapshotsOffset // where its L1 table stands
	}
	if flags&128 != 0 {
		word ^= v.word(at)
	}
	v.set(at, word)
}

// operate carries out operations, one at a time on an image that is whole, which
// has to read as it should.
func (p *player) operate(t *testing.T, v *victim, im *qcow2.Image, ops []byte, whole bool) {
	t.Helper()
	disk := bytes.Clone(v.disk)
	var batch []aio.Request
	for ; len(ops) >= 3; ops = ops[3:] {
		r := aio.Request{Op: aio.Op(ops[0] % byte(aio.OpCount)), Flags: aio.Flags(ops[0] >> 6)}
		r.Offset = int64(ops[1]) << 10
		r.Length = min(1+int64(ops[2])<<7, int64(len(disk))-r.Offset)
		if ops[0]&32 != 0 { // cluster by cluster
			r.Offset &^= v.g.ClusterSize() - 1
			r.Length = min(v.g.ClusterSize()*int64(1+ops[2]%3), int64(len(disk))-r.Offset)
		}
		if ops[0]&16 != 0 && r.Op == aio.OpWrite {
			p.writeCompressed(t, v, im, r.Offset&^(v.g.ClusterSize()-1), disk, whole)
			continue
		}
		if r.Op == aio.OpFlush {
			r.Offset, r.Length = 0, 0
		}
		if r.Op == aio.OpWrite {
			b := p.piece(len(batch))[:r.Length]
			for i := range b {
				b[i] = guestMark[(r.Offset+int64(i))%int64(len(guestMark))]
			}
		}
		batch = append(batch, r)
		if !whole && len(batch) < pieces && len(ops) >= 6 {
			continue
		}
		p.submit(im, batch)
		if whole {
			p.follow(t, v, &batch[0], disk)
		}
		batch = batch[:0]
	}
	if !whole {
		_, err := im.ReadAt(make([]byte, len(disk)), 0)
		if err != nil {
			explained(t, "read", err)
		}
		return
	}
	sameBytes(t, "the disk", readAll(t, im), disk)
}

func (p *player) writeCompressed(t *testing.T, v *victim, im *qcow2.Image, off int64, disk []byte, whole bool) {
	t.Helper()
	b := bytes.Repeat([]byte(guestMark), int(v.g.ClusterSize())/len(guestMark))
	if err := im.WriteCompressed(b, off); err != nil {
		if whole {
			t.Fatalf("compressed write: %v", err)
		}
		explained(t, "compressed write", err)
	}
	copy(disk[off:], b)
}

// follow keeps the model up to date with what was done to a whole image.
func (p *player) follow(t *testing.T, v *victim, r *aio.Request, disk []byte) {
	t.Helper()
	if r.Errno != 0 {
		t.Fatalf("%v %d+%d: %v", r.Op, r.Offset, r.Length, r.Errno)
	}
	part := disk[r.Offset:r.End()]
	switch r.Op {
	case aio.OpRead:
		sameBytes(t, fmt.Sprintf("read %d+%d", r.Offset, r.Length), p.piece(0)[:r.Length], part)
	case aio.OpWrite:
		copy(part, p.piece(0))
	case aio.OpWriteZeroes:
		clear(part)
	case aio.OpDiscard:
		// Whole clusters read as zeroes, parts as before.
		mask := v.g.ClusterSize() - 1
		from, to := (r.Offset+mask)&^mask, r.End()
		if to != int64(len(disk)) {
			to &^= mask
		}
		if from < to {
			clear(disk[from:to])
		}
	}
}

// noMarks wants the tables that the image had when it was opened, and still has,
// to hold nothing that the guest has written, and the header not to be changed.
func (v *victim) noMarks(before *victim) {
	v.t.Helper()
	sameHeader(v.t, v.data, before.data)
	v.parse()
	had := before.places()
	for at, what := range v.places() {
		if had[at] == "" || at+v.g.ClusterSize() > v.end() {
			continue
		}
		b := v.data[at:][:v.g.ClusterSize()]
		for i := range guestMark { // from wherever the write began
			if mark := guestMark[i:] + guestMark[:i]; bytes.Contains(b, []byte(mark)) {
				v.t.Fatalf("the guest has written into %s at %#x", what, at)
			}
		}
	}
}

// places are the clusters that hold metadata.
func (v *victim) places() map[int64]string {
	m := map[int64]string{0: "the header"}
	add := func(what string, at, length int64) {
		at &^= v.g.ClusterSize() - 1
		for end := at + length; at < min(end, v.end()); at += v.g.ClusterSize() {
			if at > 0 {
				m[at] = what
			}
		}
	}
	for i := range int64(v.h.L1Entries) {
		add("an L2 table", layout.EntryOffset(v.word(v.l1(i))), 1)
	}
	for at := v.h.RefcountTableOffset; at < v.h.RefcountTableOffset+int64(v.h.RefcountTableClusters)<<v.g.ClusterBits; at += 8 {
		if word := v.word(at); v.g.CheckRefcountTable(word) == nil {
			add("a refcount block", int64(word), 1)
		}
	}
	add("the L1 table", v.h.L1Offset, int64(v.h.L1Entries)*8)
	add("the refcount table", v.h.RefcountTableOffset, int64(v.h.RefcountTableClusters)<<v.g.ClusterBits)
	list, size, err := layout.ReadSnapshotTable(bytes.NewReader(v.data), v.h)
	if err == nil {
		add("the snapshot table", v.h.SnapshotsOffset, size)
		for _, s := range list {
			add("a snapshot's L1 table", s.L1Offset, int64(s.L1Entries)*8)
		}
	}
	return m
}

// isWhole wants the checker to find nothing.
func (v *victim) isWhole() {
	v.t.Helper()
	var log []string
	im, _ := openMemory(v.t, v.data, qcow2.Options{ReadOnly: true})
	report, err := check.Run(im.CheckFile(), check.Options{Log: func(s string) { log = append(log, s) }})
	if err != nil || report.ExitCode() != 0 {
		v.t.Errorf("check: %+v, %v: %q", report, err, log)
	}
	if err := im.Close(); err != nil {
		v.t.Error(err)
	}
	if got := binary.BigEndian.Uint64(v.data[72:]); v.g.Version >= 3 && got&(layout.Dirty|layout.Corrupt) != 0 {
		v.t.Errorf("incompatible features %#x", got)
	}
}
