package qcow2_test

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"platter/aio"
	"platter/formats"
	"platter/formats/qcow2"
	"platter/integration/testenv"
)

// on carries out one request on the loop and has then, still on the loop, called.
func on(t *testing.T, l *aio.Loop, im *qcow2.Image, r aio.Request, then func()) {
	t.Helper()
	over := make(chan struct{})
	r.Done = func(r *aio.Request) {
		if r.Errno != 0 {
			t.Errorf("%v: %v", r.Op, r.Errno)
		}
		// When the request is out of the image's hands.
		l.Post(func() { then(); close(over) })
	}
	l.Post(func() { im.Submit(l, []*aio.Request{&r}) })
	<-over
}

// TestLeave: loops come, write and go, while what they had reserved is on its way
// to them; what they don't need is there for the next, so that the file doesn't
// grow by the reserve of each of them.
func TestLeave(t *testing.T) {
	const loops, cluster = 40, 64 << 10
	dir := testenv.TmpfsDir(t)
	path := filepath.Join(dir, "image")
	qemuCreate(t, path, loops*cluster, "compat=1.1")
	im := open(t, path, formats.Options{})
	m, err := aio.NewMemory(cluster)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	copy(m.Bytes(), bytes.Repeat([]byte{7}, cluster))
	for i := range int64(loops) {
		l, err := aio.NewLoop(aio.LoopOptions{Engine: aio.EngineThreads})
		if err != nil {
			t.Fatal(err)
		}
		leave := func() { im.Leave(l); im.Leave(l) }
		on(t, l, im, aio.Request{Op: aio.OpWrite, Offset: i * cluster, Length: cluster, Vec: []aio.Iovec{m.Iovec(0, cluster)}}, leave)
		if i%2 == 0 { // it comes back
			on(t, l, im, aio.Request{Op: aio.OpFlush}, leave)
		}
		l.Close()
	}
	if n := im.Lanes(); n > 1 { // that of the image itself
		t.Errorf("%d lanes are left", n)
	}
	st, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	// Each loop reserves 64 clusters at least.
	if limit := int64(loops*64/2) * cluster; st.Size() > limit {
		t.Errorf("the file has %d bytes, more than %d", st.Size(), limit)
	}
	if s := im.Stats(); s.Lookups < loops {
		t.Errorf("%d lookups", s.Lookups)
	}
	sameBytes(t, "the disk", readAll(t, im), bytes.Repeat([]byte{7}, loops*cluster))
	if err := im.Close(); err != nil {
		t.Error(err)
	}
	qemuCheck(t, path)
}

// TestLeaveInUse: a lane that others use isn't given up.
func TestLeaveInUse(t *testing.T) {
	path := filepath.Join(testenv.TmpfsDir(t), "image")
	qemuCreate(t, path, 1<<20, "compat=1.1")
	im := open(t, path, formats.Options{})
	l, err := aio.NewLoop(aio.LoopOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	m, err := aio.NewMemory(4096)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	copy(m.Bytes(), "written")
	over := make(chan struct{})
	l.Post(func() {
		r := &aio.Request{Op: aio.OpWrite, Offset: 4096, Length: 4096, Vec: []aio.Iovec{m.Iovec(0, 4096)}, Done: func(r *aio.Request) {
			if r.Errno != 0 {
				t.Error(r.Errno)
			}
			close(over)
		}}
		im.Submit(l, []*aio.Request{r}) // which has to wait for metadata
		im.Leave(l)
	})
	<-over
	got := make([]byte, 7)
	if _, err := im.ReadAt(got, 4096); err != nil || string(got) != "written" {
		t.Errorf("%q, %v", got, err)
	}
	l.Call(func() { im.Leave(l) })
	if err := im.Close(); err != nil {
		t.Error(err)
	}
	qemuCheck(t, path)
}
