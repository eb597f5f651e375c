// Package cli is platter's command line: one file for each verb, which reads
// what the user wants and wires the other packages together.
package cli

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"

	"github.com/alecthomas/kong"
	kongcompletion "github.com/jotaen/kong-completion"

	_ "platter/formats/qcow2" // formats that images may have
	_ "platter/formats/raw"
)

// commands is the command line as kong reads it.
type commands struct {
	LogLevel slog.Level `default:"info" help:"What to log to standard error: debug, info, warn or error." placeholder:"LEVEL"`

	Serve      serveCmd                  `cmd:"" help:"Serve images over NBD."`
	Info       infoCmd                   `cmd:"" help:"Tell about an image."`
	Version    versionCmd                `cmd:"" help:"Print the version."`
	Completion kongcompletion.Completion `cmd:"" help:"Print how to switch on completion in a shell (bash, zsh or fish)."`
}

// app is what verbs get from the process around them.
type app struct {
	version string
	stdout  io.Writer
}

// Run carries out a command line and returns the exit status: 0, or 1 after an
// error, which has then been printed to standard error.
func Run(args []string, version string) int {
	err := run(args, &app{version: version, stdout: os.Stdout}, os.Exit)
	var code exitCode
	if errors.As(err, &code) {
		return int(code)
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "platter: error: %v\n", err)
		return 1
	}
	return 0
}

// exitCode ends the process when there is nothing left to say.
type exitCode int

func (e exitCode) Error() string { return fmt.Sprintf("exit status %d", int(e)) }

// run carries out a command line. Help and completion end the process by exit.
func run(args []string, a *app, exit func(int)) error {
	c, ctx, err := parse(args, a, exit)
	if err != nil {
		return err
	}
	slog.SetDefault(slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: c.LogLevel})))
	return ctx.Run()
}

// parse reads a command line.
func parse(args []string, a *app, exit func(int)) (*commands, *kong.Context, error) {
	c := &commands{}
	parser, err := kong.New(c,
		kong.Name("platter"),
		kong.Description("A disk-image server: raw images over NBD, merged and batched on io_uring."),
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
