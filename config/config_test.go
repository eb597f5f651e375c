package config

import (
	"errors"
	"math"
	"strings"
	"testing"
)

func TestParseSize(t *testing.T) {
	for in, want := range map[string]Size{
		"0": 0, "1": 1, "512": 512, "512b": 512, "1k": 1024, "1K": 1024, "1KiB": 1024, "1kb": 1024,
		"1.5G": 3 << 29, "2T": 2 << 40, "1P": 1 << 50, "7E": 7 << 60, "0.5k": 512, "1.0001k": 1024,
		"9223372036854775807": math.MaxInt64,
	} {
		if got, err := ParseSize(in); err != nil || got != want {
			t.Errorf("ParseSize(%q) = %d, %v; want %d", in, got, err, want)
		}
	}
	for _, in := range []string{"", "G", "-1", "+1", "1 G", "1X", "1GG", "1KBB", "0x10", "1e3", "1.2.3", ".", "8E", "1/2", "NaN", "KM", "1.5", "1.0", ".5", "2.5b"} {
		if got, err := ParseSize(in); !errors.Is(err, ErrSize) {
			t.Errorf("ParseSize(%q) = %d, %v; want ErrSize", in, got, err)
		}
	}
}

func TestSizeString(t *testing.T) {
	for in, want := range map[Size]string{
		0: "0 B", 1000: "1000 B", 1024: "1 KiB", 3 << 29: "1.5 GiB", 1 << 30: "1 GiB", 1023 << 20: "1023 MiB", math.MaxInt64: "8 EiB",
	} {
		if got := in.String(); got != want {
			t.Errorf("Size(%d) = %q, want %q", in, got, want)
		}
	}
}

func TestParseAddress(t *testing.T) {
	for in, want := range map[string]string{
		"tcp://127.0.0.1:10809":  "nbd://127.0.0.1:10809/",
		"tcp://127.0.0.1":        "nbd://127.0.0.1:10809/",
		"tcp://[::1]:0/":         "nbd://[::1]:0/",
		"tcp://localhost":        "nbd://localhost:10809/",
		"unix:///run/a b.sock":   "nbd+unix:///?socket=/run/a%20b.sock",
		"unix:///run/a%26b.sock": "nbd+unix:///?socket=/run/a%2526b.sock",
	} {
		got, err := ParseAddress(in)
		if err != nil || got.URI("") != want {
			t.Errorf("ParseAddress(%q) = %q, %v; want %q", in, got.URI(""), err, want)
		}
	}
	for _, in := range []string{"", "tcp://", "tcp://:1", "tcp://a:99999", "tcp://a b", "unix://run/x", "unix:/x", "/x", "127.0.0.1:1",
		"unix:///" + strings.Repeat("x", 107)} {
		if got, err := ParseAddress(in); !errors.Is(err, ErrAddress) {
			t.Errorf("ParseAddress(%q) = %v, %v; want ErrAddress", in, got, err)
		}
	}
}

func TestURIWithName(t *testing.T) {
	tcp, unix := Address{"tcp", "h:1"}, Address{"unix", "/s"}
	if got := tcp.URI("a b/?"); got != "nbd://h:1/a%20b/%3F" {
		t.Errorf("TCP: %s", got)
	}
	if got := unix.URI("a b/?"); got != "nbd+unix:///a%20b/%3F?socket=/s" {
		t.Errorf("Unix: %s", got)
	}
}
