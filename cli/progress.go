package cli

import (
	"os"
	"time"

	"github.com/schollz/progressbar/v3"
	"golang.org/x/sys/unix"
)

// progress shows on a terminal how far some work is. It may be used by many
// goroutines at a time.
type progress struct {
	bar *progressbar.ProgressBar // nil to show nothing
}

// progress begins to show how far the work is, unless nobody looks.
func (a *app) progress(what string, quiet bool) *progress {
	f, ok := a.stderr.(*os.File)
	if quiet || !ok || !isTerminal(f) {
		return &progress{}
	}
	return &progress{progressbar.NewOptions64(1,
		progressbar.OptionSetWriter(f),
		progressbar.OptionSetDescription(what),
		progressbar.OptionSetWidth(30),
		progressbar.OptionShowBytes(true),
		progressbar.OptionUseIECUnits(true),
		progressbar.OptionThrottle(100*time.Millisecond),
		progressbar.OptionClearOnFinish(),
	)}
}

func isTerminal(f *os.File) bool {
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}

// set tells how many bytes are done and how many there are. Both may grow, or
// start over.
func (p *progress) set(done, total int64) {
	if p.bar == nil {
		return
	}
	if done < p.bar.State().CurrentNum {
		p.clear()
		p.bar.Reset()
	}
	// A bar that was full once shows nothing more.
	p.bar.ChangeMax64(max(total, done) + 1)
	_ = p.bar.Set64(done) // a terminal that has gone away is no reason to stop
}

// add tells that n more bytes are done.
func (p *progress) add(n int64) {
	if p.bar != nil {
		_ = p.bar.Add64(n)
	}
}

// clear takes the bar away until there is news.
func (p *progress) clear() {
	if p.bar != nil {
		_ = p.bar.Clear()
	}
}
