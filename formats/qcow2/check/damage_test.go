package check

import "testing"

func TestDamageIsCountedAsByQemuImg(t *testing.T) {
	for _, c := range damageCases {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			path := c.create(t)
			m := loadImage(t, path)
			c.damage(m)
			m.save(path)
			found := check(t, path, RepairNone)
			if found.ExitCode() == 0 {
				t.Error("the damage was not found")
			}
			theirs, code, ok := qemuCheck(t, path)
			same := ok && *found == theirs && code == found.ExitCode()
			switch {
			case c.stricter && (code != 0 || found.ExitCode() != 2):
				t.Errorf("our exit code is %d, qemu-img's %d, want 2 and 0", found.ExitCode(), code)
			case c.gaveUp && (ok || code != 1 || found.ExitCode() != 2):
				t.Errorf("our exit code is %d, qemu-img's %d, want 2 and 1", found.ExitCode(), code)
			case c.stricter, c.gaveUp:
			case c.differs != "" && (same || code != found.ExitCode()):
				t.Errorf("want the same exit code, but another report: %+v and %+v", *found, theirs)
			case c.differs == "" && !same:
				t.Errorf("our report, exit code %d:\n%+v\nqemu-img's, exit code %d:\n%+v", found.ExitCode(), *found, code, theirs)
			}
			t.Run("leaks", func(t *testing.T) { c.repair(t, path, "leaks", RepairLeaks) })
			t.Run("all", func(t *testing.T) { c.repair(t, path, "all", RepairAll) })
			if c.uncut != "" {
				return
			}
			t.Run("cut off repair of leaks", func(t *testing.T) { cutRepair(t, m.data, RepairLeaks, 1) })
			t.Run("cut off repair of all", func(t *testing.T) { cutRepair(t, m.data, RepairAll, 2) })
		})
	}
}

// repair repairs copies of a damaged image, one by us and one by qemu-img, and
// lets qemu-img judge both.
func (c damageCase) repair(t *testing.T, path, mode string, repair Repair) {
	ours, theirs := copyFile(t, path, "ours-"+mode), copyFile(t, path, "theirs-"+mode)
	report := check(t, ours, repair)
	again := check(t, ours, RepairNone)
	if want := (Report{ // of a check, after which nothing has been fixed
		report.CheckErrors, report.Corruptions, report.Leaks, 0, 0,
		report.ImageEndOffset, report.TotalClusters, report.AllocatedClusters, report.FragmentedClusters, report.CompressedClusters,
	}); *again != want {
		t.Errorf("the repair reported\n%+v\nbut left\n%+v", *report, *again)
	}
	left, code, _ := qemuCheck(t, ours)
	reference, _, finished := qemuCheck(t, theirs, "-r", mode)
	theirLeft, theirCode, _ := qemuCheck(t, theirs)
	less := left.CheckErrors <= theirLeft.CheckErrors && left.Corruptions <= theirLeft.Corruptions && left.Leaks <= theirLeft.Leaks
	equal := code == theirCode && left.CheckErrors == theirLeft.CheckErrors && left.Corruptions == theirLeft.Corruptions && left.Leaks == theirLeft.Leaks
	if c.differently == "" && !equal && (!less || finished && c.better == "") {
		t.Errorf("after our repair qemu-img finds, exit code %d:\n%+v\nafter its own, exit code %d:\n%+v", code, left, theirCode, theirLeft)
	}
	if finished && (report.CorruptionsFixed != reference.CorruptionsFixed || report.LeaksFixed != reference.LeaksFixed) && c.fixed == "" {
		t.Errorf("we fixed %d corruptions and %d leaks, qemu-img %d and %d", report.CorruptionsFixed, report.LeaksFixed, reference.CorruptionsFixed, reference.LeaksFixed)
	}
	if repair == RepairAll && (code != 0) != c.stays {
		t.Errorf("after our repair the exit code of qemu-img is %d; something is expected to be left: %v", code, c.stays)
	}
	if !c.lost {
		qemuImg(t, "compare", "-f", "qcow2", "-F", "qcow2", path, ours)
	}
}
