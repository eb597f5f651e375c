package codec

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"

	"github.com/klauspost/compress/flate"
)

// window is how far back deflate data may refer: QEMU inflates with 12 bits.
const window = 4 << 10

type inflater struct {
	r interface {
		io.Reader
		flate.Resetter
	}
	src  bytes.Reader
	more [1]byte // to see that nothing follows
}

var inflaters = sync.Pool{New: func() any {
	p := new(inflater)
	p.r = flate.NewReader(&p.src).(interface {
		io.Reader
		flate.Resetter
	})
	return p
}}

func inflate(dst, src []byte) error {
	p := inflaters.Get().(*inflater)
	defer inflaters.Put(p)
	p.src.Reset(src)
	defer p.src.Reset(nil) // src is the caller's
	if err := p.r.Reset(&p.src, nil); err != nil {
		return err
	}
	if n, err := io.ReadFull(p.r, dst); err != nil {
		return corrupt(fmt.Errorf("%d of %d bytes: %w", n, len(dst), err))
	}
	switch _, err := io.ReadFull(p.r, p.more[:]); err {
	case io.EOF:
		return nil
	case nil:
		return corrupt(errTooLong)
	default:
		return corrupt(fmt.Errorf("behind the last byte: %w", err))
	}
}

// A deflater looks for repeats, and where there are few, spares references to
// them and has frequent bytes take fewer bits only: digits without order are so
// packed into half the room, where repeats by chance would take more than they
// save.
type deflater struct {
	repeats, literals *flate.Writer
	dst               limited
	buf               []byte // for what literals makes
}

var deflaters = sync.Pool{New: func() any {
	repeats, err := flate.NewWriterWindow(nil, window)
	if err != nil {
		panic(err) // no such window
	}
	literals, err := flate.NewWriter(nil, flate.HuffmanOnly)
	if err != nil {
		panic(err) // no such level
	}
	return &deflater{repeats: repeats, literals: literals}
}}

func deflate(dst, src []byte) (n int, ok bool, err error) {
	p := deflaters.Get().(*deflater)
	defer deflaters.Put(p)
	n, ok, err = p.pack(p.repeats, dst, src)
	if err != nil || ok && n <= len(src)/2 {
		return n, ok, err
	}
	most := len(dst)
	if ok {
		most = n - 1
	}
	p.buf = slices.Grow(p.buf[:0], most)[:most]
	if m, fewer, err := p.pack(p.literals, p.buf, src); err != nil || fewer {
		return copy(dst, p.buf[:m]), err == nil, err
	}
	return n, ok, nil
}

func (p *deflater) pack(w *flate.Writer, dst, src []byte) (n int, ok bool, err error) {
	p.dst.free = dst
	w.Reset(&p.dst)
	_, err = w.Write(src)
	if err == nil {
		err = w.Close()
	}
	n = len(dst) - len(p.dst.free)
	p.dst.free = nil // dst is the caller's
	switch {
	case errors.Is(err, errFull):
		return 0, false, nil
	case err != nil:
		return 0, false, fmt.Errorf("deflate: %w", err)
	}
	return n, true, nil
}

// limited writes into memory until it is full.
type limited struct{ free []byte }

var errFull = errors.New("no room")

func (l *limited) Write(b []byte) (int, error) {
	if len(b) > len(l.free) {
		return 0, errFull
	}
	l.free = l.free[copy(l.free, b):]
	return len(b), nil
}
