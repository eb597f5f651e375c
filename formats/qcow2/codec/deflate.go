package codec

import (
	"bytes"
	"errors"
	"fmt"
	"io"
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

type deflater struct {
	w   *flate.Writer
	dst limited
}

var deflaters = sync.Pool{New: func() any {
	w, err := flate.NewWriterWindow(nil, window)
	if err != nil {
		panic(err) // no such window
	}
	return &deflater{w: w}
}}

func deflate(dst, src []byte) (n int, ok bool, err error) {
	p := deflaters.Get().(*deflater)
	defer deflaters.Put(p)
	p.dst = limited{free: dst}
	p.w.Reset(&p.dst)
	_, err = p.w.Write(src)
	if err == nil {
		err = p.w.Close()
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
