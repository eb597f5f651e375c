package gonbd

import (
	"bytes"
	"math/rand/v2"
	"net"
	"testing"

	"github.com/pojntfx/go-nbd/pkg/backend"
	"github.com/pojntfx/go-nbd/pkg/server"

	"platter/export/nbd/nbdtest"
)

// serve has go-nbd's own server export a backend, and returns a client of it.
func serve(t *testing.T, b backend.Backend, blockSize uint32) *nbdtest.Client {
	t.Helper()
	there, here := net.Pipe()
	done := make(chan error, 1)
	go func() {
		done <- server.Handle(there, []*server.Export{{Name: "demo", Backend: b}}, &server.Options{MinimumBlockSize: blockSize})
		there.Close()
	}()
	c := nbdtest.New(here)
	if err := c.Hello(nbdtest.FixedNewstyle); err != nil {
		t.Fatal(err)
	}
	if err := c.Go("demo"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Disc(); err != nil {
			t.Error(err)
		}
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return c
}

// go-nbd's server can't tell an image of ours from a backend of its own.
func TestUnderGoNBDServer(t *testing.T) {
	for _, block := range []uint32{1, 512} {
		const size = 1<<20 + 512
		store, own := make([]byte, size), make([]byte, size)
		d := newDisk(t, newImage(t, backend.NewMemoryBackend(store), Options{BlockSize: block}))
		ours, theirs := serve(t, d, 1), serve(t, backend.NewMemoryBackend(own), 1)
		rng := rand.New(rand.NewPCG(1, uint64(block)))
		if err := nbdtest.Compare(ours, theirs, rng, 60, 600_000); err != nil {
			t.Error(err)
		}
		if !bytes.Equal(store, own) {
			t.Error("the backends differ")
		}
	}
}
