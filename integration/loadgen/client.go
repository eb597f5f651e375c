package loadgen

import (
	"encoding/binary"
	"fmt"
	"math/bits"
	"time"
)

// Numbers of the transmission phase.
const (
	magicRequest = 0x25609513
	magicReply   = 0x67446698
	cmdRead      = 0
	cmdWrite     = 1
	cmdDisc      = 2

	requestBytes = 28
	replyBytes   = 16

	// receiveBuffer holds some sixty 4k replies and still fits a core's cache.
	receiveBuffer = 256 << 10
)

// slot is one of the Depth places for a request in flight. Its cookie on the
// wire is the generation in the upper and the slot's index in the lower half.
type slot struct {
	offset     uint64
	sent       time.Duration // since begin
	generation uint32
	busy       bool
}

// conn is one connection and everything its thread needs.
type conn struct {
	sock  socket
	cfg   *Config
	size  uint64
	begin time.Time

	slots []slot
	free  []uint32 // indices of slots that are not in flight

	out    []byte // one batch as it goes out: header, payload, header, …
	stride int    // bytes from one header in out to the next

	in   []byte // receive buffer; in[r:w] has not been looked at
	r, w int
	skip int // payload bytes still to be passed over

	// Offsets are block numbers in [first, first+blocks) times the block size.
	first, blocks, next uint64
	rng                 uint64

	toSend  int64 // requests this connection may still send
	done    int64
	failed  int64
	elapsed time.Duration

	firstErr uint32
	latency  Histogram
}

// dial connects and negotiates connection number index of the run.
func dial(cfg *Config, index int) (*conn, error) {
	sock, err := connect(cfg.Network, cfg.Address, cfg.Timeout)
	if err != nil {
		return nil, &Error{"connect to", cfg.Address, err}
	}
	exp, err := negotiate(sock, cfg.Export)
	if err == nil {
		err = sock.spinFor(cfg.Spin)
	}
	if err == nil && cfg.Write && exp.flags&flagReadOnly != 0 {
		err = ErrReadOnly
	}
	blocks := exp.size / uint64(cfg.BlockSize)
	if err == nil && blocks < uint64(cfg.Conns) {
		err = fmt.Errorf("an export of %d bytes is too small for %d connections with blocks of %d", exp.size, cfg.Conns, cfg.BlockSize)
	}
	if err != nil {
		sock.close()
		return nil, &Error{"negotiate with", cfg.Address, err}
	}

	c := &conn{
		sock: sock, cfg: cfg, size: exp.size, blocks: blocks,
		rng:    0x9e3779b97f4a7c15 * uint64(index+1),
		slots:  make([]slot, cfg.Depth),
		free:   make([]uint32, cfg.Depth),
		stride: requestBytes,
		in:     make([]byte, receiveBuffer),
		toSend: 1<<63 - 1,
	}
	if cfg.Verify != nil {
		c.in = make([]byte, max(receiveBuffer, 2*(replyBytes+cfg.BlockSize)))
	}
	if !cfg.Random { // each connection walks a stretch of its own
		c.blocks = blocks / uint64(cfg.Conns)
		c.first = c.blocks * uint64(index)
	}
	if cfg.Requests > 0 {
		n, over := cfg.Requests/int64(cfg.Conns), cfg.Requests%int64(cfg.Conns)
		c.toSend = n
		if int64(index) < over {
			c.toSend++
		}
	}
	for i := range c.free {
		c.free[i] = uint32(i)
	}
	c.prepareBatch()
	return c, nil
}

// prepareBatch lays out everything of a batch that stays the same.
func (c *conn) prepareBatch() {
	command := uint16(cmdRead)
	if c.cfg.Write {
		command = cmdWrite
		c.stride += c.cfg.BlockSize
	}
	c.out = make([]byte, c.cfg.Batch*c.stride)
	for i := range c.cfg.Batch {
		request := c.out[i*c.stride : (i+1)*c.stride]
		binary.BigEndian.PutUint32(request[0:], magicRequest)
		binary.BigEndian.PutUint16(request[6:], command)
		binary.BigEndian.PutUint32(request[24:], uint32(c.cfg.BlockSize))
		switch payload := request[requestBytes:]; {
		case c.cfg.Fill != nil && c.cfg.Write:
			c.cfg.Fill(payload)
		default:
			for j := range payload {
				payload[j] = byte(j%251 + 1)
			}
		}
	}
}

// run keeps the connection busy until the time or the requests are used up,
// collects what is still in flight, and says goodbye.
func (c *conn) run() error {
	defer func() { c.elapsed = time.Since(c.begin) }()
	for len(c.free) > 0 && c.toSend > 0 {
		if err := c.send(time.Since(c.begin)); err != nil {
			return err
		}
	}
	for len(c.free) < c.cfg.Depth {
		if err := c.receive(); err != nil {
			return err
		}
		for c.toSend > 0 && len(c.free) >= c.cfg.Batch {
			now := time.Since(c.begin)
			if c.cfg.Duration > 0 && now >= c.cfg.Duration {
				c.toSend = 0
				break
			}
			if err := c.send(now); err != nil {
				return err
			}
		}
	}
	request := c.out[:requestBytes]
	binary.BigEndian.PutUint16(request[6:], cmdDisc)
	binary.BigEndian.PutUint64(request[16:], 0)
	binary.BigEndian.PutUint32(request[24:], 0)
	_, err := c.sock.Write(request)
	return err
}

// send puts up to one batch of new requests on the wire, in one write.
func (c *conn) send(now time.Duration) error {
	n := int(min(int64(min(len(c.free), c.cfg.Batch)), c.toSend))
	top := len(c.free) - n
	for i, index := range c.free[top:] {
		s := &c.slots[index]
		s.generation++
		s.busy = true
		s.offset = c.nextOffset()
		s.sent = now
		header := c.out[i*c.stride:]
		binary.BigEndian.PutUint64(header[8:], uint64(s.generation)<<32|uint64(index))
		binary.BigEndian.PutUint64(header[16:], s.offset)
	}
	c.free = c.free[:top]
	c.toSend -= int64(n)
	_, err := c.sock.Write(c.out[:n*c.stride])
	return err
}

func (c *conn) nextOffset() uint64 {
	block := c.next
	if c.cfg.Random {
		c.rng ^= c.rng << 13
		c.rng ^= c.rng >> 7
		c.rng ^= c.rng << 17
		block, _ = bits.Mul64(c.rng, c.blocks) // scales to [0, blocks)
	} else if c.next++; c.next == c.blocks {
		c.next = 0
	}
	return (c.first + block) * uint64(c.cfg.BlockSize)
}

// receive waits for data once and settles every reply in it.
func (c *conn) receive() error {
	// What is left is part of a header (or, verifying, of a reply).
	c.w = copy(c.in, c.in[c.r:c.w])
	c.r = 0
	n, err := c.sock.Read(c.in[c.w:])
	if err != nil {
		return err
	}
	c.w += n
	for {
		over := min(c.skip, c.w-c.r)
		c.r += over
		c.skip -= over
		if c.w-c.r < replyBytes {
			return nil
		}
		if whole, err := c.settle(c.in[c.r:c.w]); err != nil || !whole {
			return err
		}
		c.r += replyBytes
	}
}

// settle finishes the request that the reply at the start of data belongs to.
// It returns false when it needs to see more of the reply first.
func (c *conn) settle(data []byte) (whole bool, err error) {
	be := binary.BigEndian
	if be.Uint32(data) != magicReply {
		return false, fmt.Errorf("%w: no reply where one should start", ErrProtocol)
	}
	errno, generation, index := be.Uint32(data[4:]), be.Uint32(data[8:]), be.Uint32(data[12:])
	if index >= uint32(len(c.slots)) || !c.slots[index].busy || c.slots[index].generation != generation {
		return false, fmt.Errorf("%w: reply to a request that is not in flight", ErrProtocol)
	}
	s := &c.slots[index]
	switch {
	case errno != 0:
		c.failed++
		if c.firstErr == 0 {
			c.firstErr = errno
		}
	case !c.cfg.Write:
		if c.cfg.Verify != nil {
			if len(data) < replyBytes+c.cfg.BlockSize {
				return false, nil
			}
			if !c.cfg.Verify(s.offset, data[replyBytes:replyBytes+c.cfg.BlockSize]) {
				return false, fmt.Errorf("%w at offset %d", ErrPayload, s.offset)
			}
		}
		c.skip = c.cfg.BlockSize
	}
	s.busy = false
	c.free = append(c.free, index)
	c.done++
	if c.cfg.Latency {
		c.latency.record(time.Since(c.begin) - s.sent)
	}
	return true, nil
}
