package codec_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"

	"platter/formats/qcow2/codec"
	"platter/formats/qcow2/layout"
)

var types = []layout.CompressionType{layout.Zlib, layout.Zstd}

// A filler fills a cluster with data of some kind.
type filler struct {
	name string
	fill func(b []byte, rng *rand.Rand)
	pack bool // gets smaller
}

var fillers = []filler{
	{"zeroes", func(b []byte, _ *rand.Rand) { clear(b) }, true},
	{"text", func(b []byte, rng *rand.Rand) {
		words := strings.Fields("a cluster is the unit in which all allocations are done both for actual guest data and for image metadata")
		var s []byte
		for len(s) < len(b) {
			s = append(append(s, words[rng.IntN(len(words))]...), ' ')
		}
		copy(b, s)
	}, true},
	{"half random, half zero", func(b []byte, rng *rand.Rand) { random(b[:len(b)/2], rng); clear(b[len(b)/2:]) }, true},
	{"numbers", func(b []byte, rng *rand.Rand) {
		for i := range b {
			b[i] = 0
			if i%8 == 7 {
				b[i] = byte(rng.IntN(100))
			}
		}
	}, true},
	{"random", random, false},
	{"digits", func(b []byte, rng *rand.Rand) {
		for i := range b {
			b[i] = "0123456789abcdef"[rng.IntN(16)]
		}
	}, true},
}

func random(b []byte, rng *rand.Rand) {
	for len(b) > 0 {
		b = b[copy(b, binary.LittleEndian.AppendUint64(nil, rng.Uint64())):]
	}
}

// seeded returns a source of randomness whose seed is printed when the test fails.
func seeded(t testing.TB) *rand.Rand {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	return rand.New(rand.NewPCG(seed, 0))
}

func cluster(f filler, bits uint, rng *rand.Rand) []byte {
	b := make([]byte, 1<<bits)
	f.fill(b, rng)
	return b
}

func pack(t testing.TB, kind layout.CompressionType, src []byte) []byte {
	t.Helper()
	dst := make([]byte, len(src))
	n, ok, err := codec.Pack(kind, dst, src)
	if !ok || err != nil || n >= len(src) {
		t.Fatalf("pack %d bytes with %s: %d, %v, %v", len(src), kind, n, ok, err)
	}
	return dst[:n]
}

func TestRoundTrip(t *testing.T) {
	rng := seeded(t)
	for _, kind := range types {
		for _, f := range fillers {
			for _, bits := range []uint{9, 10, 12, 14, 16, 21} {
				src := cluster(f, bits, rng)
				dst := make([]byte, len(src))
				n, ok, err := codec.Pack(kind, dst, src)
				if err != nil || ok != f.pack {
					t.Errorf("%s, %s, %d bytes: packed %v, %v", kind, f.name, len(src), ok, err)
				}
				if !ok {
					continue
				}
				got := make([]byte, len(src))
				random(got, rng)
				trailing := bytes.Repeat([]byte{0x28, 0xb5, 0x2f, 0xfd, 0xff}, 100)
				if err := codec.Unpack(kind, got, append(dst[:n:n], trailing...)); err != nil || !bytes.Equal(got, src) {
					t.Errorf("%s, %s, %d bytes: unpacked the same: %v, %v", kind, f.name, len(src), bytes.Equal(got, src), err)
				}
			}
		}
	}
}

// TestTrailingBytesAreIgnored: another compressed cluster may begin in the sector
// where one ends.
func TestTrailingBytesAreIgnored(t *testing.T) {
	rng := seeded(t)
	for _, kind := range types {
		src := cluster(fillers[1], 16, rng)
		packed := pack(t, kind, src)
		for name, trailing := range map[string][]byte{
			"none": nil, "one": {0}, "zeroes": make([]byte, 511), "ones": bytes.Repeat([]byte{0xff}, 511),
			"another cluster": pack(t, kind, cluster(fillers[2], 16, rng)), "the start of one": packed[:100],
		} {
			got := make([]byte, len(src))
			if err := codec.Unpack(kind, got, append(packed[:len(packed):len(packed)], trailing...)); err != nil || !bytes.Equal(got, src) {
				t.Errorf("%s, %s: %v", kind, name, err)
			}
		}
	}
}

// TestPackDigits: what has no repeats is still packed into the bits it takes.
func TestPackDigits(t *testing.T) {
	src := cluster(fillers[5], 16, seeded(t))
	for _, kind := range types {
		if n := len(pack(t, kind, src)); n > len(src)*52/100 {
			t.Errorf("%s: %d bytes of hexadecimal digits take %d", kind, len(src), n)
		}
	}
}

func TestPackGivesUp(t *testing.T) {
	rng := seeded(t)
	for _, kind := range types {
		src := cluster(fillers[1], 16, rng)
		n := len(pack(t, kind, src))
		for _, c := range []struct {
			name string
			dst  int
			src  []byte
			ok   bool
		}{
			{"just enough room", n, src, true},
			{"a byte less", n - 1, src, false},
			{"no room", 0, src, false},
			{"nothing", 512, nil, false},
			{"one byte", 512, []byte{7}, false},
			{"random, ample room", 1 << 17, cluster(fillers[4], 16, rng), false},
			{"random, no room", 100, cluster(fillers[4], 16, rng), false},
		} {
			dst := make([]byte, c.dst)
			got, ok, err := codec.Pack(kind, dst, c.src)
			if ok != c.ok || err != nil || ok && got != n || !ok && got != 0 {
				t.Errorf("%s, %s: got %d, %v, %v", kind, c.name, got, ok, err)
			}
			// It works after giving up.
			if again := pack(t, kind, src); len(again) != n {
				t.Errorf("%s, after %s: %d bytes, %d before", kind, c.name, len(again), n)
			} else if err := codec.Unpack(kind, make([]byte, len(src)), again); err != nil {
				t.Errorf("%s, after %s: %v", kind, c.name, err)
			}
		}
	}
}

// TestPackedIsSmaller: data that hardly gets smaller is packed only if it does.
func TestPackedIsSmaller(t *testing.T) {
	rng := seeded(t)
	for _, kind := range types {
		src := make([]byte, 600)
		random(src[:500], rng)
		gaveUp, packed := 0, 0
		for n := 500; n <= len(src); n++ {
			switch got, ok, err := codec.Pack(kind, make([]byte, 1024), src[:n]); {
			case err != nil:
				t.Fatal(err)
			case !ok:
				gaveUp++
			case got >= n:
				t.Errorf("%s: %d bytes were packed into %d", kind, n, got)
			default:
				packed++
			}
		}
		if gaveUp == 0 || packed == 0 {
			t.Errorf("%s: packed %d, gave up on %d", kind, packed, gaveUp)
		}
	}
}

// TestUnpackWritesNotBeyondTheCluster: the memory behind it may be another's.
func TestUnpackWritesNotBeyondTheCluster(t *testing.T) {
	rng := seeded(t)
	for _, kind := range types {
		for _, f := range fillers[:4] {
			packed := pack(t, kind, cluster(f, 12, rng))
			room := bytes.Repeat([]byte{0xa5}, 1<<13)
			if err := codec.Unpack(kind, room[:1<<12-10], packed); !errors.Is(err, codec.ErrCorrupt) {
				t.Errorf("%s, %s: %v", kind, f.name, err)
			}
			if !bytes.Equal(room[1<<12-10:], bytes.Repeat([]byte{0xa5}, 1<<12+10)) {
				t.Errorf("%s, %s: wrote beyond the cluster", kind, f.name)
			}
		}
	}
}

func TestPackWritesNotBeyondItsRoom(t *testing.T) {
	rng := seeded(t)
	for _, kind := range types {
		for _, f := range fillers {
			src := cluster(f, 12, rng)
			room := bytes.Repeat([]byte{0xa5}, 2*len(src))
			if _, _, err := codec.Pack(kind, room[:300], src); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(room[300:], bytes.Repeat([]byte{0xa5}, len(room)-300)) {
				t.Errorf("%s, %s: wrote beyond the room", kind, f.name)
			}
		}
	}
}

func TestUnknownTypesAreRefused(t *testing.T) {
	for _, kind := range []layout.CompressionType{2, 255} {
		if err := codec.Unpack(kind, make([]byte, 512), make([]byte, 512)); !errors.Is(err, layout.ErrUnsupported) || errors.Is(err, codec.ErrCorrupt) {
			t.Errorf("unpack %s: %v", kind, err)
		}
		if n, ok, err := codec.Pack(kind, make([]byte, 512), make([]byte, 512)); n != 0 || ok || !errors.Is(err, layout.ErrUnsupported) {
			t.Errorf("pack %s: %d, %v, %v", kind, n, ok, err)
		}
	}
}

// TestConcurrentUse runs all of it at once, under the race detector.
func TestConcurrentUse(t *testing.T) {
	rng := seeded(t)
	var wg sync.WaitGroup
	for g := range 8 {
		rng := rand.New(rand.NewPCG(rng.Uint64(), 0))
		wg.Go(func() {
			for i := range 20 {
				kind, bits := types[(g+i)%2], uint(9+(g+i)%8)
				src := cluster(fillers[i%4], bits, rng)
				dst, got := make([]byte, len(src)), make([]byte, len(src))
				n, ok, err := codec.Pack(kind, dst, src)
				if !ok || err != nil {
					t.Errorf("pack: %v, %v", ok, err)
					return
				}
				if err := codec.Unpack(kind, got, dst[:n]); err != nil || !bytes.Equal(got, src) {
					t.Errorf("unpack: %v", err)
				}
				if err := codec.Unpack(kind, got, dst[:n/2]); !errors.Is(err, codec.ErrCorrupt) {
					t.Errorf("unpack half: %v", err)
				}
			}
		})
	}
	wg.Wait()
}

func BenchmarkPack(b *testing.B)   { benchmark(b, true) }
func BenchmarkUnpack(b *testing.B) { benchmark(b, false) }

func benchmark(b *testing.B, packing bool) {
	src := cluster(fillers[1], 16, rand.New(rand.NewPCG(1, 2)))
	dst := make([]byte, len(src))
	for _, kind := range types {
		packed := pack(b, kind, src)
		b.Run(fmt.Sprint(kind), func(b *testing.B) {
			b.SetBytes(int64(len(src)))
			b.ReportAllocs()
			for b.Loop() {
				var err error
				if packing {
					_, _, err = codec.Pack(kind, dst, src)
				} else {
					err = codec.Unpack(kind, dst, packed)
				}
				if err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
