package integration

import (
	"encoding/json"
	"strings"
	"testing"
	"time"

	"platter/integration/testenv"
)

// fioResult is what the tests look at of fio's JSON.
type fioResult struct {
	Jobs []struct {
		Error int `json:"error"`
		Read  struct {
			TotalIOs int64 `json:"total_ios"`
			IOBytes  int64 `json:"io_bytes"`
		} `json:"read"`
		Write struct {
			TotalIOs int64 `json:"total_ios"`
			IOBytes  int64 `json:"io_bytes"`
		} `json:"write"`
	} `json:"jobs"`
}

func fio(t testing.TB, uri string, options ...string) fioResult {
	t.Helper()
	args := []string{
		"--name=job", "--ioengine=nbd", "--uri=" + uri, "--output-format=json",
		"--verify_state_save=0", "--group_reporting",
	}
	r := testenv.Run(t, 2*time.Minute, testenv.NeedTool(t, "fio"), append(args, options...)...)
	if r.Code != 0 {
		t.Fatalf("fio: exit code %d\n%s%s", r.Code, r.Stdout, r.Stderr)
	}
	// fio may speak before its JSON.
	var result fioResult
	start := strings.IndexByte(r.Stdout, '{')
	if start < 0 || json.Unmarshal([]byte(r.Stdout[start:]), &result) != nil || len(result.Jobs) != 1 {
		t.Fatalf("fio said:\n%s%s", r.Stdout, r.Stderr)
	}
	if result.Jobs[0].Error != 0 {
		t.Fatalf("fio: error %d\n%s", result.Jobs[0].Error, r.Stderr)
	}
	return result
}

// Four connections write a quarter of the disk each at random, then read it
// back and compare checksums.
func TestFioVerify(t *testing.T) {
	eachSetup(t, func(t *testing.T, s setup) {
		const part = 8 * mib
		server := s.serve(t, testenv.Image(t, s.dir(t), "disk.raw", 4*part, nil))
		for _, workload := range [][]string{
			{"--rw=randwrite", "--bs=4k", "--iodepth=32"},
			{"--rw=write", "--bs=64k", "--iodepth=16"},
			{"--rw=randwrite", "--bsrange=512-128k", "--blockalign=512", "--iodepth=16", "--fsync=32"},
		} {
			got := fio(t, server.URI, append(workload, "--numjobs=4", "--size=8m", "--offset_increment=8m",
				"--verify=crc32c", "--do_verify=1", "--verify_fatal=1")...)
			if job := got.Jobs[0]; job.Write.IOBytes < 4*part || job.Read.IOBytes < 4*part {
				t.Errorf("fio %q wrote %d and read %d bytes, want %d", workload, job.Write.IOBytes, job.Read.IOBytes, 4*part)
			}
		}
	})
}

// Four connections share one range, reading and writing at a time.
func TestFioMixed(t *testing.T) {
	t.Parallel()
	server := serveUnix(t, "--loops", "2", testenv.Image(t, testenv.DiskDir(t), "disk.raw", 32*mib, nil))
	got := fio(t, server.URI, "--rw=randrw", "--bsrange=4k-64k", "--iodepth=32", "--numjobs=4", "--size=32m",
		"--io_size=16m", "--runtime=30")
	if job := got.Jobs[0]; job.Read.TotalIOs == 0 || job.Write.TotalIOs == 0 {
		t.Errorf("fio did %d reads and %d writes", job.Read.TotalIOs, job.Write.TotalIOs)
	}
}
