// Package nbd serves exports over the Network Block Device protocol
// (doc/proto.md of NetworkBlockDevice/nbd): fixed newstyle negotiation, then
// simple replies.
//
// A connection has two lives. It negotiates on a goroutine of its own, with
// blocking calls and a deadline (negotiate.go, options.go): that is rare, and
// wants to be plain. Then its socket moves to a loop for good, where the
// transmission phase is a state machine without a goroutine (conn.go):
//
//   - A receive fills a block of memory with whatever has come, often many
//     requests. All of them are parsed, in place, and submitted as one batch
//     (receive.go). What a write carries stays where it was received.
//   - Every request gets room for its reply as it is parsed: header and data,
//     one reply behind the other, so that reads land where they are sent from.
//   - At the end of the loop's turn everything that has completed is sent by one
//     vectored send (reply.go). Replies leave in the order of completion.
//
// What a connection may hold in flight is bounded, and so is what all
// connections of a loop may (budget.go).
package nbd
