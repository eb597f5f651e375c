package check

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"testing"

	"platter/formats/qcow2/layout"
)

// dangers is what can lose data in an image, whatever its refcounts say of it.
type dangers struct {
	low    map[int64]bool  // clusters with a refcount below their references
	shared map[string]bool // entries with the copied flag, and a shared cluster
	others int64           // corruptions that are about neither
}

// dangersOf looks at an image, of which only the first clusters count: when the
// file grows, entries that named clusters behind its end name some within it.
func dangersOf(data []byte, clusters int64) (dangers, error) {
	c, err := inspect(newMemory(data), Options{})
	d := dangers{low: make(map[int64]bool), shared: make(map[string]bool)}
	if err != nil {
		return d, err
	}
	d.others = c.report.Corruptions - c.found.flags
	either(&c.stored, &c.refs, func(cluster int64, refcount, refs uint64) {
		known := c.readable(c.entry(cluster))
		switch refs = min(refs, c.most); {
		case !c.inUse(cluster):
			return
		case refcount < refs && cluster < clusters:
			d.low[cluster] = true
		}
		// Two owners are found only where the refcount agrees.
		if known && (refcount < refs || refcount == refs && c.owners.get(cluster) > 1) {
			d.others--
		}
	})
	note := func(table, entry int64, word uint64) {
		if word&layout.Copied != 0 && c.refs.get(layout.EntryOffset(word)>>c.g.ClusterBits) > 1 {
			d.shared[fmt.Sprintf("entry %d of the table at %#x", entry, table)] = true
		}
	}
	if c.g.External {
		return d, nil
	}
	err = c.words(c.h.L1Offset, int64(c.h.L1Entries), func(i int64, word uint64) (uint64, error) {
		note(c.h.L1Offset, i, word)
		return word, nil
	})
	if err != nil {
		return d, err
	}
	err = c.rewriteL2(func(l2Table) bool { return true }, func(e l2Entry) (l2Entry, error) { return e, nil })
	if err != nil {
		return d, err
	}
	for _, t := range c.l2 {
		table := make([]byte, c.g.ClusterSize())
		if err := c.readAt(table, t.off); err != nil {
			return d, err
		}
		err := eachEntry(c.g, table, func(i int, e l2Entry) error {
			if t.active > 0 && hasHost(e.kind(c.g)) {
				note(t.off, int64(i), e.word)
			}
			return nil
		})
		if err != nil {
			return d, err
		}
	}
	return d, nil
}

// worse says what there is in d that was not there before.
func (d dangers) worse(before dangers) string {
	for cluster := range d.low {
		if !before.low[cluster] {
			return fmt.Sprintf("the refcount of cluster %d is too low", cluster)
		}
	}
	for entry := range d.shared {
		if !before.shared[entry] {
			return fmt.Sprintf("%s has the copied flag, but not its cluster alone", entry)
		}
	}
	if d.others > before.others {
		return fmt.Sprintf("there are %d other corruptions, not %d", d.others, before.others)
	}
	return ""
}

// cutRepair repairs an image in memory, and cuts the power at every write: with
// all writes before it done, and several times with some sectors of those done
// that no sync has made durable.
func cutRepair(t *testing.T, data []byte, repair Repair, seed uint64) {
	t.Helper()
	f := newMemory(bytes.Clone(data))
	f.record = true
	if _, err := Run(f, Options{Repair: repair}); err != nil {
		t.Fatalf("Run: %v", err)
	}
	h, err := layout.ParseHeader(data)
	if err != nil {
		t.Fatal(err)
	}
	clusters := h.Geometry().Clusters(int64(len(data)))
	before, err := dangersOf(data, clusters)
	if err != nil {
		t.Fatal(err)
	}
	look := func(image []byte, what string) {
		t.Helper()
		after, err := dangersOf(image, clusters)
		if err != nil {
			t.Fatalf("seed %d, %s: %v", seed, what, err)
		}
		if worse := after.worse(before); worse != "" {
			t.Fatalf("seed %d, %s: %s", seed, what, worse)
		}
	}
	random := rand.New(rand.NewPCG(seed, 0))
	durable := bytes.Clone(data)
	var pending []step
	for i, s := range f.log {
		if s.isSync() {
			for _, p := range pending {
				durable = applied(durable, p)
			}
			pending = nil
			continue
		}
		pending = append(pending, s)
		image := bytes.Clone(durable)
		for _, p := range pending {
			image = applied(image, p)
		}
		look(image, fmt.Sprintf("cut after step %d of %d", i, len(f.log)))
		for range 2 {
			image := bytes.Clone(durable)
			for _, p := range pending {
				image = torn(random, image, p)
			}
			look(image, fmt.Sprintf("cut with torn writes at step %d of %d", i, len(f.log)))
		}
	}
	if len(pending) > 0 {
		t.Errorf("the last %d writes are not durable", len(pending))
	}
}

// torn does a part of a write: some of its sectors, perhaps none.
func torn(random *rand.Rand, data []byte, s step) []byte {
	if s.truncate {
		if random.IntN(2) == 0 {
			return data
		}
		return applied(data, s)
	}
	for at := 0; at < len(s.data); at += sector {
		if random.IntN(2) == 0 {
			data = applied(data, step{off: s.off + int64(at), data: s.data[at:min(at+sector, len(s.data))]})
		}
	}
	return data
}

func TestPowerCutsInRepairsOfRandomDamage(t *testing.T) {
	seed := rand.Uint64()
	for name, m := range built(t) {
		t.Run(name, func(t *testing.T) {
			m.t = t
			random := rand.New(rand.NewPCG(seed, 1))
			sound, regions := m.data, m.metadata()
			var repaired int
			for trial := range 20 {
				m.data = bytes.Clone(sound)
				m.scramble(random, regions)
				c, err := inspect(newMemory(m.data), Options{})
				c.beyond.merge()
				// What begins in the file and ends behind it is counted only when the
				// file has grown.
				if err != nil || len(c.beyond.list) > 0 && c.beyond.list[0].first < c.clusters {
					continue
				}
				if _, err := Run(newMemory(bytes.Clone(m.data)), Options{Repair: RepairAll}); err != nil {
					continue
				}
				repaired++
				t.Logf("seed %d, trial %d", seed, trial)
				cutRepair(t, m.data, RepairLeaks, seed)
				cutRepair(t, m.data, RepairAll, seed)
			}
			if repaired < 5 {
				t.Errorf("only %d images could be repaired", repaired)
			}
		})
	}
}
