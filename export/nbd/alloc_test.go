package nbd

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"

	"platter/aio"
	"platter/export"
	"platter/export/nbd/nbdtest"
	"platter/integration/testenv"
)

// rawClient sends batches of requests and takes their replies by system calls
// and without an allocation, so that what is allocated is the server's.
type rawClient struct {
	fd      int
	out, in []byte
}

// takeOver moves a client's connection to a rawClient.
func takeOver(t testing.TB, c *nbdtest.Client) *rawClient {
	t.Helper()
	fd, err := duplicate(c.Conn)
	must(t, err)
	must(t, c.Conn.Close())
	must(t, unix.SetNonblock(fd, false))
	tv := unix.Timeval{Sec: 20}
	must(t, unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv))
	must(t, unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &tv))
	t.Cleanup(func() { unix.Close(fd) })
	return &rawClient{fd: fd}
}

// round sends c.out and receives replies of size bytes each until c.in is full.
func (c *rawClient) round(size int) error {
	for out := c.out; len(out) > 0; {
		n, err := unix.Write(c.fd, out)
		if err == unix.EINTR { // the runtime's signals
			continue
		}
		if err != nil {
			return fmt.Errorf("write: %w", err)
		}
		out = out[n:]
	}
	for in := c.in; len(in) > 0; {
		n, err := unix.Read(c.fd, in)
		if err == unix.EINTR {
			continue
		}
		if n <= 0 {
			return fmt.Errorf("read: %d, %w", n, err)
		}
		in = in[n:]
	}
	for at := 0; at < len(c.in); at += size {
		if binary.BigEndian.Uint32(c.in[at:]) != nbdtest.MagicSimple || binary.BigEndian.Uint32(c.in[at+4:]) != 0 {
			return fmt.Errorf("reply % x", c.in[at:at+simpleSize])
		}
	}
	return nil
}

// From socket to reply nothing is allocated for a request.
func TestNoAllocations(t *testing.T) {
	const (
		size     = 64 * mib
		depth    = 64
		length   = 4096
		requests = 50_048
	)
	for where, dir := range map[string]func(testing.TB) string{"tmpfs": testenv.TmpfsDir, "disk": testenv.DiskDir} {
		r := newRig(t, rawImage(t, dir(t), size), rigOptions{loops: 2})
		loops := r.server.opts.Loops
		filler := r.dial()
		for off := int64(0); off < size; off += 16 * mib {
			must(t, filler.Write(off, bytes.Repeat(pattern(4096, 1), 4096)))
		}
		for _, load := range []struct {
			name       string
			cmd        uint16
			sequential bool
			throttle   export.Throttle
		}{
			{"random read", nbdtest.CmdRead, false, export.Throttle{}}, {"sequential read", nbdtest.CmdRead, true, export.Throttle{}},
			{"random write", nbdtest.CmdWrite, false, export.Throttle{}}, {"sequential write", nbdtest.CmdWrite, true, export.Throttle{}},
			{"throttled read", nbdtest.CmdRead, false, export.Throttle{IOPS: export.Rates{Total: 100_000, Burst: 1}}},
			{"throttled write", nbdtest.CmdWrite, true, export.Throttle{BPS: export.Rates{Write: 400 * mib}}},
		} {
			t.Run(where+" "+load.name, func(t *testing.T) {
				must(t, r.export.SetThrottle(load.throttle))
				c := takeOver(t, r.dial())
				step, reply := requestSize, simpleSize+length
				if load.cmd == nbdtest.CmdWrite {
					step, reply = requestSize+length, simpleSize
				}
				for i := range uint64(depth) {
					payload := make([]byte, step-requestSize)
					c.out = append(c.out, wire(load.cmd, 0, i, 0, length, payload)...)
				}
				c.in = make([]byte, depth*reply)
				block := uint64(0)
				run := func(n int) {
					for range n / depth {
						for at := 0; at < len(c.out); at += step {
							if load.sequential {
								block = (block + 1) % (size / length)
							} else {
								block = rand.Uint64N(size / length)
							}
							binary.BigEndian.PutUint64(c.out[at+16:], block*length)
						}
						if err := c.round(reply); err != nil {
							t.Fatal(err)
						}
					}
				}
				run(requests)                        // until every list of every request has its length
				loop := loops[rand.IntN(len(loops))] // also where it has not always been
				must(t, r.export.Move([]*aio.Loop{loop}))
				run(2 * depth)
				var before, after runtime.MemStats
				runtime.ReadMemStats(&before)
				run(requests)
				runtime.ReadMemStats(&after)
				if n := after.Mallocs - before.Mallocs; n > requests/1000 {
					t.Errorf("%d allocations for %d requests", n, requests)
				}
			})
		}
		if s := r.export.Stats(); s.Merged == 0 {
			t.Errorf("%s: nothing was merged", where)
		} else if s.Throttled == 0 {
			t.Errorf("%s: nothing had to wait", where)
		}
	}
}
