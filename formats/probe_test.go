package formats_test

import (
	"encoding/binary"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"platter/formats"
	_ "platter/formats/raw"
	"platter/integration/testenv"
)

func at(off int, text string) []byte { return append(make([]byte, off), text...) }

func TestProbe(t *testing.T) {
	long := strings.Repeat("# comment\n", 60)
	for _, c := range []struct {
		name   string
		header []byte
		want   string
	}{
		{"nothing", nil, "raw"},
		{"zeroes", make([]byte, 512), "raw"},
		{"boot sector", at(510, "\x55\xaa"), "raw"},
		{"qcow2 v2", []byte("QFI\xfb\x00\x00\x00\x02"), "qcow2"},
		{"qcow2 v3", []byte("QFI\xfb\x00\x00\x00\x03"), "qcow2"},
		{"qcow2 of the future", []byte("QFI\xfb\x00\x00\x00\x09"), "qcow2"},
		{"qcow", []byte("QFI\xfb\x00\x00\x00\x01"), "qcow"},
		{"qcow version 0", []byte("QFI\xfb\x00\x00\x00\x00"), "raw"},
		{"qcow cut off", []byte("QFI\xfb\x00\x00\x00"), "raw"},
		{"qcow magic elsewhere", at(1, "QFI\xfb\x00\x00\x00\x02"), "raw"},
		{"qed", []byte("QED\x00"), "qed"},
		{"text that begins with QED", []byte("QEDx"), "raw"},
		{"vmdk sparse", []byte("KDMV\x01"), "vmdk"},
		{"vmdk 3", []byte("COWD\x01"), "vmdk"},
		{"vmdk descriptor", []byte("# Disk DescriptorFile\n\n \n# more\nversion=1\nCID=1\n"), "vmdk"},
		{"vmdk descriptor of Windows", []byte("# Disk DescriptorFile\r\nversion=3\r\n"), "vmdk"},
		{"vmdk version alone", []byte("version=2\n"), "vmdk"},
		{"vmdk version of its own", []byte("# x\nversion=10\n"), "raw"},
		{"script", []byte("#!/bin/sh\nversion = 1\n"), "raw"},
		{"comments only", []byte(long), "raw"},
		{"vhdx", []byte("vhdxfile"), "vhdx"},
		{"vpc", []byte("conectix"), "vpc"},
		{"vdi", at(0x40, "\x7f\x10\xda\xbe"), "vdi"},
		{"vdi cut off", at(0x40, "\x7f\x10\xda"), "raw"},
		{"luks", []byte("LUKS\xba\xbe\x00\x01"), "luks"},
		{"parallels", []byte("WithoutFreeSpace"), "parallels"},
		{"parallels 2", []byte("WithouFreSpacExt"), "parallels"},
		{"bochs", []byte("Bochs Virtual HD Image\x00"), "bochs"},
		{"cloop", []byte("#!/bin/sh\n#V2.0 Format\nmodprobe cloop file=$0"), "cloop"},
		{"too far behind", at(formats.ProbeSize, "version=1\n"), "raw"},
	} {
		if got := formats.Probe(c.header); got != c.want {
			t.Errorf("%s: %s, want %s", c.name, got, c.want)
		}
	}
}

// TestProbeQEMU has qemu-img make images and asks both what they are.
func TestProbeQEMU(t *testing.T) {
	tool := testenv.NeedTool(t, "qemu-img")
	for _, c := range []struct{ make, want string }{
		{"raw", "raw"}, {"qcow2", "qcow2"}, {"qcow", "qcow"}, {"qed", "qed"}, {"vmdk", "vmdk"}, {"vhdx", "vhdx"},
		{"vpc", "vpc"}, {"vdi", "vdi"}, {"parallels", "parallels"},
	} {
		path := filepath.Join(t.TempDir(), "image")
		if out, err := exec.Command(tool, "create", "-f", c.make, path, "16M").CombinedOutput(); err != nil {
			if strings.Contains(string(out), "not supported for image creation") || strings.Contains(string(out), "Unknown file format") {
				continue
			}
			t.Fatalf("create %s: %v: %s", c.make, err, out)
		}
		header, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if got := formats.Probe(header); got != c.want {
			t.Errorf("%s: %s", c.make, got)
		}
	}
}

// FuzzProbe: any bytes have a format, whatever stands behind the first 512.
func FuzzProbe(f *testing.F) {
	for _, seed := range []string{"", "QFI\xfb\x00\x00\x00\x03", "# Disk DescriptorFile\nversion=1\n", "LUKS\xba\xbe", "\n \r\n#\n", "conectix"} {
		f.Add([]byte(seed))
	}
	f.Add(at(0x40, "\x7f\x10\xda\xbe"))
	known := append(formats.Names(), "qcow2", "qcow", "qed", "vmdk", "vhdx", "vpc", "vdi", "luks", "parallels", "bochs", "cloop")
	f.Fuzz(func(t *testing.T, header []byte) {
		got := formats.Probe(header)
		if !slices.Contains(known, got) {
			t.Fatalf("unknown name %q", got)
		}
		if len(header) >= formats.ProbeSize {
			if again := formats.Probe(append(slices.Clone(header), header...)); again != got {
				t.Fatalf("%s, but %s with other bytes behind", got, again)
			}
		}
		if len(header) >= 8 && string(header[:4]) == "QFI\xfb" && binary.BigEndian.Uint32(header[4:]) >= 2 && got != "qcow2" {
			t.Fatalf("a qcow2 header is taken for %s", got)
		}
	})
}
