package layout_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"runtime"
	"strings"
	"testing"

	"platter/formats/qcow2/layout"
)

// newHeader is the header of an image of 1 GiB with clusters of 64 KiB, as
// qemu-img lays one out.
func newHeader(version uint32) *layout.Header {
	return &layout.Header{
		Version: version, ClusterBits: 16, Size: 1 << 30, L1Entries: 2, L1Offset: 3 << 16,
		RefcountTableOffset: 1 << 16, RefcountTableClusters: 1, RefcountOrder: 4,
	}
}

// encode returns the first cluster of an image.
func encode(t testing.TB, h *layout.Header) []byte {
	t.Helper()
	cluster := bytes.Repeat([]byte{0xa5}, 1<<h.ClusterBits)
	if err := h.Encode(cluster); err != nil {
		t.Fatalf("encode: %v", err)
	}
	return cluster
}

func parse(t testing.TB, cluster []byte) *layout.Header {
	t.Helper()
	h, err := layout.ParseHeader(cluster)
	if err != nil {
		t.Fatalf("parse: %v", err)
	}
	return h
}

// patch overwrites bytes of a cluster or table.
type patch struct {
	at   int
	with []byte
}

func be16(v uint16) []byte { return binary.BigEndian.AppendUint16(nil, v) }
func be32(v uint32) []byte { return binary.BigEndian.AppendUint32(nil, v) }
func be64(v uint64) []byte { return binary.BigEndian.AppendUint64(nil, v) }

func patched(b []byte, patches ...patch) []byte {
	b = bytes.Clone(b)
	for _, p := range patches {
		copy(b[p.at:], p.with)
	}
	return b
}

// wrong is an error that is expected: it names a field, what the field holds, and
// the limit.
type wrong struct {
	field string
	value string // as the message shows it
	limit string
	kind  error // nil for ErrInvalid
}

func (w wrong) check(t testing.TB, err error) {
	t.Helper()
	kind := w.kind
	if kind == nil {
		kind = layout.ErrInvalid
	}
	var field *layout.FieldError
	switch {
	case err == nil:
		t.Errorf("accepted, want an error about %s", w.field)
	case !errors.As(err, &field) || !errors.Is(err, kind):
		t.Errorf("got %v (%T), want a FieldError of kind %q", err, err, kind)
	case field.Field != w.field:
		t.Errorf("%v: is about %q, want %q", err, field.Field, w.field)
	case !strings.HasSuffix(err.Error(), fmt.Sprintf("%s is %s, %s", w.field, w.value, field.Want)):
		t.Errorf("%v: doesn't show the value %s", err, w.value)
	case !strings.Contains(field.Want, w.limit):
		t.Errorf("%v: doesn't name the limit %q", err, w.limit)
	}
}

// allocated returns how many bytes f allocates.
func allocated(f func()) uint64 {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	f()
	runtime.ReadMemStats(&after)
	return after.TotalAlloc - before.TotalAlloc
}

// at is a file that holds b at an offset and reads as zeroes before.
type at struct {
	b   []byte
	off int64
}

func (f at) ReadAt(p []byte, off int64) (n int, err error) {
	for ; n < len(p); n++ {
		switch i := off + int64(n) - f.off; {
		case i >= int64(len(f.b)):
			return n, io.EOF
		case i >= 0:
			p[n] = f.b[i]
		default:
			p[n] = 0
		}
	}
	return n, nil
}

// repeated is an endless file in which entry comes again and again from off on,
// as it might in a sparse file that takes little space.
type repeated struct {
	entry []byte
	off   int64
}

func (f repeated) ReadAt(p []byte, off int64) (int, error) {
	for n := 0; n < len(p); {
		n += copy(p[n:], f.entry[(off+int64(n)-f.off)%int64(len(f.entry)):])
	}
	return len(p), nil
}

var errBroken = errors.New("broken disk")

// broken is a file that can't be read from an offset on.
type broken struct {
	io.ReaderAt
	from int64
}

func (f broken) ReadAt(p []byte, off int64) (int, error) {
	if off+int64(len(p)) > f.from {
		return 0, errBroken
	}
	return f.ReaderAt.ReadAt(p, off)
}

func TestFieldErrorShowsTheValueInItsBase(t *testing.T) {
	for want, err := range map[string]*layout.FieldError{
		"l1_size is 7, must be 8":              {Field: "l1_size", Value: uint32(7), Want: "must be 8"},
		"offset is 0x1f, must be 0":            {Field: "offset", Value: layout.Hex(31), Want: "must be 0"},
		`name is "a\x00b", must be better`:     {Field: "name", Value: "a\x00b", Want: "must be better"},
		"extension must not be there":          {Field: "extension", Want: "must not be there"},
		"flags is 0xffffffffffffffff, must be": {Field: "flags", Value: ^layout.Hex(0), Want: "must be"},
	} {
		if got := err.Error(); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}
