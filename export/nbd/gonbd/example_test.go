package gonbd_test

import (
	"fmt"
	"log"

	"github.com/pojntfx/go-nbd/pkg/backend"

	"platter/aio"
	"platter/export/nbd/gonbd"
)

// A backend of go-nbd, here one in memory, becomes an image that any of our
// front ends can serve.
func ExampleImage() {
	img, err := gonbd.Image(backend.NewMemoryBackend(make([]byte, 1<<20)), gonbd.Options{BlockSize: 512})
	if err != nil {
		log.Fatal(err)
	}
	defer img.Close()
	fmt.Println(img.Format(), img.Size(), img.Limits().BlockSize)
	// Output: go-nbd 1048576 512
}

// An image, whatever its format, becomes a backend for code that was written
// for go-nbd.
func ExampleBackend() {
	img, err := gonbd.Image(backend.NewMemoryBackend(make([]byte, 1<<20)), gonbd.Options{})
	if err != nil {
		log.Fatal(err)
	}
	defer img.Close()
	loop, err := aio.NewLoop(aio.LoopOptions{})
	if err != nil {
		log.Fatal(err)
	}
	defer loop.Close()
	disk := gonbd.Backend(img, loop)
	defer disk.Close()

	var b backend.Backend = disk
	if _, err := b.WriteAt([]byte("hello"), 1000); err != nil {
		log.Fatal(err)
	}
	if err := b.Sync(); err != nil {
		log.Fatal(err)
	}
	p := make([]byte, 5)
	if _, err := b.ReadAt(p, 1000); err != nil {
		log.Fatal(err)
	}
	fmt.Printf("%s\n", p)
	// Output: hello
}
