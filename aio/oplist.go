package aio

// opList is a queue of ops, linked through next.
type opList struct {
	first, last *op
}

func (q *opList) empty() bool { return q.first == nil }

func (q *opList) push(o *op) {
	o.next = nil
	if q.last == nil {
		q.first = o
	} else {
		q.last.next = o
	}
	q.last = o
}

func (q *opList) pop() *op {
	o := q.first
	if q.first = o.next; q.first == nil {
		q.last = nil
	}
	o.next = nil
	return o
}
