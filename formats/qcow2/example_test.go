package qcow2_test

import (
	"fmt"
	"io"
	"log"
	"os"
	"path/filepath"

	"platter/formats"
	"platter/formats/qcow2"
)

// An image is read and written like a file. What was written is durable after
// Flush; Close leaves the image clean.
func Example() {
	dir, err := os.MkdirTemp("", "example-")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "disk.qcow2")
	if err := qcow2.Create(path, 1<<30, qcow2.CreateOptions{}); err != nil {
		log.Fatal(err)
	}
	disk, err := qcow2.Open(path, formats.Options{})
	if err != nil {
		log.Fatal(err)
	}
	if _, err := disk.WriteAt([]byte("hello"), 4096); err != nil {
		log.Fatal(err)
	}
	if err := disk.Flush(); err != nil {
		log.Fatal(err)
	}
	b := make([]byte, 7)
	if _, err := disk.ReadAt(b, 4095); err != nil {
		log.Fatal(err)
	}
	fmt.Printf("%q of %d bytes\n", b, disk.Size())
	if err := disk.Close(); err != nil {
		log.Fatal(err)
	}
	// Output: "\x00hello\x00" of 1073741824 bytes
}

// An image is an io.ReaderAt: whatever reads one can read a guest's disk.
func ExampleImage_ReadAt() {
	dir, err := os.MkdirTemp("", "example-")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "disk.qcow2")
	if err := qcow2.Create(path, 1<<20, qcow2.CreateOptions{}); err != nil {
		log.Fatal(err)
	}
	disk, err := qcow2.Open(path, formats.Options{ReadOnly: true})
	if err != nil {
		log.Fatal(err)
	}
	defer disk.Close()
	n, err := io.Copy(io.Discard, io.NewSectionReader(disk, 0, disk.Size()))
	fmt.Println(n, err)
	// Output: 1048576 <nil>
}
