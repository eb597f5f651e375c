// Package qcow2 reads and writes qcow2 images.
//
// Image is a formats.Image: any number of loops submit requests to it. What is
// mapped already is found with a few atomic loads and read or overwritten on the
// loop at once (the fast path); a write to a new cluster takes one from a run
// that its loop has reserved, and is mapped when its data has been written.
// Everything else goes to a goroutine of the image's own that may wait: reading
// metadata, copy on write, compressed clusters, discards, and the commit that a
// flush asks for. No loop ever waits.
//
// # Durability
//
// A commit (commit.go) orders what it writes so that a power cut at any moment
// leaves an image that is consistent but for leaked clusters: refcounts and the
// guest's data first, then the L2 tables that point to them, then the L1
// entries that point to new L2 tables; clusters that lost their mapping are
// punched and used again only when that is durable. What the allocator hands out
// always reads as zeroes, so no sector ever shows what another cluster held.
package qcow2
