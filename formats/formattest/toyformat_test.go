package formattest

import (
	"encoding/binary"
	"fmt"
	"slices"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"platter/aio"
	"platter/formats"
)

// toy is a small log-structured format: a table says where each block of the
// guest stands, and a block that is written goes to a new place. It survives
// power cuts, unless it has one of the bugs.
type toy struct {
	file aio.Storage
	io   *aio.Loop
	size int64
	bug  toyBug

	mu      sync.Mutex
	table   []uint64 // by guest block: its place, or 0
	dirty   map[int]bool
	free    []uint64
	pending []uint64 // places whose mapping is gone, but not durably
	next    uint64   // first place never used
}

type toyBug string

const (
	noBug              toyBug = ""
	flushesNothing     toyBug = "acknowledges a flush without flushing below"
	ignoresFUA         toyBug = "ignores FUA"
	mapsBeforeData     toyBug = "stores a mapping before its data is durable"
	mapsInFlight       toyBug = "commits mappings of writes that are in flight"
	reusesEarly        toyBug = "reuses blocks before the mapping is durable"
	clearsFirst        toyBug = "zeroes a block in place before it writes to it"
	forgetsAllocations toyBug = "takes used blocks for free when it is opened again"
	closesEarly        toyBug = "closes without writing the table"
	readsNeighbour     toyBug = "reads the block next to the right one"
	failsWrites        toyBug = "fails writes"
)

const (
	toyBlock = 4096 // bytes
	toyTable = 4096 // where the table stands, bytes
)

func createToy(path string, size int64) error {
	return WriteImage(path, make([]byte, toyTable+toyTableSize(size)))
}

// toyTableSize is the length of the table in bytes, of whole blocks.
func toyTableSize(size int64) int64 {
	return (size/toyBlock*8 + toyBlock - 1) / toyBlock * toyBlock
}

func openToy(file aio.Storage, io *aio.Loop, size int64, bug toyBug) (*toy, error) {
	y := &toy{file: file, io: io, size: size, bug: bug, dirty: map[int]bool{}}
	y.table = make([]uint64, size/toyBlock)
	table := make([]byte, toyTableSize(size))
	if errno := y.do(aio.OpRead, part{toyTable, table}); errno != 0 {
		return nil, fmt.Errorf("read table: %w", errno)
	}
	first := uint64(toyTable+len(table)) / toyBlock
	y.next = first
	for i := range y.table {
		y.table[i] = binary.BigEndian.Uint64(table[8*i:])
		y.next = max(y.next, y.table[i]+1)
	}
	if bug == forgetsAllocations {
		y.next = first
	}
	return y, nil
}

// check looks for blocks with two owners, and for owners without a block.
func (y *toy) check() error {
	owner := map[uint64]int{}
	for i, at := range y.table {
		if at == 0 {
			continue
		}
		if other, ok := owner[at]; ok {
			return fmt.Errorf("blocks %d and %d are both at %d", other, i, at)
		}
		owner[at] = i
		if int64(at+1)*toyBlock > y.file.Size() {
			return fmt.Errorf("block %d is at %d, beyond the end", i, at)
		}
	}
	return nil
}

// part is a range of the file and its bytes.
type part struct {
	off  int64
	data []byte
}

// do does operations of one kind below and waits for them.
func (y *toy) do(op aio.Op, parts ...part) unix.Errno {
	memory, err := aio.NewMemory(1 << 20)
	if err != nil {
		panic(err)
	}
	defer memory.Close()
	over := make(chan struct{})
	left, used := len(parts), 0
	batch := make([]*aio.Request, len(parts))
	for i, p := range parts {
		batch[i] = &aio.Request{Op: op, Offset: p.off, Length: int64(len(p.data)), Done: func(*aio.Request) {
			if left--; left == 0 {
				close(over)
			}
		}}
		if n := len(p.data); n > 0 {
			batch[i].Vec = []aio.Iovec{memory.Iovec(used, n)}
			copy(memory.Bytes()[used:], p.data)
			used += n
		}
	}
	if left == 0 {
		return 0
	}
	y.io.Post(func() { y.file.Submit(y.io, batch) })
	<-over
	used = 0
	for i, p := range parts {
		if batch[i].Errno != 0 {
			return batch[i].Errno
		}
		if op == aio.OpRead {
			copy(p.data, memory.Bytes()[used:])
		}
		used += len(p.data)
	}
	return 0
}

func (y *toy) Size() int64    { return y.size }
func (y *toy) ReadOnly() bool { return false }
func (y *toy) Format() string { return "toy" }
func (y *toy) Limits() formats.Limits {
	return formats.Limits{BlockSize: 512, MaxTransfer: 512 << 10, MaxSegments: 8, MultiConn: true}
}

func (y *toy) Submit(l *aio.Loop, batch []*aio.Request) {
	for _, r := range batch {
		var errno unix.Errno
		l.Go(func() { errno = y.handle(r) }, func() { r.Complete(errno) })
	}
}

func (y *toy) handle(r *aio.Request) unix.Errno {
	y.mu.Lock()
	defer y.mu.Unlock()
	switch r.Op {
	case aio.OpFlush:
		return y.commit()
	case aio.OpDiscard:
		return 0
	case aio.OpWrite:
		if y.bug == failsWrites {
			return unix.EIO
		}
	}
	var old, next []part // the blocks that the request touches, as they are and as they will be
	first := int(r.Offset / toyBlock)
	last := int((r.End() - 1) / toyBlock)
	content := make([]byte, (last-first+1)*toyBlock)
	for i := first; i <= last; i++ {
		at := y.table[i]
		if y.bug == readsNeighbour && r.Op == aio.OpRead && i%16 == 7 && at != 0 && at+1 < y.next {
			at++
		}
		if at != 0 {
			old = append(old, part{int64(at) * toyBlock, content[(i-first)*toyBlock:][:toyBlock]})
		}
	}
	if errno := y.do(aio.OpRead, old...); errno != 0 {
		return errno
	}
	within := content[r.Offset-int64(first)*toyBlock:][:r.Length]
	switch {
	case r.Op == aio.OpRead:
		aio.CopyIn(r.Vec, within)
		return 0
	case y.bug == clearsFirst:
		zeroes := make([]byte, toyBlock)
		for i := range old {
			next = append(next, part{old[i].off, zeroes})
		}
		if errno := y.do(aio.OpWrite, next...); errno != 0 {
			return errno
		}
		next = nil
	}
	if r.Op == aio.OpWrite {
		aio.CopyOut(within, r.Vec)
	} else {
		clear(within)
	}
	for i := first; i <= last; i++ {
		next = append(next, part{int64(y.move(i)) * toyBlock, content[(i-first)*toyBlock:][:toyBlock]})
	}
	write := y.do
	if y.bug == mapsInFlight {
		write = y.writeSlowly
	}
	if errno := write(aio.OpWrite, next...); errno != 0 {
		return errno
	}
	if r.Flags&aio.FlagFUA != 0 && y.bug != ignoresFUA {
		return y.commit()
	}
	return 0
}

// writeSlowly does one operation after the other, and lets others go on meanwhile.
func (y *toy) writeSlowly(op aio.Op, parts ...part) unix.Errno {
	y.mu.Unlock()
	defer y.mu.Lock()
	for _, p := range parts {
		if errno := y.do(op, p); errno != 0 {
			return errno
		}
	}
	return 0
}

// move gives a block the place that it is written to.
func (y *toy) move(i int) uint64 {
	old := y.table[i]
	if old != 0 && y.bug == clearsFirst {
		return old
	}
	at := y.allocate()
	y.table[i], y.dirty[i*8/sectorSize] = at, true
	switch {
	case old == 0:
	case y.bug == reusesEarly:
		y.free = append(y.free, old)
	default:
		y.pending = append(y.pending, old)
	}
	return at
}

func (y *toy) allocate() uint64 {
	if n := len(y.free); n > 0 {
		at := y.free[n-1]
		y.free = y.free[:n-1]
		return at
	}
	y.next++
	return y.next - 1
}

// commit makes the data durable, and then the table.
func (y *toy) commit() unix.Errno {
	if y.bug != mapsBeforeData && y.bug != flushesNothing {
		if errno := y.do(aio.OpFlush, part{}); errno != 0 {
			return errno
		}
	}
	sectors := make([]byte, toyTableSize(y.size))
	for i, at := range y.table {
		binary.BigEndian.PutUint64(sectors[8*i:], at)
	}
	var dirty []int
	for n := range y.dirty {
		dirty = append(dirty, n)
	}
	slices.Sort(dirty)
	var parts []part
	for _, n := range dirty {
		parts = append(parts, part{toyTable + int64(n)*sectorSize, sectors[n*sectorSize:][:sectorSize]})
	}
	if errno := y.do(aio.OpWrite, parts...); errno != 0 {
		return errno
	}
	clear(y.dirty)
	if y.bug != flushesNothing {
		if errno := y.do(aio.OpFlush, part{}); errno != 0 {
			return errno
		}
	}
	y.free, y.pending = append(y.free, y.pending...), nil
	return 0
}

func (y *toy) Close() error {
	var err error
	if y.bug != closesEarly {
		if errno := y.commit(); errno != 0 {
			err = errno
		}
	}
	if e := y.file.Close(); err == nil {
		err = e
	}
	return err
}

// toyConfig is the configuration of PowerCut for toys that have a bug while they
// are recorded, and one after power cuts. With checks, the tables are looked at
// too.
func toyConfig(t testing.TB, recorded, afterwards toyBug, checks bool) PowerCutConfig {
	t.Helper()
	io, err := aio.NewLoop(aio.LoopOptions{Engine: aio.EngineThreads})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { io.Close() })
	const size = 512 << 10
	c := PowerCutConfig{
		Create: createToy,
		Open: func(path string, _ bool, wrap func(aio.Storage) aio.Storage) (formats.Image, error) {
			f, err := aio.OpenFile(path, aio.FileOptions{})
			if err != nil {
				return nil, err
			}
			var storage aio.Storage = f
			bug := afterwards
			if wrap != nil {
				storage, bug = wrap(f), recorded
			}
			y, err := openToy(storage, io, size, bug)
			if err != nil {
				return nil, err
			}
			return y, nil
		},
		Size:    size,
		Rounds:  40,
		Engines: []aio.Engine{aio.EngineThreads},
		Seed:    newSeed(t),
	}
	if checks {
		c.Check = func(path string) error {
			f, err := aio.OpenFile(path, aio.FileOptions{})
			if err != nil {
				return err
			}
			y, err := openToy(f, io, size, noBug)
			if err != nil {
				return err
			}
			err = y.check()
			y.bug = closesEarly // nothing is written
			if e := y.Close(); err == nil {
				err = e
			}
			return err
		}
	}
	return c
}
