// Package cli is platter's command line: one file for each verb, which reads
// what the user wants and wires the other packages together.
package cli

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strings"

	"github.com/alecthomas/kong"
	kongcompletion "github.com/jotaen/kong-completion"
)

// commands is the command line as kong reads it.
type commands struct {
	LogLevel *slog.Level `help:"What to log to standard error: debug, info, warn or error. By default info for serve, and warn for what doesn't last." placeholder:"LEVEL"`

	Serve      serveCmd                  `cmd:"" help:"Serve images over NBD."`
	Create     createCmd                 `cmd:"" help:"Make an image."`
	Convert    convertCmd                `cmd:"" help:"Copy an image into a new one of another format."`
	Info       infoCmd                   `cmd:"" help:"Tell about an image."`
	Map        mapCmd                    `cmd:"" help:"Tell where an image has data, and where that stands."`
	Check      checkCmd                  `cmd:"" help:"Check an image for errors, and repair it."`
	Version    versionCmd                `cmd:"" help:"Print the version."`
	Completion kongcompletion.Completion `cmd:"" help:"Print how to switch on completion in a shell (bash, zsh or fish)."`
}

// app is what verbs get from the process around them.
type app struct {
	version string
	stdout  io.Writer
	stderr  io.Writer
}

// Run carries out a command line and returns the exit status: 0, or 1 after an
// error, which has then been printed to standard error. A verb may have more.
func Run(args []string, version string) int {
	err := run(args, &app{version: version, stdout: os.Stdout, stderr: os.Stderr}, os.Exit)
	return report(err, os.Stderr)
}

// report prints an error, if it has anything to say, and returns the exit
// status.
func report(err error, stderr io.Writer) int {
	if err == nil {
		return 0
	}
	code := 1
	var exit *exitError
	if errors.As(err, &exit) {
		if code = exit.code; exit.err == nil {
			return code
		}
	}
	fmt.Fprintf(stderr, "platter: error: %v\n", err)
	return code
}

// exitError ends the process with an exit status of its own. err is nil when
// there is nothing left to say.
type exitError struct {
	code int
	err  error
}

func (e *exitError) Error() string {
	if e.err == nil {
		return fmt.Sprintf("exit status %d", e.code)
	}
	return e.err.Error()
}

func (e *exitError) Unwrap() error { return e.err }

// run carries out a command line. Help and completion end the process by exit.
func run(args []string, a *app, exit func(int)) error {
	c, ctx, err := parse(args, a, exit)
	if err != nil {
		return err
	}
	level := slog.LevelWarn
	if strings.HasPrefix(ctx.Command(), "serve") {
		level = slog.LevelInfo
	}
	if c.LogLevel != nil {
		level = *c.LogLevel
	}
	slog.SetDefault(slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: level})))
	return ctx.Run()
}

// parse reads a command line.
func parse(args []string, a *app, exit func(int)) (*commands, *kong.Context, error) {
	c := &commands{}
	parser, err := kong.New(c,
		kong.Name("platter"),
		kong.Description("A disk-image server: raw and qcow2 images over NBD, merged and batched on io_uring. It makes, inspects and converts them too."),
		kong.ConfigureHelp(kong.HelpOptions{Compact: true}),
		kong.Writers(a.stdout, os.Stderr),
		kong.Exit(exit),
		kong.Bind(a),
	)
	if err != nil {
		return nil, nil, fmt.Errorf("build command line: %w", err)
	}
	kongcompletion.Register(parser)
	ctx, err := parser.Parse(args)
	if err != nil {
		return nil, nil, fmt.Errorf("%w (platter --help tells more)", err)
	}
	return c, ctx, nil
}

// printJSON prints a value as qemu-img would.
func (a *app) printJSON(v any) error {
	e := json.NewEncoder(a.stdout)
	e.SetEscapeHTML(false)
	e.SetIndent("", "    ")
	return e.Encode(v)
}
