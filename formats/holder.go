package formats

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// lockHolder describes a process that holds locks on the file of fd, such as
// "qemu-nbd (pid 4711)", or is "" when none can be seen: those of other users
// and of other PID namespaces cannot. The kernel does not tell the owner of an
// OFD lock, but /proc shows each process its open files with their locks.
func lockHolder(fd int) string {
	var file unix.Stat_t
	if unix.Fstat(fd, &file) != nil {
		return ""
	}
	links, _ := filepath.Glob("/proc/[0-9]*/fd/[0-9]*")
	for _, link := range links {
		part := strings.Split(link, "/") // "", proc, PID, fd, FD
		pid, number := part[2], part[4]
		own := pid == strconv.Itoa(os.Getpid())
		if own && number == strconv.Itoa(fd) {
			continue
		}
		var st unix.Stat_t
		if unix.Stat(link, &st) != nil || st.Dev != file.Dev || st.Ino != file.Ino {
			continue
		}
		info, err := os.ReadFile("/proc/" + pid + "/fdinfo/" + number)
		if err != nil || !bytes.Contains(info, []byte("lock:")) {
			continue
		}
		if own {
			return "this very process, which has it open already"
		}
		name, _ := os.ReadFile("/proc/" + pid + "/comm")
		return strings.TrimSpace(fmt.Sprintf("%s (pid %s)", bytes.TrimSpace(name), pid))
	}
	return ""
}
