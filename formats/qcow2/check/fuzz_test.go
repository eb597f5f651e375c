package check

import (
	"bytes"
	"testing"
)

// FuzzCheck checks and repairs whatever comes. Nothing may panic, take memory
// without bound or grow the file much, a repair must know what it left, and an
// image that it calls clean must be so.
func FuzzCheck(f *testing.F) {
	for _, m := range built(f) {
		if len(m.data) > 64<<10 { // too much to change well
			continue
		}
		f.Add(m.data)
		for cluster := range m.clusters() {
			for _, bits := range []uint64{1 << 63, 1 << 50, 1 << 9} {
				damaged := bytes.Clone(m.data)
				m.flip(m.at(cluster), bits)
				m.data, damaged = damaged, m.data
				f.Add(damaged)
			}
		}
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		if len(data) > 1<<20 {
			return
		}
		found, err := Run(newMemory(data), Options{})
		if err != nil {
			if found.ExitCode() != 1 {
				t.Errorf("error %v, and the exit code %d", err, found.ExitCode())
			}
			return
		}
		for _, repair := range []Repair{RepairLeaks, RepairAll} {
			// New refcounts may have to go behind whatever entries name behind the
			// end of the file. A file in memory must not grow so far.
			file := &memory{data: bytes.Clone(data), limit: 64 << 20}
			repaired, err := Run(file, Options{Repair: repair})
			if err != nil {
				continue
			}
			again, err := Run(file, Options{})
			if err != nil {
				t.Fatalf("repair %d reported %+v, then the check failed: %v", repair, *repaired, err)
			}
			left := *repaired
			left.CorruptionsFixed, left.LeaksFixed = 0, 0
			if *again != left {
				t.Errorf("repair %d reported %+v, but left %+v", repair, *repaired, *again)
			}
			twice, err := Run(file, Options{Repair: repair})
			if err != nil || twice.CorruptionsFixed > 0 || twice.LeaksFixed > 0 {
				t.Errorf("repair %d, done twice, reported %+v and %+v, %v", repair, *repaired, *twice, err)
			}
			if again.CheckErrors > found.CheckErrors {
				t.Errorf("repair %d: %d check errors, before it %d", repair, again.CheckErrors, found.CheckErrors)
			}
		}
	})
}
