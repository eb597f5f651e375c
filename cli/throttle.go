package cli

import (
	"errors"
	"fmt"

	"platter/config"
	"platter/export"
)

// throttleFlags bound what each image of a command may do.
type throttleFlags struct {
	IOPS      int64        `name:"iops" placeholder:"N" help:"Serve at most so many requests per second of each image."`
	IOPSRead  int64        `name:"iops-read" placeholder:"N" help:"The same for reads."`
	IOPSWrite int64        `name:"iops-write" placeholder:"N" help:"The same for writes, discards among them."`
	IOPSBurst *int64       `name:"iops-burst" placeholder:"N" help:"How many may be served at once after a rest; by default a tenth of a second's worth."`
	BPS       config.Size  `name:"bps" placeholder:"SIZE" help:"Read and write at most so many bytes per second (100M) of each image."`
	BPSRead   config.Size  `name:"bps-read" placeholder:"SIZE" help:"The same for reads."`
	BPSWrite  config.Size  `name:"bps-write" placeholder:"SIZE" help:"The same for writes."`
	BPSBurst  *config.Size `name:"bps-burst" placeholder:"SIZE" help:"How many bytes at once after a rest; by default a tenth of a second's worth."`
}

// throttle is what the flags ask for.
func (f *throttleFlags) throttle() (export.Throttle, error) {
	t := export.Throttle{
		IOPS: export.Rates{Total: f.IOPS, Read: f.IOPSRead, Write: f.IOPSWrite},
		BPS:  export.Rates{Total: int64(f.BPS), Read: int64(f.BPSRead), Write: int64(f.BPSWrite)},
	}
	if f.IOPSBurst != nil {
		if t.IOPS.Burst = *f.IOPSBurst; t.IOPS.Burst == 0 {
			return t, errors.New("--iops-burst 0: no request could go; choose 1 at least")
		}
	}
	if f.BPSBurst != nil {
		if t.BPS.Burst = int64(*f.BPSBurst); t.BPS.Burst == 0 {
			return t, fmt.Errorf("--bps-burst 0: no request could go; choose %d at least", export.MinBytesBurst)
		}
	}
	return t, t.Check()
}
