package qcow2

// Lanes is how many loops the image keeps something for.
func (im *Image) Lanes() int {
	if lanes := im.lanes.Load(); lanes != nil {
		return len(*lanes)
	}
	return 0
}
