package check

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"

	"platter/formats/qcow2/layout"
)

// Guest offsets of what fill has written.
const (
	dataAt       = 0
	sharedAt     = 200 << 10 // data that the snapshots share
	zeroAt       = 64 << 10  // an allocated zero cluster, when clusters have 64K
	farAt        = 40 << 20
	compressedAt = 640 << 10
)

type damageCase struct {
	name      string
	flavour   string // "v3" if empty
	snapshots bool
	bitmaps   bool
	damage    func(m *image)
	// stays: it can't be repaired.
	stays bool
	// lost: what the guest reads isn't defined, or changes.
	lost bool
	// stricter: qemu-img finds nothing.
	stricter bool
	// gaveUp: qemu-img has nothing to report but that.
	gaveUp bool
	// differs says why we don't count what qemu-img counts. Ours is not clean
	// either.
	differs string
	// better says why our repair leaves less than qemu-img's, differently why
	// it leaves something else.
	better, differently string
	// uncut says why it can't be told what a cut in the middle makes worse.
	uncut string
	// fixed says why the number of what was fixed isn't that of qemu-img.
	fixed string
}

// made keeps the images that create has made, by what was asked for.
var made struct {
	sync.Mutex
	images map[string][]byte
}

// create makes the image that is to be damaged, and returns its path.
func (c damageCase) create(t *testing.T) string {
	t.Helper()
	name := c.flavour
	if name == "" {
		name = "v3"
	}
	at := slices.IndexFunc(flavours, func(v flavour) bool { return v.name == name })
	if at < 0 {
		t.Fatalf("there is no flavour %q", name)
	}
	v := flavours[at]
	if v.dataFile() { // which must be its own
		return c.make(t, v)
	}
	made.Lock()
	defer made.Unlock()
	key := fmt.Sprint(name, c.snapshots, c.bitmaps)
	image, ok := made.images[key]
	if !ok {
		var err error
		if image, err = os.ReadFile(c.make(t, v)); err != nil {
			t.Fatal(err)
		}
		if made.images == nil {
			made.images = make(map[string][]byte)
		}
		made.images[key] = image
	}
	path := filepath.Join(t.TempDir(), "image.qcow2")
	if err := os.WriteFile(path, image, 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

func (c damageCase) make(t *testing.T, v flavour) string {
	t.Helper()
	path := v.create(t)
	v.fill(t, path)
	if c.bitmaps {
		v.bitmaps(t, path)
	}
	if c.snapshots {
		v.snapshots(t, path)
	}
	return path
}

var damageCases = []damageCase{
	{name: "refcount of a data cluster too low", damage: func(m *image) {
		m.setRefcount(m.host(m.l2(dataAt)), 0)
	}},
	{name: "refcount of a shared cluster too low", snapshots: true, damage: func(m *image) {
		m.setRefcount(m.host(m.l2(sharedAt)), 1)
	}},
	{name: "refcount of a shared cluster 0", snapshots: true, damage: func(m *image) {
		m.setRefcount(m.host(m.l2(sharedAt)), 0)
	}},
	{name: "refcount of a data cluster too high", damage: func(m *image) {
		m.setRefcount(m.host(m.l2(dataAt)), 5)
	}},
	{name: "refcount of an unused cluster", damage: func(m *image) {
		m.data = append(m.data, make([]byte, 3*m.g.ClusterSize())...)
		m.setRefcount(int64(len(m.data))-1, 1)
	}},
	{name: "refcounts of a 1 bit image", flavour: "1 bit refcounts", damage: func(m *image) {
		m.setRefcount(m.host(m.l2(dataAt)), 0)
		m.setRefcount(m.host(m.l2(farAt)), 0)
		m.data = append(m.data, make([]byte, 3*m.g.ClusterSize())...)
		m.setRefcount(int64(len(m.data))-1, 1)
	}},
	{name: "refcounts of a 64 bit image", flavour: "64 bit refcounts", snapshots: true, damage: func(m *image) {
		m.setRefcount(m.host(m.l2(sharedAt)), 1<<63)
		m.setRefcount(m.host(m.l2(farAt)), 1)
	}},
	{name: "refcount of the header 0", damage: func(m *image) { m.setRefcount(0, 0) }},
	{name: "refcount of the L1 table 0", damage: func(m *image) { m.setRefcount(m.h.L1Offset, 0) }},
	{name: "refcount of the refcount table 0", damage: func(m *image) { m.setRefcount(m.h.RefcountTableOffset, 0) }},
	{name: "refcount of an L2 table 2", damage: func(m *image) { m.setRefcount(m.host(m.l1(0)), 2) }},
	{name: "copied flag missing", damage: func(m *image) { m.flip(m.l2(dataAt), layout.Copied) }},
	{name: "copied flag of a shared cluster", snapshots: true, damage: func(m *image) { m.flip(m.l2(sharedAt), layout.Copied) }},
	{name: "copied flag of an L1 entry missing", damage: func(m *image) { m.flip(m.l1(0), layout.Copied) }},
	{name: "copied flag of an allocated zero cluster missing", damage: func(m *image) { m.flip(m.l2(zeroAt), layout.Copied) }},
	{name: "copied flag in a data file image missing", flavour: "data file", damage: func(m *image) { m.flip(m.l2(farAt), layout.Copied) }},
	{name: "copied flag on compressed cluster", stays: true, damage: func(m *image) { m.flip(m.l2(compressedAt), layout.Copied) }},
	{name: "leak that hides a missing copied flag", damage: func(m *image) {
		m.setRefcount(m.host(m.l2(dataAt)), 2)
		m.flip(m.l2(dataAt), layout.Copied)
	}},
	{name: "L2 table beyond the end", stays: true, lost: true, damage: func(m *image) {
		m.replace(m.l1(0), m.g.ClusterSize()*(m.clusters()+3))
	}},
	{name: "L2 table far beyond the end", stays: true, lost: true, damage: func(m *image) { m.replace(m.l1(0), 1<<55) }},
	{name: "L2 table not aligned", stays: true, lost: true, damage: func(m *image) { m.replace(m.l1(0), m.host(m.l1(0))+512) }},
	{name: "L1 entry with reserved bits", stays: true, lost: true, damage: func(m *image) { m.flip(m.l1(0), 1<<3|1<<57) }},
	{name: "L1 entry with nothing but reserved bits", stays: true, lost: true, differs: "qemu-img takes the header for an L2 table", differently: "qemu-img counts the header twice",
		damage: func(m *image) { m.set(m.l1(0), 1<<60) }},
	{name: "L1 entry with nothing but the copied flag", fixed: "qemu-img takes the header for an L2 table", lost: true, differs: "qemu-img takes the header for an L2 table", differently: "qemu-img counts the header twice",
		damage: func(m *image) { m.set(m.l1(0), layout.Copied) }},
	{name: "two L1 entries on one L2 table", flavour: "4K clusters", lost: true, damage: func(m *image) { m.set(m.l1(1), m.word(m.l1(0))) }},
	{name: "L1 table beyond the end", stays: true, lost: true, damage: func(m *image) { m.set(40, uint64(m.g.ClusterSize()*(m.clusters()+7))) }},
	{name: "data cluster beyond the end", stays: true, lost: true, damage: func(m *image) {
		m.replace(m.l2(dataAt), m.g.ClusterSize()*(m.clusters()+3))
	}},
	{name: "data cluster far beyond the end", stays: true, lost: true, damage: func(m *image) { m.replace(m.l2(dataAt), 1<<55) }},
	{name: "data cluster not aligned", stays: true, lost: true, damage: func(m *image) { m.replace(m.l2(dataAt), m.host(m.l2(dataAt))+512) }},
	{name: "zero cluster not aligned", lost: true, damage: func(m *image) { m.replace(m.l2(zeroAt), m.host(m.l2(zeroAt))+512) }},
	{name: "zero cluster not aligned in version 2", stays: true, fixed: "qemu-img sets the zero flag, which version 2 does not have", flavour: "v2", lost: true, differently: "qemu-img sets the zero flag, which version 2 does not have", damage: func(m *image) { m.set(m.l2(dataAt), m.word(m.l2(dataAt))+512|1) }},
	{name: "preallocated extended entry not aligned", flavour: "extended L2", lost: true, damage: func(m *image) {
		at := m.l2(dataAt)
		m.replace(at, m.host(at)+512)
		m.set(at+8, 7<<32)
	}},
	{name: "L2 entry with reserved bits", stays: true, lost: true, damage: func(m *image) { m.flip(m.l2(dataAt), 1<<2|1<<61) }},
	{name: "empty L2 entry with reserved bits", stays: true, lost: true, damage: func(m *image) { m.flip(m.l2(20<<20), 1<<5) }},
	{name: "two L2 entries on one cluster", lost: true, damage: func(m *image) { m.set(m.l2(farAt), m.word(m.l2(dataAt))) }},
	{name: "two L2 entries on one cluster in a 1 bit image", stays: true, flavour: "1 bit refcounts", lost: true, damage: func(m *image) { m.set(m.l2(farAt), m.word(m.l2(dataAt))) }},
	{name: "data cluster on the header", lost: true, damage: func(m *image) { m.set(m.l2(farAt), layout.Copied|uint64(m.h.L1Offset)) }},
	{name: "data cluster on an L2 table", lost: true, damage: func(m *image) { m.replace(m.l2(farAt), m.host(m.l1(0))) }},
	{name: "data cluster on a refcount block", lost: true, damage: func(m *image) { m.replace(m.l2(farAt), m.block(0)) }},
	{name: "data cluster on the refcount table", fixed: "the new refcount table leaves the cluster to the data", lost: true, damage: func(m *image) { m.replace(m.l2(farAt), m.h.RefcountTableOffset) }},
	{name: "compressed data beyond the end", stays: true, lost: true, damage: func(m *image) {
		m.set(m.l2(compressedAt), layout.CompressedL2|uint64(len(m.data)+1<<30))
	}},
	{name: "compressed data across the end", stays: true, lost: true, damage: func(m *image) {
		word, ok := m.g.CompressedEntry(m.clusters()<<m.g.ClusterBits-1000, 3000)
		if !ok {
			m.t.Fatal("no entry for it")
		}
		m.set(m.l2(compressedAt), word)
	}},
	{name: "compressed data on other clusters", lost: true, damage: func(m *image) {
		word, _ := m.g.CompressedEntry(m.host(m.l2(dataAt))+m.g.ClusterSize()-1000, 3000)
		m.set(m.l2(compressedAt), word)
	}},
	{name: "compressed cluster with a data file", stays: true, flavour: "data file", lost: true, damage: func(m *image) { m.set(m.l2(farAt), layout.CompressedL2|0x50000) }},
	{name: "subcluster both allocated and zero", stays: true, flavour: "extended L2", lost: true, damage: func(m *image) { m.flip(m.l2(dataAt)+8, 1<<32) }},
	{name: "subclusters without a cluster", stays: true, flavour: "extended L2", lost: true, damage: func(m *image) { m.set(m.l2(20<<20)+8, 1) }},
	{name: "subclusters of a compressed cluster", stays: true, fixed: "qemu-img gives the data away", flavour: "extended L2", lost: true, differs: "qemu-img takes the data for leaked", differently: "qemu-img gives the data away",
		damage: func(m *image) { m.set(m.l2(compressedAt)+8, 1) }},
	{name: "zero flag in version 2", flavour: "v2", lost: true, stricter: true, damage: func(m *image) { m.flip(m.l2(dataAt), 1) }},
	{name: "zero flag in an extended entry", flavour: "extended L2", lost: true, stricter: true, damage: func(m *image) { m.flip(m.l2(dataAt), 1) }},
	{name: "data file entry that isn't the guest offset", flavour: "data file", lost: true, stricter: true, damage: func(m *image) { m.replace(m.l2(farAt), 64<<10) }},
	{name: "refcount table entry not aligned", damage: func(m *image) { m.flip(m.h.RefcountTableOffset, 1<<9) }},
	{name: "refcount table entry with reserved bits", damage: func(m *image) { m.flip(m.h.RefcountTableOffset, 1) }},
	{name: "refcount table entry beyond the end", fixed: "qemu-img lengthens the file, and counts that", damage: func(m *image) {
		m.set(m.h.RefcountTableOffset, uint64(m.g.ClusterSize()*(m.clusters()+3)))
	}},
	{name: "refcount table entry far beyond the end", damage: func(m *image) { m.set(m.h.RefcountTableOffset, 1<<62) }},
	{name: "refcount table entry 0", damage: func(m *image) { m.set(m.h.RefcountTableOffset, 0) }},
	{name: "spare refcount table entry beyond the end", fixed: "qemu-img lengthens the file, and counts that", damage: func(m *image) {
		m.set(m.h.RefcountTableOffset+8, uint64(m.g.ClusterSize()*(m.clusters()+3)))
	}},
	{name: "two refcount table entries on one block", damage: func(m *image) {
		m.set(m.h.RefcountTableOffset+8, uint64(m.block(0)))
	}},
	{name: "one of many refcount blocks lost", flavour: "64 bit refcounts, 512 byte clusters", snapshots: true, damage: func(m *image) {
		m.set(m.h.RefcountTableOffset+3*8, 0)
	}},
	{name: "refcount block zeroed", damage: func(m *image) { clear(m.data[m.block(0):][:m.g.ClusterSize()]) }},
	{name: "refcount table on an L2 table", lost: true, damage: func(m *image) { m.set(48, uint64(m.host(m.l1(0)))) }},
	{name: "refcount table beyond the end", damage: func(m *image) { m.set(48, uint64(m.g.ClusterSize()*(m.clusters()+3))) }},
	{name: "refcount table partly beyond the end", differs: "it overlaps other metadata, which qemu-img does not look for", uncut: "the clusters that it seems to have count as its own as soon as the file is long enough", damage: func(m *image) { m.set32(56, 100) }},
	{name: "file cut off", stays: true, lost: true, damage: func(m *image) { m.data = m.data[:len(m.data)-3<<16] }},
	{name: "file cut off in a cluster", stays: true, lost: true, damage: func(m *image) { m.data = m.data[:len(m.data)-3<<16+700] }},
	{name: "file cut off with refcount blocks", stays: true, fixed: "qemu-img counts what it has lengthened", flavour: "64 bit refcounts, 512 byte clusters", lost: true, better: "qemu-img puts new blocks where entries point", damage: func(m *image) { m.data = m.data[:len(m.data)/2] }},
	{name: "snapshot table beyond the end", snapshots: true, lost: true, damage: func(m *image) { m.set(64, uint64(m.g.ClusterSize()*(m.clusters()+3))) }},
	{name: "snapshot without L1 table", stays: true, snapshots: true, lost: true, damage: func(m *image) { m.set(m.h.SnapshotsOffset, 0) }},
	{name: "snapshot L1 table not aligned", stays: true, snapshots: true, lost: true, damage: func(m *image) { m.set(m.h.SnapshotsOffset, uint64(m.snapshot(0).L1Offset)+512) }},
	{name: "snapshot L1 table beyond the end", stays: true, snapshots: true, lost: true, damage: func(m *image) { m.set(m.h.SnapshotsOffset, 1<<50) }},
	{name: "snapshot L1 table where no file reaches", gaveUp: true, stays: true, snapshots: true, lost: true, damage: func(m *image) { m.set(m.h.SnapshotsOffset, 0xe8<<56) }},
	{name: "snapshot L1 table too large", stays: true, snapshots: true, lost: true, damage: func(m *image) { m.set32(m.h.SnapshotsOffset+8, 1<<24) }},
	{name: "snapshot with the active L1 table", stays: true, snapshots: true, lost: true, damage: func(m *image) { m.set(m.h.SnapshotsOffset, uint64(m.h.L1Offset)) }},
	{name: "snapshot entry with reserved bits", stays: true, snapshots: true, lost: true, damage: func(m *image) { m.flip(m.entryBelow(m.snapshot(0).L1Offset, dataAt), 1<<3) }},
	{name: "snapshot L2 table beyond the end", stays: true, snapshots: true, lost: true, damage: func(m *image) { m.replace(m.snapshot(1).L1Offset, 1<<40) }},
	{name: "snapshot zero cluster not aligned", snapshots: true, lost: true, damage: func(m *image) {
		at := m.entryBelow(m.snapshot(0).L1Offset, zeroAt)
		m.replace(at, m.host(at)+512)
	}},
	{name: "dirty image with leaks", flavour: "lazy refcounts", damage: func(m *image) {
		m.data[79] |= 1
		m.setRefcount(m.host(m.l2(dataAt)), 2)
	}},
	{name: "corrupt image with low refcounts", damage: func(m *image) {
		m.data[79] |= 2
		m.setRefcount(m.host(m.l2(dataAt)), 0)
	}},
	{name: "bitmaps without their autoclear bit", bitmaps: true, damage: func(m *image) { m.data[95] &^= 1 }},
	{name: "bitmap data on a data cluster", differently: "qemu-img writes the bitmaps anew", bitmaps: true, damage: func(m *image) {
		m.set(m.bitmap(0).TableOffset, uint64(m.host(m.l2(farAt))))
	}},
	{name: "bitmap data beyond the end", differently: "qemu-img writes the bitmaps anew", stays: true, bitmaps: true, damage: func(m *image) { m.set(m.bitmap(0).TableOffset, 1<<40) }},
	{name: "bitmap table beyond the end", differently: "qemu-img writes the bitmaps anew", stays: true, bitmaps: true, damage: func(m *image) { m.set(m.bitmapDirectory(), 1<<40) }},
	{name: "bitmap table on an L2 table", lost: true, gaveUp: true, differently: "qemu-img writes the bitmaps anew", stays: true, bitmaps: true, damage: func(m *image) { m.set(m.bitmapDirectory(), uint64(m.host(m.l1(0)))) }},
	{name: "snapshot without extra data", snapshots: true, damage: func(m *image) { m.rewriteSnapshots(0) }},
	{name: "snapshot with too little extra data", snapshots: true, damage: func(m *image) { m.rewriteSnapshots(8) }},
	{name: "snapshot with too little extra data and a low refcount", snapshots: true, damage: func(m *image) {
		m.rewriteSnapshots(8)
		m.setRefcount(m.host(m.l2(sharedAt)), 0)
	}},
	{name: "snapshot with unknown extra data and a low refcount", snapshots: true, damage: func(m *image) {
		m.rewriteSnapshots(1000)
		m.setRefcount(m.h.SnapshotsOffset, 0)
	}},
}
