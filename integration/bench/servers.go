package main

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// server is a contender: how to start it on an image, and what it calls the export.
type server struct {
	name    string // also the heading of its column
	ours    bool
	export  string
	disk    disk
	command func(image, socket string) []string
}

// Names of our own variants; the plain one is the default of the tables.
const (
	platter         = "platter"
	platterTwoLoops = "platter, 2 loops"
	platterNoMerge  = "platter, merge off"

	platterMapped   = "platter, qcow2"
	platterFresh    = "platter, fresh qcow2"
	platterFreshRaw = "platter, fresh raw"
	platterHuge     = "platter, 10 TiB"
	platterCounted  = "platter, fresh qcow2, counted"
	platterOverlay  = "platter, overlay, counted"
	platterUnmerged = "platter, fresh qcow2, counted, merge off"
	platterApart    = "platter, a goroutine each"
	daemonMapped    = "q-s-d io_uring, qcow2"
	daemonFresh     = "q-s-d io_uring, fresh qcow2"
	daemonCounted   = "q-s-d threads, fresh qcow2"
	daemonOverlay   = "q-s-d threads, overlay"
)

// ourServers are the variants of platter that the sections compare.
func ourServers(binary, aio string) []server {
	variant := func(name string, d disk, loops, merge string) server {
		return server{name: name, ours: true, disk: d, command: func(image, socket string) []string {
			return []string{binary, "serve", "--nbd", "unix://" + socket, "--aio", aio, "--format", d.format(),
				"--cache", "writeback", "--loops", loops, "--merge", merge, image}
		}}
	}
	return []server{
		variant(platter, rawDisk, "1", "on"),
		variant(platterTwoLoops, rawDisk, "2", "on"),
		variant(platterNoMerge, rawDisk, "1", "off"),
		variant(platterMapped, mappedDisk, "1", "on"),
		variant(platterFresh, freshDisk, "1", "on"),
		variant(platterFreshRaw, freshRaw, "1", "on"),
		variant(platterHuge, hugeDisk, "1", "on"),
		variant(platterCounted, freshDisk, "1", "on").with("--aio", "threads"),
		variant(platterUnmerged, freshDisk, "1", "off").with("--aio", "threads"),
		variant(platterOverlay, overlayDisk, "1", "on").with("--aio", "threads"),
		variant(platterApart, rawDisk, "1", "on").with("--bypass", "off"),
	}
}

// with adds flags to a server's command; the last of a kind counts.
func (s server) with(flags ...string) server {
	command := s.command
	s.command = func(image, socket string) []string {
		args := command(image, socket)
		return append(append(args[:len(args)-1:len(args)-1], flags...), image)
	}
	return s
}

// peerServers are the servers that platter is compared to, each the way its own
// documentation recommends for speed.
func peerServers() []server {
	qemuNBD := func(aio string) server {
		return server{name: "qemu-nbd " + aio, command: func(image, socket string) []string {
			return []string{"qemu-nbd", "-t", "-e", "8", "-f", "raw", "--cache=writeback", "--aio=" + aio, "-k", socket, image}
		}}
	}
	daemon := func(name string, d disk, aio string) server {
		return server{name: name, export: "disk", disk: d, command: func(image, socket string) []string {
			return []string{"qemu-storage-daemon",
				"--object", "iothread,id=t0",
				"--blockdev", "driver=file,node-name=file,cache.direct=off,aio=" + aio + ",filename=" + image,
				"--blockdev", "driver=" + d.format() + ",node-name=disk,file=file",
				"--nbd-server", "addr.type=unix,max-connections=0,addr.path=" + socket,
				"--export", "type=nbd,id=export,node-name=disk,name=disk,writable=on,iothread=t0"}
		}}
	}
	return []server{
		{name: "nbdkit", command: func(image, socket string) []string {
			return []string{"nbdkit", "-f", "-U", socket, "file", image}
		}},
		qemuNBD("io_uring"),
		qemuNBD("threads"),
		daemon("q-s-d io_uring", rawDisk, "io_uring"),
		daemon("q-s-d threads", rawDisk, "threads"),
		daemon(daemonMapped, mappedDisk, "io_uring"),
		daemon(daemonFresh, freshDisk, "io_uring"),
		daemon(daemonCounted, freshDisk, "threads"),
		daemon(daemonOverlay, overlayDisk, "threads"),
	}
}

// startLimit is how long a server may take to get ready, or to end.
const startLimit = 10 * time.Second

// process is a running server.
type process struct {
	server
	socket string
	ready  time.Duration // from exec to the ready line, or for peers to the first accepted connection

	cmd    *exec.Cmd
	ended  chan struct{} // closed when the process has been waited for
	stderr *bytes.Buffer // only read after ended
}

// start runs the server on an image, with its socket in dir, and returns when
// it is ready to serve.
func (s server) start(ctx context.Context, image, dir string) (*process, error) {
	socket := filepath.Join(dir, "socket")
	if err := os.RemoveAll(socket); err != nil {
		return nil, fmt.Errorf("start %s: %w", s.name, err)
	}
	args := s.command(image, socket)
	p := &process{
		server: s, socket: socket, ended: make(chan struct{}),
		cmd: exec.Command(args[0], args[1:]...), stderr: new(bytes.Buffer),
	}
	p.cmd.Stderr = p.stderr
	stdout, stdoutWriter, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", s.name, err)
	}
	p.cmd.Stdout = stdoutWriter
	begin := time.Now()
	err = p.cmd.Start()
	stdoutWriter.Close()
	if err != nil {
		stdout.Close()
		return nil, fmt.Errorf("start %s: %w", s.name, err)
	}
	line := make(chan struct{})
	go func() { // ends when the server closes its output, which it does when it ends
		defer stdout.Close()
		r := bufio.NewReader(stdout)
		if _, err := r.ReadString('\n'); err == nil {
			close(line)
		}
		_, _ = io.Copy(io.Discard, r)
	}()
	go func() {
		_ = p.cmd.Wait() // how it ended matters only before it was ready, and then stderr tells
		close(p.ended)
	}()

	limit := time.NewTimer(startLimit)
	defer limit.Stop()
	poll := time.NewTicker(200 * time.Microsecond)
	defer poll.Stop()
	for {
		select {
		case <-line:
			if s.ours {
				p.ready = time.Since(begin)
				return p, nil
			}
			line = nil
		case <-poll.C:
			if s.ours {
				continue
			}
			if c, err := net.Dial("unix", socket); err == nil {
				p.ready = time.Since(begin)
				c.Close()
				return p, nil
			}
		case <-p.ended:
			return nil, fmt.Errorf("start %s: it ended before it was ready: %s", s.name, lastLine(p.stderr.String()))
		case <-limit.C:
			p.stop()
			return nil, fmt.Errorf("start %s: not ready after %v: %s", s.name, startLimit, lastLine(p.stderr.String()))
		case <-ctx.Done():
			p.stop()
			return nil, ctx.Err()
		}
	}
}

// stop ends the server by its own process id, the hard way if it must. Signals
// fail only when it has ended already.
func (p *process) stop() {
	_ = p.cmd.Process.Signal(unix.SIGTERM)
	select {
	case <-p.ended:
	case <-time.After(startLimit):
		_ = p.cmd.Process.Kill()
		<-p.ended
	}
}

// explain adds to the error of a run that the server has ended, if it has.
func (p *process) explain(err error) error {
	if err == nil {
		return nil
	}
	select {
	case <-p.ended:
		return fmt.Errorf("%w (the server has ended, %v: %s)", err, p.cmd.ProcessState, lastLine(p.stderr.String()))
	case <-time.After(100 * time.Millisecond): // it may be about to
		return err
	}
}

// uri names the export the way libnbd's tools want it.
func (p *process) uri() string {
	return "nbd+unix:///" + p.export + "?socket=" + url.QueryEscape(p.socket)
}

// peakMemory is the most resident memory that the server has used, in bytes.
func (p *process) peakMemory() (float64, error) {
	path := fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid)
	status, err := os.ReadFile(path)
	if err != nil {
		return 0, fmt.Errorf("read peak memory: %w", err)
	}
	for line := range strings.Lines(string(status)) {
		if f := strings.Fields(line); len(f) == 3 && f[0] == "VmHWM:" {
			kib, err := strconv.ParseFloat(f[1], 64)
			return kib * 1024, err
		}
	}
	return 0, fmt.Errorf("read peak memory: no VmHWM in %s", path)
}

// lastLine is the part of a program's complaint that names the cause.
func lastLine(text string) string {
	text = strings.TrimSpace(text)
	if text == "" {
		return "it said nothing"
	}
	return text[strings.LastIndexByte(text, '\n')+1:]
}
