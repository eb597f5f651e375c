package config

import (
	"errors"
	"fmt"
	"net"
	"net/url"
	"strings"
)

// ErrAddress is returned for what is no address to listen on.
var ErrAddress = errors.New("not an address")

// DefaultPort is NBD's port.
const DefaultPort = "10809"

// Address is where a server listens: tcp://host:port or unix:///path.
type Address struct {
	Network string // "tcp" or "unix", as package net has it
	Host    string // host:port, or the socket's path
}

// ParseAddress reads an address. A TCP address without a port gets NBD's.
func ParseAddress(s string) (Address, error) {
	scheme, rest, ok := strings.Cut(s, "://")
	switch {
	case ok && scheme == "unix" && strings.HasPrefix(rest, "/"):
		if len(rest) > maxSocketPath {
			return Address{}, fmt.Errorf("%w: %q is too long (a socket's path has at most %d bytes, this one %d)", ErrAddress, s, maxSocketPath, len(rest))
		}
		return Address{"unix", rest}, nil
	case ok && scheme == "tcp":
		rest = strings.TrimSuffix(rest, "/")
		host, port, err := net.SplitHostPort(rest)
		if err != nil {
			host, port = strings.Trim(rest, "[]"), DefaultPort
		}
		if _, err := net.LookupPort("tcp", port); err == nil && !strings.ContainsAny(host, "/ ") && host != "" {
			return Address{"tcp", net.JoinHostPort(host, port)}, nil
		}
	}
	return Address{}, fmt.Errorf("%w: %q (write tcp://HOST:PORT or unix:///PATH)", ErrAddress, s)
}

// maxSocketPath is what sockaddr_un holds, less its final zero.
const maxSocketPath = 107

// UnmarshalText reads an address from the command line or a file.
func (a *Address) UnmarshalText(text []byte) (err error) {
	*a, err = ParseAddress(string(text))
	return err
}

func (a Address) String() string {
	return a.Network + "://" + a.Host
}

// URI is what an NBD client calls an export at the address, as doc/uri.md of
// NetworkBlockDevice/nbd has it. The default export has no name.
func (a Address) URI(export string) string {
	u := url.URL{Scheme: "nbd", Host: a.Host, Path: "/" + export}
	if a.Network == "unix" {
		socket := strings.NewReplacer("+", "%20", "%2F", "/").Replace(url.QueryEscape(a.Host))
		return "nbd+unix://" + u.EscapedPath() + "?socket=" + socket
	}
	return u.String()
}
