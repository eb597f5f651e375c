package cli

import (
	"bytes"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"platter/integration/testenv"
)

// terminal opens a terminal, and returns with it a function that closes it and
// tells what was shown.
func terminal(t *testing.T) (tty *os.File, shown func() string) {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0)
	if err != nil {
		testenv.Skip(t, "no terminal to be had: "+err.Error())
	}
	if err := unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(int(master.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	tty, err = os.OpenFile("/dev/pts/"+strconv.Itoa(n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	text := make(chan string)
	go func() {
		b, _ := io.ReadAll(master) // ends with an error when the terminal is closed
		text <- string(b)
	}()
	t.Cleanup(func() { master.Close() })
	return tty, func() string {
		tty.Close()
		return <-text
	}
}

// Progress is shown on a terminal, and taken away again in the end.
func TestProgressOnTerminal(t *testing.T) {
	dir := t.TempDir()
	source := testenv.Image(t, dir, "source.raw", 32<<20, bytes.Repeat(testenv.Pattern(1<<20, 1), 32))
	image := filepath.Join(dir, "image.qcow2")
	must(t, "convert", "-O", "qcow2", source, image)
	setRefcount(t, image, 0, 3)
	for args, words := range map[string][]string{
		"convert " + source + " " + filepath.Join(dir, "new"): {"convert ", "%", "iB"},
		"check " + image: {"check ", "%", "cluster 0 "},
	} {
		tty, shown := terminal(t)
		var stdout bytes.Buffer
		_ = run(strings.Fields(args), &app{stdout: &stdout, stderr: tty}, func(int) {})
		text := shown()
		for _, word := range words {
			if !strings.Contains(text, word) {
				t.Errorf("%s: no %q in %q", args, word, text)
			}
		}
		last := text[strings.LastIndexByte(strings.TrimRight(text, "\r\n"), '\r')+1:]
		if strings.Contains(last, "|") || strings.Contains(stdout.String(), "%|") || strings.Contains(stdout.String(), "\r") {
			t.Errorf("%s: the bar is left: %q, %q", args, text, &stdout)
		}
	}
}

// Nobody else sees it: --quiet, a file, a pipe.
func TestNoProgress(t *testing.T) {
	dir := t.TempDir()
	source := testenv.Image(t, dir, "source.raw", 8<<20, bytes.Repeat(testenv.Pattern(1<<20, 1), 8))
	image := filepath.Join(dir, "image.qcow2")
	must(t, "convert", "-O", "qcow2", source, image)
	for _, args := range []string{"convert -q " + image, "check -q " + image} {
		tty, shown := terminal(t)
		if strings.HasPrefix(args, "convert") {
			args += " " + filepath.Join(dir, "quiet")
		}
		err := run(strings.Fields(args), &app{stdout: io.Discard, stderr: tty}, func(int) {})
		if text := shown(); err != nil || text != "" {
			t.Errorf("%s: %q, %v", args, text, err)
		}
	}
	for name, args := range map[string]string{"a": "convert " + image + " " + filepath.Join(dir, "loud"), "b": "check " + image} {
		log, err := os.Create(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		defer log.Close()
		if err := run(strings.Fields(args), &app{stdout: io.Discard, stderr: log}, func(int) {}); err != nil {
			t.Error(err)
		}
		if text, err := os.ReadFile(log.Name()); err != nil || len(text) > 0 {
			t.Errorf("%s: %q, %v", args, text, err)
		}
	}
}

// Both what is done and what there is may grow, and start over.
func TestProgressSet(t *testing.T) {
	tty, shown := terminal(t)
	p := (&app{stderr: tty}).progress("check", false)
	for _, at := range [][2]int64{{0, 0}, {1 << 20, 1 << 20}, {2 << 20, 4 << 20}, {0, 1 << 20}, {8 << 20, 8 << 20}} {
		p.set(at[0], at[1])
		if now := p.bar.State(); now.CurrentNum != at[0] || now.Max <= at[0] {
			t.Errorf("%v: the bar is at %d of %d", at, now.CurrentNum, now.Max)
		}
	}
	p.clear()
	if text := shown(); !strings.Contains(text, "check") {
		t.Errorf("%q", text)
	}
}
