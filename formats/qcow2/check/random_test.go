package check

import (
	"bytes"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"platter/formats/qcow2/layout"
)

// region is a part of an image with metadata.
type region struct{ off, size int64 }

// metadata lists where an image's metadata is, apart from the header.
func (m *image) metadata() []region {
	m.t.Helper()
	c, err := inspect(newMemory(m.data), Options{})
	if err != nil {
		m.t.Fatal(err)
	}
	cluster := m.g.ClusterSize()
	list := []region{{m.h.RefcountTableOffset, 64}, {m.h.L1Offset, int64(m.h.L1Entries) * 8}}
	for _, word := range c.table {
		if word != 0 {
			list = append(list, region{int64(word), cluster})
		}
	}
	for _, t := range c.l2 {
		list = append(list, region{t.off, cluster})
	}
	for _, s := range c.snapshots.list {
		list = append(list, region{s.L1Offset, int64(s.L1Entries) * 8})
	}
	if c.snapshots.size > 0 {
		list = append(list, region{m.h.SnapshotsOffset, c.snapshots.size})
	}
	for _, b := range c.bitmaps {
		list = append(list, region{b.TableOffset, int64(b.TableEntries) * 8})
	}
	return list
}

// scramble changes a few words of an image's metadata.
func (m *image) scramble(random *rand.Rand, regions []region) {
	for range 1 + random.IntN(3) {
		r := regions[random.IntN(len(regions))]
		at := r.off + random.Int64N(r.size)&^7
		word := m.word(at)
		for try := 0; word == 0 && try < 20; try++ { // most are
			at = r.off + random.Int64N(r.size)&^7
			word = m.word(at)
		}
		switch random.IntN(6) {
		case 0:
			m.flip(at, 1<<random.IntN(64))
		case 1:
			m.set(at, 0)
		case 2:
			m.set(at, random.Uint64())
		case 3: // another cluster
			m.replace(at, random.Int64N(m.clusters()+3)<<m.g.ClusterBits)
		case 4: // a word from somewhere else
			other := regions[random.IntN(len(regions))]
			m.set(at, m.word(other.off+random.Int64N(other.size)&^7))
		case 5: // a bit that means something
			bits := []uint64{layout.Copied, layout.CompressedL2, layout.ZeroFlag, 1 << 9, 1 << 16, 1 << 56}
			m.flip(at, bits[random.IntN(len(bits))])
		}
	}
}

// stricter are the messages of what qemu-img doesn't look at, different those of
// what it counts in another way.
var (
	stricter = []string{
		"must not have the zero flag in version 2", "must not have reserved bits set", "must name the guest offset",
		"metadata of more than one owner",
	}
	different = []string{
		"names no L2 table", "is compressed and has a subcluster bitmap", "more than 1000 findings",
	}
)

func TestRandomDamageIsFoundAsByQemuImg(t *testing.T) {
	const trials = 25
	for _, name := range []string{"v2, 512 byte clusters", "512 byte clusters", "v3", "extended L2, 16K clusters", "8 bit refcounts", "1 bit refcounts", "data file"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := damageCase{flavour: name, snapshots: true, bitmaps: !strings.HasPrefix(name, "v2")}
			path := c.create(t)
			m := loadImage(t, path)
			sound, regions := m.data, m.metadata()
			seed := rand.Uint64()
			random := rand.New(rand.NewPCG(seed, 0))
			t.Logf("seed %d", seed)
			var equal int
			for trial := range trials {
				m.data = bytes.Clone(sound)
				m.scramble(random, regions)
				damaged := filepath.Join(filepath.Dir(path), "damaged")
				m.save(damaged)
				if compareFindings(t, damaged, trial) {
					equal++
				}
				f := newMemory(bytes.Clone(m.data))
				report, err := Run(f, Options{Repair: RepairAll})
				if err != nil || report.ExitCode() != 0 {
					continue
				}
				m.data = f.data
				m.save(damaged)
				if left, code, _ := qemuCheck(t, damaged); code != 0 {
					t.Errorf("trial %d: after a complete repair qemu-img finds, exit code %d: %+v", trial, code, left)
				}
			}
			t.Logf("%d of %d reports equal qemu-img's", equal, trials)
		})
	}
}

// compareFindings checks a damaged image. We may find more than qemu-img, of the
// few kinds that it doesn't look for, but never less.
func compareFindings(t *testing.T, path string, trial int) (equal bool) {
	t.Helper()
	var lines []string
	ours, err := Run(openFile(t, path), Options{Log: func(line string) { lines = append(lines, line) }})
	mentions := func(messages []string) bool {
		for _, message := range messages {
			if slices.ContainsFunc(lines, func(line string) bool { return strings.Contains(line, message) }) {
				return true
			}
		}
		return false
	}
	theirs, code, ok := qemuCheck(t, path)
	switch {
	case err != nil && code == 0:
		t.Errorf("trial %d: qemu-img finds nothing, we give up: %v", trial, err)
	case err != nil:
	case code == 0 && ours.ExitCode() != 0 && !mentions(stricter), code != 0 && ours.ExitCode() == 0:
		t.Errorf("trial %d: our exit code is %d, qemu-img's %d\n%s", trial, ours.ExitCode(), code, strings.Join(lines[:min(len(lines), 50)], "\n"))
	case ok && *ours != theirs && !mentions(stricter) && !mentions(different):
		t.Errorf("trial %d: our report\n%+v\nqemu-img's\n%+v\n%s", trial, *ours, theirs, strings.Join(lines[:min(len(lines), 50)], "\n"))
	}
	return ok && *ours == theirs
}
