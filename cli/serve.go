package cli

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"platter/aio"
	"platter/config"
	"platter/export"
	"platter/export/nbd"
	"platter/formats"
	"platter/formats/qcow2"
	"platter/formats/qcow2/create"
	"platter/formats/raw"
)

type serveCmd struct {
	contentFlags
	NBD        []config.Address    `name:"nbd" default:"tcp://127.0.0.1:10809" placeholder:"ADDR" help:"Where to serve NBD: tcp://HOST:PORT or unix:///PATH. May be repeated. Default: ${default}."`
	Name       string              `placeholder:"NAME" help:"Name of the export, when there is one image. It is the default export too."`
	ReadOnly   bool                `short:"r" help:"Refuse writes."`
	Format     string              `short:"f" default:"auto" placeholder:"F" help:"Format of the images, raw or qcow2. By default it is found out; state it for an image that a guest has written."`
	Create     *config.Size        `placeholder:"SIZE" help:"Make images that don't exist, of this size (512M, 1.5G), as raw files or with --format qcow2. An image that exists is kept as it is."`
	Snapshot   string              `placeholder:"NAME" help:"Serve the disks as they were in this snapshot: a name or an ID. Needs --read-only."`
	AIO        string              `name:"aio" enum:"auto,io_uring,native,threads" default:"auto" placeholder:"E" help:"I/O engine: auto, io_uring, native (Linux AIO; for --cache none and directsync) or threads. auto takes io_uring where it is allowed, else threads."`
	Cache      string              `enum:"writeback,none,writethrough,directsync,unsafe" default:"writeback" placeholder:"MODE" help:"Caching, as in qemu: writeback, none (O_DIRECT), writethrough, directsync or unsafe."`
	Loops      int                 `default:"0" placeholder:"N" help:"Loops, that is threads that serve connections. By default one for each processor, at most 4."`
	Queues     int                 `default:"0" placeholder:"N" help:"How many queues an export offers at most; over NBD, each connection is one. By default as many as come."`
	QueueLoops []config.QueueLoops `sep:"none" placeholder:"LIST" help:"Loops that serve the queues of an export, as LIST or NAME=LIST: with 0,1,1 its first connection is served by loop 0, the next two by loop 1, and so on. By default they take turns. May be repeated."`
	PollMax    time.Duration       `default:"64us" placeholder:"TIME" help:"How long a thread looks for work before it sleeps, when that has paid lately; 0 never does. Default: ${default}."`
	Merge      string              `enum:"on,off" default:"on" placeholder:"on|off" help:"Join contiguous requests of a batch (on) or not (off)."`
	Bypass     string              `enum:"on,off" default:"on" hidden:"" help:"Dispatch requests on the loop (on), or by a goroutine each, to be compared with (off)."`
	MergeGap   *config.Size        `placeholder:"SIZE" help:"Fill gaps of up to SIZE between writes of a batch to new qcow2 clusters with zeroes, to write once (0: never; at most 256K). By default 16K, or 4K for files in memory."`
	ForceShare bool                `short:"U" help:"Take no lock on the images, to read what others may be writing. Needs --read-only."`
	throttleFlags
	Images []string `arg:"" name:"image" help:"Images to serve, as PATH or NAME=PATH."`
}

// drainTime is how long clients get to take their last replies.
const drainTime = 10 * time.Second

// cacheModes are what --cache means for a file.
var cacheModes = map[string]struct{ direct, sync, noFlush bool }{
	"writeback":    {},
	"none":         {direct: true},
	"writethrough": {sync: true},
	"directsync":   {direct: true, sync: true},
	"unsafe":       {noFlush: true},
}

// Validate refuses values that can't be, before anything is opened.
func (c *serveCmd) Validate() error {
	if c.MergeGap != nil && *c.MergeGap > qcow2.MaxMergeGap {
		return fmt.Errorf("--merge-gap %s: choose at most %s, or 0 to fill no gaps", *c.MergeGap, config.Size(qcow2.MaxMergeGap))
	}
	return nil
}

// Run serves until a signal comes.
func (c *serveCmd) Run(a *app) error {
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, unix.SIGTERM, unix.SIGINT)
	defer signal.Stop(signals)
	s, err := c.start()
	if err != nil {
		return err
	}
	defer s.close()
	if _, err := fmt.Fprintln(a.stdout, s.ready()); err != nil {
		return fmt.Errorf("print that the server is ready: %w", err)
	}
	select {
	case <-signals:
	case err := <-s.failed:
		return errors.Join(err, s.stop())
	}
	go func() {
		<-signals
		slog.Warn("second signal: ending at once")
		os.Exit(1)
	}()
	return s.stop()
}

// service is everything that serve holds open.
type service struct {
	loops     []*aio.Loop
	images    []formats.Image
	paths     []string
	exports   []*export.Export
	server    *nbd.Server
	listeners []net.Listener
	addresses []config.Address
	failed    chan error
}

// start opens what the command line asks for and begins to serve.
func (c *serveCmd) start() (s *service, err error) {
	s = &service{}
	defer func() {
		if err != nil {
			s.close()
		}
	}()
	if c.Name != "" && len(c.Images) > 1 {
		return s, errors.New("--name is for one image; write NAME=PATH for each of several")
	}
	if err := c.checkQueues(); err != nil {
		return s, err
	}
	throttle, err := c.throttle()
	if err != nil {
		return s, err
	}
	// Ports and images first: they are what goes wrong.
	for _, addr := range c.NBD {
		l, err := listen(addr)
		if err != nil {
			return s, err
		}
		s.listeners = append(s.listeners, l)
		s.addresses = append(s.addresses, boundTo(addr, l))
	}
	if err := c.openImages(s); err != nil {
		return s, err
	}
	for _, e := range s.exports {
		if err := e.SetThrottle(throttle); err != nil {
			return s, err
		}
	}
	if err := c.startLoops(s); err != nil {
		return s, err
	}
	s.server, err = nbd.NewServer(nbd.Options{Loops: s.loops, Exports: s.exports})
	if err != nil {
		return s, err
	}
	s.failed = make(chan error, len(s.listeners))
	for _, l := range s.listeners {
		go func() {
			if err := s.server.Serve(l); !errors.Is(err, nbd.ErrServerClosed) {
				s.failed <- err
			}
		}()
	}
	return s, nil
}

func (c *serveCmd) startLoops(s *service) error {
	engine, err := aio.ParseEngine(c.AIO)
	if err != nil {
		return err
	}
	n := c.loopCount()
	// Loops hold their thread while they spin: leave room for the rest.
	runtime.GOMAXPROCS(max(runtime.GOMAXPROCS(0), n+1))
	for range n {
		l, err := aio.NewLoop(aio.LoopOptions{Engine: engine, Poll: c.PollMax})
		if err != nil {
			return fmt.Errorf("start loop: %w; try --aio auto", err)
		}
		s.loops = append(s.loops, l)
	}
	slog.Info("loops started", "loops", n, "aio", s.loops[0].Engine())
	return c.place(s)
}

func (c *serveCmd) openImages(s *service) error {
	cache := cacheModes[c.Cache]
	if c.Snapshot != "" && !c.ReadOnly {
		return errors.New("--snapshot: what a disk was can't be changed; serve it with --read-only")
	}
	for _, arg := range c.Images {
		name, path := c.split(arg)
		if err := c.create(path); err != nil {
			return err
		}
		image, err := openImage(path, formats.Options{
			Format: c.Format, ReadOnly: c.ReadOnly, ForceShare: c.ForceShare, NotEmpty: true, Snapshot: c.Snapshot,
			Direct: cache.direct, Sync: cache.sync, NoFlush: cache.noFlush,
			AllowDirs: c.AllowDir, MetadataCache: int64(c.MetadataCache), MergeGap: c.mergeGap(), NoMerge: c.Merge == "off",
		})
		if err != nil {
			return err
		}
		if c.Format == "auto" && image.Format() == formats.RawName && !image.ReadOnly() {
			slog.Info("the format was guessed: writes that make the image's start look like another format will fail; --format raw allows them",
				"image", path, "format", formats.RawName)
		}
		s.images = append(s.images, image)
		s.paths = append(s.paths, path)
		s.exports = append(s.exports, export.New(image, export.Options{Name: name, ReadOnly: c.ReadOnly, NoMerge: c.Merge == "off", NoBypass: c.Bypass == "off", Queues: c.Queues}))
	}
	return nil
}

// mergeGap is --merge-gap as formats.Options have it.
func (c *serveCmd) mergeGap() int64 {
	switch {
	case c.MergeGap == nil:
		return 0
	case *c.MergeGap == 0:
		return -1
	}
	return int64(*c.MergeGap)
}

// split takes NAME=PATH apart. One image without a name is the default export;
// several are named after their files.
func (c *serveCmd) split(arg string) (name, path string) {
	if name, path, ok := strings.Cut(arg, "="); ok && path != "" && !strings.Contains(name, "/") {
		if _, err := os.Lstat(arg); err != nil { // a file of that very name goes first
			return name, path
		}
	}
	if len(c.Images) > 1 {
		return filepath.Base(arg), arg
	}
	return c.Name, arg
}

// create makes the image when --create was given and it doesn't exist.
func (c *serveCmd) create(path string) error {
	if c.Create == nil {
		return nil
	}
	if *c.Create == 0 {
		return errors.New("--create: a size of 0 makes an image that can't be served; write one with a suffix: 512M, 1.5G, 2T")
	}
	if c.ReadOnly {
		return errors.New("--create and --read-only: an image that is made to be served must take writes")
	}
	var err error
	switch c.Format {
	case "auto", formats.RawName:
		err = raw.Create(path, int64(*c.Create), raw.CreateOptions{})
	case "qcow2":
		err = create.Create(path, int64(*c.Create), create.Options{})
	default:
		return fmt.Errorf("--create makes raw and qcow2 images, not %s", c.Format)
	}
	if errors.Is(err, os.ErrExist) {
		slog.Info("image exists and is kept as it is", "image", path)
		return nil
	}
	return err
}

// ready is the line that tells that clients may come, and how.
func (s *service) ready() string {
	what := fmt.Sprintf("%d images", len(s.images))
	name := ""
	if len(s.images) == 1 {
		what = fmt.Sprintf("%s (%s, %s)", s.paths[0], config.Size(s.images[0].Size()), s.images[0].Format())
		name = s.exports[0].Name()
	}
	uris := make([]string, len(s.addresses))
	for i, a := range s.addresses {
		uris[i] = a.URI(name)
	}
	return "platter: serving " + what + " at " + strings.Join(uris, " and ")
}

// stop lets clients finish, makes what they wrote durable, and ends.
func (s *service) stop() error {
	ctx, cancel := context.WithTimeout(context.Background(), drainTime)
	defer cancel()
	slog.Info("stopping: finishing what is in flight")
	if s.server.Shutdown(ctx) != nil {
		slog.Warn("clients that didn't take their replies were cut off")
	}
	var errs []error
	for i, e := range s.exports {
		logStats(s.paths[i], e.Stats())
		if e.ReadOnly() {
			continue
		}
		if err := e.Flush(s.loops[0]); err != nil {
			errs = append(errs, fmt.Errorf("flush %s: %w", s.paths[i], err))
		}
	}
	return errors.Join(append(errs, s.close())...)
}

// close gives everything back. It may be called again.
func (s *service) close() error {
	var errs []error
	for _, l := range s.listeners {
		_ = l.Close() // the server has closed it already, as a rule
	}
	for i, image := range s.images {
		if err := image.Close(); err != nil {
			errs = append(errs, fmt.Errorf("close %s: %w", s.paths[i], err))
		}
	}
	for _, l := range s.loops {
		_ = l.Close()
	}
	s.listeners, s.images, s.loops = nil, nil, nil
	return errors.Join(errs...)
}
