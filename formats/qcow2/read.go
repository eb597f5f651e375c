package qcow2

import (
	"golang.org/x/sys/unix"

	"platter/aio"
)

// read splits a read and reports whether it will be continued.
func (ln *lane) read(o *op) (more bool) {
	im := ln.im
	end := o.r.End()
	for ; o.at < end; ln.lookups.Add(1) {
		if host, _, ok := im.plain(o.at, end); ok && host+end-o.at <= im.dataEnd() {
			ln.out = append(ln.out, &ln.part(o, end-o.at, host).req)
			continue
		}
		m := im.lookup(o.at, end)
		switch m.kind {
		case data:
			if m.host+m.length > im.dataEnd() {
				ln.readShort(o, m)
				continue
			}
			// Pieces that lie behind each other in the file are one operation,
			// also across slices.
			for o.at+m.length < end {
				n := im.lookup(o.at+m.length, end)
				if n.kind != data || n.host != m.host+m.length || n.host+n.length > im.dataEnd() {
					break
				}
				m.length += n.length
			}
			ln.out = append(ln.out, &ln.part(o, m.length, m.host).req)
		case hole:
			ln.readHole(o, m.length)
		case zero:
			ln.zeroFill(o, m.length)
		case compressed:
			guest, n := o.at, m.length
			p := ln.part(o, n, 0)
			ln.apart(im.readers, p, func() unix.Errno { return im.readCompressed(p.req.Vec, guest, n, m.word) })
		case missing:
			ln.load(o)
			return true
		case broken:
			o.fail(unix.EIO)
		}
	}
	return false
}

// readHole reads what isn't allocated: the backing file, and zeroes beyond it.
func (ln *lane) readHole(o *op, n int64) {
	if below := min(n, ln.im.backingSize-o.at); below > 0 {
		ln.outBelow = append(ln.outBelow, &ln.part(o, below, o.at).req)
		n -= below
	}
	if n > 0 {
		ln.zeroFill(o, n)
	}
}

// zeroFill reads zeroes.
func (ln *lane) zeroFill(o *op, n int64) {
	p := ln.part(o, n, 0)
	aio.Zero(p.req.Vec)
	ln.ended(p, 0)
}

// readShort reads what reaches beyond the end of the file, as it may in the last
// cluster: there are zeroes.
func (ln *lane) readShort(o *op, m mapping) {
	if n := min(m.length, ln.im.dataEnd()-m.host); n > 0 {
		ln.out = append(ln.out, &ln.part(o, n, m.host).req)
		m.length -= n
	}
	ln.zeroFill(o, m.length)
}

// load has the slice for o.at read, and the request continued after that.
func (ln *lane) load(o *op) {
	ln.misses.Add(1)
	number := o.at >> ln.im.sliceShift
	for p := ln.parked; p != nil; p = p.next {
		if p.slice == number {
			o.next, p.ops = p.ops, o
			return
		}
	}
	p := &parking{slice: number, ops: o, next: ln.parked}
	o.next, ln.parked = nil, p
	guest := o.at
	go ln.im.loadSlice(guest, func(err error) {
		ln.loop.Post(func() { ln.loaded(p, err) })
	})
}

// loaded goes on with the requests that waited for a slice, in the order in
// which they came.
func (ln *lane) loaded(p *parking, err error) {
	for at := &ln.parked; ; at = &(*at).next {
		if *at == p {
			*at = p.next
			break
		}
	}
	var first *op
	for p.ops != nil {
		o := p.ops
		p.ops, o.next, first = o.next, first, o
	}
	for first != nil {
		o := first
		first, o.next = o.next, nil
		if err != nil {
			o.fail(errnoOf(err))
		}
		ln.split(o)
	}
	ln.submit()
}
