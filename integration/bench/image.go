package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// image is a fully written raw image whose data is in memory: on tmpfs always,
// elsewhere in the page cache. The two behave differently below a server: only
// disk file systems can tell a ring at once that data is cached.
type image struct {
	fs   string // file system, as the tables name it
	dir  string // removed at the end
	path string
	size int64
}

// fileSystems names what makes a useful second place beside tmpfs.
var fileSystems = map[int64]string{
	unix.TMPFS_MAGIC:       "tmpfs",
	unix.EXT4_SUPER_MAGIC:  "ext4",
	unix.XFS_SUPER_MAGIC:   "xfs",
	unix.BTRFS_SUPER_MAGIC: "btrfs",
}

// makeImages writes one image on tmpfs and one on a disk file system, or only
// that on the kind of file system named by only: memory or disk.
func makeImages(only string, size int64) (images []*image, err error) {
	defer func() {
		if err != nil {
			removeImages(images)
		}
	}()
	for _, place := range []struct {
		kind    string
		wanted  func(fs string) bool
		parents []string
	}{
		{"memory", func(fs string) bool { return fs == "tmpfs" }, []string{"/dev/shm", os.TempDir()}},
		{"disk", func(fs string) bool { return fs != "tmpfs" && fs != "" }, []string{os.TempDir(), ".", "/var/tmp"}},
	} {
		if only != "" && only != place.kind {
			continue
		}
		img, err := makeImage(place.parents, place.wanted, size)
		if err != nil {
			return images, fmt.Errorf("make image on a %s file system: %w", place.kind, err)
		}
		images = append(images, img)
	}
	if len(images) == 0 {
		return nil, fmt.Errorf("-fs %q: need memory or disk", only)
	}
	return images, nil
}

func removeImages(images []*image) {
	for _, img := range images {
		os.RemoveAll(img.dir)
	}
}

// makeImage makes an image in a fresh directory below the first of the parents
// that lies on a wanted file system.
func makeImage(parents []string, wanted func(fs string) bool, size int64) (*image, error) {
	for _, parent := range parents {
		var st unix.Statfs_t
		if unix.Statfs(parent, &st) != nil || !wanted(fileSystems[st.Type]) {
			continue
		}
		parent, err := filepath.Abs(parent)
		if err != nil {
			return nil, err
		}
		dir, err := os.MkdirTemp(parent, "platter-bench-")
		if err != nil {
			return nil, err
		}
		img := &image{fileSystems[st.Type], dir, filepath.Join(dir, "image.raw"), size}
		if err := errors.Join(img.fill(), img.recache()); err != nil {
			os.RemoveAll(dir)
			return nil, err
		}
		return img, nil
	}
	return nil, fmt.Errorf("none found among %q", parents)
}

// fill writes the whole image with data that repeats nowhere and waits until it
// is on its device, so that nothing is written back while something is measured.
func (img *image) fill() (err error) {
	f, err := os.Create(img.path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	block := make([]byte, 1<<20)
	x := uint64(0x9e3779b97f4a7c15)
	for off := int64(0); off < img.size; off += int64(len(block)) {
		for i := 0; i < len(block); i += 8 {
			x ^= x << 13
			x ^= x >> 7
			x ^= x << 17
			binary.LittleEndian.PutUint64(block[i:], x)
		}
		if _, err := f.Write(block[:min(int64(len(block)), img.size-off)]); err != nil {
			return err
		}
	}
	return f.Sync()
}

// warm reads the image, for which the kernel may have found a better use of its
// memory since the last run.
func (img *image) warm() error {
	f, err := os.Open(img.path)
	if err != nil {
		return fmt.Errorf("warm image: %w", err)
	}
	defer f.Close()
	if _, err := io.CopyBuffer(io.Discard, struct{ io.Reader }{f}, make([]byte, 1<<20)); err != nil {
		return fmt.Errorf("warm image: %w", err)
	}
	return nil
}

// recache has the image read into the page cache anew. How a file was written
// decides in what pieces the cache holds it, and those how fast it is read: images
// that are compared must not differ in that. In memory it changes nothing.
func (img *image) recache() error {
	f, err := os.Open(img.path)
	if err != nil {
		return fmt.Errorf("drop image from the cache: %w", err)
	}
	err = errors.Join(f.Sync(), unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED), f.Close())
	if err != nil {
		return fmt.Errorf("drop image from the cache: %w", err)
	}
	return img.warm()
}

// settle waits until what a run wrote is on the device.
func (img *image) settle() error {
	f, err := os.Open(img.path)
	if err != nil {
		return fmt.Errorf("settle image: %w", err)
	}
	defer f.Close()
	if err := f.Sync(); err != nil {
		return fmt.Errorf("settle image: %w", err)
	}
	return nil
}
