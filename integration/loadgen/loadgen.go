// Package loadgen drives an NBD server hard enough that the server, and not
// the client, is what gets measured.
//
// Common clients spend more time per request than a good server does. This one
// spends next to none: every connection is one locked operating-system thread
// with a blocking socket; requests leave in batches, many headers (and, for
// writes, payloads prepared once) in one system call; replies arrive in reads
// as large as the socket gives, of which only the 16-byte headers are looked
// at. Nothing is allocated per request. Replies may come in any order: each is
// matched to its request by its cookie.
//
// The client speaks the fixed newstyle handshake with NBD_OPT_GO and simple
// replies, which every server must offer.
package loadgen

import (
	"errors"
	"fmt"
	"runtime"
	"sync"
	"time"
)

var (
	// ErrProtocol says that the server sent something NBD does not allow here.
	ErrProtocol = errors.New("not the NBD protocol")
	// ErrReadOnly says that writes were asked of a read-only export.
	ErrReadOnly = errors.New("export is read-only")
	// ErrRefused says that the server answered the handshake with an error.
	ErrRefused = errors.New("server refused the export")
	// ErrPayload says that Config.Verify rejected the data of a reply.
	ErrPayload = errors.New("wrong data in reply")
)

// Error is what every failure of this package is wrapped in.
type Error struct {
	Op      string // what was tried: "connect to", "negotiate with", "run against"
	Address string // the server's address
	Err     error
}

func (e *Error) Error() string { return e.Op + " " + e.Address + ": " + e.Err.Error() }

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// Config describes one run. Only Address is required; the zero value of any
// other field stands for the default named beside it.
type Config struct {
	Network   string // "unix" or "tcp"; default unix
	Address   string // socket path, or host:port
	Export    string // export name; default is the server's default export
	Write     bool   // write instead of read
	Random    bool   // random instead of sequential offsets
	BlockSize int    // bytes per request; default 4096
	Depth     int    // requests in flight per connection; default 1
	Batch     int    // requests per send; default half of Depth, at most 32, so that the server has some while the client has some
	Conns     int    // connections, one thread each; default 1

	// The run ends after Duration, or after Requests requests over all
	// connections, whichever comes first; one of them must be set.
	Duration time.Duration
	Requests int64

	// Latency asks for a histogram of the time from the send of a request's
	// batch to the read that completed its reply.
	Latency bool

	// Fill prepares the payload of every write, once; default is a pattern
	// without runs of zeroes.
	Fill func(payload []byte)

	// Verify, when set, sees the data of every successful read, which is only
	// valid during the call, and says whether it is right. It is called from
	// all connections at a time, and slows the client down.
	Verify func(offset uint64, data []byte) bool

	// Spin is how long a connection looks for replies before it sleeps; default
	// 0. It takes the time that waking this client takes, which can be longer
	// than a server works on a batch, out of what is measured.
	Spin time.Duration

	// Timeout bounds the wait for any single answer; default 10 s.
	Timeout time.Duration
}

// Result is what a run did.
type Result struct {
	Requests int64         // replies received, failed ones included
	Errors   int64         // replies that carried an error
	FirstErr uint32        // NBD error number of the first such reply
	Elapsed  time.Duration // from the first request to the last reply
	Size     uint64        // bytes of the export
	Latency  Histogram     // empty unless asked for
}

// IOPS is the number of successful requests per second.
func (r Result) IOPS() float64 {
	if r.Elapsed <= 0 {
		return 0
	}
	return float64(r.Requests-r.Errors) / r.Elapsed.Seconds()
}

// Run connects, carries the load out, disconnects and returns what happened.
// Error replies are counted, not returned: an error from Run means that a
// connection failed or that the server broke the protocol.
func Run(cfg Config) (Result, error) {
	if err := cfg.complete(); err != nil {
		return Result{}, &Error{"run against", cfg.Address, err}
	}
	conns := make([]*conn, 0, cfg.Conns)
	defer func() {
		for _, c := range conns {
			c.sock.close()
		}
	}()
	for i := range cfg.Conns {
		c, err := dial(&cfg, i)
		if err != nil {
			return Result{}, err
		}
		conns = append(conns, c)
	}

	var ready, done sync.WaitGroup
	start := make(chan struct{})
	errs := make([]error, len(conns))
	for i, c := range conns {
		ready.Add(1)
		done.Go(func() {
			// Unlocked again, or the thread would end with the run, and with it
			// every child process that it started and that asked for a signal
			// at its parent's death, as nbdkit does.
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
			ready.Done()
			<-start
			errs[i] = c.run()
		})
	}
	ready.Wait()
	begin := time.Now()
	for _, c := range conns {
		c.begin = begin
	}
	close(start)
	done.Wait()

	var total Result
	for _, c := range conns {
		total.Requests += c.done
		total.Errors += c.failed
		if total.FirstErr == 0 {
			total.FirstErr = c.firstErr
		}
		total.Elapsed = max(total.Elapsed, c.elapsed)
		total.Size = c.size
		total.Latency.add(&c.latency)
	}
	if err := errors.Join(errs...); err != nil {
		return total, &Error{"run against", cfg.Address, err}
	}
	return total, nil
}

func (c *Config) complete() error {
	setDefault(&c.Network, "unix")
	setDefault(&c.BlockSize, 4096)
	setDefault(&c.Depth, 1)
	setDefault(&c.Batch, min((c.Depth+1)/2, 32))
	setDefault(&c.Conns, 1)
	setDefault(&c.Timeout, 10*time.Second)
	switch {
	case c.BlockSize < 1 || c.BlockSize > 32<<20:
		return fmt.Errorf("block size %d: need 1 byte to 32 MiB", c.BlockSize)
	case c.Depth < 1 || c.Depth > 1<<16:
		return fmt.Errorf("depth %d: need 1 to 65536", c.Depth)
	case c.Batch < 1 || c.Batch > c.Depth:
		return fmt.Errorf("batch %d: need 1 to the depth of %d", c.Batch, c.Depth)
	case c.Conns < 1:
		return fmt.Errorf("connections %d: need at least 1", c.Conns)
	case c.Duration <= 0 && c.Requests <= 0:
		return errors.New("neither a duration nor a number of requests is set")
	}
	return nil
}

func setDefault[T comparable](v *T, d T) {
	var zero T
	if *v == zero {
		*v = d
	}
}
