// Command bench measures platter beside its peers in one session and prints
// Markdown tables of medians, ratios and targets: docs/benchmarks.md is its
// output, and `make bench` its caller.
//
//	go run ./integration/bench                      everything, some 15 minutes
//	go run ./integration/bench -only 'random|cpu'   some sections
//	go run ./integration/bench -short               a smoke test, below 20 seconds
//	go run ./integration/bench -only 'random/generator' -fs memory -peers=false
//	go run ./integration/bench -gen SOCKET -pid PID drive a running server once
//
// A session makes an image on tmpfs and one on a disk file system (main.go,
// image.go), starts server after server on them (servers.go) in alternating
// rounds (measure.go), drives each by a client (clients.go), and sets the
// figures beside each other (report.go) in the tables that sections.go lists.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// options are the flags of a session.
type options struct {
	only   string
	fs     string
	short  bool
	peers  bool
	rounds int
	length time.Duration
	size   int64
	aio    string
	binary string
}

func main() {
	var (
		g generator
		o options
	)
	flag.StringVar(&g.address, "gen", "", "only drive the server at this `socket` (a path, or tcp://host:port) once, and print one line")
	flag.StringVar(&g.export, "export", "", "with -gen: export `name`")
	flag.StringVar(&g.rw, "rw", "read", "with -gen: read or write")
	flag.StringVar(&g.pattern, "pattern", "rand", "with -gen: rand or seq")
	flag.IntVar(&g.bs, "bs", 4096, "with -gen: `bytes` per request")
	flag.IntVar(&g.depth, "depth", 64, "with -gen: requests in flight per connection")
	flag.IntVar(&g.batch, "batch", 0, "with -gen: requests per send (default half of the depth, at most 32)")
	flag.IntVar(&g.conns, "conns", 1, "with -gen: connections")
	flag.Int64Var(&g.requests, "requests", 0, "with -gen: stop after this many requests")
	flag.IntVar(&g.pid, "pid", 0, "with -gen: also report the CPU time of this server `process`")
	flag.DurationVar(&o.length, "time", time.Second, "length of each run")
	flag.DurationVar(&g.spin, "spin", 0, "with -gen: how long it looks for replies before it sleeps")
	flag.StringVar(&o.only, "only", "", "only rows whose name matches this `regexp`, as in 'merge', 'copy|cpu' or 'random/generator, depth 1'; the sections are "+sectionNames())
	flag.StringVar(&o.fs, "fs", "", "only this kind of file system: memory or disk")
	flag.BoolVar(&o.short, "short", false, "smoke test: one short round, a small image, one peer")
	flag.BoolVar(&o.peers, "peers", true, "measure the peers too")
	flag.IntVar(&o.rounds, "rounds", 5, "runs behind each figure")
	flag.Int64Var(&o.size, "size", 1<<30, "`bytes` of the image")
	flag.StringVar(&o.aio, "aio", "auto", "engine of platter: auto, io_uring, native or threads")
	flag.StringVar(&o.binary, "platter", "", "measure this `binary` instead of building one")
	flag.Parse()

	// A generator's thread that sleeps in a system call should not have its
	// processor slot taken away by the Go scheduler.
	runtime.GOMAXPROCS(max(runtime.GOMAXPROCS(0), g.conns+1, 5))
	g.duration = o.length
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	defer stop()

	var err error
	if g.address != "" {
		err = g.run(os.Stdout)
	} else {
		err = o.run(ctx)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		stop()
		os.Exit(1)
	}
}

// run carries out one session.
func (o options) run(ctx context.Context) error {
	if o.short {
		o.rounds, o.length, o.size = 1, 50*time.Millisecond, 64<<20
	}
	if o.rounds < 1 || o.size < 1<<20 {
		return errors.New("need at least 1 round and an image of 1 MiB")
	}
	chosen, err := o.sections()
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "platter-bench-")
	if err != nil {
		return fmt.Errorf("make directory: %w", err)
	}
	defer os.RemoveAll(dir)
	if o.binary == "" {
		o.binary = filepath.Join(dir, "platter")
		if err := build(ctx, o.binary); err != nil {
			return err
		}
	}
	fmt.Fprintln(os.Stderr, "writing the images")
	images, err := makeImages(o.fs, o.size)
	if err != nil {
		return err
	}
	defer removeImages(images)

	ours, err := probe(ctx, ourServers(o.binary, o.aio), images[0], dir, o.binary, os.Stderr)
	if err != nil {
		return err
	}
	var peers []server
	if o.peers {
		if peers, err = probe(ctx, peerServers(), images[0], dir, o.binary, os.Stderr); err != nil {
			return err
		}
		if o.short {
			// One for raw images, and those for qcow2.
			peers = slices.DeleteFunc(peers, func(p server) bool { return p.disk == rawDisk && p.name != peers[0].name })
		}
	}
	chosen = without(chosen, append(ours, peers...))
	s := &session{
		servers: append(ours, peers...), images: images, rounds: o.rounds,
		length: o.length, progress: os.Stderr, dir: dir, binary: o.binary,
	}
	if err := s.run(ctx, needs(chosen, peers)); err != nil {
		return err
	}
	title := "Benchmarks"
	if o.short {
		title = "Smoke test of the benchmarks: the figures mean nothing"
	}
	s.writeHeader(ctx, os.Stdout, title)
	s.report(os.Stdout, chosen, peers)
	return nil
}

// sections keeps the rows that -only asks for.
func (o options) sections() ([]section, error) {
	pattern, err := regexp.Compile(o.only)
	if err != nil {
		return nil, fmt.Errorf("-only: %w", err)
	}
	var chosen []section
	for _, s := range sections() {
		s.rows = slices.DeleteFunc(s.rows, func(r row) bool { return !pattern.MatchString(s.name + "/" + r.title) })
		if len(s.rows) > 0 {
			chosen = append(chosen, s)
		}
	}
	if len(chosen) == 0 {
		return nil, fmt.Errorf("-only %q: no section or row has such a name", o.only)
	}
	return chosen, nil
}

// build makes platter as it is shipped.
func build(ctx context.Context, path string) error {
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags=-s -w", "-o", path, "platter")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build platter: %w: %s", err, lastLine(string(out)))
	}
	return nil
}
