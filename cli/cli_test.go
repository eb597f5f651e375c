package cli

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"platter/export/nbd/nbdtest"
	"platter/integration/testenv"
)

// command runs a command line and returns what it printed.
func command(t *testing.T, args ...string) (string, error) {
	t.Helper()
	var out bytes.Buffer
	type ended struct{}
	var err error
	func() {
		defer func() {
			if r := recover(); r != nil {
				if _, ok := r.(ended); !ok {
					panic(r)
				}
			}
		}()
		err = run(args, &app{version: "v1.2.3", stdout: &out}, func(int) { panic(ended{}) })
	}()
	return out.String(), err
}

func TestVersion(t *testing.T) {
	if out, err := command(t, "version"); err != nil || !strings.HasPrefix(out, "platter v1.2.3 (go") || strings.Count(out, "\n") != 1 {
		t.Errorf("%q, %v", out, err)
	}
}

func TestHelp(t *testing.T) {
	for args, words := range map[string][]string{
		"--help":       {"serve", "info", "version", "completion"},
		"serve --help": {"--nbd", "--name", "--read-only", "--format", "--create", "--aio", "--cache", "--loops", "--merge", "--force-share", "tcp://127.0.0.1:10809", "<image>"},
		"info --help":  {"--output", "--format", "--force-share"},
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
		"serve --name n a b":                "NAME=PATH",
		"info":                              "image",
		"info --output xml x":               "json",
		"info /nonexistent":                 "no such file",
		"--log-level loud serve x":          "log-level",
		"serve --loops many x":              "loops",
		"serve --nbd unix:///nowhere/s.s x": "folder doesn't exist",
	} {
		if out, err := command(t, strings.Fields(args)...); err == nil || !strings.Contains(err.Error(), word) || out != "" {
			t.Errorf("platter %s: %v, want %q; printed %q", args, err, word, out)
		}
	}
}

// info prints what qemu-img prints, field by field.
func TestInfoJSON(t *testing.T) {
	tool := testenv.NeedTool(t, "qemu-img")
	dir := testenv.DiskDir(t)
	for name, size := range map[string]int64{"sparse.raw": 10 << 20, "odd.raw": 1000, "one.raw": 1, "large.raw": 3 << 30} {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte("x"), 0o644); err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(path, size); err != nil {
			t.Fatal(err)
		}
		theirs, err := exec.Command(tool, "info", "--output", "json", "-f", "raw", path).Output()
		if err != nil {
			t.Fatal(err)
		}
		ours, err := command(t, "info", "--output", "json", path)
		if err != nil {
			t.Fatal(err)
		}
		var a, b map[string]any
		if err := json.Unmarshal([]byte(ours), &a); err != nil {
			t.Fatal(err)
		}
		if err := json.Unmarshal(theirs, &b); err != nil {
			t.Fatal(err)
		}
		if _, ok := b["children"]; !ok { // before QEMU 8.2
			delete(a, "children")
		}
		sameFields(t, name, a, b, size)
		human, err := command(t, "info", path)
		if err != nil || !strings.Contains(human, "image: "+path+"\nfile format: raw\nvirtual size: ") || strings.Count(human, "\n") != 4 {
			t.Errorf("%q, %v", human, err)
		}
	}
}

// sameFields wants of each field of qemu-img's the same here. It gives the
// virtual size in whole sectors, platter in bytes.
func sameFields(t *testing.T, where string, ours, theirs map[string]any, size int64) {
	t.Helper()
	for key, want := range theirs {
		if key == "virtual-size" {
			if got := ours[key]; got != float64(size) {
				t.Errorf("%s: %s is %v, want %d", where, key, got, size)
			}
			continue
		}
		if list, ok := want.([]any); ok {
			got, _ := ours[key].([]any)
			if len(got) != len(list) {
				t.Errorf("%s: %s is %v, qemu-img has %v", where, key, got, list)
				continue
			}
			for i := range list {
				g, _ := got[i].(map[string]any)
				w := list[i].(map[string]any)
				if info, ok := w["info"].(map[string]any); ok {
					gotInfo, _ := g["info"].(map[string]any)
					sameFields(t, where+" "+key, gotInfo, info, size)
					delete(w, "info")
					delete(g, "info")
				}
				if !reflect.DeepEqual(g, w) {
					t.Errorf("%s: %s is %v, qemu-img has %v", where, key, g, w)
				}
			}
			continue
		}
		if !reflect.DeepEqual(ours[key], want) {
			t.Errorf("%s: %s is %v, qemu-img has %v", where, key, ours[key], want)
		}
	}
	for key := range ours {
		if _, ok := theirs[key]; !ok {
			t.Errorf("%s: qemu-img has no %s", where, key)
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

// What can't be served leaves nothing behind: no socket, no lock, no image.
func TestServeFails(t *testing.T) {
	dir := testenv.ShortDir(t)
	socket, good := filepath.Join(dir, "nbd.sock"), testenv.Image(t, dir, "good.raw", 1<<20, nil)
	made := filepath.Join(dir, "made.raw")
	for args, word := range map[string]string{
		"--loops=-1 " + good:                               "--loops",
		"--loops 257 " + good:                              "--loops",
		"--create 0 " + made:                               "size of 0",
		"--create 1M --read-only " + made:                  "--read-only",
		"--create 1M --format qcow2 " + made:               "raw",
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
