package main

import (
	"fmt"
	"io"
	"slices"
	"strings"
)

// spread is what the samples of a cell come to.
type spread struct{ median, low, high float64 }

// spreadOf returns the spread of values, which must not be empty.
func spreadOf(values []float64) spread {
	v := slices.Sorted(slices.Values(values))
	middle := v[len(v)/2]
	if len(v)%2 == 0 {
		middle = (v[len(v)/2-1] + middle) / 2
	}
	return spread{middle, v[0], v[len(v)-1]}
}

// values is the figure of every sample, in the order of the rounds.
func (m metric) values(samples []sample) []float64 {
	out := make([]float64, len(samples))
	for i, s := range samples {
		out[i] = m.of(s)
	}
	return out
}

// best is the index of the best median among the columns but the first, or 0
// when there is no other.
func (m metric) best(columns [][]float64) int {
	at := 0
	for i := 1; i < len(columns); i++ {
		if at == 0 || (spreadOf(columns[i]).median < spreadOf(columns[at]).median) == m.less {
			at = i
		}
	}
	return at
}

// ratio compares the first column with another: of medians, or, paired, the
// median of the rounds' ratios.
func ratio(ours, other []float64, paired bool) float64 {
	if !paired {
		return spreadOf(ours).median / spreadOf(other).median
	}
	rounds := make([]float64, min(len(ours), len(other)))
	for i := range rounds {
		rounds[i] = ours[i] / other[i]
	}
	return spreadOf(rounds).median
}

// reached says whether a figure keeps to the bound.
func (m metric) reached(figure, bound float64) bool {
	if m.less {
		return figure <= bound
	}
	return figure >= bound
}

// report writes the tables of all sections.
func (s *session) report(out io.Writer, sections []section, peers []server) {
	for _, sec := range sections {
		fmt.Fprintf(out, "\n## %s\n\n%s\n\n", sec.title, sec.note)
		headings := sec.columns
		if headings == nil {
			headings = []string{platter}
			for _, p := range rawPeers(peers) {
				headings = append(headings, p.name)
			}
		}
		other := "best peer"
		if len(sec.against) > 0 {
			other = headings[1]
		}
		columns := append([]string{"file system", "what"}, headings...)
		columns = append(columns, headings[0]+" / "+other, "target", "reached")
		writeRow(out, columns)
		writeRow(out, slices.Repeat([]string{"---"}, len(columns)))
		for _, img := range s.images {
			for _, r := range sec.rows {
				writeRow(out, append([]string{img.fs, r.title}, s.line(sec, r, img.fs, peers)...))
			}
		}
	}
}

// line fills the columns of a row from the figures on.
func (s *session) line(sec section, r row, fs string, peers []server) []string {
	var (
		columns [][]float64
		cells   []string
	)
	for _, name := range r.servers(sec, peers) {
		v := r.metric.values(s.results[cell{fs, r.load.name, name}])
		sp := spreadOf(v)
		columns = append(columns, v)
		cells = append(cells, fmt.Sprintf("%s (%s–%s)", r.metric.format(sp.median), r.metric.format(sp.low), r.metric.format(sp.high)))
	}
	best := r.metric.best(columns)
	factor := 0.0
	if best == 0 {
		cells = append(cells, "–")
	} else {
		factor = ratio(columns[0], columns[best], sec.paired)
		cells[best] = "**" + cells[best] + "**"
		cells = append(cells, fmt.Sprintf("%.2f", factor))
	}

	g := r.goalFor(fs)
	sign := "≥"
	if r.metric.less {
		sign = "≤"
	}
	switch {
	case g.bound == 0:
		return append(cells, "", "")
	case g.absolute:
		return append(cells, sign+" "+r.metric.format(g.bound), verdict(r.metric.reached(spreadOf(columns[0]).median, g.bound)))
	case best == 0:
		return append(cells, fmt.Sprintf("%s %g ×", sign, g.bound), "–")
	}
	return append(cells, fmt.Sprintf("%s %g ×", sign, g.bound), verdict(r.metric.reached(factor, g.bound)))
}

func verdict(reached bool) string {
	if reached {
		return "yes"
	}
	return "**no**"
}

func writeRow(out io.Writer, cells []string) {
	fmt.Fprintf(out, "| %s |\n", strings.Join(cells, " | "))
}
