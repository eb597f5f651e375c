package cli

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"platter/export/nbd/nbdtest"
	"platter/integration/testenv"
)

// outcome is what a command line left behind.
type outcome struct {
	stdout, stderr string
	code           int
	err            error
}

// platter carries out a command line.
func platter(t *testing.T, args ...string) outcome {
	t.Helper()
	var stdout, stderr bytes.Buffer
	type ended struct{}
	var o outcome
	func() {
		defer func() {
			if r := recover(); r != nil {
				if _, ok := r.(ended); !ok {
					panic(r)
				}
			}
		}()
		o.err = run(args, &app{version: "v1.2.3", stdout: &stdout, stderr: &stderr}, func(int) { panic(ended{}) })
	}()
	o.code = report(o.err, &stderr)
	o.stdout, o.stderr = stdout.String(), stderr.String()
	return o
}

// command runs a command line and returns what it printed.
func command(t *testing.T, args ...string) (string, error) {
	t.Helper()
	o := platter(t, args...)
	return o.stdout, o.err
}

// must runs a command line that must succeed, and returns what it printed.
func must(t *testing.T, args ...string) string {
	t.Helper()
	o := platter(t, args...)
	if o.code != 0 {
		t.Fatalf("platter %q: exit status %d, %s", args, o.code, o.stderr)
	}
	return o.stdout
}

// refused runs a command line that must fail as bad input does: with exit status
// 1, an error that has all of the words, and nothing on standard output.
func refused(t *testing.T, args []string, words ...string) {
	t.Helper()
	o := platter(t, args...)
	if o.code != 1 || o.stdout != "" || !strings.HasPrefix(o.stderr, "platter: error: ") {
		t.Errorf("platter %q: exit status %d, printed %q and %q", args, o.code, o.stdout, o.stderr)
	}
	for _, word := range words {
		if !strings.Contains(o.stderr, word) {
			t.Errorf("platter %q: no %q in %q", args, word, o.stderr)
		}
	}
}

func TestVersion(t *testing.T) {
	if out, err := command(t, "version"); err != nil || !strings.HasPrefix(out, "platter v1.2.3 (go") || strings.Count(out, "\n") != 1 {
		t.Errorf("%q, %v", out, err)
	}
}

func TestHelp(t *testing.T) {
	for args, words := range map[string][]string{
		"--help": {"serve", "create", "convert", "info", "map", "check", "version", "completion"},
		"serve --help": {"--nbd", "--name", "--read-only", "--format", "--create", "--aio", "--cache", "--loops", "--queues", "--queue-loops", "--merge", "--force-share",
			"--snapshot", "--metadata-cache", "--merge-gap", "--allow-dir", "tcp://127.0.0.1:10809", "<image>"},
		"info --help":    {"--output", "--format", "--force-share", "--backing-chain", "--snapshot", "--allow-dir"},
		"map --help":     {"--output", "--format", "--force-share", "--start-offset", "--max-length", "--allow-dir", "--metadata-cache"},
		"check --help":   {"--output", "--format", "--force-share", "--repair", "--quiet", "63"},
		"create --help":  {"--format", "--options", "--backing", "--backing-format", "[<size>]"},
		"convert --help": {"--format", "--output-format", "--options", "--compress", "--snapshot", "--quiet", "--allow-dir", "--metadata-cache"},
	} {
		out, err := command(t, strings.Fields(args)...)
		for _, word := range words {
			if err != nil || !strings.Contains(out, word) {
				t.Errorf("platter %s: %v: no %q in\n%s", args, err, word, out)
			}
		}
	}
}

func TestCompletion(t *testing.T) {
	for _, shell := range []string{"bash", "zsh", "fish"} {
		if out, err := command(t, "completion", "-c", shell); err != nil || !strings.Contains(out, "platter") {
			t.Errorf("%s: %q, %v", shell, out, err)
		}
	}
}

func TestUsageErrors(t *testing.T) {
	for args, word := range map[string]string{
		"":                                  "expected",
		"nosuch":                            "nosuch",
		"serve":                             "image",
		"serve --nosuch x":                  "--nosuch",
		"serve --nbd nonsense x":            "nonsense",
		"serve --create 1.5 x":              "fraction",
		"serve --create 16E x":              "16E",
		"serve --cache nosuch x":            "writeback",
		"serve --aio nosuch x":              "native",
		"serve --name n a b":                "NAME=PATH",
		"info":                              "image",
		"info --output xml x":               "json",
		"info /nonexistent":                 "no such file",
		"info --snapshot":                   "snapshot",
		"map --output xml x":                "json",
		"map --start-offset x y":            "not a size",
		"map --max-length -1 x":             "max-length",
		"map /nonexistent":                  "no such file",
		"check --repair some x":             "leaks",
		"check --output xml x":              "json",
		"check /nonexistent":                "no such file",
		"check --format nosuch /dev/zero":   "nosuch",
		"check":                             "image",
		"create x 1.5":                      "fraction",
		"create -f vdi x 1M":                "qcow2",
		"create":                            "image",
		"convert x":                         "destination",
		"convert -O vdi x y":                "qcow2",
		"convert /nonexistent /y":           "no such file",
		"serve --metadata-cache many x":     "not a size",
		"serve --merge-gap 257K x":          "choose at most 256 KiB",
		"--log-level loud serve x":          "log-level",
		"serve --loops many x":              "loops",
		"serve --queues many x":             "queues",
		"serve --queue-loops a,b x":         "counted from 0",
		"serve --queue-loops= x":            "counted from 0",
		"serve --queue-loops=-1 x":          "no loop -1",
		"serve --nbd unix:///nowhere/s.s x": "folder doesn't exist",
	} {
		if out, err := command(t, strings.Fields(args)...); err == nil || !strings.Contains(err.Error(), word) || out != "" {
			t.Errorf("platter %s: %v, want %q; printed %q", args, err, word, out)
		}
	}
}

// A server is made, used, and ended, with several images and addresses.
func TestServe(t *testing.T) {
	dir := testenv.ShortDir(t)
	socket := filepath.Join(dir, "nbd.sock")
	one, two := filepath.Join(dir, "one.raw"), filepath.Join(dir, "two.raw")
	c := parseServe(t, "--nbd", "unix://"+socket, "--nbd", "tcp://127.0.0.1:0", "--create", "1M", "first="+one, two)
	s, err := c.start()
	if err != nil {
		t.Fatal(err)
	}
	ready := s.ready()
	if !strings.HasPrefix(ready, "platter: serving 2 images at nbd+unix:///?socket="+socket+" and nbd://127.0.0.1:") || strings.Contains(ready, ":0/") {
		t.Error(ready)
	}
	for _, name := range []string{"first", "two.raw"} {
		client, err := nbdtest.Dial("unix", socket, name)
		if err != nil {
			t.Fatal(err)
		}
		if client.Size != 1<<20 {
			t.Errorf("%s has %d bytes", name, client.Size)
		}
		if err := client.Write(5, []byte(name)); err != nil {
			t.Error(err)
		}
		// The format was guessed, so this is refused.
		if err := client.Write(0, []byte("QFI\xfb\x00\x00\x00\x03")); !errors.Is(err, nbdtest.EPERM) {
			t.Errorf("the header of another format: %v", err)
		}
		client.Close()
	}
	if err := s.stop(); err != nil {
		t.Error(err)
	}
	for name, path := range map[string]string{"first": one, "two.raw": two} {
		if data, err := os.ReadFile(path); err != nil || len(data) != 1<<20 || !bytes.HasPrefix(data[5:], []byte(name)) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := os.Stat(socket); !os.IsNotExist(err) {
		t.Errorf("the socket is left: %v", err)
	}
}

func parseServe(t *testing.T, args ...string) *serveCmd {
	t.Helper()
	c, _, err := parse(append([]string{"serve"}, args...), &app{stdout: &bytes.Buffer{}}, func(int) {})
	if err != nil {
		t.Fatal(err)
	}
	return &c.Serve
}

// --create makes a qcow2 image when that is the format, and keeps one that
// exists.
func TestServeCreatesQcow2(t *testing.T) {
	dir := testenv.ShortDir(t)
	socket, path := filepath.Join(dir, "nbd.sock"), filepath.Join(dir, "disk.qcow2")
	for round, want := range []string{"\x00\x00\x00", "abc"} {
		s, err := parseServe(t, "--nbd", "unix://"+socket, "--create", "1M", "--format", "qcow2", "--metadata-cache", "1M", "--allow-dir", dir, path).start()
		if err != nil {
			t.Fatal(err)
		}
		client, err := nbdtest.Dial("unix", socket, "")
		if err != nil {
			t.Fatal(err)
		}
		got := make([]byte, 3)
		if err := client.Read(70000, got); err != nil || string(got) != want {
			t.Errorf("round %d: %q, %v", round, got, err)
		}
		if err := client.Write(70000, []byte("abc")); err != nil {
			t.Error(err)
		}
		client.Close()
		if err := s.stop(); err != nil {
			t.Error(err)
		}
	}
	if out := must(t, "check", path); !strings.HasPrefix(out, "No errors") {
		t.Error(out)
	}
}

// What can't be served leaves nothing behind: no socket, no lock, no image.
func TestServeFails(t *testing.T) {
	dir := testenv.ShortDir(t)
	socket, good := filepath.Join(dir, "nbd.sock"), testenv.Image(t, dir, "good.raw", 1<<20, nil)
	made := filepath.Join(dir, "made.raw")
	for args, word := range map[string]string{
		"--loops=-1 " + good:                               "--loops",
		"--loops 257 " + good:                              "256",
		"--queues=-1 " + good:                              "1024",
		"--queues 1025 " + good:                            "1024",
		"--loops 2 --queue-loops 0,2 " + good:              "0 to 1",
		"--queue-loops nosuch=0 " + good:                   `"nosuch"`,
		"--queue-loops 0 --queue-loops 0 " + good:          "two lists",
		"--create 0 " + made:                               "size of 0",
		"--create 1M --read-only " + made:                  "--read-only",
		"--create 1M --format vdi " + made:                 "vdi",
		"--create 4E --format qcow2 " + made:               "size",
		"--snapshot one " + good:                           "--read-only",
		"--snapshot one --read-only " + good:               "raw image",
		"--force-share " + good:                            "read-only",
		good + " " + dir + "/missing":                      "--create",
		"--read-only x=" + good + " x=" + good:             `"x"`,
		"--name " + strings.Repeat("n", 4097) + " " + good: "4096",
		"--nbd unix://" + socket + " " + good:              "in use",
	} {
		c := parseServe(t, append([]string{"--nbd", "unix://" + socket}, strings.Fields(args)...)...)
		if _, err := c.start(); err == nil || !strings.Contains(err.Error(), word) {
			t.Errorf("%s: %v, want %q", args, err, word)
		}
		if _, err := os.Stat(socket); !os.IsNotExist(err) {
			t.Errorf("%s: the socket is left", args)
		}
		if _, err := os.Stat(made); !os.IsNotExist(err) {
			t.Errorf("%s: the image was made", args)
		}
	}
	s, err := parseServe(t, "--nbd", "unix://"+socket, good).start() // no lock is left
	if err != nil {
		t.Fatal(err)
	}
	if err := s.stop(); err != nil {
		t.Error(err)
	}
}

// --queue-loops decides which loop serves which connection, of one export or of
// all, and --queues how many there are.
func TestServeQueues(t *testing.T) {
	dir := testenv.ShortDir(t)
	socket := filepath.Join(dir, "nbd.sock")
	a, b := testenv.Image(t, dir, "a", 1<<20, nil), testenv.Image(t, dir, "b", 1<<20, nil)
	s, err := parseServe(t, "--nbd", "unix://"+socket, "--loops", "3", "--queues", "2", "--queue-loops", "0,1,2", "--queue-loops", "b=2,2,1", a, b).start()
	if err != nil {
		t.Fatal(err)
	}
	for i, want := range [][]int{{0, 1, 2}, {2, 2, 1}} {
		for j, l := range s.exports[i].Loops() {
			if len(want) != len(s.exports[i].Loops()) || l != s.loops[want[j]] {
				t.Errorf("export %d, queue %d: another loop", i, j)
			}
		}
	}
	for range 2 {
		client, err := nbdtest.Dial("unix", socket, "a")
		if err != nil {
			t.Fatal(err)
		}
		defer client.Close()
		if err := client.Flush(); err != nil {
			t.Error(err)
		}
	}
	client, err := nbdtest.Dial("unix", socket, "a")
	if err == nil {
		if err = client.Flush(); err == nil {
			t.Error("a third connection is served")
		}
		client.Close()
	}
	if err := s.stop(); err != nil {
		t.Error(err)
	}
}

// A socket that a killed server left is replaced; any other file is not.
func TestListen(t *testing.T) {
	dir := testenv.ShortDir(t)
	path := filepath.Join(dir, "file")
	if err := os.WriteFile(path, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	c := parseServe(t, "--nbd", "unix://"+path, "x")
	if _, err := listen(c.NBD[0]); err == nil || !strings.Contains(err.Error(), "in use") || !strings.Contains(err.Error(), path) {
		t.Error(err)
	}
	if data, _ := os.ReadFile(path); string(data) != "precious" {
		t.Error("the file was replaced")
	}
}
