package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"platter/integration/loadgen"
)

// counted is a load of so many requests, of which the cost at the file is
// counted: how many writes the server makes, and of how many bytes. Its rate is
// worth nothing, as the server is traced meanwhile.
func counted(name string, cfg loadgen.Config) *load {
	run := func(ctx context.Context, p *process, img *image, _ time.Duration) (sample, error) {
		cfg := cfg
		cfg.Address, cfg.Export = p.socket, p.export
		trace := filepath.Join(img.dir, "trace")
		defer os.Remove(trace)
		stop, err := traceWrites(ctx, p.cmd.Process.Pid, trace)
		if err != nil {
			return sample{}, err
		}
		r, err := loadgen.Run(cfg)
		if err = errors.Join(err, stop()); err != nil {
			return sample{}, err
		}
		if r.Errors > 0 {
			return sample{}, fmt.Errorf("server failed %d of %d requests, first with NBD error %d", r.Errors, r.Requests, r.FirstErr)
		}
		writes, written, err := readTrace(trace)
		if err != nil {
			return sample{}, err
		}
		n := float64(r.Requests)
		return sample{rate: r.IOPS(), fileWrites: float64(writes) / n, fileBytes: float64(written) / n / float64(cfg.BlockSize)}, nil
	}
	return &load{name: name, writes: true, once: true, run: run}
}

// traceWrites has strace note every write that a process makes to a file. The
// servers of a section that is counted use system calls for that, no ring.
func traceWrites(ctx context.Context, pid int, path string) (stop func() error, err error) {
	cmd := exec.CommandContext(ctx, "strace", "-f", "-qq", "-p", strconv.Itoa(pid), "-o", path,
		"-e", "trace=pwrite64,pwritev,pwritev2", "-e", "signal=none")
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("trace server: %w", err)
	}
	stop = func() error {
		_ = cmd.Process.Signal(unix.SIGINT) // it lets go and ends; a server that has ended has ended it
		_ = cmd.Wait()
		return nil
	}
	for end := time.Now().Add(startLimit); !traced(pid); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			_ = stop()
			return nil, fmt.Errorf("trace server: strace does not get hold of process %d", pid)
		}
	}
	return stop, nil
}

// traced reports whether every thread of a process is traced.
func traced(pid int) bool {
	threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", pid))
	if err != nil || len(threads) == 0 {
		return false
	}
	for _, path := range threads {
		status, err := os.ReadFile(path)
		if err != nil || strings.Contains(string(status), "TracerPid:\t0\n") {
			return false
		}
	}
	return true
}

var traceResult = regexp.MustCompile(`= (\d+)$`)

// readTrace counts the writes that succeeded, and their bytes.
func readTrace(path string) (writes, written int64, err error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, 0, fmt.Errorf("read trace: %w", err)
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		if m := traceResult.FindStringSubmatch(lines.Text()); m != nil {
			n, err := strconv.ParseInt(m[1], 10, 64)
			if err != nil {
				return 0, 0, fmt.Errorf("read trace: %w", err)
			}
			writes, written = writes+1, written+n
		}
	}
	if writes == 0 {
		return 0, 0, fmt.Errorf("read trace: the server wrote nothing")
	}
	return writes, written, lines.Err()
}

// queues is a load of four connections for a server with two loops, and of one
// for others; ideal is what all processors would come to with what client and
// server take for a request of one connection.
func queues(name string, cfg loadgen.Config) *load {
	one := generated(name, cfg)
	cfg.Conns = 4
	four := generated(name, cfg)
	return &load{name: name, run: func(ctx context.Context, p *process, img *image, length time.Duration) (sample, error) {
		if p.name == platterTwoLoops {
			return four.run(ctx, p, img, length)
		}
		before, err := cpuTime(os.Getpid())
		if err != nil {
			return sample{}, err
		}
		s, err := one.run(ctx, p, img, length)
		if err != nil {
			return s, err
		}
		after, err := cpuTime(os.Getpid())
		client := (after - before).Seconds() / (s.rate * length.Seconds())
		s.ideal = float64(runtime.NumCPU()) / (s.cpu + client)
		return s, err
	}}
}
