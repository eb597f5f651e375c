package main

import (
	"bytes"
	"context"
	"os"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestSpread(t *testing.T) {
	for _, c := range []struct {
		in   []float64
		want spread
	}{
		{[]float64{7}, spread{7, 7, 7}},
		{[]float64{3, 1, 2}, spread{2, 1, 3}},
		{[]float64{4, 1, 3, 2}, spread{2.5, 1, 4}},
	} {
		if got := spreadOf(c.in); got != c.want {
			t.Errorf("%v: %v, want %v", c.in, got, c.want)
		}
	}
}

func TestRatioOfMediansAndOfRounds(t *testing.T) {
	ours, other := []float64{10, 20, 60}, []float64{10, 40, 30}
	if got := ratio(ours, other, false); got != 20.0/30 {
		t.Errorf("ratio of medians %v", got)
	}
	if got := ratio(ours, other, true); got != 1 {
		t.Errorf("median of ratios %v", got)
	}
}

func TestBestFollowsTheMetric(t *testing.T) {
	columns := [][]float64{{1000}, {2}, {9}, {5}}
	if got := kiloIOPS.best(columns); got != 2 {
		t.Errorf("fastest is column %d", got)
	}
	if got := cpuMillion.best(columns); got != 1 {
		t.Errorf("cheapest is column %d", got)
	}
	if got := kiloIOPS.best(columns[:1]); got != 0 {
		t.Errorf("alone, the best other is column %d", got)
	}
}

// TestReportLines checks figures, ratio, target and verdict of whole lines.
func TestReportLines(t *testing.T) {
	l := &load{name: "l"}
	peers := []server{{name: "a"}, {name: "b"}}
	s := &session{images: []*image{{fs: "tmpfs"}, {fs: "ext4"}}, results: map[cell][]sample{}}
	for _, img := range s.images {
		s.results[cell{img.fs, "l", platter}] = []sample{{rate: 3000, cpu: 2e-6, memory: 64 << 20}, {rate: 5000, cpu: 2e-6, memory: 65 << 20}, {rate: 4000, cpu: 2e-6, memory: 64 << 20}}
		s.results[cell{img.fs, "l", "a"}] = []sample{{rate: 2000, cpu: 5e-6, memory: 1 << 20}}
		s.results[cell{img.fs, "l", "b"}] = []sample{{rate: 1000, cpu: 3e-6, memory: 2 << 20}}
	}
	for _, c := range []struct {
		row   row
		fs    string
		peers []server
		want  string
	}{
		{row{load: l, metric: kiloIOPS, goal: goal{bound: 2}}, "ext4", peers, "4.0 (3.0–5.0) | **2.0 (2.0–2.0)** | 1.0 (1.0–1.0) | 2.00 | ≥ 2 × | yes"},
		{row{load: l, metric: kiloIOPS, goal: goal{bound: 2}, goalOn: map[string]goal{"tmpfs": {bound: 2.5}}}, "tmpfs", peers, "4.0 (3.0–5.0) | **2.0 (2.0–2.0)** | 1.0 (1.0–1.0) | 2.00 | ≥ 2.5 × | **no**"},
		{row{load: l, metric: cpuMillion, goal: goal{bound: 0.5}}, "ext4", peers, "2.00 (2.00–2.00) | 5.00 (5.00–5.00) | **3.00 (3.00–3.00)** | 0.67 | ≤ 0.5 × | **no**"},
		{row{load: l, metric: mebibytes, goal: goal{bound: 64 << 20, absolute: true}}, "ext4", nil, "64.0 (64.0–65.0) | – | ≤ 64.0 | yes"},
		{row{load: l, metric: kiloIOPS, goal: goal{bound: 2}}, "ext4", nil, "4.0 (3.0–5.0) | – | ≥ 2 × | –"},
	} {
		if got := strings.Join(s.line(section{}, c.row, c.fs, c.peers), " | "); got != c.want {
			t.Errorf("got  %s\nwant %s", got, c.want)
		}
	}

	var out bytes.Buffer
	s.report(&out, []section{{title: "T", note: "N", rows: []row{{title: "what it is", load: l, metric: kiloIOPS}}}}, peers)
	lines := strings.Split(strings.TrimSpace(out.String()), "\n")
	if len(lines) != 8 || strings.Count(lines[4], "|") != strings.Count(lines[7], "|") {
		t.Errorf("not one table of two rows:\n%s", out.String())
	}
}

func TestNeedsShareLoads(t *testing.T) {
	peers := peerServers()
	all := needs(sections(), peers)
	seen := map[string]bool{}
	for _, n := range all {
		if seen[n.load.name] {
			t.Errorf("load %q stands for two", n.load.name)
		}
		seen[n.load.name] = true
		for i, name := range n.servers {
			for _, other := range n.servers[i+1:] {
				if name == other {
					t.Errorf("%s measures %s twice a round", n.load.name, name)
				}
			}
		}
	}
	// One random-read load feeds the rates, the CPU seconds, and what is compared
	// with ourselves.
	n := all[1]
	for _, name := range []string{platter, platterApart, platterMapped, "nbdkit", "q-s-d io_uring", daemonMapped} {
		if n.load.name != "random read 64" || !slices.Contains(n.servers, name) {
			t.Errorf("%s is measured with %v, not with %s", n.load.name, n.servers, name)
		}
	}
}

func TestOnlyChoosesRows(t *testing.T) {
	for only, want := range map[string][2]int{
		"":                           {15, len(flatten(sections()))},
		"^(cpu|copy)":                {2, 3},
		"random/generator, depth 1$": {1, 1},
	} {
		got, err := options{only: only}.sections()
		if err != nil || len(got) != want[0] || len(flatten(got)) != want[1] {
			t.Errorf("%q: %d sections, %d rows, %v; want %v", only, len(got), len(flatten(got)), err, want)
		}
	}
	for _, bad := range []string{"no such thing", "("} {
		if _, err := (options{only: bad}).sections(); err == nil {
			t.Errorf("accepted %q", bad)
		}
	}
}

func flatten(sections []section) (rows []row) {
	for _, s := range sections {
		rows = append(rows, s.rows...)
	}
	return rows
}

func TestParseFio(t *testing.T) {
	got, err := parseFio([]byte("fio: connected to NBD server\n" + `{"jobs":[{"error":0,"read":{"iops":1234.5},"write":{"iops":0}}]}`))
	if err != nil || got.rate != 1234.5 {
		t.Errorf("%v, %v", got, err)
	}
	for _, bad := range []string{"", "no report", `{"jobs":[]}`, `{"jobs":[{"error":5,"read":{"iops":9}}]}`, `{"jobs":[{"read":{"iops":0}}]}`} {
		if _, err := parseFio([]byte(bad)); err == nil {
			t.Errorf("accepted %q", bad)
		}
	}
}

func TestGeneratorRefusesUnknownWords(t *testing.T) {
	for _, g := range []generator{{rw: "erase", pattern: "rand"}, {rw: "read", pattern: "zigzag"}} {
		if err := g.run(&bytes.Buffer{}); err == nil || !strings.Contains(err.Error(), "need") {
			t.Errorf("%+v: %v", g, err)
		}
	}
}

func TestCPUTimeCountsThisProcess(t *testing.T) {
	before, err := cpuTime(1<<22 + 1) // above the largest there is
	if err == nil {
		t.Errorf("a process that cannot exist used %v", before)
	}
	before, err = cpuTime(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	for begin := time.Now(); time.Since(begin) < 20*time.Millisecond; {
	}
	after, err := cpuTime(os.Getpid())
	if err != nil || after <= before {
		t.Errorf("CPU time went from %v to %v: %v", before, after, err)
	}
}

func TestFailingServerIsReported(t *testing.T) {
	broken := server{name: "broken", command: func(image, socket string) []string {
		return []string{"sh", "-c", "echo first >&2; echo the cause >&2; exit 1"}
	}}
	_, err := broken.start(context.Background(), "", t.TempDir())
	if err == nil || !strings.Contains(err.Error(), "broken") || !strings.Contains(err.Error(), "the cause") {
		t.Errorf("got %v", err)
	}
	var notices bytes.Buffer
	if got, err := probe(context.Background(), []server{broken}, &image{}, t.TempDir(), "", &notices); err != nil || len(got) != 0 || notices.Len() == 0 {
		t.Errorf("broken peer: %v, %v, %q", got, err, notices.String())
	}
	broken.ours = true
	if _, err := probe(context.Background(), []server{broken}, &image{}, t.TempDir(), "", &notices); err == nil {
		t.Error("broken platter was left out in silence")
	}
}
