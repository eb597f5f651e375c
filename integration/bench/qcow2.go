package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"

	"platter/formats/qcow2/qcow2test"
)

// disk is which image a server is started on.
type disk int

const (
	rawDisk     disk = iota // the fully written raw image
	mappedDisk              // the same content as a qcow2 image, every cluster mapped
	freshDisk               // a new, empty qcow2 image, for each run
	freshRaw                // a new, empty raw image, for each run
	hugeDisk                // a qcow2 image of 10 TiB with a million allocated clusters
	overlayDisk             // a new, empty qcow2 image over the raw image, for each run
)

// freshSize is that of an empty image, large enough that nearly every random
// write of a run meets a cluster that nobody has written to.
const freshSize = 16 << 30

// onDisk makes the image that the server is to work on, unless it is there.
func (s server) onDisk(ctx context.Context, img *image, binary string) (*image, error) {
	switch s.disk {
	case mappedDisk:
		mapped := &image{fs: img.fs, dir: img.dir, path: filepath.Join(img.dir, "mapped.qcow2"), size: img.size}
		if _, err := os.Stat(mapped.path); err == nil {
			return mapped, nil
		}
		if err := runPlatter(ctx, binary, "convert", "--quiet", "-f", "raw", "-O", "qcow2", img.path, mapped.path); err != nil {
			return nil, err
		}
		return mapped, mapped.recache()
	case hugeDisk:
		huge := &image{fs: img.fs, dir: img.dir, path: filepath.Join(img.dir, "huge.qcow2"), size: 10 << 40}
		if _, err := os.Stat(huge.path); err == nil {
			return huge, nil
		}
		return huge, qcow2test.Huge(huge.path)
	case overlayDisk:
		overlay := &image{fs: img.fs, dir: img.dir, path: filepath.Join(img.dir, "overlay"), size: img.size}
		if err := os.RemoveAll(overlay.path); err != nil {
			return nil, fmt.Errorf("make room for a new image: %w", err)
		}
		return overlay, runPlatter(ctx, binary, "create", "-f", "qcow2", "-b", img.path, "-F", "raw", overlay.path)
	case freshDisk, freshRaw:
		fresh := &image{fs: img.fs, dir: img.dir, path: filepath.Join(img.dir, "fresh"), size: freshSize}
		if err := os.RemoveAll(fresh.path); err != nil {
			return nil, fmt.Errorf("make room for a new image: %w", err)
		}
		return fresh, runPlatter(ctx, binary, "create", "-f", s.disk.format(), fresh.path, strconv.Itoa(freshSize))
	}
	return img, nil
}

// format is the format of the disk's image.
func (d disk) format() string {
	if d == rawDisk || d == freshRaw {
		return "raw"
	}
	return "qcow2"
}

func runPlatter(ctx context.Context, binary string, args ...string) error {
	if out, err := exec.CommandContext(ctx, binary, args...).CombinedOutput(); err != nil {
		return fmt.Errorf("platter %s: %w: %s", args[0], err, lastLine(string(out)))
	}
	return nil
}
