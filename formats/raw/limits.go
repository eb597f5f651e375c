package raw

import (
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"platter/formats"
)

const (
	maxTransfer = 32 << 20 // what front ends at most ask for; any longer only costs memory
	maxSegments = 1024     // IOV_MAX, what one preadv takes
	pageSize    = 4096
)

// limitsOf asks the file system or the block device what it is good at. A
// storage without a descriptor (-1) gets what is always true.
func limitsOf(fd int, size int64, readOnly bool) formats.Limits {
	limits := formats.Limits{
		BlockSize:          1,
		PreferredSize:      pageSize,
		MaxTransfer:        maxTransfer,
		MaxSegments:        maxSegments,
		DiscardGranularity: pageSize,
		MultiConn:          true,
		FUA:                true,
	}
	var st unix.Stat_t
	if fd < 0 || unix.Fstat(fd, &st) != nil {
		return limits
	}
	if st.Mode&unix.S_IFMT == unix.S_IFBLK {
		limits.DiscardGranularity = granularity(queueAttr(st.Rdev, "discard_granularity"))
		limits.FastZero = queueAttr(st.Rdev, "write_zeroes_max_bytes") > 0
		limits.Rotational = queueAttr(st.Rdev, "rotational") == 1
		return limits
	}
	limits.DiscardGranularity = granularity(int64(st.Blksize))
	limits.FastZero = !readOnly && punchesHoles(fd, size)
	limits.Rotational = queueAttr(st.Dev, "rotational") == 1
	return limits
}

// granularity takes a value of the kernel's for what can be freed at a time,
// which is 0 when nothing can.
func granularity(n int64) uint32 {
	if n < 512 || n > 1<<30 || n&(n-1) != 0 {
		return pageSize
	}
	return uint32(n)
}

// punchesHoles tries it where there is nothing to lose: behind the end.
func punchesHoles(fd int, size int64) bool {
	return unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, size, pageSize) == nil
}

// queueAttr reads a number that sysfs tells of the queue of a block device, or
// 0. A partition's queue is that of the disk, whose folder it stands in.
func queueAttr(dev uint64, name string) int64 {
	device := fmt.Sprintf("/sys/dev/block/%d:%d/", unix.Major(dev), unix.Minor(dev))
	for _, queue := range []string{"queue/", "../queue/"} {
		if text, err := os.ReadFile(device + queue + name); err == nil {
			n, _ := strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64)
			return n
		}
	}
	return 0
}
