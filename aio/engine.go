package aio

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"runtime"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"platter/aio/native"
	"platter/aio/uring"
)

// Engine is how loops wait and how files are read and written.
type Engine uint8

const (
	// EngineAuto is io_uring where the kernel has it and allows it, else threads.
	EngineAuto Engine = iota
	// EngineIOUring puts sockets and files on one io_uring per loop.
	EngineIOUring
	// EngineNative waits in epoll and does file I/O by Linux AIO, as far as that is
	// asynchronous: with O_DIRECT. The rest is done as by EngineThreads.
	EngineNative
	// EngineThreads waits in epoll and does file I/O on a bounded pool of threads.
	EngineThreads
)

var engineNames = []string{"auto", "io_uring", "native", "threads"}

func (e Engine) String() string { return engineNames[e] }

// ParseEngine reads an engine's name.
func ParseEngine(s string) (Engine, error) {
	for i, name := range engineNames {
		if s == name {
			return Engine(i), nil
		}
	}
	return 0, fmt.Errorf("%w %q: choose one of %s", ErrEngine, s, strings.Join(engineNames, ", "))
}

// ErrEngine is returned for an engine that doesn't exist or can't be used here.
var ErrEngine = errors.New("unknown I/O engine")

// ErrNoURing is returned for EngineIOUring where io_uring can't be used.
var ErrNoURing = errors.New("io_uring can't be used here")

// probeURing finds out once whether this process can use io_uring.
var probeURing = sync.OnceValue(func() error {
	result := make(chan error)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		result <- tryURing()
	}()
	return <-result
})

func tryURing() error {
	r, err := uring.New(uring.Options{Entries: 8})
	if err != nil {
		return fmt.Errorf("%w: %w%s", ErrNoURing, err, whyNoURing(err))
	}
	defer r.Close()
	ok, err := r.Supports(uring.OpRead, uring.OpWrite, uring.OpReadv, uring.OpWritev, uring.OpFsync,
		uring.OpFallocate, uring.OpFadvise, uring.OpSend, uring.OpSendmsg, uring.OpRecv, uring.OpPollAdd, uring.OpAsyncCancel)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrNoURing, err)
	}
	if !ok {
		return fmt.Errorf("%w: %w", ErrNoURing, uring.ErrTooOld)
	}
	return nil
}

func whyNoURing(err error) string {
	if b, e := os.ReadFile("/proc/sys/kernel/io_uring_disabled"); e == nil && strings.TrimSpace(string(b)) != "0" {
		return " (sysctl kernel.io_uring_disabled is " + strings.TrimSpace(string(b)) + ")"
	}
	if errors.Is(err, unix.EPERM) || errors.Is(err, unix.EACCES) {
		return " (forbidden by a seccomp filter or a security module)"
	}
	return ""
}

// ErrNoNative is returned for EngineNative where Linux AIO can't be used.
var ErrNoNative = errors.New("native (Linux AIO) can't be used here")

// newNativeContext makes a context for so many operations.
func newNativeContext(operations int) (*native.Context, error) {
	c, err := native.New(operations)
	if err != nil {
		return nil, fmt.Errorf("%w: %w%s", ErrNoNative, err, whyNoNative(err))
	}
	return c, nil
}

func whyNoNative(err error) string {
	switch {
	case errors.Is(err, unix.EAGAIN):
		return fmt.Sprintf(" (sysctl fs.aio-max-nr allows the system %s operations, of which %s are taken: raise it)",
			kernelNumber("/proc/sys/fs/aio-max-nr"), kernelNumber("/proc/sys/fs/aio-nr"))
	case errors.Is(err, unix.ENOSYS):
		return " (the kernel was built without it)"
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		return " (forbidden by a seccomp filter or a security module)"
	}
	return ""
}

// kernelNumber is what a file of /proc/sys holds, for a message.
func kernelNumber(path string) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return "?"
	}
	return strings.TrimSpace(string(b))
}

var logChoice sync.Once

// Resolve replaces EngineAuto by the engine that this process gets, which it
// logs the first time, and refuses EngineIOUring where it can't be had. Whether
// EngineNative can be had each loop finds out by itself: others may use it up.
func (e Engine) Resolve() (Engine, error) {
	switch e {
	case EngineNative, EngineThreads:
		return e, nil
	case EngineIOUring:
		return e, probeURing()
	}
	err := probeURing()
	e = EngineIOUring
	if err != nil {
		e = EngineThreads
	}
	logChoice.Do(func() {
		if err != nil {
			slog.Info("I/O engine chosen", "aio", e.String(), "because", err)
		} else {
			slog.Info("I/O engine chosen", "aio", e.String())
		}
	})
	return e, nil
}
