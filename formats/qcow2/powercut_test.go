package qcow2_test

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"testing"

	"platter/aio"
	"platter/formats"
	"platter/formats/formattest"
	"platter/formats/qcow2"
	"platter/formats/qcow2/layout"
	"platter/integration/testenv"
)

// leaksOnly has qemu-img check an image, which may have leaks and nothing worse.
func leaksOnly(path string) error {
	out, err := exec.Command("qemu-img", "check", "-f", "qcow2", "--output", "json", path).CombinedOutput()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		return err
	}
	if err == nil || exit.ExitCode() == 3 {
		return nil
	}
	// Lazy refcounts may be wrong while the image says so.
	b, readErr := os.ReadFile(path)
	if readErr == nil && len(b) > 79 && b[79]&byte(layout.Dirty) != 0 {
		return nil
	}
	return fmt.Errorf("qemu-img check: %w: %s", err, out)
}

// closed is leaksOnly for an image that was closed: it must not say any more that
// its refcounts may be wrong.
func closed(path string) error {
	b, err := os.ReadFile(path)
	if err == nil && len(b) > 79 && b[79]&byte(layout.Dirty) != 0 {
		err = errors.New("the dirty bit is set")
	}
	return errors.Join(err, leaksOnly(path))
}

// TestPowerCut cuts the power in the middle of everything.
func TestPowerCut(t *testing.T) {
	testenv.NeedTool(t, "qemu-img")
	for _, v := range []struct {
		name, options string
		size          int64
	}{
		{"v3", "compat=1.1", 1 << 20},
		{"512", "cluster_size=512", 256 << 10},
		{"4K", "cluster_size=4K,refcount_bits=64", 1 << 20},
		{"v2", "compat=0.10,cluster_size=4K", 512 << 10},
		{"ExtendedL2", "extended_l2=on,cluster_size=16K", 1 << 20},
		{"Lazy", "lazy_refcounts=on,cluster_size=4K", 512 << 10},
	} {
		t.Run(v.name, func(t *testing.T) {
			formattest.PowerCut(t, formattest.PowerCutConfig{
				Size: v.size,
				Create: func(path string, size int64) error {
					out, err := exec.Command("qemu-img", "create", "-q", "-f", "qcow2", "-o", v.options, path, strconv.FormatInt(size, 10)).CombinedOutput()
					if err != nil {
						return fmt.Errorf("qemu-img create: %w: %s", err, out)
					}
					return nil
				},
				Open:       openCut,
				Check:      leaksOnly,
				CheckClean: closed,
			})
		})
	}
}

func openCut(path string, readOnly bool, wrap func(aio.Storage) aio.Storage) (formats.Image, error) {
	f, err := aio.OpenFile(path, aio.FileOptions{ReadOnly: readOnly})
	if err != nil {
		return nil, err
	}
	var storage aio.Storage = f
	if wrap != nil {
		storage = wrap(f)
	}
	im, err := qcow2.New(storage, qcow2.Options{Path: path, ReadOnly: readOnly})
	if err != nil {
		return nil, err
	}
	return im, nil
}
