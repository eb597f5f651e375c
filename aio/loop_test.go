package aio

import (
	"fmt"
	"os"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestPost: functions of many goroutines are all called, on the loop's thread
// and those of one goroutine in its order.
func TestPost(t *testing.T) {
	eachEngine(t, func(t *testing.T, l *Loop) {
		const posters, each = 8, 2000
		var thread int
		l.Call(func() { thread = unix.Gettid() })
		var next [posters]int // on the loop's thread
		var all sync.WaitGroup
		for p := range posters {
			all.Go(func() {
				for i := range each {
					l.Post(func() {
						if next[p] != i || unix.Gettid() != thread {
							t.Errorf("poster %d: function %d comes when %d is next", p, i, next[p])
						}
						next[p]++
					})
				}
			})
		}
		all.Wait()
		l.Call(func() {})
		for p, n := range next {
			if n != each {
				t.Errorf("poster %d: %d functions were called", p, n)
			}
		}
	})
}

// TestWakeUps posts while the loop is about to sleep: a lost wake-up would leave
// Call waiting.
func TestWakeUps(t *testing.T) {
	for _, poll := range []time.Duration{0, DefaultPoll} {
		for _, e := range []Engine{EngineIOUring, EngineNative, EngineThreads} {
			t.Run(fmt.Sprintf("%v/%v", e, poll), func(t *testing.T) {
				l := newLoop(t, LoopOptions{Engine: e, Poll: poll})
				over := make(chan struct{})
				go func() {
					defer close(over)
					var both sync.WaitGroup
					for p := range 2 {
						both.Go(func() {
							for i := range 2000 {
								l.Call(func() {})
								for range i * (p + 1) % 40 {
									runtime.Gosched()
								}
							}
						})
					}
					both.Wait()
				}()
				waitFor(t, over, "calls")
			})
		}
	}
}

// TestNoWakeAfterEnd: a goroutine that found the loop asleep, and comes to wake
// it when it has ended, must not write to its eventfd: the number may be another
// file's by then.
func TestNoWakeAfterEnd(t *testing.T) {
	eachEngine(t, func(t *testing.T, l *Loop) {
		woken := false
		l.Call(func() { l.driver = &filter{driver: l.driver, wake1: func() { woken = true }} })
		l.Close()
		woken = false
		l.pending.Store(false)
		l.asleep.Store(true)
		l.notify()
		if woken {
			t.Error("a loop was woken that had ended")
		}
	})
}

// TestWakeAgain: when the kernel ends the poll on the eventfd it is begun again.
func TestWakeAgain(t *testing.T) {
	l := newLoop(t, LoopOptions{Engine: EngineIOUring})
	for range 3 {
		l.Call(func() {
			e := l.driver.(*ringDriver).sqe()
			e.Cancel(wakeTag)
			e.UserData = wakeTag
		})
		over := make(chan struct{})
		go func() {
			defer close(over)
			for range 5 {
				l.Call(func() {})
				time.Sleep(time.Millisecond) // the loop goes to sleep
			}
		}()
		waitFor(t, over, "calls")
	}
}

func TestDefer(t *testing.T) {
	eachEngine(t, func(t *testing.T, l *Loop) {
		var calls []string
		var again Task
		one := Task{Run: func() { calls = append(calls, "one") }}
		two := Task{Run: func() { calls = append(calls, "two"); l.Defer(&again) }}
		again = Task{Run: func() { calls = append(calls, "again"); l.Defer(&one) }}
		l.Call(func() {
			l.Defer(&one)
			l.Defer(&two)
			l.Defer(&one)
			l.Defer(&two)
			calls = append(calls, "turn")
		})
		// Nothing else happens, and still the tasks of tasks come.
		deadline := time.Now().Add(patience)
		for n := 0; n < 5; {
			l.Call(func() { n = len(calls) })
			if time.Now().After(deadline) {
				break
			}
		}
		l.Call(func() {
			if want := []string{"turn", "one", "two", "again", "one"}; !slices.Equal(calls, want) {
				t.Errorf("calls: %v", calls)
			}
		})
	})
}

// TestUndefer: a task that was deferred doesn't run after all, unless it is
// deferred again.
func TestUndefer(t *testing.T) {
	eachEngine(t, func(t *testing.T, l *Loop) {
		var calls []string
		one := Task{Run: func() { calls = append(calls, "one") }}
		two := Task{Run: func() { calls = append(calls, "two") }}
		l.Call(func() {
			l.Undefer(&one)
			l.Defer(&one)
			l.Defer(&two)
			l.Undefer(&one)
		})
		l.Call(func() {
			l.Undefer(&two) // has run
			l.Defer(&one)
		})
		l.Call(func() {})
		l.Call(func() {
			if want := []string{"two", "one"}; !slices.Equal(calls, want) {
				t.Errorf("calls: %v", calls)
			}
		})
	})
}

// TestDeferWhileIdle: a task that a task has deferred is run though nothing
// else wakes the loop.
func TestDeferWhileIdle(t *testing.T) {
	eachEngine(t, func(t *testing.T, l *Loop) {
		over := make(chan struct{})
		second := Task{Run: func() { close(over) }}
		first := Task{Run: func() { l.Defer(&second) }}
		l.Post(func() { l.Defer(&first) })
		waitFor(t, over, "task")
	})
}

func TestGo(t *testing.T) {
	eachEngine(t, func(t *testing.T, l *Loop) {
		const jobs = 200 // more than the pool has threads
		var worked atomic.Int32
		over := make(chan struct{})
		left := jobs
		l.Call(func() {
			thread := unix.Gettid()
			for range jobs {
				l.Go(func() {
					if unix.Gettid() == thread {
						t.Error("blocking work on the loop's thread")
					}
					worked.Add(1)
				}, func() {
					if unix.Gettid() != thread {
						t.Error("done is called on another thread")
					}
					if left--; left == 0 {
						close(over)
					}
				})
			}
		})
		waitFor(t, over, "work")
		if worked.Load() != jobs {
			t.Errorf("%d jobs were done", worked.Load())
		}
	})
}

// TestClose: Close waits for what is in flight and calls what was posted before;
// afterwards Post, Call and Close return, without calling anything.
func TestClose(t *testing.T) {
	eachEngine(t, func(t *testing.T, l *Loop) {
		release := make(chan struct{})
		var order []string
		note := func(s string) func() { return func() { order = append(order, s) } }
		task := Task{Run: note("task")}
		l.Call(func() {
			l.AfterFunc(time.Hour, note("timer"))
			l.Go(func() { <-release }, func() { note("work")(); l.Defer(&task) })
		})
		l.Post(note("posted"))
		closed := make(chan struct{})
		go func() {
			defer close(closed)
			if err := l.Close(); err != nil {
				t.Error(err)
			}
		}()
		closing := false
		for !closing {
			l.Call(func() { closing = l.closing })
		}
		select {
		case <-closed:
			t.Error("it is closed while work is in flight")
		default:
		}
		close(release)
		waitFor(t, closed, "close")
		if want := []string{"posted", "work", "task"}; !slices.Equal(order, want) {
			t.Errorf("called: %v, want %v", order, want)
		}
		l.Post(note("late post"))
		l.Call(note("late call"))
		if err := l.Close(); err != nil || len(order) != 3 || len(l.posted) != 0 {
			t.Errorf("after the end: %v, called %v, kept %d", err, order, len(l.posted))
		}
	})
}

// TestCloseRunsTasks: what the last completion has deferred is done before the
// loop ends.
func TestCloseRunsTasks(t *testing.T) {
	eachEngine(t, func(t *testing.T, l *Loop) {
		pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		m := newMemory(t, 4096)
		ran := false
		task := Task{Run: func() { ran = true }}
		l.Call(func() {
			var s *Socket
			s = l.NewSocket(pair[0], func(int, unix.Errno) {
				s.Close()
				l.Defer(&task)
			}, nil)
			s.Recv(m.Iovec(0, 100))
		})
		closed := make(chan struct{})
		go func() {
			defer close(closed)
			l.Close()
		}()
		for closing := false; !closing; {
			l.Call(func() { closing = l.closing })
		}
		unix.Close(pair[1])
		waitFor(t, closed, "close")
		if !ran {
			t.Error("the task did not run")
		}
	})
}

// TestThreadSurvives: the loop's thread does not end with it, since with it
// would end children that it started to die with their parent.
func TestThreadSurvives(t *testing.T) {
	eachEngine(t, func(t *testing.T, l *Loop) {
		var thread int
		l.Call(func() { thread = unix.Gettid() })
		l.Close()
		for range 20 { // a thread takes a moment to end
			time.Sleep(time.Millisecond)
			if _, err := os.Stat(fmt.Sprintf("/proc/self/task/%d", thread)); err != nil {
				t.Fatalf("the thread is gone: %v", err)
			}
		}
	})
}

// TestDescriptors: loops leave no descriptor behind.
func TestDescriptors(t *testing.T) {
	open := func() int {
		list, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(list)
	}
	newLoop(t, LoopOptions{}).Close() // what the process opens once
	before := open()
	eachEngine(t, func(t *testing.T, l *Loop) {
		l.Call(func() { l.Arena().Get().Release() })
		l.Close()
	})
	if after := open(); after != before {
		t.Errorf("%d descriptors before, %d after", before, after)
	}
}

// TestIdle: a loop that has nothing to do doesn't turn, and doesn't spin.
func TestIdle(t *testing.T) {
	eachEngine(t, func(t *testing.T, l *Loop) {
		var turns int
		l.Call(func() { l.driver = &filter{driver: l.driver, turn1: func() { turns++ }} })
		usage := func() (d time.Duration, n int) {
			l.Call(func() {
				var u unix.Rusage
				if err := unix.Getrusage(unix.RUSAGE_THREAD, &u); err != nil {
					t.Error(err)
				}
				d, n = time.Duration(unix.TimevalToNsec(u.Utime)+unix.TimevalToNsec(u.Stime)), turns
			})
			return d, n
		}
		for range 50 { // work, lest the spin window be closed anyway
			l.Call(func() {})
		}
		used, turned := usage()
		time.Sleep(300 * time.Millisecond)
		usedNow, turnedNow := usage()
		if turnedNow-turned > 20 {
			t.Errorf("%d turns of nothing", turnedNow-turned)
		}
		if usedNow-used > 100*time.Millisecond {
			t.Errorf("%v of processor time while idle", usedNow-used)
		}
	})
}
