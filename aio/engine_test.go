package aio

import (
	"bytes"
	"errors"
	"log/slog"
	"os"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"platter/aio/uring"
)

func TestParseEngine(t *testing.T) {
	for _, e := range []Engine{EngineAuto, EngineIOUring, EngineNative, EngineThreads} {
		if got, err := ParseEngine(e.String()); got != e || err != nil {
			t.Errorf("%v: %v, %v", e, got, err)
		}
	}
	for _, s := range []string{"", "IO_URING", "epoll"} {
		_, err := ParseEngine(s)
		if !errors.Is(err, ErrEngine) || !strings.Contains(err.Error(), "auto, io_uring, native, threads") {
			t.Errorf("%q: %v", s, err)
		}
	}
}

// TestResolve: a name for each engine, and one line in the log for the choice,
// however many loops ask.
func TestResolve(t *testing.T) {
	var log bytes.Buffer
	before := slog.Default()
	slog.SetDefault(slog.New(slog.NewTextHandler(&log, nil)))
	defer slog.SetDefault(before)
	logChoice = sync.Once{}
	if e, err := EngineThreads.Resolve(); e != EngineThreads || err != nil {
		t.Errorf("threads: %v, %v", e, err)
	}
	if log.Len() != 0 {
		t.Errorf("a choice that isn't one was logged: %s", &log)
	}
	forced, errForced := EngineIOUring.Resolve()
	for range 3 {
		e, err := EngineAuto.Resolve()
		if err != nil || (e == EngineIOUring) != (errForced == nil) || e == EngineAuto {
			t.Errorf("auto: %v, %v; io_uring: %v, %v", e, err, forced, errForced)
		}
		if strings.Count(log.String(), "\n") != 1 || !strings.Contains(log.String(), "aio="+e.String()) {
			t.Errorf("log: %s", &log)
		}
	}
	if errForced != nil && !errors.Is(errForced, ErrNoURing) {
		t.Error(errForced)
	}
}

// TestWhyNoURing: the message names the cause.
func TestWhyNoURing(t *testing.T) {
	b, err := os.ReadFile("/proc/sys/kernel/io_uring_disabled")
	disabled := err == nil && strings.TrimSpace(string(b)) != "0"
	for _, tc := range []struct {
		errno unix.Errno
		want  string
	}{
		{unix.EPERM, "seccomp"},
		{unix.EACCES, "seccomp"},
		{unix.ENOSYS, ""},
		{unix.ENOMEM, ""},
	} {
		got := whyNoURing(&uring.Error{Op: "io_uring_setup", Err: tc.errno})
		switch {
		case disabled:
			if !strings.Contains(got, "io_uring_disabled") {
				t.Errorf("%v: %q", tc.errno, got)
			}
		case tc.want == "" && got != "", !strings.Contains(got, tc.want):
			t.Errorf("%v: %q", tc.errno, got)
		}
	}
}

func TestNames(t *testing.T) {
	seen := map[string]bool{}
	for op := range Op(OpCount) {
		seen[op.String()] = true
	}
	if len(seen) != OpCount || seen[""] || Op(OpCount).String() != "unknown" {
		t.Errorf("names: %v, %v", seen, Op(OpCount))
	}
	for op, writes := range map[Op]bool{OpRead: false, OpWrite: true, OpFlush: false, OpDiscard: true, OpWriteZeroes: true, OpCache: false} {
		if op.Writes() != writes {
			t.Errorf("%v: Writes is %v", op, op.Writes())
		}
	}
}
