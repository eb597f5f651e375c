package qcow2_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"testing"

	"platter/aio"
	"platter/formats/qcow2"
	"platter/formats/qcow2/check"
	"platter/formats/qcow2/layout"
)

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
