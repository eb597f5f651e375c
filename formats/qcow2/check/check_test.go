package check

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"platter/formats/qcow2/layout"
	"platter/integration/testenv"
)

// built are the images that build makes, by name.
func built(t testing.TB) map[string]*image {
	t.Helper()
	return map[string]*image{
		"version 2":   build(t, 2, 9, 4, 0),
		"version 3":   build(t, 3, 9, 4, 0),
		"2 bits":      build(t, 3, 9, 1, 0),
		"64 bits":     build(t, 3, 12, 6, 0),
		"extended L2": build(t, 3, 14, 4, layout.ExtendedL2),
	}
}

func TestBuiltImagesAreCleanForBothCheckers(t *testing.T) {
	for name, m := range built(t) {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "image.qcow2")
			m.save(path)
			testenv.NeedTool(t, "qemu-img")
			if report := expectSame(t, path); report.ExitCode() != 0 {
				t.Errorf("not clean: %+v", *report)
			}
		})
	}
}

func TestExitCode(t *testing.T) {
	for _, c := range []struct {
		report Report
		want   int
	}{
		{Report{}, 0},
		{Report{CorruptionsFixed: 2, LeaksFixed: 3, TotalClusters: 5}, 0},
		{Report{CheckErrors: 1, Corruptions: 1, Leaks: 1}, 1},
		{Report{Corruptions: 1, Leaks: 1}, 2},
		{Report{Leaks: 1}, 3},
	} {
		if got := c.report.ExitCode(); got != c.want {
			t.Errorf("%+v: exit code %d, want %d", c.report, got, c.want)
		}
	}
}

func TestJSONLeavesOutWhatQemuImgDoes(t *testing.T) {
	got, err := json.Marshal(Report{})
	if want := `{"check-errors":0}`; err != nil || string(got) != want {
		t.Errorf("got %s, %v, want %s", got, err, want)
	}
}

func TestCheckingNeverWrites(t *testing.T) {
	m := build(t, 3, 9, 4, layout.Dirty|layout.Corrupt)
	m.setRefcount(m.at(dataCluster), 7)
	m.setRefcount(m.at(sharedCluster), 0)
	f := newMemory(m.data)
	f.record = true
	report, err := Run(f, Options{})
	if err != nil || report.Corruptions == 0 || report.Leaks != 1 {
		t.Errorf("got %+v, %v, want corruptions and a leak", *report, err)
	}
	if len(f.log) > 0 {
		t.Errorf("%d things were done to the file", len(f.log))
	}
}

// headers reads the features of an image.
func (m *image) features() (incompatible, autoclear uint64) { return m.word(72), m.word(88) }

func TestRepairClearsMarksOfAnImageThatIsThenClean(t *testing.T) {
	const unknown = 1 << 40
	for _, c := range []struct {
		name             string
		repair           Repair
		damage           func(m *image)
		marked, unknowns bool // what must still be there afterwards
	}{
		{"only looking", RepairNone, func(*image) {}, true, true},
		{"clean, leaks", RepairLeaks, func(*image) {}, false, false},
		{"clean, all", RepairAll, func(*image) {}, false, false},
		{"leak", RepairLeaks, func(m *image) { m.setRefcount(m.at(dataCluster), 2) }, false, false},
		{"corruption, leaks", RepairLeaks, func(m *image) { m.setRefcount(m.at(dataCluster), 0) }, true, true},
		{"corruption, all", RepairAll, func(m *image) { m.setRefcount(m.at(dataCluster), 0) }, false, false},
		{"lost data", RepairAll, func(m *image) { m.replace(m.at(l2Cluster), 1<<40) }, true, false},
		{"low refcount without a block", RepairAll, func(m *image) { m.set(m.at(tableCluster), 0) }, false, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			m := build(t, 3, 9, 4, layout.Dirty|layout.Corrupt)
			m.set(88, m.word(88)|unknown)
			c.damage(m)
			m.mustRun(c.repair)
			incompatible, autoclear := m.features()
			if got := incompatible&(layout.Dirty|layout.Corrupt) != 0; got != c.marked {
				t.Errorf("marks left: %v, want %v", got, c.marked)
			}
			if got := autoclear&unknown != 0; got != c.unknowns {
				t.Errorf("unknown autoclear bit left: %v, want %v", got, c.unknowns)
			}
			if autoclear&layout.BitmapsValid == 0 {
				t.Error("the bitmaps' bit is lost")
			}
		})
	}
}

func TestMetadataOfTwoOwnersIsFoundThoughItsRefcountAgrees(t *testing.T) {
	m := build(t, 3, 9, 4, 0)
	m.set(m.at(snapshotsCluster), uint64(m.at(l1Cluster))) // the snapshot has the active L1 table
	m.mustRun(RepairAll)
	report := m.mustRun(RepairNone)
	// The flag in an L1 table of two owners isn't corrected: it isn't ours alone.
	if report.Corruptions != 2 || report.Leaks != 0 {
		t.Errorf("got %+v, want the shared L1 table and its entry's copied flag", *report)
	}
	m.flip(m.at(l1Cluster), layout.Copied)
	if report = m.mustRun(RepairNone); report.Corruptions != 1 {
		t.Errorf("got %+v, want the shared L1 table", *report)
	}
}

func TestSnapshotOfVersion2NeedsNoExtraData(t *testing.T) {
	m := build(t, 2, 9, 4, 0)
	m.rewriteSnapshots(0)
	if report := m.mustRun(RepairNone); report.ExitCode() != 0 {
		t.Errorf("not clean: %+v", *report)
	}
}

func TestRewrittenSnapshotTableKeepsWhatItSays(t *testing.T) {
	m := build(t, 3, 9, 4, 0)
	before := m.snapshot(0)
	m.rewriteSnapshots(8)
	report := m.mustRun(RepairAll)
	if report.ExitCode() != 0 || report.CorruptionsFixed != 1 {
		t.Fatalf("got %+v, want one corruption fixed", *report)
	}
	before.ICount = layout.NoICount // was in the extra data that is gone
	m.h, _ = layout.ParseHeader(m.data)
	if after := m.snapshot(0); fmt.Sprint(after) != fmt.Sprint(before) {
		t.Errorf("the snapshot is %+v, was %+v", after, before)
	}
	if m.h.SnapshotsOffset == m.at(snapshotsCluster) {
		t.Error("the snapshot table was rewritten in its place")
	}
}

func TestLogIsBounded(t *testing.T) {
	m := build(t, 3, 16, 4, 0)
	m.data = append(m.data, make([]byte, 2*MaxLog<<16)...)
	for cluster := int64(builtClusters); cluster < builtClusters+2*MaxLog; cluster++ {
		m.setRefcount(m.at(cluster), 1)
	}
	var lines []string
	report, err := Run(newMemory(m.data), Options{Log: func(line string) { lines = append(lines, line) }})
	if err != nil || report.Leaks != 2*MaxLog {
		t.Fatalf("got %+v, %v, want %d leaks", *report, err, 2*MaxLog)
	}
	if len(lines) != MaxLog+1 {
		t.Errorf("%d lines were logged, want %d", len(lines), MaxLog+1)
	}
	if want := fmt.Sprintf("Leaked cluster %d refcount=1 reference=0", builtClusters); lines[0] != want {
		t.Errorf("the first line is %q, want %q", lines[0], want)
	}
	if !strings.HasPrefix(lines[MaxLog], "more than 1000 findings") {
		t.Errorf("the last line is %q", lines[MaxLog])
	}
}

func TestProgressGrowsToItsEnd(t *testing.T) {
	for name, m := range built(t) {
		t.Run(name, func(t *testing.T) {
			var calls int
			var lastDone, lastTotal int64
			_, err := Run(newMemory(m.data), Options{Progress: func(done, total int64) {
				if calls++; done < lastDone || total < lastTotal || done > total {
					t.Errorf("progress went from %d of %d to %d of %d", lastDone, lastTotal, done, total)
				}
				lastDone, lastTotal = done, total
			}})
			if err != nil {
				t.Fatal(err)
			}
			if calls < 3 || lastDone != lastTotal || lastDone < 4*m.g.ClusterSize() {
				t.Errorf("%d calls, the last with %d of %d", calls, lastDone, lastTotal)
			}
		})
	}
}

func TestProgressStartsOverWhenARepairIsChecked(t *testing.T) {
	for _, leak := range []bool{false, true} {
		m := build(t, 3, 9, 4, 0)
		if leak {
			m.setRefcount(m.at(dataCluster), 2)
		}
		var starts int
		last := int64(math.MaxInt64)
		_, err := Run(newMemory(m.data), Options{Repair: RepairAll, Progress: func(done, _ int64) {
			if done < last {
				starts++
			}
			last = done
		}})
		if want := map[bool]int{false: 1, true: 2}[leak]; err != nil || starts != want {
			t.Errorf("with a leak %v: progress began %d times, want %d (%v)", leak, starts, want, err)
		}
	}
}

// reads notes what is read.
type reads struct {
	*memory
	mu   sync.Mutex
	list []region
}

func (f *reads) ReadAt(p []byte, off int64) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.list = append(f.list, region{off, int64(len(p))})
	return f.memory.ReadAt(p, off)
}

func TestSharedTablesAreReadOnceAndNeighboursTogether(t *testing.T) {
	m := build(t, 3, 16, 4, 0)
	// Four L2 tables at the end of the file, two after two, and forty snapshots
	// whose L1 tables name all of them.
	m.data = append(m.data, make([]byte, 50*m.g.ClusterSize())...)
	tables := []int64{builtClusters, builtClusters + 1, builtClusters + 4, builtClusters + 5}
	for i, table := range tables {
		m.set(m.l1(int64(i)), uint64(m.at(table)))
		m.setRefcount(m.at(table), 41)
	}
	m.setRefcount(m.at(l2Cluster), 0)
	var list []layout.Snapshot
	for i := range int64(40) {
		l1 := m.at(builtClusters + 6 + i)
		copy(m.data[l1:], m.data[m.at(l1Cluster):][:32])
		m.setRefcount(l1, 1)
		list = append(list, layout.Snapshot{ID: fmt.Sprint(i), Name: "x", L1Offset: l1, L1Entries: 4, Size: m.h.Size})
	}
	copy(m.data[m.at(snapshotsCluster):], layout.AppendSnapshots(nil, list))
	m.set32(60, 40)
	for _, cluster := range []int64{snapshotL1Cluster, snapshotL2Cluster, sharedCluster, dataCluster, zeroCluster, compressedCluster} {
		m.setRefcount(m.at(cluster), 0)
	}

	f := &reads{memory: newMemory(m.data)}
	report, err := Run(f, Options{Log: logTo(t)})
	if err != nil || report.ExitCode() != 0 {
		t.Fatalf("got %+v, %v, want a clean image", *report, err)
	}
	var times, calls int
	for _, r := range f.list {
		if r.off+r.size > m.at(tables[0]) && r.off <= m.at(tables[3]) && r.size > 32 {
			calls++
			if r.off <= m.at(tables[2]) && r.off+r.size > m.at(tables[2]) {
				times++
			}
		}
	}
	if times != 1 {
		t.Errorf("an L2 table that 41 L1 tables share was read %d times", times)
	}
	if calls != 2 {
		t.Errorf("two pairs of neighbouring L2 tables took %d reads", calls)
	}
}

// long is a file that claims to be longer than its data, with zeroes in the rest.
type long struct {
	*memory
	size int64
}

func (f long) Size() (int64, error) { return f.size, nil }

func TestHugeSparseFileTakesNoMemoryForItsHoles(t *testing.T) {
	m := build(t, 3, 9, 4, 0)
	m.replace(m.at(l2Cluster)+8, 1<<49) // far away, but in the file
	f := long{newMemory(m.data), 1 << 50}
	allocated := testing.AllocsPerRun(1, func() {
		report, err := Run(f, Options{})
		if err != nil || report.Corruptions != 2 || report.Leaks != 1 {
			t.Errorf("got %+v, %v, want the cluster without a refcount, its flag, and a leak", *report, err)
		}
	})
	if allocated > 2000 {
		t.Errorf("%v allocations", allocated)
	}
}

func TestErrors(t *testing.T) {
	for _, c := range []struct {
		name   string
		file   func(t *testing.T, m *image) File
		repair Repair
		want   error
	}{
		{"no qcow2 image", func(_ *testing.T, m *image) File { return newMemory(make([]byte, len(m.data))) }, RepairNone, layout.ErrNotQcow2},
		{"empty file", func(*testing.T, *image) File { return newMemory(nil) }, RepairNone, layout.ErrNotQcow2},
		{"invalid header", func(_ *testing.T, m *image) File { m.set(40, 1); return newMemory(m.data) }, RepairNone, layout.ErrInvalid},
		{"unknown feature", func(_ *testing.T, m *image) File { m.set(72, 1<<20); return newMemory(m.data) }, RepairAll, layout.ErrUnsupported},
		{"bitmap directory", func(_ *testing.T, m *image) File { m.set(m.at(directoryCluster), 5); return newMemory(m.data) }, RepairNone, layout.ErrInvalid},
		{"snapshot table that is too large", func(_ *testing.T, m *image) File {
			m.set32(m.at(snapshotsCluster)+36, math.MaxUint32)
			return newMemory(m.data)
		}, RepairNone, layout.ErrInvalid},
		{"tangled tables", tangled, RepairNone, ErrTangled},
		{"a refcount table that can't be long enough", func(_ *testing.T, m *image) File {
			m.set(m.at(tableCluster), 0)
			return long{newMemory(m.data), 1 << 50}
		}, RepairAll, ErrBeyondRepair},
		{"no place that nothing refers to", scattered, RepairAll, ErrBeyondRepair},
		{"a table on the header", func(_ *testing.T, m *image) File {
			m.set(m.at(tableCluster), 0)
			m.set(m.at(snapshotsCluster), 0)
			return newMemory(m.data)
		}, RepairAll, ErrBeyondRepair},
		{"no space", func(_ *testing.T, m *image) File {
			m.set(m.at(tableCluster), 0)
			return &memory{data: m.data, limit: int64(len(m.data)) + 700}
		}, RepairAll, errNoSpace},
		{"no space in the middle of writing", func(_ *testing.T, m *image) File {
			m.set(m.at(tableCluster), 0)
			return full{newMemory(m.data)}
		}, RepairAll, errNoSpace},
		{"no space on a block device", func(_ *testing.T, m *image) File {
			m.set(m.at(tableCluster), 0)
			return &memory{data: m.data, fixed: true}
		}, RepairAll, errFixed},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := c.file(t, build(t, 3, 9, 4, 0))
			before := contents(t, f)
			report, err := Run(f, Options{Repair: c.repair})
			if !errors.Is(err, c.want) || report.CheckErrors != 1 || report.ExitCode() != 1 {
				t.Errorf("got %+v, %v, want the error %v", *report, err, c.want)
			}
			if !bytes.Equal(contents(t, f), before) {
				t.Error("the file was changed")
			}
		})
	}
}

func contents(t *testing.T, f File) []byte {
	t.Helper()
	b, err := io.ReadAll(io.NewSectionReader(f, 0, math.MaxInt64))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// tangled has an L1 table whose entries name every sector as an L2 table.
func tangled(t *testing.T, _ *image) File {
	m := build(t, 2, 21, 4, 0)
	entries := m.at(1) / 8
	for i := range entries {
		m.set(m.l1(i), uint64(512*i%int64(len(m.data))|512))
	}
	m.set32(36, uint32(entries))
	return newMemory(m.data)
}

// scattered has entries that name very many places behind the end, and no
// refcounts.
func scattered(t *testing.T, _ *image) File {
	m := build(t, 3, 16, 4, 0)
	const tables = 20
	for i := range int64(tables) {
		m.set(m.l1(i), uint64(len(m.data)))
		for j := range int64(8192) {
			m.data = append(m.data, 0, 0, 0, 0, 0, 0, 0, 0)
			m.set(int64(len(m.data)-8), uint64((1<<20+2*(8192*i+j))<<16))
		}
	}
	m.set32(36, tables)
	m.set(m.at(tableCluster), 0)
	return newMemory(m.data)
}

// full is a file that may grow, but has no space behind its first bytes.
type full struct{ *memory }

func (f full) WriteAt(p []byte, off int64) (int, error) {
	if off > builtClusters<<9 {
		return 0, errNoSpace
	}
	return f.memory.WriteAt(p, off)
}

func TestNewRefcountsFitIntoABlockDevice(t *testing.T) {
	for name, damage := range map[string]func(m *image){
		"no block":             func(m *image) { m.set(m.at(tableCluster), 0) },
		"damaged entry":        func(m *image) { m.set(m.at(tableCluster), uint64(m.at(builtClusters+7)|1)) },
		"refcount in the tail": func(m *image) { m.setRefcount(m.at(builtClusters+9), 1); m.flip(m.at(tableCluster), 512) },
	} {
		t.Run(name, func(t *testing.T) {
			m := build(t, 3, 10, 4, 0)
			m.data = append(m.data, make([]byte, 40*m.g.ClusterSize())...)
			damage(m)
			length := len(m.data)
			f := &memory{data: bytes.Clone(m.data), fixed: true}
			report, err := Run(f, Options{Repair: RepairAll, Log: logTo(t)})
			if err != nil || report.ExitCode() != 0 || len(f.data) != length {
				t.Fatalf("got %+v, %v, and a length of %d, want a clean image as long as before", *report, err, len(f.data))
			}
			if !bytes.Equal(f.data[sector:m.at(builtClusters)], m.data[sector:m.at(builtClusters)]) {
				t.Error("something in use was overwritten")
			}
		})
	}
}

func TestRefcountBlockThatTheEndCutsOffIsRepaired(t *testing.T) {
	m := build(t, 3, 10, 4, 0)
	m.data = append(m.data, m.data[m.at(blockCluster):m.at(blockCluster+1)]...)
	m.set(m.at(tableCluster), uint64(m.at(builtClusters)))
	m.setRefcount(m.at(builtClusters), 1)
	m.setRefcount(m.at(blockCluster), 0)
	m.setRefcount(m.at(dataCluster), 0)
	m.data = m.data[:len(m.data)-sector]
	report := m.mustRun(RepairAll)
	if report.ExitCode() != 0 || report.CorruptionsFixed != 1 || report.LeaksFixed != 0 {
		t.Errorf("got %+v, want one corruption fixed", *report)
	}
}

func TestZeroEntryInATableThatNewRefcountsSetFreeIsRepaired(t *testing.T) {
	m := build(t, 3, 10, 4, 0)
	m.flip(m.at(l2Cluster)+16, 512)
	m.set(48, uint64(m.at(l2Cluster))) // the L2 table is the refcount table too
	if report := m.mustRun(RepairAll); report.ExitCode() != 0 {
		t.Errorf("got %+v, want a clean image", *report)
	}
	if got := m.word(m.at(l2Cluster) + 16); got != layout.ZeroFlag {
		t.Errorf("the entry is %#x", got)
	}
}

func TestReferencesThatNoRefcountCanCountStay(t *testing.T) {
	for name, damage := range map[string]func(m *image){
		"in place": func(*image) {},
		"rebuilt":  func(m *image) { m.set(m.at(tableCluster), 0) },
	} {
		t.Run(name, func(t *testing.T) {
			m := build(t, 3, 9, 1, 0) // of 2 bits
			for i := range int64(4) {
				m.set(m.at(l2Cluster)+80+8*i, m.word(m.at(l2Cluster))) // 6 references
			}
			damage(m)
			report := m.mustRun(RepairAll)
			if report.Corruptions != 3 || report.LeaksFixed != 0 {
				t.Errorf("got %+v, want 3 references too many", *report)
			}
		})
	}
}

func TestFaultAtEveryCallLeavesTheImageNoWorse(t *testing.T) {
	damage := map[string]func(m *image){
		"refcounts and flags": func(m *image) {
			m.setRefcount(m.at(sharedCluster), 1)
			m.setRefcount(m.at(dataCluster), 3)
			m.flip(m.at(l2Cluster), layout.Copied)
			m.flip(m.at(l1Cluster), layout.Copied)
		},
		"refcount table": func(m *image) { m.flip(m.at(tableCluster), 512) },
		"snapshot table and zero cluster": func(m *image) {
			m.rewriteSnapshots(8)
			m.flip(m.at(l2Cluster)+16, 512)
		},
	}
	for name, damage := range damage {
		t.Run(name, func(t *testing.T) {
			m := build(t, 3, 10, 4, layout.Dirty)
			m.set(88, m.word(88)|1<<30)
			damage(m)
			before, err := dangersOf(m.data, m.clusters())
			if err != nil {
				t.Fatal(err)
			}
			for n := 1; ; n++ {
				f := newMemory(bytes.Clone(m.data))
				f.fail = n
				report, err := Run(f, Options{Repair: RepairAll})
				if f.fail > 0 { // there are no more calls
					if err != nil || report.ExitCode() != 0 {
						t.Errorf("without a fault: %+v, %v", *report, err)
					}
					if n < 10 {
						t.Errorf("there were only %d calls", n)
					}
					return
				}
				if !errors.Is(err, errFault) || report.ExitCode() != 1 {
					t.Fatalf("fault at call %d: %+v, %v", n, *report, err)
				}
				after, err := dangersOf(f.data, m.clusters())
				if err != nil {
					t.Fatalf("fault at call %d: %v", n, err)
				}
				if worse := after.worse(before); worse != "" {
					t.Errorf("fault at call %d: %s", n, worse)
				}
				if report, err := Run(f, Options{Repair: RepairAll}); err != nil || report.ExitCode() != 0 {
					t.Errorf("repair after a fault at call %d: %+v, %v", n, *report, err)
				}
			}
		})
	}
}
