package qcow2_test

import (
	"bytes"
	"math/rand/v2"
	"path/filepath"
	"testing"

	"platter/formats"
)

// packable is a cluster that takes about half its size when it is packed.
func packable(rng *rand.Rand, cluster int) []byte {
	b := bytes.Repeat([]byte{byte(rng.Uint32())}, cluster)
	for i := range b[:cluster/2] {
		b[i] = byte(rng.Uint32())
	}
	return b
}

// TestPackerKeepsItsCluster: a host cluster that compressed data is being added to
// isn't free, also when all that was in it has been overwritten.
func TestPackerKeepsItsCluster(t *testing.T) {
	const cluster = 4096
	for _, refcounts := range []string{"1", "2", "16"} {
		t.Run(refcounts+" bits", func(t *testing.T) {
			rng := seeded(t)
			path := filepath.Join(t.TempDir(), "image")
			qemuCreate(t, path, 4<<20, "cluster_size=4K,refcount_bits="+refcounts)
			im := open(t, path, formats.Options{})
			want := make([]byte, 4<<20)
			put := func(n int, compressed bool) {
				t.Helper()
				b := packable(rng, cluster)
				copy(want[n*cluster:], b)
				var err error
				if compressed {
					err = im.WriteCompressed(b, int64(n)*cluster)
				} else {
					_, err = im.WriteAt(b, int64(n)*cluster)
				}
				if err != nil {
					t.Fatal(err)
				}
			}
			for round := range 20 {
				put(10*round, true)
				put(10*round, false)
				for range 3 { // what lost its place is free after that
					if err := im.Flush(); err != nil {
						t.Fatal(err)
					}
				}
				// Into what is free.
				for i := range 4 {
					put(10*round+1+i, false)
					if err := im.Flush(); err != nil {
						t.Fatal(err)
					}
				}
				put(10*round+6, true)
				put(10*round+7, true)
			}
			sameBytes(t, "the disk", readAll(t, im), want)
			if err := im.Close(); err != nil {
				t.Fatal(err)
			}
			qemuCheck(t, path)
			sameBytes(t, "as QEMU reads it", rawOf(t, path), want)
		})
	}
}
