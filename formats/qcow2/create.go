package qcow2

import "platter/formats/qcow2/create"

// CreateOptions say what a new image is like; the zero value is what qemu-img
// makes. See package create, which also reads them from key=value lists.
type CreateOptions = create.Options

// Create makes an image of size bytes at path, where nothing may be yet. It is
// durable on return; when something goes wrong, nothing is left behind.
func Create(path string, size int64, o CreateOptions) error { return create.Create(path, size, o) }
