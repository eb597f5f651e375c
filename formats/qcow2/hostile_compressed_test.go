package qcow2_test

import (
	"bytes"
	"compress/flate"
	"encoding/binary"
	"errors"
	"fmt"
	"testing"

	"golang.org/x/sys/unix"

	"platter/formats/qcow2"
	"platter/formats/qcow2/layout"
)

// bomb is deflate data for far more than a cluster, in few bytes.
func bomb() []byte {
	var b bytes.Buffer
	w, err := flate.NewWriter(&b, 9)
	if err != nil {
		panic(err)
	}
	if _, err := w.Write(make([]byte, 6<<20)); err != nil {
		panic(err)
	}
	if err := w.Close(); err != nil {
		panic(err)
	}
	return b.Bytes()
}

// frame is a zstd frame that says of itself to hold so many bytes, and has blocks
// of 128 KiB of one byte each.
func frame(size uint64, blocks int) []byte {
	b := []byte{0x28, 0xb5, 0x2f, 0xfd, 0xe0} // a single segment, and 8 bytes of size
	b = binary.LittleEndian.AppendUint64(b, size)
	for i := range blocks {
		header := uint32(128<<10<<3 | 1<<1)
		if i == blocks-1 {
			header |= 1
		}
		b = append(b, byte(header), byte(header>>8), byte(header>>16), 'x')
	}
	return b
}

// window is a zstd frame with a window of so many bytes, a power of two.
func window(bits int) []byte {
	return []byte{0x28, 0xb5, 0x2f, 0xfd, 0x00, byte(bits-10) << 3, 0x01 | 0x02 | 0x80, 0x00, 0x01, 'x'}
}

// TestWrongCompressedData: what can't be unpacked can't be read nor changed in
// part. It says nothing of the image's tables, which are right: the image goes on.
func TestWrongCompressedData(t *testing.T) {
	for _, c := range []struct {
		name    string
		options string
		data    []byte
	}{
		{"zlib, garbage", "", bytes.Repeat([]byte{0xff, 0x5a, 0x07}, 3000)},
		{"zlib, zeroes", "", make([]byte, 8192)},
		{"zlib, more than a cluster", "", bomb()},
		{"zlib, less than a cluster", "", []byte{0x4b, 0x04, 0x00}},
		{"zlib, with zlib's header", "", []byte{0x78, 0x9c, 0x4b, 0x04, 0x00}},
		{"zlib, a distance before the start", "", []byte{0x03, 0x12, 0x00, 0x00, 0xff}},
		{"zstd, garbage", ",compression_type=zstd", bytes.Repeat([]byte{0xff, 0x5a, 0x07}, 3000)},
		{"zstd, zeroes", ",compression_type=zstd", make([]byte, 8192)},
		{"zstd, more than a cluster", ",compression_type=zstd", frame(8*128<<10, 8)},
		{"zstd, says of itself to hold 1 TiB", ",compression_type=zstd", frame(1<<40, 1)},
		{"zstd, a window of 1 GiB", ",compression_type=zstd", window(30)},
		{"zstd, deflate data", ",compression_type=zstd", []byte{0x4b, 0x04, 0x00}},
		{"zlib, a zstd frame", "", frame(4096, 1)},
	} {
		t.Run(c.name, func(t *testing.T) {
			v := newVictim(t, "cluster_size=4K"+c.options, 512<<10, "compressed")
			// It comes to stand behind everything else, as long as it may be.
			host := v.end()
			v.data = append(v.data, make([]byte, 8192)...)
			n := copy(v.data[host:], c.data)
			word, ok := v.g.CompressedEntry(host, int64(n))
			if !ok {
				t.Fatal("no such entry")
			}
			v.set(v.l2(bad), word)
			for i := range int64(2) {
				v.setRefcount(host+i*4096, 1)
			}
			v.survives(t, 4096)
		})
	}
}

// survives wants the compressed cluster at bad to be unreadable, and everything
// else to be possible.
func (v *victim) survives(t *testing.T, cluster int64) {
	t.Helper()
	for _, readOnly := range []bool{true, false} {
		log := captureLog(t)
		im, m := v.open(qcow2.Options{ReadOnly: readOnly})
		var err error
		allocated := allocates(func() { _, err = im.ReadAt(make([]byte, 100), bad+10) })
		if !errors.Is(err, unix.EIO) {
			t.Errorf("read: %v, want EIO", err)
		}
		if allocated > 24<<20 {
			t.Errorf("unpacking took %d MiB", allocated>>20)
		}
		log.says(t, "compressed cluster can't be read", "image=image", fmt.Sprintf(`"guest offset"=%d`, bad+10))
		v.reads(t, im, 0, bad+cluster, 480<<10)
		if !readOnly {
			for what, err := range map[string]error{
				"write":        second(im.WriteAt([]byte{1}, bad)),
				"zero a part":  im.Zero(bad+100, 100),
				"write of two": second(im.WriteAt(make([]byte, cluster), bad-100)),
			} {
				if !errors.Is(err, unix.EIO) {
					t.Errorf("%s: %v, want EIO", what, err)
				}
			}
			want := bytes.Repeat([]byte{9}, int(cluster))
			for what, err := range map[string]error{
				"write of the cluster":                        second(im.WriteAt(want, bad)),
				"write elsewhere":                             second(im.WriteAt([]byte{1}, hole)),
				"write to a compressed cluster that is right": second(im.WriteAt(v.disk[200<<10:][:100], 200<<10)),
				"flush": im.Flush(),
			} {
				if err != nil {
					t.Errorf("%s: %v", what, err)
				}
			}
			got := make([]byte, cluster)
			if _, err := im.ReadAt(got, bad); err != nil {
				t.Error(err)
			}
			sameBytes(t, "the cluster, written anew", got, want)
			v.reads(t, im, 200<<10)
		}
		if err := im.Close(); err != nil {
			t.Error(err)
		}
		if m.content(t)[79]&byte(layout.Corrupt) != 0 {
			t.Error("marked as corrupt")
		}
	}
}

// TestCompressedDataCutOff: an entry has too few sectors, or the file too few
// bytes.
func TestCompressedDataCutOff(t *testing.T) {
	for _, kind := range []string{"zlib", "zstd"} {
		options := "cluster_size=64K,compression_type=" + kind
		t.Run(kind+", too few sectors", func(t *testing.T) {
			v := newVictim(t, options, 512<<10, "compressed")
			at := int64(-1)
			for off := int64(0); off < 512<<10; off += 64 << 10 {
				word := v.word(v.l2(off))
				if host, n := v.g.CompressedRange(word); word != 0 && n > 512 {
					at = off
					// The first sector alone.
					short, ok := v.g.CompressedEntry(host, 1)
					if !ok {
						t.Fatal("no such entry")
					}
					v.set(v.l2(off), short)
					break
				}
			}
			if at < 0 {
				t.Fatal("all clusters are packed into one sector")
			}
			v.cutOff(t, at)
		})
		t.Run(kind+", too few bytes in the file", func(t *testing.T) {
			v := newVictim(t, options, 512<<10, "compressed")
			at, last := int64(-1), int64(0)
			for off := int64(0); off < 512<<10; off += 64 << 10 {
				word := v.word(v.l2(off))
				if host, _ := v.g.CompressedRange(word); word != 0 && host > last {
					at, last = off, host
				}
			}
			v.data = v.data[:last+20]
			v.cutOff(t, at)
		})
	}
}

// cutOff wants the compressed cluster at a guest offset to be unreadable and the
// image to go on.
func (v *victim) cutOff(t *testing.T, at int64) {
	t.Helper()
	for _, readOnly := range []bool{true, false} {
		im, m := v.open(qcow2.Options{ReadOnly: readOnly})
		if _, err := im.ReadAt(make([]byte, 1), at); !errors.Is(err, unix.EIO) {
			t.Errorf("read-only %v: %v, want EIO", readOnly, err)
		}
		v.reads(t, im, (at+64<<10)%(128<<10))
		if !readOnly {
			if _, err := im.WriteAt([]byte{1}, hole); err != nil {
				t.Errorf("write elsewhere: %v", err)
			}
		}
		if err := im.Close(); err != nil {
			t.Error(err)
		}
		if m.content(t)[79]&byte(layout.Corrupt) != 0 {
			t.Error("marked as corrupt")
		}
	}
}
