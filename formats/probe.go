package formats

import (
	"bytes"
)

// Probe names the format that a file with these first bytes has: a registered
// driver's, or one that is known but not supported here, or raw when it is none
// of them. Only the first ProbeSize bytes count. It never fails: any bytes are
// a raw image.
func Probe(header []byte) string {
	header = header[:min(len(header), ProbeSize)]
	registry.RLock()
	defer registry.RUnlock()
	for _, d := range registry.drivers {
		if d.Probe != nil && d.Probe(header) {
			return d.Name
		}
	}
	for _, f := range foreign {
		if f.match(header) {
			return f.name
		}
	}
	return RawName
}

// foreign lists the formats to recognise although no driver handles them. They
// are those that other programs detect on their own: taking one for raw would
// show a guest the container in place of the disk, and letting a guest write
// one into a raw image would make others open what the guest made up.
var foreign = []struct {
	name  string
	match func(header []byte) bool
}{
	{"qcow2", qcowVersion(2, 1<<32-1)},
	{"qcow", qcowVersion(1, 1)},
	{"qed", magic(0, "QED\x00")},
	{"vmdk", func(h []byte) bool {
		return bytes.HasPrefix(h, []byte("KDMV")) || bytes.HasPrefix(h, []byte("COWD")) || vmdkDescriptor(h)
	}},
	{"vhdx", magic(0, "vhdxfile")},
	{"vpc", magic(0, "conectix")},
	{"vdi", magic(0x40, "\x7f\x10\xda\xbe")},
	{"luks", magic(0, "LUKS\xba\xbe")},
	{"parallels", func(h []byte) bool {
		return bytes.HasPrefix(h, []byte("WithoutFreeSpace")) || bytes.HasPrefix(h, []byte("WithouFreSpacExt"))
	}},
	{"bochs", magic(0, "Bochs Virtual HD Image")},
	{"cloop", magic(0, "#!/bin/sh\n#V2.0 Format\nmodprobe cloop")},
}

func magic(at int, signature string) func([]byte) bool {
	return func(h []byte) bool {
		return len(h) >= at && bytes.HasPrefix(h[at:], []byte(signature))
	}
}

// qcowVersion matches the magic with a version in a range, both big-endian. A
// header too short for a version has none.
func qcowVersion(lowest, highest uint32) func([]byte) bool {
	return func(h []byte) bool {
		if len(h) < 8 || string(h[:4]) != "QFI\xfb" {
			return false
		}
		v := uint32(h[4])<<24 | uint32(h[5])<<16 | uint32(h[6])<<8 | uint32(h[7])
		return lowest <= v && v <= highest
	}
}

// vmdkDescriptor matches the text file that describes a VMDK whose data stands
// elsewhere: after blank lines and comments it starts with its version.
func vmdkDescriptor(h []byte) bool {
	for line := range bytes.Lines(h) {
		if text := bytes.TrimLeft(line, " "); line[0] == '#' || len(bytes.TrimRight(text, "\r\n")) == 0 {
			continue
		}
		for _, version := range []string{"version=1", "version=2", "version=3"} {
			if string(bytes.TrimRight(line, "\r\n")) == version {
				return true
			}
		}
		return false
	}
	return false
}
