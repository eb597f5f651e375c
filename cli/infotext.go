package cli

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
	"time"
	"unicode"

	"platter/config"
)

// human is what info prints for people, like qemu-img info.
func (info *imageInfo) human() string {
	var b strings.Builder
	line := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	line("image: %s", info.Filename)
	line("file format: %s", info.Format)
	line("virtual size: %s", sizeText(info.VirtualSize))
	line("disk size: %s", config.Size(info.ActualSize))
	if info.Encrypted {
		line("encrypted: yes")
	}
	if info.ClusterSize > 0 {
		line("cluster_size: %d", info.ClusterSize)
	}
	if info.DirtyFlag {
		line("cleanly shut down: no")
	}
	if info.BackingFilename != "" {
		path := ""
		if info.FullBackingFilename != info.BackingFilename {
			path = " (actual path: " + printable(info.FullBackingFilename) + ")"
		}
		line("backing file: %s%s", printable(info.BackingFilename), path)
	}
	if info.BackingFormat != "" {
		line("backing file format: %s", printable(info.BackingFormat))
	}
	if len(info.Snapshots) > 0 {
		line("Snapshot list:")
		line("%-7s %-16s %8s %19s %15s %10s", "ID", "TAG", "VM_SIZE", "DATE", "VM_CLOCK", "ICOUNT")
		for _, s := range info.Snapshots {
			line("%s", s.human())
		}
	}
	if info.FormatSpecific != nil {
		line("Format specific information:")
		b.WriteString(tree(info.FormatSpecific.Data))
	}
	for _, c := range info.Children {
		line("Child node '/%s':", c.Name)
		line("    filename: %s", c.Info.Filename)
		line("    protocol type: %s", c.Info.Format)
		line("    file length: %s", sizeText(c.Info.VirtualSize))
		line("    disk size: %s", config.Size(c.Info.ActualSize))
	}
	return b.String()
}

// printable quotes what an image says where it could do more to a terminal than
// be shown.
func printable(s string) string {
	if strings.ContainsFunc(s, func(r rune) bool { return !unicode.IsPrint(r) }) {
		return strconv.Quote(s)
	}
	return s
}

func sizeText(n int64) string { return fmt.Sprintf("%s (%d bytes)", config.Size(n), n) }

// human is a line of the list of snapshots.
func (s *snapshotInfo) human() string {
	date := time.Unix(s.DateSec, 0).Format(time.DateTime)
	seconds := s.VMClockSec
	clock := fmt.Sprintf("%04d:%02d:%02d.%03d", seconds/3600, seconds/60%60, seconds%60, s.VMClockNsec/1e6)
	count := "--"
	if s.ICount != nil {
		count = fmt.Sprint(*s.ICount)
	}
	return fmt.Sprintf("%-7s %-16s %8s %19s %15s %10s", printable(s.ID), printable(s.Name), config.Size(s.VMStateSize), date, clock, count)
}

// tree prints what would be a JSON object as an indented list, in the order of
// its fields, with spaces for the dashes in their names.
func tree(v any) string {
	text, err := json.Marshal(v)
	if err != nil {
		return "" // of what was built from strings and numbers
	}
	d := json.NewDecoder(bytes.NewReader(text))
	d.UseNumber()
	var b strings.Builder
	if t, err := d.Token(); err == nil {
		branch(&b, d, t, 1)
	}
	return b.String()
}

// branch prints the object or list that has just been opened.
func branch(b *strings.Builder, d *json.Decoder, open json.Token, depth int) {
	for i := 0; d.More(); i++ {
		name := fmt.Sprintf("[%d]", i)
		if open == json.Delim('{') {
			key, _ := d.Token()
			name = strings.ReplaceAll(fmt.Sprint(key), "-", " ")
		}
		fmt.Fprintf(b, "%s%s:", strings.Repeat("    ", depth), name)
		value, _ := d.Token()
		if _, nested := value.(json.Delim); nested {
			b.WriteString("\n")
			branch(b, d, value, depth+1)
			continue
		}
		fmt.Fprintf(b, " %s\n", printable(fmt.Sprint(value)))
	}
	_, _ = d.Token() // the closing bracket
}
