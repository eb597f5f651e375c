package nbd

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"math"
	"runtime/metrics"
	"testing"

	"platter/export/nbd/nbdtest"
)

// maxAllocation is what one negotiation may allocate, whatever the client says:
// its buffers, and up to an error reply per option.
const maxAllocation = 256 << 10

// heapAllocated is the number of bytes that were ever allocated.
func heapAllocated() uint64 {
	sample := []metrics.Sample{{Name: "/gc/heap/allocs:bytes"}}
	metrics.Read(sample)
	return sample[0].Value.Uint64()
}

// allocated is what a negotiation allocates. Others in the process allocate too,
// so what looks like too much is measured again.
func allocated(input []byte, lim limits) uint64 {
	least := uint64(math.MaxUint64)
	for range 10 {
		before := heapAllocated()
		_, _ = negotiate(script{bytes.NewReader(input), io.Discard}, testShelf, lim)
		if least = min(least, heapAllocated()-before); least <= maxAllocation {
			break
		}
	}
	return least
}

// Lengths that are claimed and not backed by data cost no memory.
func TestMemoryIsBounded(t *testing.T) {
	for name, claim := range map[string][]byte{
		"go":          {0, 0, 0, 7, 0xff, 0xff, 0xff, 0xff},
		"go, skipped": {0, 0, 0, 7, 0, 1, 0, 0},
		"export name": {0, 0, 0, 1, 0xff, 0xff, 0xff, 0xff},
		"list":        {0, 0, 0, 3, 0, 1, 0, 0},
		"unknown":     {0, 0, 0, 99, 0, 1, 0, 0},
	} {
		t.Run(name, func(t *testing.T) {
			in := binary.BigEndian.AppendUint32(nil, nbdtest.FixedNewstyle)
			in = binary.BigEndian.AppendUint64(in, nbdtest.MagicOption)
			in = append(in, claim...)
			const rounds = 100
			before := heapAllocated()
			for range rounds {
				if _, err := negotiate(script{bytes.NewReader(in), io.Discard}, testShelf, defaultLimits); err == nil {
					t.Fatal("a cut negotiation succeeded")
				}
			}
			if got := (heapAllocated() - before) / rounds; got > 2*optionBuffer {
				t.Errorf("%d bytes allocated, want at most %d", got, 2*optionBuffer)
			}
		})
	}
}

// FuzzNegotiate lets a client say anything. The server must come to an end,
// take only whole options, answer in well-formed replies, and stay small.
func FuzzNegotiate(f *testing.F) {
	seed := func(flags uint32, options ...[]byte) {
		f.Add(append(binary.BigEndian.AppendUint32(nil, flags), bytes.Join(options, nil)...))
	}
	seed(3, frame(nbdtest.OptGo, nbdtest.InfoData("demo", 0, 1, 2, 3)), []byte("requests"))
	seed(1, frame(nbdtest.OptInfo, nbdtest.InfoData("größe", 1)), frame(nbdtest.OptGo, nbdtest.InfoData("other")))
	seed(0, frame(nbdtest.OptExportName, []byte("demo")))
	seed(3, frame(nbdtest.OptExportName, []byte("\x00\xff")))
	seed(1, frame(nbdtest.OptList, nil), frame(nbdtest.OptList, []byte("x")), frame(nbdtest.OptAbort, []byte("bye")))
	seed(1, frame(nbdtest.OptStartTLS, nil), frame(nbdtest.OptStructuredReply, nil), frame(99, make([]byte, 100)))
	seed(1, frame(nbdtest.OptGo, []byte{255, 255, 255, 255, 0, 0}), frame(nbdtest.OptGo, nil))
	seed(0xffffffff)
	f.Add([]byte{})

	f.Fuzz(func(t *testing.T, input []byte) {
		lim := limits{options: 64, skip: 1 << 10}
		in, out := bytes.NewReader(input), new(bytes.Buffer)
		res, err := negotiate(script{in, out}, testShelf, lim)
		if got := allocated(input, lim); got > maxAllocation {
			t.Errorf("%d bytes allocated", got)
		}
		taken := input[:len(input)-in.Len()]
		if err != nil {
			var typed *Error
			if !errors.As(err, &typed) {
				t.Fatalf("error %v is no *Error", err)
			}
		} else if last, ok := lastOption(taken); !ok {
			t.Errorf("negotiation ended within an option")
		} else if last != nbdtest.OptGo && last != nbdtest.OptExportName {
			t.Errorf("export %q chosen by option %d", res.offer.Name, last)
		} else if last == nbdtest.OptExportName {
			return // its reply has no header
		}
		checkReplies(t, out.Bytes())
	})
}

// lastOption walks through what a client sent and returns its last option,
// unless the input ends within one.
func lastOption(b []byte) (id uint32, ok bool) {
	for b = b[clientFlagsSize:]; len(b) >= optionSize; {
		id = binary.BigEndian.Uint32(b[8:])
		length := uint64(binary.BigEndian.Uint32(b[12:]))
		if b = b[optionSize:]; length > uint64(len(b)) {
			return 0, false
		}
		b = b[length:]
	}
	return id, len(b) == 0
}

// checkReplies takes what a server sent apart.
func checkReplies(t *testing.T, b []byte) {
	t.Helper()
	if len(b) < greetingSize {
		t.Fatalf("greeting of %d bytes", len(b))
	}
	for b = b[greetingSize:]; len(b) > 0; {
		if len(b) < replySize || binary.BigEndian.Uint64(b) != nbdtest.MagicReply {
			t.Fatalf("reply starts with % x", b[:min(len(b), replySize)])
		}
		length := binary.BigEndian.Uint32(b[16:])
		if b = b[replySize:]; uint64(length) > uint64(len(b)) || length > 2*maxString+4 {
			t.Fatalf("reply of %d bytes, %d are there", length, len(b))
		}
		b = b[length:]
	}
}
