package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"regexp"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// writeHeader says what was measured, how, and on what kind of machine.
func (s *session) writeHeader(ctx context.Context, out io.Writer, title string) {
	fmt.Fprintf(out, "# %s\n\n", title)
	size := s.images[0].size >> 20
	fmt.Fprintf(out, "A fully written raw image of %d MiB, cached in memory, served over a Unix socket. Every figure is the median (lowest–highest) of %d runs of %v, ", size, s.rounds, s.length)
	fmt.Fprintln(out, "for which the servers take turns, each time with a fresh process. The best figure of the others is in bold; the ratio is to that one.")
	fmt.Fprintln(out)
	facts := [][2]string{{"processor", fmt.Sprintf("%d cores, %s", runtime.NumCPU(), processor())}}
	var uts unix.Utsname
	if unix.Uname(&uts) == nil {
		facts = append(facts, [2]string{"kernel", unix.ByteSliceToString(uts.Release[:])})
	}
	facts = append(facts, [2]string{"Go", strings.TrimPrefix(runtime.Version(), "go")})
	for _, tool := range []string{"qemu-nbd", "qemu-storage-daemon", "nbdkit", "nbdcopy", "fio"} {
		facts = append(facts, [2]string{tool, toolVersion(ctx, tool)})
	}
	for _, f := range facts {
		fmt.Fprintf(out, "- %s: %s\n", f[0], f[1])
	}
}

// processor is the processor's model, where the kernel names it.
func processor() string {
	info, err := os.ReadFile("/proc/cpuinfo")
	if err == nil {
		for line := range strings.Lines(string(info)) {
			if key, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(key) == "model name" {
				return strings.TrimSpace(value)
			}
		}
	}
	return runtime.GOARCH
}

var versionNumber = regexp.MustCompile(`\d+(\.\d+)+`)

// toolVersion is the number in what a tool says to --version.
func toolVersion(ctx context.Context, tool string) string {
	out, err := runTool(ctx, time.Second, tool, "--version")
	if v := versionNumber.Find(out); err == nil && v != nil {
		return string(v)
	}
	return "not available"
}
