package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"slices"
	"time"
)

// cell is where samples belong: one load against one server on one file system.
type cell struct {
	fs, load, server string
}

// session measures; results hold one sample per round and cell.
type session struct {
	servers  []server
	images   []*image
	rounds   int
	length   time.Duration // of each run
	progress io.Writer
	binary   string // platter, which makes images
	dir      string // for sockets
	results  map[cell][]sample
}

// probe starts each server once and returns those that work. A peer that does
// not, because its tool is missing or io_uring is forbidden, is left out with a
// notice; ours must work.
func probe(ctx context.Context, servers []server, img *image, dir, binary string, notices io.Writer) ([]server, error) {
	var working []server
	for _, s := range servers {
		img, err := s.onDisk(ctx, img, binary)
		if err != nil {
			return nil, err
		}
		p, err := s.start(ctx, img.path, dir)
		switch {
		case err == nil:
			p.stop()
			working = append(working, s)
		case s.ours || ctx.Err() != nil:
			return nil, err
		default:
			fmt.Fprintf(notices, "left out: %v\n", err)
		}
	}
	return working, nil
}

// run carries the needs out. Servers take turns in every round, each time with
// a fresh process and each round with another one first, so that a drift of the
// machine meets all of them alike.
func (s *session) run(ctx context.Context, needs []need) error {
	s.results = map[cell][]sample{}
	for _, img := range s.images {
		for _, n := range needs {
			fmt.Fprintf(s.progress, "%s: %s\n", img.fs, n.load.name)
			rounds := s.rounds * max(1, n.load.repeat)
			if n.load.once {
				rounds = 1
			}
			for round := range rounds {
				for i := range n.servers {
					name := n.servers[(i+round)%len(n.servers)]
					at := slices.IndexFunc(s.servers, func(c server) bool { return c.name == name })
					got, err := s.measure(ctx, s.servers[at], img, n.load)
					if err != nil {
						return fmt.Errorf("measure %s on %s with %s: %w", n.load.name, img.fs, name, err)
					}
					c := cell{img.fs, n.load.name, name}
					s.results[c] = append(s.results[c], got)
				}
			}
		}
	}
	return nil
}

// measure runs one load against a fresh process of the server.
func (s *session) measure(ctx context.Context, contender server, img *image, l *load) (sample, error) {
	if err := ctx.Err(); err != nil {
		return sample{}, err
	}
	img, err := contender.onDisk(ctx, img, s.binary)
	if err != nil {
		return sample{}, err
	}
	if contender.disk == rawDisk || contender.disk == mappedDisk {
		if err := img.warm(); err != nil {
			return sample{}, err
		}
	}
	p, err := contender.start(ctx, img.path, s.dir)
	if err != nil {
		return sample{}, err
	}
	defer func() {
		p.stop()
		if l.writes {
			if err := img.settle(); err != nil {
				fmt.Fprintln(os.Stderr, "bench:", err)
			}
		}
	}()
	got, err := l.run(ctx, p, img, s.length)
	if err == nil {
		got.ready = p.ready
		got.memory, err = p.peakMemory()
	}
	return got, p.explain(err)
}
