package cli

import (
	"errors"
	"fmt"
	"net"
	"os"

	"golang.org/x/sys/unix"

	"platter/config"
)

// listen opens the address. A Unix socket that a server left behind when it
// was killed is replaced; one that is answered, or any other file, is not.
func listen(a config.Address) (net.Listener, error) {
	l, err := net.Listen(a.Network, a.Host)
	if errors.Is(err, unix.EADDRINUSE) && a.Network == "unix" && abandoned(a.Host) {
		if err := os.Remove(a.Host); err != nil {
			return nil, fmt.Errorf("replace abandoned socket: %w", err)
		}
		l, err = net.Listen(a.Network, a.Host)
	}
	if err == nil {
		return l, nil
	}
	var op *net.OpError
	if errors.As(err, &op) {
		err = op.Err
	}
	var call *os.SyscallError
	if errors.As(err, &call) {
		err = call.Err
	}
	return nil, fmt.Errorf("listen on %s: %w%s", a, err, listenRemedy(err))
}

func listenRemedy(err error) string {
	switch {
	case errors.Is(err, unix.EADDRINUSE):
		return " (another server has it: stop that one, or choose another --nbd address)"
	case errors.Is(err, unix.EADDRNOTAVAIL):
		return " (it is none of this machine's addresses)"
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
		return " (choose a port above 1023 or a folder that you may write to)"
	case errors.Is(err, unix.ENOENT):
		return " (its folder doesn't exist)"
	}
	return ""
}

// abandoned reports whether path is a socket that nobody listens on.
func abandoned(path string) bool {
	st, err := os.Lstat(path)
	if err != nil || st.Mode()&os.ModeSocket == 0 {
		return false
	}
	c, err := net.Dial("unix", path)
	if err == nil {
		c.Close()
	}
	return errors.Is(err, unix.ECONNREFUSED)
}

// boundTo is the address that was got, which tells the port that was chosen when
// 0 was asked for.
func boundTo(a config.Address, l net.Listener) config.Address {
	if tcp, ok := l.Addr().(*net.TCPAddr); ok {
		host, _, _ := net.SplitHostPort(a.Host)
		a.Host = net.JoinHostPort(host, fmt.Sprint(tcp.Port))
	}
	return a
}
