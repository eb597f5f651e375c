package aio

import (
	"runtime"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// mallocs counts the allocations of the process while run makes it go from one
// call of its argument to the next. Both come on the loop's thread.
func mallocs(t *testing.T, run func(mark func())) uint64 {
	t.Helper()
	var counts []uint64
	over := make(chan struct{})
	run(func() {
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		if counts = append(counts, m.Mallocs); len(counts) == 2 {
			close(over)
		}
	})
	waitFor(t, over, "requests")
	return counts[1] - counts[0]
}

// fillPool has every worker of the pool sit in a system call at once: for that the
// runtime makes goroutines and threads, which it keeps.
func fillPool(t *testing.T) {
	t.Helper()
	l := newLoop(t, LoopOptions{Engine: EngineThreads})
	var pipe [2]int
	if err := unix.Pipe2(pipe[:], unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	var entered sync.WaitGroup
	entered.Add(threads.limit)
	left, over := threads.limit, make(chan struct{})
	l.Call(func() {
		for range threads.limit {
			l.Go(func() {
				entered.Done()
				_, _ = unix.Read(pipe[0], make([]byte, 1)) // until the other end is closed
			}, func() {
				if left--; left == 0 {
					close(over)
				}
			})
		}
	})
	entered.Wait()
	unix.Close(pipe[1])
	waitFor(t, over, "workers")
	unix.Close(pipe[0])
}

// TestRequestsAllocateNothing drives requests in batches of 64, the next one when
// the last of a batch is over.
func TestRequestsAllocateNothing(t *testing.T) {
	const depth, warm, batches = 64, 50, 160 // over 10,000 requests
	fillPool(t)
	eachKind(t, 1<<20, func(t *testing.T, l *Loop, f *File) {
		for _, op := range []Op{OpRead, OpWrite} {
			if op == OpWrite && f.opts.Sync {
				continue // thousands of durable writes take too long, and are the same
			}
			m := newMemory(t, depth*4096)
			batch := make([]*Request, depth)
			n := mallocs(t, func(mark func()) {
				left, round := 0, 0
				submit := Task{Run: func() {
					left = depth
					f.Submit(l, batch)
				}}
				done := func(r *Request) {
					if r.Errno != 0 {
						t.Error(r.Errno)
					}
					if left--; left > 0 {
						return
					}
					if round++; round == warm || round == warm+batches {
						mark()
					}
					if round < warm+batches {
						l.Defer(&submit)
					}
				}
				for i := range batch {
					batch[i] = &Request{Op: op, Offset: int64(i) * 4096, Length: 4096, Done: done}
					batch[i].Vec = []Iovec{m.Iovec(i*4096, 4096)}
					if i%2 == 0 {
						batch[i].Vec = []Iovec{m.Iovec(i*4096, 512), m.Iovec(i*4096+512, 3584)}
						if f.align > 512 {
							batch[i].Vec = []Iovec{m.Iovec(i*4096, 4096)}
						}
					}
				}
				l.Post(func() { l.Defer(&submit) })
			})
			// The runtime and the test's own waiting may allocate now and then.
			if n > depth*batches/100 {
				t.Errorf("%v: %d allocations for %d requests", op, n, depth*batches)
			}
		}
	})
}

// TestSocketsAllocateNothing has two sockets of one loop play ping-pong.
func TestSocketsAllocateNothing(t *testing.T) {
	const warm, rounds = 100, 5000
	eachEngine(t, func(t *testing.T, l *Loop) {
		pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		m := newMemory(t, 4096)
		var ends [2]*Socket
		n := mallocs(t, func(mark func()) {
			round := 0
			l.Call(func() {
				vecs := make([][]Iovec, 2)
				for i := range ends {
					in := m.Iovec(1024*i, 512)
					whole := []Iovec{m.Iovec(1024*i+512, 100), m.Iovec(1024*i+612, 200)}
					vecs[i] = make([]Iovec, 2)
					ends[i] = l.NewSocket(pair[i], func(n int, e unix.Errno) {
						if n != 300 || e != 0 {
							t.Errorf("received %d bytes, %v", n, e)
						}
						if round++; round == warm || round == warm+rounds {
							mark()
						}
						if round == warm+rounds {
							return
						}
						copy(vecs[i], whole) // Send has cut it
						ends[i].Send(vecs[i])
						ends[i].Recv(in)
					}, func(e unix.Errno) {
						if e != 0 {
							t.Error(e)
						}
					})
				}
				copy(vecs[0], []Iovec{m.Iovec(512, 100), m.Iovec(612, 200)})
				ends[0].Recv(m.Iovec(0, 512))
				ends[1].Recv(m.Iovec(1024, 512))
				ends[0].Send(vecs[0])
			})
		})
		if n > rounds/100 {
			t.Errorf("%d allocations for %d messages", n, rounds)
		}
		// One end still waits for the reply.
		l.Call(func() {
			for _, s := range ends {
				s.onRecv = func(int, unix.Errno) {}
				s.Shutdown()
			}
		})
		for active := 1; active > 0; {
			l.Call(func() { active = l.active })
		}
		l.Call(func() {
			ends[0].Close()
			ends[1].Close()
		})
	})
}
