// Package qcow2test makes qcow2 images that tests and benchmarks need and that
// no tool makes quickly.
package qcow2test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"

	"platter/formats/qcow2/layout"
)

// Huge writes an image of 10 TiB with clusters of 64 KiB, of which 1,044,480 are
// allocated: the first 51 of each L2 table. The data is a hole of the file, so
// that all of it takes some 100 MiB on a disk.
func Huge(path string) (err error) {
	const (
		bits    = 16
		size    = 10 << 40
		each    = 51
		perL2   = 1 << (bits - 3)
		perBlk  = 1 << (bits - 1)
		tables  = size >> (2*bits - 3)
		l1Start = 1
		l1Size  = tables * 8 >> bits
		l1      = l1Size + 1 // clusters; a part of the last one is in use
		refs    = l1Start + l1
		total   = 2_000_000 // host clusters that refcount blocks are made for
		blocks  = total/perBlk + 1
		l2      = refs + 1 + blocks
		data    = l2 + tables
		end     = data + tables*each
	)
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o644)
	if err != nil {
		return fmt.Errorf("make image: %w", err)
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	h := layout.Header{
		Version: 3, ClusterBits: bits, Size: size, RefcountOrder: 4,
		L1Entries: tables, L1Offset: l1Start << bits, RefcountTableOffset: refs << bits, RefcountTableClusters: 1,
	}
	write := func(b []byte, cluster int) {
		if err == nil {
			_, err = f.WriteAt(b, int64(cluster)<<bits)
		}
	}
	cluster := make([]byte, 1<<bits)
	if err := h.Encode(cluster); err != nil {
		return err
	}
	write(cluster, 0)
	var l1Table, refTable []byte
	for i := range tables {
		l1Table = binary.BigEndian.AppendUint64(l1Table, layout.Copied|uint64(l2+i)<<bits)
	}
	write(l1Table, l1Start)
	g := h.Geometry()
	for i := range blocks {
		refTable = binary.BigEndian.AppendUint64(refTable, uint64(refs+1+i)<<bits)
		clear(cluster)
		for j := range min(perBlk, max(end-i*perBlk, 0)) {
			g.SetRefcount(cluster, j, 1)
		}
		write(cluster, refs+1+i)
	}
	write(refTable, refs)
	for i := range tables {
		var entries []byte
		for j := range each {
			entries = binary.BigEndian.AppendUint64(entries, layout.Copied|uint64(data+i*each+j)<<bits)
		}
		write(entries, l2+i)
	}
	if err != nil {
		return fmt.Errorf("write image: %w", err)
	}
	return f.Truncate(end << bits)
}
