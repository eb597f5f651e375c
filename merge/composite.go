package merge

import "platter/aio"

// composite is a request that stands for several others, its members. When it
// has succeeded, so have they. When it has failed nothing is known of any one
// of them, so they are carried out again one by one: the same request then
// stands for one member at a time.
type composite struct {
	request aio.Request
	merger  *Merger
	members []*aio.Request // in arrival order
	vec     []aio.Iovec    // memory of the composite's vector

	retrying  bool            // the request stands for members[next]
	next      int             // the member being retried
	calling   bool            // resubmit has not returned yet
	completed bool            // it completed the request before it returned
	one       [1]*aio.Request // the argument of resubmit
}

// take returns a composite without members.
func (m *Merger) take() *composite {
	if n := len(m.free); n > 0 {
		c := m.free[n-1]
		m.free[n-1] = nil
		m.free = m.free[:n-1]
		return c
	}
	c := &composite{merger: m}
	c.request.Done = c.done
	return c
}

// release makes the composite available again, holding on to nothing.
func (c *composite) release() {
	clear(c.members)
	c.members = c.members[:0]
	c.vec = c.vec[:0]
	c.request.Vec = nil
	c.retrying, c.next = false, 0
	c.one[0] = nil
	c.merger.free = append(c.merger.free, c)
}

// done is the request's Done.
func (c *composite) done(r *aio.Request) {
	switch {
	case c.retrying:
		c.retried()
	case r.Errno != 0:
		c.retrying = true
		c.retry()
	default:
		for _, member := range c.members {
			member.Complete(0)
		}
		c.release()
	}
}

// retry carries out members[next] and those after it, one after the other: a
// write must not overtake an earlier one that it overlaps. It goes on by itself
// as long as they complete within resubmit, and leaves the rest to retried
// otherwise.
func (c *composite) retry() {
	for c.next < len(c.members) {
		member := c.members[c.next]
		r := &c.request
		r.Flags, r.Offset, r.Length, r.Vec = member.Flags, member.Offset, member.Length, member.Vec
		c.one[0] = r
		c.calling, c.completed = true, false
		c.merger.resubmit(c.one[:])
		c.calling = false
		if !c.completed {
			return
		}
	}
	c.release()
}

// retried passes the outcome on to the member that was retried.
func (c *composite) retried() {
	member, errno := c.members[c.next], c.request.Errno
	c.next++
	c.completed = true
	member.Complete(errno)
	if !c.calling {
		c.retry()
	}
}
