// Package config is what users write: sizes, addresses and names, read from the
// command line. It does no I/O on images and depends on no other package here.
package config

import (
	"errors"
	"fmt"
	"math"
	"math/big"
	"strings"
)

// ErrSize is returned for what is no size.
var ErrSize = errors.New("not a size")

// Size is a number of bytes, written as users of qemu-img write it: a number
// with one of the suffixes b, k, M, G, T, P and E for powers of 1024 (KiB and KB
// mean the same). With k and above it may be a decimal fraction.
type Size int64

const suffixes = "KMGTPE"

// ParseSize reads a size.
func ParseSize(s string) (Size, error) {
	digits := strings.TrimRight(s, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
	unit := strings.ToUpper(s[len(digits):])
	if len(unit) > 1 {
		unit = strings.TrimSuffix(strings.TrimSuffix(unit, "B"), "I")
	}
	shift := 0
	switch i := strings.Index(suffixes, unit); {
	case unit == "" && digits == s, unit == "B":
	case len(unit) == 1 && i >= 0:
		shift = 10 * (i + 1)
	default:
		return 0, wrongSize(s)
	}
	if strings.Trim(digits, "0123456789.") != "" || strings.Count(digits, ".") > 1 {
		return 0, wrongSize(s)
	}
	if shift == 0 && strings.Contains(digits, ".") {
		return 0, fmt.Errorf("%w: %q is a fraction of a byte (a suffix may be missing: %sM, %sG)", ErrSize, s, digits, digits)
	}
	n, ok := new(big.Rat).SetString(digits)
	if !ok {
		return 0, wrongSize(s)
	}
	n.Mul(n, new(big.Rat).SetInt(new(big.Int).Lsh(big.NewInt(1), uint(shift))))
	whole := new(big.Int).Quo(n.Num(), n.Denom())
	if !whole.IsInt64() {
		return 0, fmt.Errorf("%w: %q is more than %d bytes", ErrSize, s, int64(math.MaxInt64))
	}
	return Size(whole.Int64()), nil
}

func wrongSize(s string) error {
	return fmt.Errorf("%w: %q (write a number of bytes, or one with a suffix: 512M, 1.5G, 2T)", ErrSize, s)
}

// UnmarshalText reads a size from the command line or a file.
func (s *Size) UnmarshalText(text []byte) (err error) {
	*s, err = ParseSize(string(text))
	return err
}

// String writes the size as people like to read it: "1 GiB", "1.5 GiB",
// "1000 B".
func (s Size) String() string {
	n, unit := float64(s), ""
	for i := 0; n >= 1024 && i < len(suffixes); i++ {
		n /= 1024
		unit = suffixes[i:i+1] + "i"
	}
	text := fmt.Sprintf("%.3g", n)
	if n >= 1000 {
		text = fmt.Sprintf("%.0f", n)
	}
	return text + " " + unit + "B"
}
