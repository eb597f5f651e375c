package main

import (
	"bytes"
	"context"
	"io"
	"strings"
	"testing"
	"time"

	"platter/integration/loadgen"
	"platter/integration/testenv"
)

// TestSessionWithAPeer runs a whole small session against a real server.
func TestSessionWithAPeer(t *testing.T) {
	for _, tool := range []string{"nbdkit", "fio", "nbdcopy"} {
		testenv.NeedTool(t, tool)
	}
	const size = 8 << 20
	peer := peerServers()[0]
	ours := peer
	ours.name = platter
	img, err := makeImage([]string{testenv.ShortDir(t)}, func(string) bool { return true }, size)
	if err != nil {
		t.Fatal(err)
	}
	s := &session{
		servers: []server{ours, peer}, images: []*image{img}, rounds: 2, length: 50 * time.Millisecond,
		progress: io.Discard, dir: testenv.ShortDir(t),
	}
	var rows []row
	for _, l := range []*load{
		fioRandomRead("fio", 4), copyToNull("copy"),
		generated("read", loadgen.Config{Random: true, Depth: 16}),
		generated("write", loadgen.Config{Depth: 16, Write: true}),
		generated("one", loadgen.Config{Random: true, Depth: 1}),
	} {
		rows = append(rows, row{title: l.name, load: l, metric: kiloIOPS})
	}
	table := section{title: "T", rows: rows}
	if err := s.run(context.Background(), needs([]section{table}, []server{peer})); err != nil {
		t.Fatal(err)
	}
	for _, r := range rows {
		for _, name := range []string{platter, peer.name} {
			got := s.results[cell{img.fs, r.load.name, name}]
			if len(got) != s.rounds {
				t.Fatalf("%s with %s: %d samples", r.load.name, name, len(got))
			}
			for _, v := range got {
				if v.rate <= 0 || v.ready <= 0 || v.memory < 1<<20 {
					t.Errorf("%s with %s: %+v", r.load.name, name, v)
				}
			}
		}
	}
	if one := s.results[cell{img.fs, "one", platter}][0]; one.p50 <= 0 || one.p99 < one.p50 || one.cpu <= 0 {
		t.Errorf("depth 1: %+v", one)
	}
	var out bytes.Buffer
	s.writeHeader(context.Background(), &out, "Title")
	s.report(&out, []section{table}, []server{peer})
	for _, want := range []string{"# Title", "- nbdkit: 1.", "| " + img.fs + " | copy |"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("no %q in:\n%s", want, out.String())
		}
	}

	p, err := peer.start(context.Background(), img.path, s.dir)
	if err != nil {
		t.Fatal(err)
	}
	defer p.stop()
	out.Reset()
	g := generator{address: p.socket, rw: "read", pattern: "rand", bs: 4096, depth: 1, conns: 1, requests: 100, pid: p.cmd.Process.Pid}
	if err := g.run(&out); err != nil || !strings.Contains(out.String(), "100 requests, 0 errors, median") || !strings.Contains(out.String(), "s/million") {
		t.Errorf("generator: %v, %q", err, out.String())
	}
}

// TestInterruptEndsASession checks that no server outlives a cancelled session.
func TestInterruptEndsASession(t *testing.T) {
	stuck := server{name: "stuck", ours: true, command: func(image, socket string) []string { return []string{"sleep", "60"} }}
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	begin := time.Now()
	if _, err := stuck.start(ctx, "", t.TempDir()); err == nil || time.Since(begin) > 5*time.Second {
		t.Errorf("got %v after %v", err, time.Since(begin))
	}
}
