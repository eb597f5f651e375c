package main

import (
	"fmt"
	"io"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"platter/integration/loadgen"
)

// generator holds the flags of the mode that drives a running server once.
type generator struct {
	address, export string
	rw, pattern     string
	bs, depth       int
	batch, conns    int
	duration, spin  time.Duration
	requests        int64
	pid             int
}

// run drives the server once and prints one line about it.
func (g generator) run(out io.Writer) error {
	cfg := loadgen.Config{
		Network: "unix", Address: g.address, Export: g.export,
		Write: g.rw == "write", Random: g.pattern == "rand",
		BlockSize: g.bs, Depth: g.depth, Batch: g.batch, Conns: g.conns,
		Duration: g.duration, Requests: g.requests,
		Spin:    g.spin,
		Latency: g.depth == 1,
	}
	if address, ok := strings.CutPrefix(g.address, "tcp://"); ok {
		cfg.Network, cfg.Address = "tcp", address
	}
	cfg.Address = strings.TrimPrefix(cfg.Address, "unix://")
	if g.rw != "read" && !cfg.Write {
		return fmt.Errorf("-rw %q: need read or write", g.rw)
	}
	if g.pattern != "seq" && !cfg.Random {
		return fmt.Errorf("-pattern %q: need rand or seq", g.pattern)
	}
	before, err := cpuTime(g.pid)
	if err != nil {
		return err
	}
	r, err := loadgen.Run(cfg)
	if err != nil {
		return err
	}
	after, err := cpuTime(g.pid)
	if err != nil {
		return err
	}
	fmt.Fprintf(out, "%s %s bs=%d depth=%d conns=%d: %.0f IOPS, %.0f MB/s, %d requests, %d errors",
		g.pattern, g.rw, g.bs, g.depth, g.conns, r.IOPS(), r.IOPS()*float64(g.bs)/1e6, r.Requests, r.Errors)
	if cfg.Latency {
		fmt.Fprintf(out, ", median %v, p99 %v", r.Latency.Quantile(0.5), r.Latency.Quantile(0.99))
	}
	if g.pid != 0 && r.Requests > 0 {
		used := after - before
		fmt.Fprintf(out, ", server CPU %.2f s/million (%.0f%% of a core)",
			used.Seconds()/float64(r.Requests)*1e6, 100*used.Seconds()/r.Elapsed.Seconds())
	}
	fmt.Fprintln(out)
	if r.Errors > 0 {
		return fmt.Errorf("server failed %d of %d requests, first with NBD error %d", r.Errors, r.Requests, r.FirstErr)
	}
	return nil
}

// cpuTime is the processor time that all threads of a process, living or
// ended, have used so far, to the nanosecond; 0 for pid 0.
func cpuTime(pid int) (time.Duration, error) {
	if pid == 0 {
		return 0, nil
	}
	// How clock_getcpuclockid(3) encodes a process: its complement, shifted,
	// and CPUCLOCK_SCHED.
	const cpuclockSched = 2
	var ts unix.Timespec
	if err := unix.ClockGettime(int32(^pid<<3|cpuclockSched), &ts); err != nil {
		return 0, fmt.Errorf("read CPU time of process %d: %w", pid, err)
	}
	return time.Duration(ts.Nano()), nil
}
