package cli

import (
	"bytes"
	"log/slog"
	"strings"
	"testing"

	"platter/aio"
	"platter/export"
)

func TestLogStats(t *testing.T) {
	var log bytes.Buffer
	before := slog.Default()
	defer slog.SetDefault(before)
	slog.SetDefault(slog.New(slog.NewTextHandler(&log, nil)))
	s := export.Stats{Merged: 5, Batches: 3}
	s.Requests[aio.OpWrite], s.Bytes[aio.OpWrite], s.Latency[aio.OpWrite][20] = 9, 1536, 9
	logStats("disk.raw", s)
	s.Gaps.Writes, s.Gaps.Bytes = 2, 512
	logStats("disk.raw", s)
	lines := strings.Split(strings.TrimSpace(log.String()), "\n")
	if len(lines) != 2 {
		t.Fatalf("%d lines: %q", len(lines), lines)
	}
	for _, word := range []string{"msg=served image=disk.raw ", "write.requests=9 write.size=\"1.5 KiB\" write.p50=79ns ", "batches=3 merged=5 refused=0"} {
		if !strings.Contains(lines[0], word) {
			t.Errorf("%q is not in %s", word, lines[0])
		}
	}
	if strings.Contains(lines[0], "read") || strings.Contains(lines[0], "gaps") {
		t.Errorf("what was not done: %s", lines[0])
	}
	if !strings.Contains(lines[1], "gaps.writes=2 gaps.size=\"512 B\"") {
		t.Errorf("gaps: %s", lines[1])
	}
}
