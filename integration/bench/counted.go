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
// counted: how many writes the server makes. Its rate is worth nothing, as the
// server is traced meanwhile.
func counted(name string, cfg loadgen.Config) *load {
	return &load{name: name, writes: true, once: true, run: func(ctx context.Context, p *process, img *image, _ time.Duration) (sample, error) {
		trace := filepath.Join(img.dir, "trace")
		defer os.Remove(trace)
		stop, err := traceWrites(ctx, p.cmd.Process.Pid, trace)
		if err != nil {
			return sample{}, err
		}
		r, err := runOnce(cfg, p)
		stop()
		if err != nil {
			return sample{}, err
		}
		writes, err := readTrace(trace)
		return sample{rate: r.IOPS(), fileWrites: float64(writes) / float64(r.Requests)}, err
	}}
}

// weighed is a load of so many requests, of which it is found out how many bytes
// the server writes to files, by what the kernel says of the process.
func weighed(name string, cfg loadgen.Config) *load {
	return &load{name: name, writes: true, once: true, run: func(_ context.Context, p *process, _ *image, _ time.Duration) (sample, error) {
		before, err := bytesWritten(p.cmd.Process.Pid)
		if err != nil {
			return sample{}, err
		}
		r, err := runOnce(cfg, p)
		if err != nil {
			return sample{}, err
		}
		after, err := bytesWritten(p.cmd.Process.Pid)
		return sample{rate: r.IOPS(), fileBytes: float64(after-before) / float64(r.Requests) / float64(cfg.BlockSize)}, err
	}}
}

// runOnce runs the generator for the requests that cfg asks for.
func runOnce(cfg loadgen.Config, p *process) (loadgen.Result, error) {
	cfg.Address, cfg.Export = p.socket, p.export
	r, err := loadgen.Run(cfg)
	if err == nil && r.Errors > 0 {
		err = fmt.Errorf("server failed %d of %d requests, first with NBD error %d", r.Errors, r.Requests, r.FirstErr)
	}
	return r, err
}

// bytesWritten is how many bytes a process has written by write and its like, to
// files as a rule: sockets are sent to, and what eventfds take is next to nothing.
// A ring's writes aren't in it.
func bytesWritten(pid int) (int64, error) {
	path := fmt.Sprintf("/proc/%d/io", pid)
	text, err := os.ReadFile(path)
	if err != nil {
		return 0, fmt.Errorf("read bytes written: %w", err)
	}
	for line := range strings.Lines(string(text)) {
		if n, ok := strings.CutPrefix(line, "wchar: "); ok {
			return strconv.ParseInt(strings.TrimSpace(n), 10, 64)
		}
	}
	return 0, fmt.Errorf("read bytes written: no wchar in %s", path)
}

// traceWrites has strace note every write that a process makes to a file. The
// servers of a section that is counted use system calls for that, no ring.
func traceWrites(ctx context.Context, pid int, path string) (stop func(), err error) {
	cmd := exec.CommandContext(ctx, "strace", "-f", "-qq", "-p", strconv.Itoa(pid), "-o", path,
		"-e", "trace=pwrite64,pwritev,pwritev2", "-e", "signal=none")
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("trace server: %w", err)
	}
	stop = func() {
		_ = cmd.Process.Signal(unix.SIGINT) // it lets go and ends; a server that has ended has ended it
		_ = cmd.Wait()
	}
	for end := time.Now().Add(startLimit); !traced(pid); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			stop()
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

var traceResult = regexp.MustCompile(`= \d+$`)

// readTrace counts the writes that succeeded.
func readTrace(path string) (writes int64, err error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, fmt.Errorf("read trace: %w", err)
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		if traceResult.MatchString(lines.Text()) {
			writes++
		}
	}
	if writes == 0 {
		return 0, errors.New("read trace: the server wrote nothing")
	}
	return writes, lines.Err()
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
