package codec_test

import (
	"bytes"
	"compress/flate"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"platter/formats/qcow2/codec"
	"platter/formats/qcow2/layout"
	"platter/integration/testenv"
)

// writeFile writes a file into a fresh directory and returns its path.
func writeFile(t *testing.T, name string, b []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, b, 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

// disk is the content of a disk with clusters of all kinds that get smaller.
func disk(bits uint, n int, rng *rand.Rand) []byte {
	var b []byte
	for i := range n {
		b = append(b, cluster(fillers[1+i%3], bits, rng)...)
	}
	return b
}

// TestClustersOfQEMU unpacks what qemu-img convert -c packs.
func TestClustersOfQEMU(t *testing.T) {
	rng := seeded(t)
	for _, kind := range types {
		for _, bits := range []uint{9, 12, 16, 21} {
			t.Run(fmt.Sprintf("%s, %d bytes", kind, 1<<bits), func(t *testing.T) {
				want := disk(bits, 6, rng)
				raw := writeFile(t, "disk.raw", want)
				path := filepath.Join(t.TempDir(), "disk.qcow2")
				testenv.Tool(t, "qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2",
					"-o", fmt.Sprintf("cluster_size=%d,compression_type=%s", 1<<bits, kind), raw, path)
				file, err := os.ReadFile(path)
				if err != nil {
					t.Fatal(err)
				}
				h, err := layout.ReadHeader(bytes.NewReader(file), int64(len(file)))
				if err != nil || h.CompressionType != kind {
					t.Fatalf("header: %+v, %v", h, err)
				}
				g := h.Geometry()
				l2 := layout.EntryOffset(binary.BigEndian.Uint64(file[h.L1Offset:]))
				got := make([]byte, g.ClusterSize())
				for i := range len(want) >> bits {
					word := binary.BigEndian.Uint64(file[l2+int64(8*i):])
					if g.Kind(word) != layout.Compressed {
						t.Fatalf("cluster %d is %v", i, g.Kind(word))
					}
					off, length := g.CompressedRange(word)
					packed := file[off:min(off+length, int64(len(file)))]
					if err := codec.Unpack(kind, got, packed); err != nil || !bytes.Equal(got, want[i<<bits:(i+1)<<bits]) {
						t.Errorf("cluster %d: %v", i, err)
					}
				}
			})
		}
	}
}

// TestQEMUReadsOurClusters builds images whose clusters are all packed here, one
// right behind the other, and has qemu-img check them and compare their content.
func TestQEMUReadsOurClusters(t *testing.T) {
	rng := seeded(t)
	for _, kind := range types {
		for _, bits := range []uint{9, 12, 16, 21} {
			t.Run(fmt.Sprintf("%s, %d bytes", kind, 1<<bits), func(t *testing.T) {
				want := disk(bits, 12, rng)
				path := writeFile(t, "disk.qcow2", packedImage(t, kind, bits, want))
				testenv.Tool(t, "qemu-img", "check", "-q", path)
				testenv.Tool(t, "qemu-img", "compare", "-q", "-f", "qcow2", "-F", "raw", path, writeFile(t, "disk.raw", want))
			})
		}
	}
}

// packedImage is a qcow2 image of up to 64 clusters, each compressed.
func packedImage(t *testing.T, kind layout.CompressionType, bits uint, content []byte) []byte {
	t.Helper()
	const refTable, refBlock, l1, l2, data = 1, 2, 3, 4, 5 // clusters
	h := &layout.Header{
		Version: 3, ClusterBits: uint32(bits), Size: int64(len(content)), L1Entries: 1, L1Offset: l1 << bits,
		RefcountTableOffset: refTable << bits, RefcountTableClusters: 1, RefcountOrder: 4, CompressionType: kind,
	}
	if kind != layout.Zlib {
		h.Incompatible = layout.Compression
	}
	g := h.Geometry()
	file := make([]byte, data<<bits)
	if err := h.Encode(file[:1<<bits]); err != nil {
		t.Fatal(err)
	}
	binary.BigEndian.PutUint64(file[refTable<<bits:], refBlock<<bits)
	binary.BigEndian.PutUint64(file[l1<<bits:], l2<<bits|layout.Copied)
	for i := range len(content) >> bits {
		packed := pack(t, kind, content[i<<bits:(i+1)<<bits])
		word, ok := g.CompressedEntry(int64(len(file)), int64(len(packed)))
		if !ok {
			t.Fatal("no room in the entry")
		}
		binary.BigEndian.PutUint64(file[l2<<bits+8*i:], word)
		file = append(file, packed...)
	}
	file = append(file, make([]byte, -len(file)&(1<<bits-1))...)
	block := file[refBlock<<bits : (refBlock+1)<<bits]
	for i := range data {
		g.SetRefcount(block, i, 1)
	}
	for i := range len(content) >> bits {
		off, length := g.CompressedRange(binary.BigEndian.Uint64(file[l2<<bits+8*i:]))
		for c := off >> bits; c <= (off+length-1)>>bits; c++ {
			g.SetRefcount(block, int(c), g.Refcount(block, int(c))+1)
		}
	}
	return file
}

// inflateByByte inflates each file with a window of 4 KiB. It takes one byte of
// output at a time, so that what is referred to can only be in the window, and
// prints "ok" or what went wrong.
const inflateByByte = `
import sys, zlib
for path in sys.argv[1:]:
    data, z, out, at = open(path, "rb").read(), zlib.decompressobj(-12), bytearray(), 0
    try:
        while not z.eof:
            if not z.unconsumed_tail and at < len(data):
                piece = z.decompress(data[at:at+16], 1)
                at += 16
            else:
                piece = z.decompress(z.unconsumed_tail, 1)
                if not piece and not z.unconsumed_tail and at >= len(data) and not z.eof:
                    raise zlib.error("cut off")
            out += piece
        print("ok" if out == open(path + ".plain", "rb").read() else "other data")
    except zlib.error as e:
        print(e)
`

// TestDeflateNeedsNoMoreThan4KiB: a reader that keeps the last 4 KiB, as zlib with
// 12 bits, can inflate what is packed here.
func TestDeflateNeedsNoMoreThan4KiB(t *testing.T) {
	python := testenv.NeedTool(t, "python3")
	rng := seeded(t)
	dir := t.TempDir()
	var paths, names, want []string
	add := func(name, result string, plain, packed []byte) {
		path := filepath.Join(dir, fmt.Sprint(len(paths)))
		for p, b := range map[string][]byte{path: packed, path + ".plain": plain} {
			if err := os.WriteFile(p, b, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		paths, names, want = append(paths, path), append(names, name), append(want, result)
	}
	// That the script notices: zlib's own window is 32 KiB.
	for period, result := range map[int]string{4096: "ok", 4097: "invalid distance too far back"} {
		var b bytes.Buffer
		w, err := flate.NewWriter(&b, flate.BestCompression)
		if err != nil {
			t.Fatal(err)
		}
		plain := periodic(period, 2*period, rng)
		if _, err := w.Write(plain); err != nil {
			t.Fatal(err)
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		add(fmt.Sprintf("another packer, period %d", period), result, plain, b.Bytes())
	}
	for _, f := range fillers[:4] {
		for _, bits := range []uint{9, 13, 19} { // the last is longer than what the packer keeps
			plain := cluster(f, bits, rng)
			add(fmt.Sprintf("%s, %d bytes", f.name, 1<<bits), "ok", plain, pack(t, layout.Zlib, plain))
		}
	}
	// Data in which everything was there before, at just about the window.
	for _, period := range []int{1, 2, 100, 4000, 4094, 4095, 4096, 4097, 4098, 8192, 30000} {
		plain := append(periodic(period, 1<<16-1<<12, rng), make([]byte, 1<<12)...) // some gets smaller
		add(fmt.Sprintf("period %d", period), "ok", plain, pack(t, layout.Zlib, plain))
	}
	r := testenv.Run(t, 5*time.Minute, python, append([]string{"-c", inflateByByte}, paths...)...)
	got := strings.Split(strings.TrimSpace(r.Stdout), "\n")
	if r.Code != 0 || len(got) != len(want) {
		t.Fatalf("exit code %d, %d results, want %d\n%s", r.Code, len(got), len(want), r.Stderr)
	}
	for i := range want {
		if !strings.Contains(got[i], want[i]) {
			t.Errorf("%s: got %q, want %q", names[i], got[i], want[i])
		}
	}
}

// periodic is n bytes that repeat after period random ones.
func periodic(period, n int, rng *rand.Rand) []byte {
	b := make([]byte, n)
	random(b[:min(period, n)], rng)
	for i := period; i < n; i++ {
		b[i] = b[i-period]
	}
	return b
}

// TestOtherReadersInflateOurClusters: the standard library reads them to their end.
func TestOtherReadersInflateOurClusters(t *testing.T) {
	rng := seeded(t)
	for _, f := range fillers[:4] {
		src := cluster(f, 16, rng)
		got, err := io.ReadAll(flate.NewReader(bytes.NewReader(pack(t, layout.Zlib, src))))
		if err != nil || !bytes.Equal(got, src) {
			t.Errorf("%s: %v", f.name, err)
		}
	}
}
