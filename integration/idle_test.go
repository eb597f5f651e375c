package integration

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"platter/integration/testenv"
)

// processorTime is what the threads of a process have used of the processors, in
// clock ticks of 10 ms: utime and stime of proc_pid_stat(5).
func processorTime(t *testing.T, pid int) int {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		t.Fatal(err)
	}
	// The second field, the name, may hold anything but ends with the last ")".
	fields := strings.Fields(string(text[strings.LastIndexByte(string(text), ')')+1:]))
	ticks := 0
	for _, f := range fields[11:13] {
		n, err := strconv.Atoi(f)
		if err != nil {
			t.Fatal(err)
		}
		ticks += n
	}
	return ticks
}

// busy makes it worth while for a server to look for work.
func busy(t *testing.T, clients ...*wireClient) {
	t.Helper()
	for range 500 {
		for _, c := range clients {
			if errno, _ := c.call(0, cmdRead, 0, 4096); errno != 0 {
				t.Fatalf("read: error %d", errno)
			}
		}
	}
}

// wantIdle fails the test unless the server soon uses no more than the given part
// of a processor, in percent, while a client does its little.
func wantIdle(t *testing.T, server *testenv.Server, percent int, little func()) {
	t.Helper()
	const (
		window = 2 * time.Second
		tick   = 10 * time.Millisecond
		tries  = 3
	)
	most := int(window/tick) * percent / 100
	used := 0
	for range tries {
		before := processorTime(t, server.PID())
		for begin := time.Now(); time.Since(begin) < window; {
			little()
		}
		if used = processorTime(t, server.PID()) - before; used <= most {
			return
		}
	}
	t.Errorf("of %v the idle server used %v", window, time.Duration(used)*tick)
}

// A server whose clients have nothing to ask uses no processor time, however
// long it may look for work: less than a hundredth of one processor, soon after
// they have stopped.
func TestIdle(t *testing.T) {
	t.Parallel()
	for _, engine := range []string{"io_uring", "native", "threads"} {
		for _, flags := range [][]string{nil, {"--poll-max", "10ms"}, {"--iops", "100000", "--bps", "1G"}} {
			t.Run(engine+" "+strings.Join(flags, " "), func(t *testing.T) {
				t.Parallel()
				image := testenv.Image(t, testenv.TmpfsDir(t), "disk.raw", mib, nil)
				server := serveUnix(t, append(append([]string{"--aio", engine, "--loops", "2"}, flags...), image)...)
				clients := []*wireClient{ready(t, server), ready(t, server), ready(t, server)}
				busy(t, clients...)
				wantIdle(t, server, 1, func() { time.Sleep(2 * time.Second) })
				busy(t, clients...) // they are still served
			})
		}
	}
}

// Work that is late time after time isn't waited for by looking for it: a request
// now and then costs little more than to serve it.
func TestNearlyIdle(t *testing.T) {
	t.Parallel()
	for _, engine := range []string{"io_uring", "native", "threads"} {
		t.Run(engine, func(t *testing.T) {
			t.Parallel()
			image := testenv.Image(t, testenv.TmpfsDir(t), "disk.raw", mib, nil)
			server := serveUnix(t, "--aio", engine, "--poll-max", "10ms", image)
			c := ready(t, server)
			after := func(pause time.Duration) {
				time.Sleep(pause)
				if errno, _ := c.call(0, cmdRead, 0, 4096); errno != 0 {
					t.Fatalf("read: error %d", errno)
				}
			}
			busy(t, c)
			for pause := 16 * time.Microsecond; pause < 8*time.Millisecond; pause += pause / 4 {
				after(pause) // looking for longer and longer pays
			}
			wantIdle(t, server, 5, func() { after(40 * time.Millisecond) })
		})
	}
}
