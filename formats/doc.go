// Package formats opens disk images.
//
// Image is the contract that every format fulfils: a guest disk, which takes
// batches of requests on any number of loops. A format is a Driver; its package
// registers it when it is imported, so a program handles the formats that it
// imports and nothing here knows them.
//
// Open does what is the same for all: it opens the file, takes QEMU's image
// locks on it, reads its first bytes to find the format if that was not stated,
// and hands it to the driver. A format that is recognised but has no driver is
// refused rather than served as raw bytes. What goes wrong is an *Error, which
// tells the user the file, the cause and the remedy.
//
// formattest is the conformance suite for all formats.
package formats
