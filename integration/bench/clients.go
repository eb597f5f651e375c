package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os/exec"
	"time"

	"platter/integration/loadgen"
)

// sample is what one run of a load against one server showed. Fields that the
// load does not measure are 0.
type sample struct {
	rate     float64       // requests per second, or bytes per second for a copy
	cpu      float64       // server CPU seconds per request
	p50, p99 time.Duration // latency
	memory   float64       // peak resident bytes of the server
	ready    time.Duration // from exec to ready

	fileWrites float64 // of the server to its file, per request
	fileBytes  float64 // that it wrote there, per byte of the client's
	ideal      float64 // requests per second, see queues
}

// load is a client with its parameters.
type load struct {
	name   string
	writes bool // the image changes
	repeat int  // how many times the session's rounds it takes; 0 is once
	once   bool // one round is enough: the figures are counts
	run    func(ctx context.Context, p *process, img *image, length time.Duration) (sample, error)
}

// generated is a load from the batching generator.
func generated(name string, cfg loadgen.Config) *load {
	run := func(_ context.Context, p *process, _ *image, length time.Duration) (sample, error) {
		cfg := cfg
		cfg.Address, cfg.Export, cfg.Duration = p.socket, p.export, length
		cfg.Latency = cfg.Depth == 1
		before, err := cpuTime(p.cmd.Process.Pid)
		if err != nil {
			return sample{}, err
		}
		r, err := loadgen.Run(cfg)
		if err != nil {
			return sample{}, err
		}
		after, err := cpuTime(p.cmd.Process.Pid)
		if err != nil {
			return sample{}, err
		}
		if r.Errors > 0 {
			return sample{}, fmt.Errorf("server failed %d of %d requests, first with NBD error %d", r.Errors, r.Requests, r.FirstErr)
		}
		return sample{
			rate: r.IOPS(),
			cpu:  (after - before).Seconds() / float64(r.Requests),
			p50:  r.Latency.Quantile(0.5),
			p99:  r.Latency.Quantile(0.99),
		}, nil
	}
	return &load{name: name, writes: cfg.Write, run: run}
}

// fioRandomRead is 4k random reads by fio's nbd engine.
func fioRandomRead(name string, depth int) *load {
	return &load{name: name, run: func(ctx context.Context, p *process, img *image, length time.Duration) (sample, error) {
		out, err := runTool(ctx, length, "fio", "--name=read", "--ioengine=nbd", "--uri="+p.uri(), "--rw=randread", "--bs=4k",
			fmt.Sprint("--iodepth=", depth), fmt.Sprint("--size=", img.size), "--norandommap", "--randrepeat=0",
			"--time_based", fmt.Sprintf("--runtime=%dms", length.Milliseconds()), "--eta=never", "--output-format=json")
		if err != nil {
			return sample{}, err
		}
		return parseFio(out)
	}}
}

// parseFio takes the rate of reads from fio's report, which may have lines of
// text before it.
func parseFio(out []byte) (sample, error) {
	var report struct {
		Jobs []struct {
			Error int
			Read  struct{ IOPS float64 }
		}
	}
	if start := bytes.IndexByte(out, '{'); start > 0 {
		out = out[start:]
	}
	if err := json.Unmarshal(out, &report); err != nil {
		return sample{}, fmt.Errorf("read fio's report: %w", err)
	}
	if len(report.Jobs) != 1 || report.Jobs[0].Error != 0 || report.Jobs[0].Read.IOPS <= 0 {
		return sample{}, fmt.Errorf("fio failed: %+v", report.Jobs)
	}
	return sample{rate: report.Jobs[0].Read.IOPS}, nil
}

// copyToNull reads the whole image by nbdcopy.
func copyToNull(name string) *load {
	return &load{name: name, run: func(ctx context.Context, p *process, img *image, _ time.Duration) (sample, error) {
		begin := time.Now()
		_, err := runTool(ctx, 0, "nbdcopy", p.uri(), "null:")
		return sample{rate: float64(img.size) / time.Since(begin).Seconds()}, err
	}}
}

// runTool runs a client for the given length and up to a minute more.
func runTool(ctx context.Context, length time.Duration, name string, args ...string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, length+time.Minute)
	defer cancel()
	var stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("run %s: %w: %s", name, err, lastLine(stderr.String()))
	}
	return out, nil
}
