package integration

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"testing"

	"platter/integration/testenv"
)

// layers ranks the packages of the module, as paths below its root; "" is main.
// An import runs from a higher rank to a lower one. A package that is not listed
// has the place of its nearest parent that is.
var layers = map[string]int{
	"config":      0,
	"aio/native":  1,
	"aio/uring":   1,
	"aio":         2,
	"merge":       3,
	"formats":     3,
	"export":      4,
	"export/nbd":  5,
	"ublk":        5,
	"virtioblk":   5,
	"cli":         6,
	"":            7,
	"integration": 8,
}

const (
	formatRank   = 3
	frontEndRank = 5
)

// unsafeFamilies may import unsafe.
var unsafeFamilies = map[string]bool{"aio": true, "aio/native": true, "aio/uring": true, "ublk": true, "virtioblk": true}

// family returns the listed package that pkg belongs to.
func family(pkg string) (string, bool) {
	for name := pkg; name != ""; {
		if _, ok := layers[name]; ok {
			return name, true
		}
		cut := strings.LastIndexByte(name, '/')
		if cut < 0 {
			return "", false
		}
		name = name[:cut]
	}
	return "", true
}

// relative turns an import path into a path below the module's root.
func relative(path string) (pkg string, ours bool) {
	if path == "platter" {
		return "", true
	}
	return strings.CutPrefix(path, "platter/")
}

// testPackage reports whether a package exists for tests only, as its name says.
func testPackage(pkg string) bool {
	return strings.HasSuffix(pkg, "test") || pkg == "integration/testenv"
}

// checkImport returns what is wrong with one package importing another, both as
// import paths, or nil. Tests, and packages for tests, may use the formats and
// the test environment; and the latter what stands beside them, which the suite of
// formats puts before images.
func checkImport(from, to string, inTest bool) error {
	fromPkg, _ := relative(from)
	fromFamily, known := family(fromPkg)
	if !known {
		return fmt.Errorf("%s has no place in the layers", from)
	}
	switch to {
	case "unsafe":
		if !unsafeFamilies[fromFamily] {
			return fmt.Errorf("%s imports unsafe", from)
		}
		return nil
	case "C":
		return fmt.Errorf("%s uses cgo", from)
	}
	toPkg, ours := relative(to)
	if !ours || fromPkg == toPkg {
		return nil
	}
	toFamily, known := family(toPkg)
	if !known {
		return fmt.Errorf("%s has no place in the layers", to)
	}
	inTest = inTest || testPackage(fromPkg) || fromFamily == "integration"
	if testPackage(toPkg) && !inTest {
		return fmt.Errorf("%s imports %s, which is for tests", from, to)
	}
	if toPkg == "integration/testenv" {
		return nil
	}
	fromRank, toRank := layers[fromFamily], layers[toFamily]
	isFormat := toFamily == "formats" && toPkg != "formats"
	switch {
	case fromFamily == toFamily:
		return nil
	case toRank > fromRank:
		return fmt.Errorf("%s imports %s, which is above it", from, to)
	case toRank == fromRank && !testPackage(fromPkg):
		return fmt.Errorf("%s imports %s, which is beside it", from, to)
	case fromRank == frontEndRank && isFormat && !inTest:
		return fmt.Errorf("%s imports %s: a front end knows images, not formats", from, to)
	}
	return nil
}

func TestCheckImport(t *testing.T) {
	t.Parallel()
	if layers["formats"] != formatRank || layers["merge"] != formatRank {
		t.Fatal("merge and formats must stand beside each other")
	}
	good := []struct {
		from, to string
		inTest   bool
	}{
		{"platter", "platter/cli", false},
		{"platter/cli", "platter/export/nbd", false},
		{"platter/cli", "platter/formats/raw", false},
		{"platter/cli", "platter/config", false},
		{"platter/export/nbd", "platter/export", false},
		{"platter/export/nbd", "platter/formats", false},
		{"platter/export/nbd", "platter/formats/raw", true},
		{"platter/export", "platter/merge", false},
		{"platter/formats/raw", "platter/formats", false},
		{"platter/formats/raw", "platter/aio", false},
		{"platter/aio", "platter/aio/uring", false},
		{"platter/aio", "platter/aio/native", false},
		{"platter/aio", "unsafe", false},
		{"platter/aio/native", "unsafe", true},
		{"platter/aio/uring", "unsafe", true},
		{"platter/virtioblk/virtqueue", "unsafe", false},
		{"platter/virtioblk/vhostuser", "platter/virtioblk", false},
		{"platter/merge", "fmt", false},
		{"platter/merge", "platter/integration/testenv", true},
		{"platter/integration/bench", "platter/cli", false},
		{"platter/integration/bench", "platter/integration/testenv", false},
		{"platter/formats/formattest", "platter/integration/testenv", false},
		{"platter/formats/formattest", "platter/merge", false},
		{"platter/export/nbd", "platter/export/nbd/nbdtest", true},
	}
	for _, edge := range good {
		if err := checkImport(edge.from, edge.to, edge.inTest); err != nil {
			t.Errorf("a good import is refused: %v", err)
		}
	}
	bad := []struct {
		from, to string
		inTest   bool
	}{
		{"platter/aio", "platter/merge", false},
		{"platter/aio", "platter/formats/raw", true},
		{"platter/aio/uring", "platter/aio", false},
		{"platter/aio/native", "platter/aio", false},
		{"platter/aio/native", "platter/aio/uring", false},
		{"platter/merge", "platter/formats", false},
		{"platter/formats/raw", "platter/merge", true},
		{"platter/formats/raw", "platter/export", false},
		{"platter/formats/raw", "platter/export/nbd", false},
		{"platter/export", "platter/export/nbd", false},
		{"platter/export/nbd", "platter/formats/raw", false},
		{"platter/ublk", "platter/formats/qcow2", false},
		{"platter/ublk", "platter/virtioblk", false},
		{"platter/export/nbd", "platter/cli", false},
		{"platter/cli", "platter", false},
		{"platter/config", "platter/aio", false},
		{"platter/cli", "platter/integration/testenv", false},
		{"platter/formats/raw", "platter/formats/formattest", false},
		{"platter/formats/formattest", "platter/export", false},
		{"platter/formats/formattest", "unsafe", false},
		{"platter/merge", "unsafe", false},
		{"platter/export/nbd", "unsafe", true},
		{"platter/integration", "unsafe", true},
		{"platter", "unsafe", false},
		{"platter/aio", "C", false},
		{"platter/newcomer", "fmt", false},
		{"platter/cli", "platter/newcomer", false},
	}
	for _, edge := range bad {
		if checkImport(edge.from, edge.to, edge.inTest) == nil {
			t.Errorf("%s may import %s (in a test: %v)", edge.from, edge.to, edge.inTest)
		}
	}
}

// TestImportsRunDownwards checks every import of the module, for each
// architecture that it is built for.
func TestImportsRunDownwards(t *testing.T) {
	t.Parallel()
	for _, arch := range []string{"amd64", "arm64"} {
		t.Run(arch, func(t *testing.T) {
			t.Parallel()
			packages, edges := 0, 0
			check := func(from string, imports []string, inTest bool) {
				for _, to := range imports {
					edges++
					if err := checkImport(from, to, inTest); err != nil {
						t.Error(err)
					}
				}
			}
			for _, p := range listPackages(t, arch) {
				packages++
				check(p.ImportPath, p.Imports, false)
				check(p.ImportPath, p.TestImports, true)
				check(p.ImportPath, p.XTestImports, true)
			}
			if packages < 3 || edges < 10 {
				t.Errorf("only %d packages with %d imports were checked", packages, edges)
			}
		})
	}
}

type listedPackage struct {
	ImportPath   string
	Imports      []string
	TestImports  []string
	XTestImports []string
}

func listPackages(t *testing.T, arch string) []listedPackage {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "go", "list", "-e", "-json=ImportPath,Imports,TestImports,XTestImports", "./...")
	cmd.Dir = testenv.ModuleRoot(t)
	cmd.Env = append(os.Environ(), "GOARCH="+arch, "CGO_ENABLED=0")
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	var packages []listedPackage
	for dec := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p listedPackage
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			return packages
		} else if err != nil {
			t.Fatalf("go list: %v", err)
		}
		packages = append(packages, p)
	}
}
