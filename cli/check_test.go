package cli

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"platter/integration/testenv"
)

// leaked makes an image with a cluster that nothing refers to.
func leaked(t *testing.T, path string) {
	t.Helper()
	makeQcow2(t, path, 1<<20, "")
	if err := os.Truncate(path, 5<<16); err != nil {
		t.Fatal(err)
	}
	setRefcount(t, path, 4, 1)
}

// corrupt makes an image whose L1 table counts as free.
func corrupt(t *testing.T, path string) {
	t.Helper()
	leaked(t, path)
	setRefcount(t, path, l1Cluster, 0)
}

// The exit status tells the result, and both forms of the output tell the rest.
func TestCheck(t *testing.T) {
	for _, c := range []struct {
		name         string
		make         func(t *testing.T, path string)
		args         string
		code, after  int // exit status, and that of another check
		human        string
		stderr, json string
	}{
		{"clean", func(t *testing.T, path string) {
			makeQcow2(t, path, 1<<20, "", piece{0, []byte("abc")})
		}, "", 0, 0, "No errors were found on the image.\n1/16 = 6.25% allocated, 0.00% fragmented, 0.00% compressed clusters\nImage end offset: ", "",
			`"check-errors":0,"image-end-offset":N,"total-clusters":16,"allocated-clusters":1,"filename":"IMAGE","format":"qcow2"`},
		{"leaks", leaked, "", 3, 3, "1 leaked clusters were found on the image.\nThis means waste of disk space, but no harm to data.\nImage end offset: ", "cluster 4",
			`"check-errors":0,"leaks":1,"image-end-offset":N,"total-clusters":16,"filename":"IMAGE","format":"qcow2"`},
		{"corruption", corrupt, "", 2, 2, "1 errors were found on the image.\nData may be corrupted, or further writes to the image may corrupt it.\n1 leaked clusters", "ERROR cluster 3 refcount=0",
			`"check-errors":0,"corruptions":1,"leaks":1,"image-end-offset":N,"total-clusters":16,"filename":"IMAGE","format":"qcow2"`},
		{"leaks repaired", leaked, "--repair leaks", 0, 0, "Repaired: 1 leaked clusters, 0 corruptions. What is left:\nNo errors were found on the image.\n", "",
			`"check-errors":0,"leaks-fixed":1,"image-end-offset":N,"total-clusters":16,"filename":"IMAGE","format":"qcow2"`},
		{"only leaks repaired", corrupt, "-r leaks", 2, 2, "Repaired: 1 leaked clusters, 0 corruptions. What is left:\n1 errors were found on the image.\n", "",
			`"check-errors":0,"corruptions":1,"leaks-fixed":1,"image-end-offset":N,"total-clusters":16,"filename":"IMAGE","format":"qcow2"`},
		{"all repaired", corrupt, "--repair all", 0, 0, "Repaired: 1 leaked clusters, 1 corruptions. What is left:\nNo errors were found on the image.\n", "",
			`"check-errors":0,"corruptions-fixed":1,"leaks-fixed":1,"image-end-offset":N,"total-clusters":16,"filename":"IMAGE","format":"qcow2"`},
	} {
		t.Run(c.name, func(t *testing.T) {
			for _, output := range []string{"human", "json"} {
				path := filepath.Join(t.TempDir(), "disk.qcow2")
				c.make(t, path)
				o := platter(t, append([]string{"check", "--output", output, path}, strings.Fields(c.args)...)...)
				if o.code != c.code || !strings.Contains(o.stderr, c.stderr) || strings.Contains(o.stderr, "platter: error") {
					t.Errorf("exit status %d, %q", o.code, o.stderr)
				}
				if output == "human" && !strings.HasPrefix(o.stdout, c.human) {
					t.Errorf("got\n%swant\n%s", o.stdout, c.human)
				}
				if output == "json" {
					sameJSON(t, o.stdout, strings.ReplaceAll(c.json, "IMAGE", path))
				}
				if after := platter(t, "check", path); after.code != c.after {
					t.Errorf("another check: exit status %d, %s%s", after.code, after.stdout, after.stderr)
				}
			}
		})
	}
}

// sameJSON compares an object with its fields as they are wanted, where N stands
// for any number that isn't 0.
func sameJSON(t *testing.T, got, want string) {
	t.Helper()
	var g, w map[string]any
	if err := json.Unmarshal([]byte(got), &g); err != nil {
		t.Fatalf("%v in %q", err, got)
	}
	if err := json.Unmarshal([]byte("{"+strings.ReplaceAll(want, ":N", ":-1")+"}"), &w); err != nil {
		t.Fatal(err)
	}
	for name, value := range w {
		if g[name] != value && (value != -1.0 || g[name] == nil || g[name] == 0.0) {
			t.Errorf("%s is %v, want %v", name, g[name], value)
		}
	}
	if len(g) != len(w) {
		t.Errorf("got %s, want %s", got, want)
	}
}

// --quiet leaves only the exit status, and JSON that was asked for.
func TestCheckQuiet(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk.qcow2")
	corrupt(t, path)
	if o := platter(t, "check", "-q", path); o.code != 2 || o.stdout != "" || o.stderr != "" {
		t.Errorf("%+v", o)
	}
	if o := platter(t, "check", "-q", "--output", "json", path); o.code != 2 || !strings.HasPrefix(o.stdout, "{") || o.stderr != "" {
		t.Errorf("%+v", o)
	}
}

// A raw image has nothing to check, which has an exit status of its own.
func TestCheckRaw(t *testing.T) {
	path := testenv.Image(t, t.TempDir(), "disk.raw", 1<<20, nil)
	for _, args := range [][]string{{"check", path}, {"check", "-f", "raw", path}} {
		if o := platter(t, args...); o.code != noChecks || o.stdout != "" || !strings.Contains(o.stderr, "raw image has nothing to check") || !strings.Contains(o.stderr, path) {
			t.Errorf("%q: %+v", args, o)
		}
	}
}

// A repair needs the image for itself, a check shares it with readers.
func TestCheckLocks(t *testing.T) {
	dir := t.TempDir()
	path := makeQcow2(t, filepath.Join(dir, "disk.qcow2"), 1<<20, "")
	refused(t, []string{"check", "--repair", "all", "--force-share", path}, path, "--force-share")
	held, _, err := (&checkCmd{imageFlags: imageFlags{Format: "auto"}, Repair: "no", Image: path}).open()
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	must(t, "check", path)
	refused(t, []string{"check", "--repair", "leaks", path}, path, "in use")
}

// What can't be checked at all is an error that tells what to do.
func TestCheckImpossible(t *testing.T) {
	dir := t.TempDir()
	path := makeQcow2(t, filepath.Join(dir, "disk.qcow2"), 1<<20, "")
	patch(t, path, 20, []byte{0, 0, 0, 40}) // cluster_bits
	for _, args := range [][]string{{"check", path}, {"check", "--repair", "all", path}} {
		refused(t, args, path, "cluster_bits is 40", "can't be repaired")
	}
}
