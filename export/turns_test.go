package export

import (
	"math"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"platter/aio"
)

const second = int64(1e9)

// rig is turns with a clock of their own.
type rig struct {
	turns
	now int64
}

func newRig(t testing.TB, to Throttle) *rig {
	t.Helper()
	if err := to.Check(); err != nil {
		t.Fatal(err)
	}
	r := &rig{now: 5 * second}
	r.set(to, r.now)
	return r
}

func (r *rig) run() int64 {
	r.woken = r.woken[:0]
	return r.dispatch(r.now)
}

// taken is what a queue's requests are that may go, which it takes.
func (w *waiter) taken() []*aio.Request {
	all := w.ready
	w.ready = nil
	return all
}

func some(n int, op aio.Op, length int64) []*aio.Request {
	all := make([]*aio.Request, n)
	for i := range all {
		all[i] = &aio.Request{Op: op, Offset: int64(i), Length: length}
	}
	return all
}

func (r *rig) addAll(w *waiter, all []*aio.Request) {
	for _, x := range all {
		r.add(w, x)
	}
}

// A throttle lets go at least what its rates make of the time and at most a burst
// more, whatever the sizes are, however late the timers.
func TestThrottleKeepsItsRates(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		rate := func(name string, most int64) int64 {
			return rapid.OneOf(rapid.Just(int64(0)), rapid.Int64Range(1, most)).Draw(t, name)
		}
		to := Throttle{
			IOPS: Rates{Total: rate("iops", 1e5), Read: rate("iops-read", 1e5), Write: rate("iops-write", 1e5)},
			BPS:  Rates{Total: rate("bps", 1e9), Read: rate("bps-read", 1e9), Write: rate("bps-write", 1e9)},
		}
		r := &rig{now: 5 * second}
		r.set(to, r.now)
		lengths := rapid.SliceOfN(rapid.Int64Range(0, 1<<20), 1, 8).Draw(t, "lengths")
		queues := make([]waiter, 3)
		next := 0
		refill := func(w *waiter, op aio.Op) {
			d := directionOf(op)
			for w.lines[d].empty() {
				for range 1 + rapid.IntRange(0, 5).Draw(t, "depth") {
					r.add(w, &aio.Request{Op: op, Length: lengths[next%len(lengths)]})
					next++
				}
			}
		}
		begin := r.now
		var requests, bytes, longest [directions]float64
		steps := rapid.IntRange(1, 60).Draw(t, "steps")
		for range steps {
			// Lines are never empty when the clock goes on, lest the time be
			// nobody's.
			var wait int64
			for granted := 0; granted < 2000; {
				for i := range queues {
					refill(&queues[i], aio.OpRead)
					refill(&queues[i], aio.OpWrite)
				}
				wait = r.run()
				before := granted
				for i := range queues {
					for _, x := range queues[i].taken() {
						d := directionOf(x.Op)
						requests[d]++
						bytes[d] += float64(x.Length)
						longest[d] = max(longest[d], float64(x.Length))
						granted++
					}
				}
				if granted == before {
					break
				}
			}
			if wait == 0 {
				return // more than the test cares to count
			}
			r.now += wait + rapid.Int64Range(0, 1e6).Draw(t, "late")
		}
		took := float64(r.now-begin) / 1e9
		atMost := func(what string, got, longest float64, rates Rates, rate int64, least float64) {
			if limit := float64(rate)*took + rates.burst(rate, least) + longest; rate > 0 && got > limit+1 {
				t.Fatalf("%s: %v in %v s, at most %v", what, got, took, limit)
			}
		}
		atMost("iops", requests[reads]+requests[writes], 1, to.IOPS, to.IOPS.Total, 1)
		atMost("iops-read", requests[reads], 1, to.IOPS, to.IOPS.Read, 1)
		atMost("iops-write", requests[writes], 1, to.IOPS, to.IOPS.Write, 1)
		atMost("bps", bytes[reads]+bytes[writes], max(longest[reads], longest[writes]), to.BPS, to.BPS.Total, MinBytesBurst)
		atMost("bps-read", bytes[reads], longest[reads], to.BPS, to.BPS.Read, MinBytesBurst)
		atMost("bps-write", bytes[writes], longest[writes], to.BPS, to.BPS.Write, MinBytesBurst)
	})
}

// All of a rate is used, when there is demand.
func TestThrottleUsesItsRate(t *testing.T) {
	for name, to := range map[string]Throttle{
		"iops":         {IOPS: Rates{Total: 1000, Burst: 1}},
		"small burst":  {IOPS: Rates{Total: 100_000, Burst: 1}}, // timers are later than tokens
		"bps":          {BPS: Rates{Write: 4_096_000}},
		"bigger burst": {BPS: Rates{Write: 4_096_000, Burst: 1 << 20}},
	} {
		r := newRig(t, to)
		var w waiter
		begin, done := r.now, 0
		for r.now < begin+10*second {
			for w.waiting.Load() < 1000 {
				r.addAll(&w, some(100, aio.OpWrite, 4096))
			}
			r.now += max(r.run(), 1e6) // a timer that is a millisecond late
			done += len(w.taken())
		}
		rate := float64(max(to.IOPS.Total, to.BPS.Write/4096))
		burst := to.IOPS.burst(to.IOPS.Total, 1) + to.BPS.burst(to.BPS.Write, 1)/4096
		took := float64(r.now-begin) / 1e9
		if least, most := rate*(took-0.002), rate*took+burst+1; float64(done) < least || float64(done) > most {
			t.Errorf("%s: %d requests in %v s, want from %.0f to %.0f", name, done, took, least, most)
		}
	}
}

// A queue with 128 requests and one with a single request at a time get as many.
func TestQueuesTakeTurns(t *testing.T) {
	r := newRig(t, Throttle{IOPS: Rates{Total: 1000, Burst: 1}})
	var deep, shallow waiter
	r.addAll(&deep, some(128, aio.OpRead, 4096))
	r.run()
	deep.taken() // the burst
	served := [2]int{}
	for range 1000 {
		if shallow.waiting.Load() == 0 {
			r.addAll(&shallow, some(1, aio.OpRead, 4096))
		}
		r.now += r.run()
		n := len(deep.taken())
		served[0] += n
		r.addAll(&deep, some(n, aio.OpRead, 4096))
		served[1] += len(shallow.taken())
	}
	if served[0]+served[1] < 900 || served[1] < served[0]-2 {
		t.Errorf("the deep queue got %d, the shallow one %d", served[0], served[1])
	}
}

// When many tokens come at once each queue gets its share of them.
func TestQueuesShare(t *testing.T) {
	r := newRig(t, Throttle{IOPS: Rates{Read: 1000, Burst: 90}})
	queues := make([]waiter, 3)
	for i, n := range []int{500, 20, 100} {
		r.addAll(&queues[i], some(n, aio.OpRead, 512))
	}
	r.run()
	for i, want := range []int{500 - 35, 0, 100 - 35} {
		if got := int(queues[i].waiting.Load()); got != want {
			t.Errorf("queue %d: %d wait, want %d", i, got, want)
		}
	}
}

// What a direction has used up holds the other one up only if both share it.
func TestDirections(t *testing.T) {
	r := newRig(t, Throttle{IOPS: Rates{Write: 10, Burst: 1}})
	var w waiter
	r.addAll(&w, some(5, aio.OpWrite, 4096))
	r.addAll(&w, some(5, aio.OpRead, 4096))
	r.addAll(&w, some(5, aio.OpCache, 4096))
	r.run()
	if got := w.taken(); len(got) != 11 || w.waiting.Load() != 4 {
		t.Errorf("%d went, %d wait", len(got), w.waiting.Load())
	}

	// Large writes get through among small reads that would take all.
	r = newRig(t, Throttle{BPS: Rates{Total: 1 << 20, Burst: 64 << 10}})
	var small, large waiter
	r.addAll(&large, some(100, aio.OpWrite, 64<<10))
	wrote, read := 0, 0
	for range 1000 {
		r.addAll(&small, some(16-int(small.waiting.Load()), aio.OpRead, 4096))
		r.now += r.run()
		wrote += len(large.taken())
		read += len(small.taken())
	}
	if wrote < 90 || read < 90 {
		t.Errorf("%d large writes, %d small reads", wrote, read)
	}
}

// A request larger than the burst goes when the bucket is full, and the next one
// when what it took has come.
func TestLargerThanBurst(t *testing.T) {
	r := newRig(t, Throttle{BPS: Rates{Read: 1 << 20, Burst: 64 << 10}})
	var w waiter
	r.addAll(&w, some(2, aio.OpRead, 1<<20))
	r.addAll(&w, some(1, aio.OpRead, 4096))
	for i, want := range []int64{second, second - second*60/1024} {
		wait := r.run()
		if got := w.taken(); len(got) != 1 || wait < want-1e6 || wait > want+1e6 {
			t.Fatalf("%d: %d went, and then nothing for %v ms; want %v", i, len(got), wait/1e6, want/1e6)
		}
		r.now += wait
	}
	if wait := r.run(); wait != 0 || len(w.taken()) != 1 {
		t.Errorf("something waits, %v", wait)
	}
}

// A flush passes what waits; of the rest each direction keeps its order.
func TestTurnsKeepOrder(t *testing.T) {
	r := newRig(t, Throttle{IOPS: Rates{Total: 1000, Burst: 1}})
	var w waiter
	flush := &aio.Request{Op: aio.OpFlush}
	want := [directions][]*aio.Request{some(40, aio.OpRead, 1), some(40, aio.OpWrite, 1)}
	r.addAll(&w, want[reads])
	r.addAll(&w, want[writes])
	r.run()
	w.taken()
	r.add(&w, flush)
	r.run()
	if got := w.taken(); len(got) != 1 || got[0] != flush {
		t.Fatalf("with a flush came %d", len(got))
	}
	got := [directions][]*aio.Request{}
	for w.waiting.Load() > 0 {
		r.now += r.run()
		for _, x := range w.taken() {
			got[directionOf(x.Op)] = append(got[directionOf(x.Op)], x)
		}
	}
	for d := range got {
		first := len(want[d]) - len(got[d]) // the burst
		if first > 2 || !slices.Equal(got[d], want[d][first:]) {
			t.Errorf("direction %d: %d of %d, in another order", d, len(got[d]), len(want[d]))
		}
	}
}

// What is expedited goes at once, and others pay for it.
func TestExpediteOwes(t *testing.T) {
	r := newRig(t, Throttle{IOPS: Rates{Total: 100, Burst: 1}})
	var leaving, third waiter
	other := waiter{queue: &Queue{}}
	r.addAll(&third, some(1, aio.OpWrite, 1)) // the burst
	r.run()
	r.addAll(&leaving, some(101, aio.OpWrite, 1))
	r.addAll(&leaving, some(100, aio.OpRead, 1))
	r.addAll(&other, some(1, aio.OpWrite, 1))
	r.run()
	r.expedite(&leaving)
	if n := len(leaving.taken()); n < 200 || leaving.waiting.Load() != 0 {
		t.Errorf("%d went, %d wait", n, leaving.waiting.Load())
	}
	if wait := r.run(); wait < 19*second/10 || r.anyone() != other.queue {
		t.Errorf("the next one goes in %v ms", wait/1e6)
	}
	r.now += 3 * second
	if r.run(); len(other.taken()) != 1 || other.waiting.Load() != 0 {
		t.Error("another waits for good")
	}
	if r.run(); r.anyone() != nil {
		t.Error("somebody waits")
	}
}

// A line is a queue, and its memory doesn't grow with what has passed.
func TestLine(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var l line
		var model []*aio.Request
		for range rapid.IntRange(0, 400).Draw(t, "steps") {
			if len(model) == 0 || len(model) < 40 && rapid.Bool().Draw(t, "push") {
				r := &aio.Request{}
				l.push(r)
				model = append(model, r)
				continue
			}
			if l.front() != model[0] || l.pop() != model[0] {
				t.Fatal("another request")
			}
			model = model[1:]
		}
		if l.empty() != (len(model) == 0) || cap(l.requests) > 160 {
			t.Fatalf("%d requests, room for %d", len(model), cap(l.requests))
		}
	})
}

func TestRing(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var r ring
		lines := make([]line, 6)
		var model []int
		for range rapid.IntRange(0, 60).Draw(t, "steps") {
			i := rapid.IntRange(0, len(lines)-1).Draw(t, "line")
			switch at := slices.Index(model, i); {
			case at < 0:
				r.push(&lines[i])
				model = append(model, i)
			case rapid.Bool().Draw(t, "pop"):
				r.pop()
				model = model[1:]
			default:
				r.remove(&lines[i])
				model = slices.Delete(model, at, at+1)
			}
			x := r.first
			for _, i := range model {
				if x != &lines[i] {
					t.Fatal("another order")
				}
				x = x.next
			}
			if x != nil || (r.last == nil) != (len(model) == 0) {
				t.Fatal("another end")
			}
		}
	})
}

// No wait is so long that adding it to a moment gives one in the past.
func TestBucketWait(t *testing.T) {
	var b bucket
	b.set(1, 1<<50, 0)
	b.take(1 << 62)
	if wait := b.wait(1); wait < second || wait > math.MaxInt64/2 {
		t.Error(wait)
	}
	b.set(0, 0, 0)
	if wait := b.wait(1 << 62); wait != 0 {
		t.Error(wait)
	}
	b.set(10, 5, 0)
	if b.fill(0); b.level != 5 {
		t.Errorf("a new bucket has %v", b.level)
	}
	b.take(4)
	b.set(10, 2, 0)
	if b.level != 1 {
		t.Errorf("a changed bucket has %v", b.level)
	}
}
