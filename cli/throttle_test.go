package cli

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"platter/export"
)

// serving starts what a command line asks for.
func serving(t *testing.T, args ...string) (*service, error) {
	t.Helper()
	image := filepath.Join(t.TempDir(), "disk.raw")
	if err := os.WriteFile(image, make([]byte, 4096), 0o600); err != nil {
		t.Fatal(err)
	}
	c, _, err := parse(append(append([]string{"serve", "--nbd", "tcp://127.0.0.1:0"}, args...), image), &app{stdout: os.Stdout}, func(int) { t.Error("exit") })
	if err != nil {
		return nil, err
	}
	s, err := c.Serve.start()
	if err == nil {
		t.Cleanup(func() {
			if err := s.stop(); err != nil {
				t.Error(err)
			}
		})
	}
	return s, err
}

func TestServeThrottle(t *testing.T) {
	for _, c := range []struct {
		args string
		want export.Throttle
	}{
		{"", export.Throttle{}},
		{"--iops 0 --bps 0", export.Throttle{}},
		{"--iops 1000 --bps 1.5G", export.Throttle{IOPS: export.Rates{Total: 1000}, BPS: export.Rates{Total: 3 << 29}}},
		{"--iops-read 7 --iops-write=9 --iops-burst 1 --bps-read 100M --bps-write 4k --bps-burst 512",
			export.Throttle{IOPS: export.Rates{Read: 7, Write: 9, Burst: 1}, BPS: export.Rates{Read: 100 << 20, Write: 4096, Burst: 512}}},
	} {
		s, err := serving(t, strings.Fields(c.args)...)
		if err != nil {
			t.Errorf("%s: %v", c.args, err)
		} else if got := s.exports[0].Throttle(); got != c.want {
			t.Errorf("%s: %+v", c.args, got)
		}
	}
}

func TestServeThrottleImpossible(t *testing.T) {
	for args, words := range map[string]string{
		"--iops=-1":                      "iops -1 1000000000",
		"--iops-read=1000000001":         "iops-read 1000000001 1000000000",
		"--iops-write=x":                 "iops-write",
		"--bps=-5M":                      "bps",
		"--bps-read=2P":                  "bps-read 1125899906842624",
		"--iops-burst=0 --iops=5":        "iops-burst 1",
		"--iops-burst=-3 --iops=5":       "iops-burst -3 1",
		"--iops-burst=5":                 "iops-burst iops-read",
		"--bps-burst=0 --bps=1M":         "bps-burst 512",
		"--bps-burst=100 --bps-write=1M": "bps-burst 100 512",
	} {
		_, err := serving(t, strings.Fields(args)...)
		if err == nil {
			t.Errorf("%s is accepted", args)
			continue
		}
		for _, word := range strings.Fields(words) {
			if !strings.Contains(err.Error(), word) {
				t.Errorf("%s: %q isn't in %v", args, word, err)
			}
		}
	}
}
