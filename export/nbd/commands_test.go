package nbd

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"testing"
	"time"

	"github.com/pojntfx/go-nbd/pkg/backend"
	"github.com/pojntfx/go-nbd/pkg/server"
	"golang.org/x/sys/unix"

	"platter/aio"
	"platter/export"
	"platter/export/nbd/nbdtest"
	"platter/formats"
	"platter/formats/formattest"
	"platter/formats/raw"
	"platter/integration/testenv"
)

// Every command with every flag that it may have, on real files.
func TestCommands(t *testing.T) {
	eachEngine(t, func(t *testing.T, engine aio.Engine) {
		for name, dir := range map[string]func(testing.TB) string{"disk": testenv.DiskDir, "tmpfs": testenv.TmpfsDir} {
			t.Run(name, func(t *testing.T) {
				const size = 4 * mib
				r := newRig(t, rawImage(t, dir(t), size), rigOptions{engine: engine})
				c := r.dial()
				if c.Size != size || c.MinBlock != 1 || c.MaxBlock != 32*mib {
					t.Errorf("size %d, blocks %d to %d", c.Size, c.MinBlock, c.MaxBlock)
				}
				model := make([]byte, size)
				check := func(what string, err error) {
					t.Helper()
					got := make([]byte, size)
					if err != nil {
						t.Fatalf("%s: %v", what, err)
					}
					must(t, c.Read(0, got))
					if !bytes.Equal(got, model) {
						t.Fatalf("%s: the bytes are wrong", what)
					}
				}
				for i, flags := range []uint16{0, nbdtest.FUA} {
					data := pattern(100_000, uint64(i))
					copy(model[12345*(i+1):], data)
					check("write", c.Write(int64(12345*(i+1)), data, flags))
				}
				for i, flags := range []uint16{0, nbdtest.FUA, nbdtest.NoHole, nbdtest.FUA | nbdtest.NoHole} {
					clear(model[20_000*(i+1):][:9000])
					check("write zeroes", c.WriteZeroes(int64(20_000*(i+1)), 9000, flags))
				}
				check("flush", c.Flush())
				check("cache", c.Cache(1000, 1_000_000))
				check("trim of nothing", c.Trim(1000, 0))
				check("trim", c.Trim(3*mib, mib)) // was a hole
				check("trim with FUA", c.Trim(3*mib, mib, nbdtest.FUA))
				must(t, c.Send(nbdtest.CmdRead, nbdtest.FUA, 9, 12345, 10, nil))
				if _, errno, data, err := c.Recv(); err != nil || errno != 0 || !bytes.Equal(data, model[12345:12355]) {
					t.Errorf("read with FUA: %v, %v, % x", errno, err, data)
				}
				must(t, c.Send(nbdtest.CmdFlush, nbdtest.FUA, 10, 0, 0, nil))
				if _, errno, _, err := c.Recv(); err != nil || errno != 0 {
					t.Errorf("flush with FUA: %v, %v", errno, err)
				}
				must(t, c.Disc())
			})
		}
	})
}

// Bad requests get their error, and what follows them is understood.
func TestRefusedRequests(t *testing.T) {
	const size = mib
	type refusal struct {
		cmd, flags uint16
		off        uint64
		length     uint32
		want       nbdtest.Errno
	}
	cases := []refusal{
		{nbdtest.CmdRead, 0, size, 1, nbdtest.EINVAL},
		{nbdtest.CmdRead, 0, size - 1, 2, nbdtest.EINVAL},
		{nbdtest.CmdRead, 0, 1 << 63, 2, nbdtest.EINVAL},
		{nbdtest.CmdRead, 0, 1<<64 - 1, 2, nbdtest.EINVAL},
		{nbdtest.CmdRead, 0, 0, 64*mib + 1, nbdtest.EINVAL},
		{nbdtest.CmdRead, 0, 0, 1<<32 - 1, nbdtest.EINVAL},
		{nbdtest.CmdRead, nbdtest.DF, 0, 1, nbdtest.EINVAL},
		{nbdtest.CmdRead, 1 << 15, 0, 1, nbdtest.EINVAL},
		{nbdtest.CmdWrite, 0, size, 1, nbdtest.ENOSPC},
		{nbdtest.CmdWrite, 0, size - 1, 2, nbdtest.ENOSPC},
		{nbdtest.CmdWrite, nbdtest.FUA, 1<<64 - 1, 300_000, nbdtest.ENOSPC},
		{nbdtest.CmdWrite, nbdtest.NoHole, 0, 4096, nbdtest.EINVAL},
		{nbdtest.CmdWrite, 1 << 14, 0, 700_000, nbdtest.EINVAL},
		{nbdtest.CmdWriteZeroes, 0, size - 1, 2, nbdtest.ENOSPC},
		{nbdtest.CmdWriteZeroes, nbdtest.FastZero, 0, 2, nbdtest.EINVAL},
		{nbdtest.CmdTrim, 0, size - 1, 2, nbdtest.EINVAL},
		{nbdtest.CmdTrim, nbdtest.NoHole, 0, 2, nbdtest.EINVAL},
		{nbdtest.CmdCache, 0, size, 1, nbdtest.EINVAL},
		{nbdtest.CmdFlush, nbdtest.NoHole, 0, 0, nbdtest.EINVAL},
		{nbdtest.CmdBlockStatus, 0, 0, 512, nbdtest.EINVAL},
		{8, 0, 0, 0, nbdtest.EINVAL},
		{0xffff, 0xffff, 1<<64 - 1, 1<<32 - 1, nbdtest.EINVAL},
	}
	image := newFake(t, size)
	original := pattern(size, 1)
	copy(image.data, original)
	r := newRig(t, image, rigOptions{})
	c := r.dial()
	// Each with a good read behind it, all in one piece.
	var stream []byte
	for i, x := range cases {
		var payload []byte
		if x.cmd == nbdtest.CmdWrite {
			payload = bytes.Repeat([]byte{0xee}, int(x.length))
		}
		stream = append(stream, wire(x.cmd, x.flags, uint64(1000+i), x.off, x.length, payload)...)
		stream = append(stream, wire(nbdtest.CmdRead, 0, 1<<63|uint64(i), uint64(i), 1, nil)...)
	}
	go func() { _, _ = c.Conn.Write(stream) }()
	for range 2 * len(cases) {
		// Recv doesn't know of the reads: their byte comes behind the header.
		cookie, errno, _, err := c.Recv()
		must(t, err)
		if cookie>>63 == 0 {
			if x := cases[cookie-1000]; errno != x.want {
				t.Errorf("%+v: %v", x, errno)
			}
			continue
		}
		b := make([]byte, 1)
		_, err = c.Conn.Read(b)
		must(t, err)
		if i := cookie &^ (1 << 63); errno != 0 || b[0] != original[i] {
			t.Errorf("read %d: %v, %x", i, errno, b)
		}
	}
	if !image.holds(0, original) {
		t.Error("a refused write has changed the image")
	}
	must(t, c.Disc())
}

func TestReadOnlyExport(t *testing.T) {
	image := newFake(t, mib)
	r := newRig(t, nil, rigOptions{exports: []*export.Export{export.New(image, export.Options{ReadOnly: true})}})
	c := r.dial()
	if c.Flags&nbdtest.ReadOnly == 0 || c.Flags&(nbdtest.SendFUA|nbdtest.SendTrim|nbdtest.SendWriteZeroes) != 0 {
		t.Errorf("flags %#x", c.Flags)
	}
	for what, err := range map[string]error{
		"write": c.Write(0, make([]byte, 300_000)), "trim": c.Trim(0, 4096), "zeroes": c.WriteZeroes(0, 4096), "beyond": c.Write(mib, []byte{1}),
	} {
		if !errors.Is(err, nbdtest.EPERM) {
			t.Errorf("%s: %v", what, err)
		}
	}
	must(t, c.Read(0, make([]byte, 4096)))
	must(t, c.Flush())
	must(t, c.Disc())
}

func TestBlockSize(t *testing.T) {
	image := newFake(t, mib)
	image.block = 512
	c := newRig(t, image, rigOptions{}).dial()
	if c.MinBlock != 512 {
		t.Errorf("the smallest block is %d", c.MinBlock)
	}
	must(t, c.Write(512, make([]byte, 1024)))
	if err := c.Write(511, make([]byte, 512)); !errors.Is(err, nbdtest.EINVAL) {
		t.Errorf("offset: %v", err)
	}
	if err := c.Read(512, make([]byte, 100)); !errors.Is(err, nbdtest.EINVAL) {
		t.Errorf("length: %v", err)
	}
}

// An image's errors reach the client as the protocol has them.
func TestImageErrors(t *testing.T) {
	image := newFake(t, mib)
	var errno unix.Errno
	image.fail = func(*aio.Request) unix.Errno { return errno }
	c := newRig(t, image, rigOptions{}).dial()
	for e, want := range map[unix.Errno]nbdtest.Errno{
		unix.EIO: nbdtest.EIO, unix.ENOSPC: nbdtest.ENOSPC, unix.EDQUOT: nbdtest.ENOSPC, unix.EFBIG: nbdtest.ENOSPC, unix.EPERM: nbdtest.EPERM,
		unix.EROFS: nbdtest.EPERM, unix.ENOMEM: nbdtest.ENOMEM, unix.EBADF: nbdtest.EIO, unix.EOVERFLOW: nbdtest.EINVAL, unix.EOPNOTSUPP: nbdtest.EINVAL,
	} {
		image.mu.Lock()
		errno = e
		image.mu.Unlock()
		for what, err := range map[string]error{
			"read": c.Read(0, make([]byte, 4096)), "write": c.Write(0, make([]byte, 4096)), "flush": c.Flush(), "trim": c.Trim(0, 10),
			"zeroes": c.WriteZeroes(0, 10), "cache": c.Cache(0, 10),
		} {
			if !errors.Is(err, want) {
				t.Errorf("%s with %v: %v", what, e, err)
			}
		}
	}
}

// When a merged request fails, only those members fail that fail by themselves.
func TestCompositeFailure(t *testing.T) {
	file, err := aio.OpenFile(diskFile(t, mib), aio.FileOptions{})
	must(t, err)
	faulty := formattest.NewFaulty(file)
	image, err := raw.New(faulty, raw.Options{})
	must(t, err)
	defer image.Close()
	r := newRig(t, image, rigOptions{})
	t.Cleanup(func() { _ = r.shutdown(time.Second) }) // before the image is closed
	c := r.dial()
	const bad = 5 * 4096
	for _, cmd := range []uint16{nbdtest.CmdWrite, nbdtest.CmdRead} {
		faulty.Inject(formattest.Fault{Errno: unix.EIO, Match: func(r *aio.Request) bool { return r.Offset <= bad && bad < r.End() }})
		var stream []byte
		for i := range uint64(16) {
			var payload []byte
			if cmd == nbdtest.CmdWrite {
				payload = pattern(4096, i)
			}
			stream = append(stream, wire(cmd, 0, i, i*4096, 4096, payload)...)
		}
		_, err := c.Conn.Write(stream)
		must(t, err)
		for range 16 {
			cookie, errno, _, err := c.Recv()
			must(t, err)
			if (errno != 0) != (cookie == 5) {
				t.Errorf("command %d: request %d: %v", cmd, cookie, errno)
			}
			if cmd == nbdtest.CmdRead && errno == 0 {
				got := make([]byte, 4096)
				must(t, readFull(c, got))
				if !bytes.Equal(got, pattern(4096, cookie)) {
					t.Errorf("read %d brought other bytes", cookie)
				}
			}
		}
		faulty.Heal()
	}
	if s := r.export.Stats(); s.Merged == 0 {
		t.Errorf("nothing was merged: %+v", s)
	}
}

// A flush on one connection makes durable what another's writes have stored.
func TestFlushCoversOtherConnections(t *testing.T) {
	file, err := aio.OpenFile(diskFile(t, mib), aio.FileOptions{})
	must(t, err)
	storage := formattest.NewFaulty(file)
	image, err := raw.New(storage, raw.Options{})
	must(t, err)
	defer image.Close()
	r := newRig(t, image, rigOptions{loops: 2})
	t.Cleanup(func() { _ = r.shutdown(time.Second) }) // before the image is closed
	a, b := r.dial(), r.dial()
	if a.Flags&nbdtest.CanMultiConn == 0 {
		t.Errorf("flags %#x", a.Flags)
	}
	for i := range int64(20) {
		must(t, a.Write(i*4096, make([]byte, 4096)))
	}
	if n := storage.Unflushed(); n != 20 {
		t.Errorf("%d writes are not durable", n)
	}
	must(t, b.Flush())
	if n := storage.Unflushed(); n != 0 {
		t.Errorf("%d writes are not durable after the flush", n)
	}
	must(t, b.Write(0, make([]byte, 4096), nbdtest.FUA))
	must(t, b.WriteZeroes(0, 4096, nbdtest.FUA))
	if n := storage.Unflushed(); n != 0 {
		t.Errorf("%d writes with FUA are not durable", n)
	}
}

func TestSeveralExports(t *testing.T) {
	one, two := newFake(t, mib), newFake(t, 2*mib)
	r := newRig(t, nil, rigOptions{loops: 2, exports: []*export.Export{
		export.New(one, export.Options{Name: "one", Description: "first"}), export.New(two, export.Options{Name: "two"}),
	}})
	for name, image := range map[string]*fakeImage{"one": one, "two": two} {
		c, err := nbdtest.Dial("unix", r.path, name)
		must(t, err)
		if int64(c.Size) != image.Size() {
			t.Errorf("%s has %d bytes", name, c.Size)
		}
		must(t, c.Write(0, []byte(name)))
		must(t, c.Disc())
		if !image.holds(0, []byte(name)) {
			t.Errorf("%s doesn't hold what was written", name)
		}
	}
	for _, name := range []string{"", "three"} {
		if _, err := nbdtest.Dial("unix", r.path, name); err == nil {
			t.Errorf("%q was found", name)
		}
	}
	if _, err := NewServer(Options{Loops: r.server.opts.Loops, Exports: []*export.Export{export.New(one, export.Options{}), export.New(two, export.Options{})}}); err == nil {
		t.Error("two exports of one name were taken")
	}
	if _, err := NewServer(Options{}); err == nil {
		t.Error("a server without loops was made")
	}
}

// Random requests of all sizes, many in flight and answered in any order, beside
// a model.
func TestManyInFlight(t *testing.T) {
	eachEngine(t, func(t *testing.T, engine aio.Engine) {
		const size = 32 * mib
		reordering := newFake(t, size)
		reordering.later = shuffle()
		images := map[string]formats.Image{
			"shuffled": reordering, "disk": rawImage(t, testenv.DiskDir(t), size), "tmpfs": rawImage(t, testenv.TmpfsDir(t), size),
		}
		for name, image := range images {
			t.Run(name, func(t *testing.T) {
				r := newRig(t, image, rigOptions{engine: engine, loops: 2})
				rng := rand.New(rand.NewPCG(rand.Uint64(), 1))
				errs := make(chan error)
				for i := range int64(3) { // each its own part
					c := r.dial()
					seed := rng.Uint64()
					go func() {
						reordered, err := inFlight(c, rand.New(rand.NewPCG(seed, 2)), i*10*mib, 10*mib, 200)
						if err == nil && name == "shuffled" && !reordered {
							err = errors.New("all replies came in the order of the requests")
						}
						errs <- err
					}()
				}
				for range 3 {
					if err := <-errs; err != nil {
						t.Error(err)
					}
				}
			})
		}
	})
}

// inFlight sends rounds requests within [base, base+size), at most one at a time
// to each slot of it, and compares what comes back with a model. It reports
// whether replies came in another order than the requests were sent in.
func inFlight(c *nbdtest.Client, rng *rand.Rand, base, size int64, rounds int) (reordered bool, err error) {
	const slot, depth = 512 * kib, 16
	model := make([]byte, size)
	busy := map[uint64][2]int64{} // by slot, which is the cookie: place and length of its read
	free := rng.Perm(int(size / slot))
	var order []uint64
	for sent := 0; sent < rounds || len(busy) > 0; {
		if sent < rounds && len(busy) < depth {
			i := free[0]
			free = free[1:]
			n := 1 + rng.Int64N(4096)
			if rng.IntN(8) == 0 {
				n = 1 + rng.Int64N(slot)
			}
			off := int64(i)*slot + rng.Int64N(slot-n+1)
			var err error
			switch rng.IntN(5) {
			case 0, 1:
				data := pattern(int(n), rng.Uint64())
				copy(model[off:], data)
				busy[uint64(i)] = [2]int64{}
				err = c.Send(nbdtest.CmdWrite, 0, uint64(i), uint64(base+off), uint32(n), data)
			case 2:
				clear(model[off : off+n])
				busy[uint64(i)] = [2]int64{}
				err = c.Send(nbdtest.CmdWriteZeroes, 0, uint64(i), uint64(base+off), uint32(n), nil)
			default:
				busy[uint64(i)] = [2]int64{off, n}
				err = c.Send(nbdtest.CmdRead, 0, uint64(i), uint64(base+off), uint32(n), nil)
			}
			if err != nil {
				return reordered, err
			}
			order = append(order, uint64(i))
			sent++
			continue
		}
		cookie, errno, data, err := c.Recv()
		place, ok := busy[cookie]
		if err != nil {
			return reordered, err
		}
		if errno != 0 || !ok {
			return reordered, fmt.Errorf("reply to %d (in flight: %v), error %d", cookie, ok, uint32(errno))
		}
		if !bytes.Equal(data, model[place[0]:place[0]+place[1]]) {
			return reordered, fmt.Errorf("read of %d at %d brought other bytes", place[1], place[0])
		}
		delete(busy, cookie)
		free = append(free, int(cookie))
		reordered = reordered || order[0] != cookie
		order = order[1:]
	}
	got := make([]byte, size)
	if err := c.Read(base, got); err != nil {
		return reordered, err
	}
	if !bytes.Equal(got, model) {
		return reordered, errors.New("the image differs from the model")
	}
	return reordered, c.Disc()
}

// The longest requests there are, in one piece.
func TestLongest(t *testing.T) {
	eachEngine(t, func(t *testing.T, engine aio.Engine) {
		r := newRig(t, rawImage(t, testenv.TmpfsDir(t), 65*mib), rigOptions{engine: engine})
		c := r.dial()
		all := bytes.Repeat(pattern(mib+4099, 1), 66)
		for i, n := range []int{256 * kib, 256*kib - 28, 256*kib + 1, mib + 77, 32 * mib, 64 * mib} {
			data, got := all[i*1000:][:n], make([]byte, n)
			must(t, c.Write(int64(i), data))
			must(t, c.Read(int64(i), got))
			if !bytes.Equal(got, data) {
				t.Fatalf("%d bytes came back changed", n)
			}
		}
		other := r.dial()
		must(t, c.Send(nbdtest.CmdWrite, 0, 1, 0, 64*mib+1, nil))
		wantClosed(t, c)
		must(t, other.Read(0, make([]byte, 512)))
	})
}

// A stream may be cut anywhere.
func TestSplitAnywhere(t *testing.T) {
	eachEngine(t, func(t *testing.T, engine aio.Engine) {
		image := newFake(t, mib)
		c := newRig(t, image, rigOptions{engine: engine}).dial()
		data := pattern(50, 3)
		stream := append(wire(nbdtest.CmdWrite, 0, 1, 100, 50, data), wire(nbdtest.CmdRead, 0, 2, 100, 0, nil)...)
		stream = append(stream, wire(nbdtest.CmdFlush, 0, 3, 0, 0, nil)...)
		for at := 1; at < len(stream); at++ { // in two pieces
			must(t, c.WriteZeroes(0, mib))
			splitAt(t, c, stream, at, len(stream))
			if !image.holds(100, data) {
				t.Fatalf("split at %d: the write is wrong", at)
			}
		}
		places := make([]int, len(stream)) // byte by byte
		for i := range places {
			places[i] = i + 1
		}
		splitAt(t, c, stream, places...)
		if image.count(aio.OpWrite) != len(stream) || image.count(aio.OpFlush) != len(stream) {
			t.Errorf("%d writes and %d flushes", image.count(aio.OpWrite), image.count(aio.OpFlush))
		}
	})
}

func splitAt(t *testing.T, c *nbdtest.Client, stream []byte, places ...int) {
	t.Helper()
	from := 0
	for _, to := range places {
		_, err := c.Conn.Write(stream[from:to])
		must(t, err)
		from = to
		for range 3 { // so that the pieces are received one by one, mostly
			time.Sleep(20 * time.Microsecond)
		}
	}
	for range 3 {
		if cookie, errno, _, err := c.Recv(); err != nil || errno != 0 {
			t.Fatalf("split at %v: request %d: %v, %v", places, cookie, errno, err)
		}
	}
}

// Headers and payloads lie across the ends of the blocks that they are received
// into, wherever those happen to be.
func TestAcrossBlocks(t *testing.T) {
	image := newFake(t, 2*mib)
	c := newRig(t, image, rigOptions{}).dial()
	model := make([]byte, len(image.data))
	rng := rand.New(rand.NewPCG(rand.Uint64(), 1))
	for range 8 {
		var stream []byte
		n := 0
		for len(stream) < 900*kib {
			length := 1 + rng.IntN(5000)
			off := rng.IntN(len(model) - length)
			data := pattern(length, rng.Uint64())
			copy(model[off:], data)
			stream = append(stream, wire(nbdtest.CmdWrite, 0, uint64(n), uint64(off), uint32(length), data)...)
			n++
		}
		go func() {
			for len(stream) > 0 { // in pieces of any size
				k := min(len(stream), 1+rand.IntN(200*kib))
				if _, err := c.Conn.Write(stream[:k]); err != nil {
					return
				}
				stream = stream[k:]
			}
		}()
		for range n {
			if cookie, errno, _, err := c.Recv(); err != nil || errno != 0 {
				t.Fatalf("request %d: %v, %v", cookie, errno, err)
			}
		}
		if !image.holds(0, model) {
			t.Fatal("the image differs from the model")
		}
	}
}

// A payload that comes in small pieces costs no more memory than another.
func TestPayloadPiecesAreJoined(t *testing.T) {
	image := newFake(t, mib)
	segments := 0
	image.fail = func(r *aio.Request) unix.Errno {
		segments = max(segments, len(r.Vec))
		return 0
	}
	c := newRig(t, image, rigOptions{}).dial()
	data := pattern(300*kib, 1)
	_, err := c.Conn.Write(wire(nbdtest.CmdWrite, 0, 1, 0, uint32(len(data)), nil))
	must(t, err)
	for rest := data; len(rest) > 0; {
		n := min(len(rest), 500)
		_, err := c.Conn.Write(rest[:n])
		must(t, err)
		rest = rest[n:]
	}
	if _, errno, _, err := c.Recv(); err != nil || errno != 0 {
		t.Fatal(errno, err)
	}
	if !image.holds(0, data) {
		t.Error("the payload is wrong")
	}
	image.mu.Lock()
	defer image.mu.Unlock()
	if segments > 5 {
		t.Errorf("the payload has %d segments", segments)
	}
}

// go-nbd's server and ours can't be told apart.
func TestDifferential(t *testing.T) {
	eachEngine(t, func(t *testing.T, engine aio.Engine) {
		const size = 2*mib + 512
		image := rawImage(t, testenv.TmpfsDir(t), size)
		ours := newRig(t, image, rigOptions{engine: engine}).dial()
		there, here := net.Pipe()
		done := make(chan error, 1)
		go func() {
			done <- server.Handle(there, []*server.Export{{Name: "demo", Backend: backend.NewMemoryBackend(make([]byte, size))}},
				&server.Options{MinimumBlockSize: 1})
			there.Close()
		}()
		theirs := nbdtest.New(here)
		must(t, theirs.Hello(nbdtest.FixedNewstyle))
		must(t, theirs.Go("demo"))
		must(t, nbdtest.Compare(ours, theirs, rand.New(rand.NewPCG(rand.Uint64(), 1)), 150, 700_000))
		must(t, theirs.Disc())
		must(t, <-done)
		must(t, ours.Disc())
	})
}
