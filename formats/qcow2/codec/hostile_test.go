package codec_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"runtime"
	"strings"
	"testing"

	"github.com/klauspost/compress/flate"
	"github.com/klauspost/compress/zstd"

	"platter/formats/qcow2/codec"
	"platter/formats/qcow2/layout"
)

func wantCorrupt(t *testing.T, name string, err error, cause string) {
	t.Helper()
	if !errors.Is(err, codec.ErrCorrupt) || !strings.Contains(err.Error(), cause) {
		t.Errorf("%s: got %v, want %v: …%s…", name, err, codec.ErrCorrupt, cause)
	}
}

func TestTruncatedDataIsRefused(t *testing.T) {
	rng := seeded(t)
	for _, kind := range types {
		for _, f := range fillers[:4] {
			src := cluster(f, 12, rng)
			packed, dst := pack(t, kind, src), make([]byte, len(src))
			for n := range packed {
				err := codec.Unpack(kind, dst, packed[:n:n])
				wantCorrupt(t, f.name, err, io.ErrUnexpectedEOF.Error())
			}
		}
	}
}

// TestDamagedDataIsRefusedOrHarmless flips every bit. Zstd frames have a checksum,
// so that what is unpacked is right; deflate data can turn into other data.
func TestDamagedDataIsRefusedOrHarmless(t *testing.T) {
	rng := seeded(t)
	for _, kind := range types {
		for _, f := range fillers[:4] {
			src := cluster(f, 9, rng)
			packed, dst := pack(t, kind, src), make([]byte, len(src))
			refused := 0
			for bit := range 8 * len(packed) {
				damaged := bytes.Clone(packed)
				damaged[bit/8] ^= 1 << (bit % 8)
				switch err := codec.Unpack(kind, dst, damaged); {
				case err != nil:
					refused++
					wantCorrupt(t, f.name, err, "")
				case kind == layout.Zstd && !bytes.Equal(dst, src):
					t.Errorf("%s, bit %d: other data, and no error", f.name, bit)
				}
			}
			if refused == 0 {
				t.Errorf("%s, %s: no damage was noticed", kind, f.name)
			}
		}
	}
}

// TestDataOfTheWrongLengthIsRefused: exactly one cluster must come out.
func TestDataOfTheWrongLengthIsRefused(t *testing.T) {
	rng := seeded(t)
	for _, kind := range types {
		for _, f := range fillers[:4] {
			src := cluster(f, 16, rng)
			packed := pack(t, kind, src)
			wantCorrupt(t, "twice the cluster", codec.Unpack(kind, make([]byte, len(src)/2), packed), "more than a cluster")
			wantCorrupt(t, "a byte more", codec.Unpack(kind, make([]byte, len(src)-1), packed), "more than a cluster")
			wantCorrupt(t, "a byte less", codec.Unpack(kind, make([]byte, len(src)+1), packed), io.ErrUnexpectedEOF.Error())
			wantCorrupt(t, "half the cluster", codec.Unpack(kind, make([]byte, 2*len(src)), packed), io.ErrUnexpectedEOF.Error())
		}
		wantCorrupt(t, "no data", codec.Unpack(kind, make([]byte, 512), nil), "EOF")
		wantCorrupt(t, "ones", codec.Unpack(kind, make([]byte, 512), bytes.Repeat([]byte{0xff}, 512)), "")
	}
}

// TestEmptyDeflateBlocks: data of endless blocks with nothing in them ends with
// its input.
func TestEmptyDeflateBlocks(t *testing.T) {
	empty := bytes.Repeat([]byte{0, 0, 0, 0xff, 0xff}, 1<<17)
	wantCorrupt(t, "empty blocks", codec.Unpack(layout.Zlib, make([]byte, 512), empty), io.ErrUnexpectedEOF.Error())
}

// frames packs each part into a frame of its own.
func frames(t *testing.T, parts [][]byte, options ...zstd.EOption) []byte {
	t.Helper()
	e, err := zstd.NewWriter(nil, options...)
	if err != nil {
		t.Fatal(err)
	}
	var b []byte
	for _, part := range parts {
		b = e.EncodeAll(part, b)
	}
	return b
}

// skippable is a frame that readers skip.
func skippable(data string) []byte {
	return append(binary.LittleEndian.AppendUint32([]byte{0x5a, 0x2a, 0x4d, 0x18}, uint32(len(data))), data...)
}

func TestFramesOfZstd(t *testing.T) {
	rng := seeded(t)
	src := cluster(fillers[1], 16, rng)
	half := len(src) / 2
	whole := frames(t, [][]byte{src})
	two := frames(t, [][]byte{src[:half], src[half:]})
	stream := func(level zstd.EncoderLevel) []byte { // without the length, as a pipe is packed
		var b bytes.Buffer
		w, err := zstd.NewWriter(&b, zstd.WithEncoderLevel(level))
		if err != nil {
			t.Fatal(err)
		}
		for part := range bytes.Lines(bytes.ReplaceAll(src, []byte(" "), []byte("\n"))) {
			if _, err := w.Write(bytes.ReplaceAll(part, []byte("\n"), []byte(" "))); err != nil {
				t.Fatal(err)
			}
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		return b.Bytes()
	}
	for name, packed := range map[string][]byte{
		"one":                    whole,
		"two":                    two,
		"with an empty one":      frames(t, [][]byte{src[:half], {}, src[half:]}, zstd.WithZeroFrames(true)),
		"after a skippable one":  append(skippable("of some program"), whole...),
		"empty skippable one":    append(skippable(""), whole...),
		"without a checksum":     frames(t, [][]byte{src}, zstd.WithEncoderCRC(false)),
		"best compression":       frames(t, [][]byte{src}, zstd.WithEncoderLevel(zstd.SpeedBestCompression)),
		"window of 8 MiB":        stream(zstd.SpeedDefault),
		"window of 128 MiB":      patchWindow(stream(zstd.SpeedFastest), 17<<3),
		"with trailing skipping": append(bytes.Clone(whole), skippable("ignored")...),
	} {
		got := make([]byte, len(src))
		if err := codec.Unpack(layout.Zstd, got, packed); err != nil || !bytes.Equal(got, src) {
			t.Errorf("%s: the same %v, %v", name, bytes.Equal(got, src), err)
		}
	}
	// The header with the length in 8 bytes rather than 2.
	unlimited := append([]byte{0x28, 0xb5, 0x2f, 0xfd, whole[4] | 0xc0, 0, 0, 0, 0, 0, 0, 0, 0x40}, whole[7:]...)
	for name, c := range map[string]struct {
		packed []byte
		cause  string
	}{
		"second one too long":                  {frames(t, [][]byte{src[:half], src}), "more than a cluster"},
		"second one without a length too long": {append(frames(t, [][]byte{src[:half]}), stream(zstd.SpeedDefault)...), "more than a cluster"},
		"one half":                             {frames(t, [][]byte{src[:half]}), "32768 of 65536 bytes"},
		"one half and garbage":                 {append(frames(t, [][]byte{src[:half]}), "garbage!"...), "invalid input"},
		"nothing but skippable":                {skippable("x"), "0 of 65536 bytes"},
		"skippable beyond the end":             {append([]byte{0x50, 0x2a, 0x4d, 0x18}, 0xff, 0xff, 0xff, 0xff), "EOF"},
		"window of 256 MiB":                    {patchWindow(stream(zstd.SpeedFastest), 18<<3), "window size exceeded"},
		"window of 3 TiB":                      {patchWindow(stream(zstd.SpeedFastest), 31<<3|7), "window size exceeded"},
		"length of 4 EiB":                      {unlimited, "more than a cluster"},
		"dictionary":                           {frames(t, [][]byte{src}, zstd.WithEncoderDictRaw(7, src[:1000])), "dictionary"},
		"reserved block":                       {[]byte{0x28, 0xb5, 0x2f, 0xfd, 0, 0x58, 7, 0, 0}, "reserved"},
		"reserved bit":                         {[]byte{0x28, 0xb5, 0x2f, 0xfd, 8, 0x58, 1, 0, 0}, "reserved"},
		"endless RLE blocks":                   {rleBlocks(1 << 16), "more than a cluster"},
		"another format":                       {[]byte("\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03"), "invalid input"},
	} {
		wantCorrupt(t, name, codec.Unpack(layout.Zstd, make([]byte, len(src)), c.packed), c.cause)
	}
}

// patchWindow changes the window of a frame that has one.
func patchWindow(frame []byte, descriptor byte) []byte {
	frame = bytes.Clone(frame)
	frame[5] = descriptor
	return frame
}

// rleBlocks is a frame of n blocks that each stand for 128 KiB.
func rleBlocks(n int) []byte {
	b := []byte{0x28, 0xb5, 0x2f, 0xfd, 0, 0x58}
	for range n {
		b = append(b, 0x02, 0x00, 0x10, 'x')
	}
	return append(b, 1, 0, 0)
}

// maxAllocated is what Unpack promises to stay below.
const maxAllocated = 8 << 20

// allocated returns how many bytes f allocates.
func allocated(f func()) uint64 {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	f()
	runtime.ReadMemStats(&after)
	return after.TotalAlloc - before.TotalAlloc
}

// TestUnpackMemoryIsBounded unpacks bombs into the largest cluster.
func TestUnpackMemoryIsBounded(t *testing.T) {
	dst := make([]byte, 1<<layout.MaxClusterBits)
	var deflated bytes.Buffer
	w, err := flate.NewWriter(&deflated, 9)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(make([]byte, 8<<20)); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	rng := rand.New(rand.NewPCG(1, 2))
	tight := make([]byte, len(dst)) // many sequences
	for i := range tight {
		tight[i] = "ab"[rng.IntN(2)]
	}
	for name, c := range map[string]struct {
		kind   layout.CompressionType
		packed []byte
	}{
		"deflate bomb":      {layout.Zlib, deflated.Bytes()},
		"zstd bomb":         {layout.Zstd, frames(t, [][]byte{make([]byte, 8<<20)})},
		"RLE bomb":          {layout.Zstd, rleBlocks(1 << 18)},
		"a byte too long":   {layout.Zstd, patchLength(frames(t, [][]byte{append(bytes.Clone(tight), 'a')}))},
		"many frames":       {layout.Zstd, bytes.Repeat(frames(t, [][]byte{{}}, zstd.WithZeroFrames(true)), 1000)},
		"largest cluster":   {layout.Zstd, frames(t, [][]byte{tight})},
		"largest, deflated": {layout.Zlib, pack(t, layout.Zlib, tight)},
	} {
		runtime.GC() // twice, so that the pools are empty
		runtime.GC()
		if n := allocated(func() { err = codec.Unpack(c.kind, dst, c.packed) }); n > maxAllocated {
			t.Errorf("%s: %d bytes were allocated", name, n)
		}
		if fits := strings.HasPrefix(name, "largest"); (err == nil) != fits {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// patchLength has a frame of 2 MiB and a byte claim to be of 2 MiB.
func patchLength(frame []byte) []byte {
	frame = bytes.Clone(frame)
	binary.LittleEndian.PutUint32(frame[5:], 2<<20)
	return frame
}

// FuzzUnpack unpacks hostile data. What is unpacked can be packed again.
func FuzzUnpack(f *testing.F) {
	rng := rand.New(rand.NewPCG(3, 4))
	for i, kind := range types {
		for _, filler := range fillers[:4] {
			f.Add(uint8(i), pack(f, kind, cluster(filler, 10, rng)))
		}
	}
	f.Add(uint8(1), rleBlocks(4))
	f.Add(uint8(1), append(skippable("x"), rleBlocks(1)...))
	f.Fuzz(func(t *testing.T, how uint8, packed []byte) {
		kind, bits := layout.CompressionType(how%2), 9+uint(how/2)%13
		dst := bytes.Repeat([]byte{0xa5}, 1<<bits+100)
		room := dst[:1<<bits]
		var err error
		if n := allocated(func() { err = codec.Unpack(kind, room, packed) }); n > maxAllocated {
			t.Errorf("%d bytes were allocated", n)
		}
		if !bytes.Equal(dst[1<<bits:], bytes.Repeat([]byte{0xa5}, 100)) {
			t.Fatal("wrote beyond the cluster")
		}
		if err != nil {
			if !errors.Is(err, codec.ErrCorrupt) {
				t.Fatal(err)
			}
			return
		}
		again, got := make([]byte, len(room)), make([]byte, len(room))
		n, ok, err := codec.Pack(kind, again, room)
		if err != nil {
			t.Fatal(err)
		}
		if !ok {
			return
		}
		if err := codec.Unpack(kind, got, again[:n]); err != nil || !bytes.Equal(got, room) {
			t.Fatalf("packed again it became something else: %v", err)
		}
	})
}
