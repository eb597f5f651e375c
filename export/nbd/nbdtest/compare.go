package nbdtest

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
)

// Compare sends the same random writes and reads to two servers and returns an
// error as soon as they answer differently. It uses only what every server
// knows, and leaves both exports with the same bytes. The exports must have
// held the same before, and be of one size. Requests are aligned to the larger
// of both minimum block sizes and at most longest bytes.
func Compare(a, b *Client, rng *rand.Rand, rounds, longest int) error {
	if a.Size != b.Size {
		return fmt.Errorf("sizes differ: %d and %d", a.Size, b.Size)
	}
	block := int64(max(a.MinBlock, b.MinBlock, 1))
	blocks := int64(a.Size) / block
	most := min(int64(longest)/block, blocks)
	if most == 0 {
		return errors.New("nothing to compare: no whole block")
	}
	// both asks both servers, each of which may refuse, but in the same words.
	both := func(what string, off int64, n int, ask func(c *Client) error) error {
		errA, errB := ask(a), ask(b)
		var errnoA, errnoB Errno
		if errA != nil && !errors.As(errA, &errnoA) {
			return fmt.Errorf("%s %d at %d: first server: %w", what, n, off, errA)
		}
		if errB != nil && !errors.As(errB, &errnoB) {
			return fmt.Errorf("%s %d at %d: second server: %w", what, n, off, errB)
		}
		if errnoA != errnoB {
			return fmt.Errorf("%s %d at %d: first server: error %d, second: error %d", what, n, off, uint32(errnoA), uint32(errnoB))
		}
		return nil
	}
	p, q := make([]byte, most*block), make([]byte, most*block)
	read := func(off int64, n int) error {
		if err := both("read", off, n, func(c *Client) error {
			if c == a {
				return c.Read(off, p[:n])
			}
			return c.Read(off, q[:n])
		}); err != nil {
			return err
		}
		if !bytes.Equal(p[:n], q[:n]) {
			return fmt.Errorf("read %d at %d: the servers' bytes differ", n, off)
		}
		return nil
	}
	for range rounds {
		count := 1 + rng.Int64N(most)
		off, n := block*rng.Int64N(blocks-count+1), int(block*count)
		if rng.IntN(2) == 0 {
			if err := read(off, n); err != nil {
				return err
			}
			continue
		}
		fill(p[:n], rng)
		if err := both("write", off, n, func(c *Client) error { return c.Write(off, p[:n]) }); err != nil {
			return err
		}
	}
	for off := int64(0); off < blocks*block; off += most * block {
		if err := read(off, int(min(most, blocks-off/block)*block)); err != nil {
			return err
		}
	}
	return nil
}

// fill makes p random.
func fill(p []byte, rng *rand.Rand) {
	for len(p) >= 8 {
		v := rng.Uint64()
		for i := range 8 {
			p[i] = byte(v >> (8 * i))
		}
		p = p[8:]
	}
	for i := range p {
		p[i] = byte(rng.Uint32())
	}
}
