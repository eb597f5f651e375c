package main

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"platter/integration/loadgen"
)

// metric is a figure of a sample.
type metric struct {
	of     func(sample) float64
	format func(float64) string
	less   bool // the smaller the better
}

func number(decimals int, scale float64) func(float64) string {
	return func(v float64) string { return fmt.Sprintf("%.*f", decimals, v*scale) }
}

var (
	kiloIOPS   = metric{of: func(s sample) float64 { return s.rate }, format: number(1, 1e-3)}
	megabytes  = metric{of: func(s sample) float64 { return s.rate }, format: number(0, 1e-6)}
	cpuMillion = metric{of: func(s sample) float64 { return s.cpu }, format: number(2, 1e6), less: true}
	latency50  = metric{of: func(s sample) float64 { return s.p50.Seconds() }, format: number(1, 1e6), less: true}
	latency99  = metric{of: func(s sample) float64 { return s.p99.Seconds() }, format: number(1, 1e6), less: true}
	mebibytes  = metric{of: func(s sample) float64 { return s.memory }, format: number(1, 1.0/(1<<20)), less: true}
	fileWrites = metric{of: func(s sample) float64 { return s.fileWrites }, format: number(4, 1), less: true}
	fileBytes  = metric{of: func(s sample) float64 { return s.fileBytes }, format: number(3, 1), less: true}
	idealIOPS  = metric{of: func(s sample) float64 { return max(s.ideal, s.rate) }, format: number(1, 1e-3)}
	readyTime  = metric{of: func(s sample) float64 { return s.ready.Seconds() }, format: number(1, 1e3), less: true}
)

// goal is what a row must reach: a bound on our figure as a multiple of the
// best other column's, or, absolute, on the figure itself. The metric says
// whether it is a lower or an upper bound. The zero value demands nothing.
type goal struct {
	bound    float64
	absolute bool
}

// row is one line of a table for each file system.
type row struct {
	title  string
	load   *load
	ours   string          // which of our servers fills the first column; default platter
	metric metric          // what is shown and compared
	goal   goal            // on every file system…
	goalOn map[string]goal // …but these
}

// section is one table. The first column is ours, the others are what it is
// compared to: the peers, unless others are named.
type section struct {
	name, title, note string
	columns           []string // headings of a table that compares us with ourselves
	against           []string // servers of its columns after the first
	paired            bool     // compare round by round instead of the medians
	rows              []row
}

// spin is how long the generator looks for replies before it sleeps, where client
// and server have a processor each.
const spin = 100 * time.Microsecond

// sections lists everything that is measured. Rows that share a load share its
// runs, within a section and between sections.
func sections() []section {
	const random = true
	var (
		fio64  = fioRandomRead("fio random read 64", 64)
		fio1   = fioRandomRead("fio random read 1", 1)
		read64 = generated("random read 64", loadgen.Config{Random: random, Depth: 64, Spin: spin})
		read1  = generated("random read 1", loadgen.Config{Random: random, Depth: 1, Spin: spin})
		slept1 = generated("random read 1, sleeping", loadgen.Config{Random: random, Depth: 1})
		two    = generated("random read 64, 2 connections", loadgen.Config{Random: random, Depth: 64, Conns: 2})

		seqRead  = generated("sequential read 64", loadgen.Config{Depth: 64, Spin: spin})
		seqLarge = generated("sequential read 64k 32", loadgen.Config{Depth: 32, BlockSize: 64 << 10, Spin: spin})
		seqWrite = generated("sequential write 64", loadgen.Config{Depth: 64, Write: true, Spin: spin})
		unmerged = generated("random read 64, on and off", loadgen.Config{Random: random, Depth: 64, Spin: spin})

		four        = generated("4 connections 4k", loadgen.Config{Random: random, Depth: 64, Conns: 4})
		randomWrite = generated("random write 64", loadgen.Config{Random: random, Depth: 64, Write: true, Spin: spin})

		write16     = loadgen.Config{Depth: 16, Batch: 16, BlockSize: 4 << 10, Requests: 16384, Write: true}
		write64     = loadgen.Config{Depth: 64, Batch: 64, BlockSize: 4 << 10, Requests: 16384, Write: true}
		write64half = loadgen.Config{Depth: 64, BlockSize: 4 << 10, Requests: 16384, Write: true}
		counted16   = counted("sequential write 16, counted", write16)
		counted64   = counted("sequential write 64, counted", write64)
		weighed16   = weighed("sequential write 16, weighed", write16)
		weighed64   = weighed("sequential write 64, weighed", write64)
		weighedHalf = weighed("sequential write 64, half at a time, weighed", write64half)
		spread4     = queues("random read 64, 4 connections or 1", loadgen.Config{Random: random, Depth: 64})

		fourLarge = generated("4 connections 64k", loadgen.Config{Random: random, Depth: 64, Conns: 4, BlockSize: 64 << 10})
		wholeCopy = copyToNull("nbdcopy")
		nothing   = &load{name: "no load", run: func(context.Context, *process, *image, time.Duration) (sample, error) { return sample{}, nil }}
	)
	unmerged.repeat = 4 // what merging costs where it gains nothing is far below a run's noise
	ratio := func(bound float64) goal { return goal{bound: bound} }
	atMost := func(bound float64) goal { return goal{bound: bound, absolute: true} }
	return []section{
		{
			name:  "random",
			title: "4k random reads, thousands of requests per second",
			note:  "fio sends a request at a time and is soon the bottleneck itself; the generator sends up to 32 per system call and, on one connection, looks for replies for 100 µs before it sleeps, so that its own wake-ups aren't measured (one row shows what they cost). Two connections are served by two loops.",
			rows: []row{
				{title: "fio, depth 64", load: fio64, metric: kiloIOPS, goal: ratio(1.3)},
				{title: "generator, depth 64", load: read64, metric: kiloIOPS, goal: ratio(2.5)},
				{title: "generator, depth 64, 2 connections", load: two, ours: platterTwoLoops, metric: kiloIOPS, goal: ratio(3)},
				{title: "generator, depth 1", load: read1, metric: kiloIOPS, goal: ratio(1.2)},
				{title: "generator that sleeps, depth 1", load: slept1, metric: kiloIOPS, goal: ratio(1.2)},
				{title: "fio, depth 1", load: fio1, metric: kiloIOPS, goal: ratio(1.2)},
			},
		},
		{
			name:    "merge",
			title:   "Merging on and off",
			note:    "Generator, one connection. Rates are thousands of requests per second, CPU is server seconds per million requests; ratios are medians of the rounds' ratios. The last line comes from four times as many runs.",
			columns: []string{"merge on", "merge off"},
			against: []string{platterNoMerge},
			paired:  true,
			rows: []row{
				{title: "4k sequential read, depth 64", load: seqRead, metric: kiloIOPS, goal: ratio(1.5)},
				{title: "4k sequential write, depth 64", load: seqWrite, metric: kiloIOPS, goal: ratio(1.3)},
				{title: "64k sequential read, depth 32", load: seqLarge, metric: kiloIOPS, goal: ratio(1.11)},
				{title: "4k random read, depth 64: CPU", load: unmerged, metric: cpuMillion, goal: ratio(1.02)},
			},
		},
		{
			name:    "joint",
			title:   "Writes of 4 KiB to a new qcow2 image, counted at the file",
			note:    "16,384 writes in order: writes of the file for each write of the guest, by strace, and bytes written for each of its bytes, as the kernel counts them. Metadata is included, which is some 30 of the writes. The generator sends as many as its depth at once.",
			columns: []string{"platter", daemonCounted, "platter, merge off"},
			against: []string{daemonCounted, platterUnmerged},
			rows: []row{
				{title: "writes, depth 16", load: counted16, ours: platterCounted, metric: fileWrites, goal: atMost(0.0645)},
				{title: "bytes, depth 16", load: weighed16, ours: platterCounted, metric: fileBytes, goal: atMost(1.02)},
				{title: "writes, depth 64", load: counted64, ours: platterCounted, metric: fileWrites, goal: atMost(0.0625)},
				{title: "bytes, depth 64", load: weighed64, ours: platterCounted, metric: fileBytes, goal: atMost(1.02)},
			},
		},
		{
			name:    "joint-overlay",
			title:   "The same over an allocated backing file",
			note:    "The overlay stands over a raw image full of data. When half is sent at a time, batches end within clusters, of which the rest is then copied from below, and written again by the next batch.",
			columns: []string{"platter", daemonOverlay},
			against: []string{daemonOverlay},
			rows: []row{
				{title: "writes, depth 16", load: counted16, ours: platterOverlay, metric: fileWrites, goal: atMost(0.0645)},
				{title: "bytes, depth 16", load: weighed16, ours: platterOverlay, metric: fileBytes, goal: atMost(1.05)},
				{title: "bytes, depth 64", load: weighed64, ours: platterOverlay, metric: fileBytes, goal: atMost(1.05)},
				{title: "bytes, depth 64, half at a time", load: weighedHalf, ours: platterOverlay, metric: fileBytes},
			},
		},
		{
			name:    "dispatch",
			title:   "Requests dispatched on the loop, beside a goroutine and memory for each",
			note:    "Generator, one connection, a raw image. `--bypass off` hands every request to a goroutine of its own, in memory of its own, and back to the loop: what most servers do.",
			columns: []string{"bypass on", "bypass off"},
			against: []string{platterApart},
			paired:  true,
			rows:    []row{{title: "4k random read, depth 64", load: read64, metric: kiloIOPS, goal: ratio(1.3)}},
		},
		{
			name:    "queues",
			title:   "Four queues on two loops, beside one queue on one loop",
			note:    "Generator, 4k random reads, depth 64 on each connection. It needs processors too: the ideal is what all of them come to with the time that client and server take for a request of one queue.",
			columns: []string{"4 queues, 2 loops", "1 queue, 1 loop"},
			against: []string{platter},
			paired:  true,
			rows: []row{
				{title: "thousands of requests per second", load: spread4, ours: platterTwoLoops, metric: kiloIOPS},
				{title: "beside the ideal", load: spread4, ours: platterTwoLoops, metric: idealIOPS},
			},
		},
		{
			name:    "qcow2-raw",
			title:   "qcow2 with every cluster mapped, beside our raw",
			note:    "Generator, one connection, clusters of 64 KiB. Thousands of requests per second; ratios are medians of the rounds' ratios.",
			columns: []string{"qcow2", "raw"},
			against: []string{platter},
			paired:  true,
			rows: []row{
				{title: "4k random read, depth 64", load: read64, ours: platterMapped, metric: kiloIOPS, goal: ratio(0.95)},
				{title: "4k random write, depth 64", load: randomWrite, ours: platterMapped, metric: kiloIOPS, goal: ratio(0.95)},
				{title: "64k sequential read, depth 32", load: seqLarge, ours: platterMapped, metric: kiloIOPS, goal: ratio(0.95)},
			},
		},
		{
			name:    "qcow2",
			title:   "qcow2 with every cluster mapped, beside qemu-storage-daemon",
			note:    "The same. Random writes to a cached ext4 file are bounded by the kernel, at some 25 thousand for every server.",
			columns: []string{"platter", daemonMapped},
			against: []string{daemonMapped},
			rows: []row{
				{title: "4k random read, depth 64", load: read64, ours: platterMapped, metric: kiloIOPS, goal: ratio(2.5)},
				{title: "4k random write, depth 64", load: randomWrite, ours: platterMapped, metric: kiloIOPS, goalOn: map[string]goal{"tmpfs": ratio(2.5)}},
			},
		},
		{
			name:    "fresh",
			title:   "An empty qcow2 image, beside qemu-storage-daemon",
			note:    "A new image of 16 GiB for each run, so that nearly every random write needs a new cluster.",
			columns: []string{"platter", daemonFresh},
			against: []string{daemonFresh},
			rows: []row{
				{title: "4k random write, depth 64", load: randomWrite, ours: platterFresh, metric: kiloIOPS, goalOn: map[string]goal{"tmpfs": ratio(8)}},
				{title: "4k sequential write, depth 64", load: seqWrite, ours: platterFresh, metric: kiloIOPS, goal: ratio(3)},
			},
		},
		{
			name:    "fresh-raw",
			title:   "An empty qcow2 image, beside our raw",
			note:    "Raw is the fully written image, and an empty file: new pages of a file cost the kernel more than the copy.",
			columns: []string{"qcow2", "raw", "empty raw"},
			against: []string{platter, platterFreshRaw},
			rows: []row{
				{title: "4k random write, depth 64", load: randomWrite, ours: platterFresh, metric: kiloIOPS, goalOn: map[string]goal{"tmpfs": ratio(0.5)}},
			},
		},
		{
			name:  "cpu",
			title: "Server CPU seconds per million 4k random reads",
			note:  "Generator. All threads of the server's process, in user and kernel mode.",
			rows: []row{
				{title: "depth 64", load: read64, metric: cpuMillion, goal: ratio(0.5)},
				{title: "depth 1", load: read1, metric: cpuMillion},
			},
		},
		{
			name:  "copy",
			title: "nbdcopy of the whole image to null:, MB/s",
			note:  "nbdcopy opens up to four connections where the server says that it may.",
			rows:  []row{{title: "nbdcopy", load: wholeCopy, ours: platterTwoLoops, metric: megabytes}},
		},
		{
			name:  "memory",
			title: "Memory and start",
			note:  "Peak resident memory with 4 connections at depth 64, and the time from exec to the ready line (for peers: to the first connection accepted).",
			rows: []row{
				{title: "4k random reads: MiB", load: four, ours: platterTwoLoops, metric: mebibytes, goal: atMost(64 << 20)},
				{title: "64k random reads: MiB", load: fourLarge, ours: platterTwoLoops, metric: mebibytes},
				{title: "ready: ms", load: four, ours: platterTwoLoops, metric: readyTime, goal: atMost(0.05)},
			},
		},
		{
			name:    "huge",
			title:   "A qcow2 image of 10 TiB with a million allocated clusters",
			note:    "From exec to the ready line, and the peak of resident memory until then.",
			columns: []string{"platter"},
			against: []string{},
			rows: []row{
				{title: "ready: ms", load: nothing, ours: platterHuge, metric: readyTime, goal: atMost(0.05)},
				{title: "memory: MiB", load: nothing, ours: platterHuge, metric: mebibytes, goal: atMost(32 << 20)},
			},
		},
		{
			name:  "latency",
			title: "Latency of a 4k random read at depth 1, µs",
			note:  "Generator; from send to the end of the reply.",
			rows: []row{
				{title: "median", load: read1, metric: latency50},
				{title: "99th percentile", load: read1, metric: latency99},
			},
		},
	}
}

// sectionNames lists the names of all sections.
func sectionNames() string {
	var names []string
	for _, s := range sections() {
		names = append(names, s.name)
	}
	return strings.Join(names, ", ")
}

// goalFor is the row's goal on a file system.
func (r row) goalFor(fs string) goal {
	if g, ok := r.goalOn[fs]; ok {
		return g
	}
	return r.goal
}

// servers names the row's servers, in the order of the section's columns.
func (r row) servers(s section, peers []server) []string {
	names := []string{platter}
	if r.ours != "" {
		names[0] = r.ours
	}
	if s.against != nil {
		return append(names, s.against...)
	}
	for _, p := range rawPeers(peers) {
		names = append(names, p.name)
	}
	return names
}

// rawPeers are the peers that are compared where nobody else is named.
func rawPeers(peers []server) []server {
	return slices.DeleteFunc(slices.Clone(peers), func(p server) bool { return p.disk != rawDisk })
}

// without drops sections that compare us with a peer that isn't there.
func without(sections []section, servers []server) []section {
	return slices.DeleteFunc(sections, func(s section) bool {
		return slices.ContainsFunc(s.against, func(name string) bool {
			return !slices.ContainsFunc(servers, func(c server) bool { return c.name == name })
		})
	})
}

// need is one load with all servers that some row wants it for.
type need struct {
	load    *load
	servers []string
}

// needs collects the loads of all sections, in the order of first use.
func needs(sections []section, peers []server) []need {
	var all []need
	for _, s := range sections {
		for _, r := range s.rows {
			at := slices.IndexFunc(all, func(n need) bool { return n.load == r.load })
			if at < 0 {
				at = len(all)
				all = append(all, need{load: r.load})
			}
			for _, name := range r.servers(s, peers) {
				if !slices.Contains(all[at].servers, name) {
					all[at].servers = append(all[at].servers, name)
				}
			}
		}
	}
	return all
}
