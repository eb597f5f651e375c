package nbd

import "platter/export"

// exportList is the server's exports as a Catalogue.
type exportList []*export.Export

// find is the export of that name. The empty name is the default export: the
// one without a name, or the only one.
func (s exportList) find(name string) *export.Export {
	for _, e := range s {
		if e.Name() == name {
			return e
		}
	}
	if name == "" && len(s) == 1 {
		return s[0]
	}
	return nil
}

func (s exportList) Find(name string) (Offer, bool) {
	e := s.find(name)
	if e == nil {
		return Offer{}, false
	}
	return offerOf(e), true
}

func (s exportList) List() []Offer {
	offers := make([]Offer, len(s))
	for i, e := range s {
		offers[i] = offerOf(e)
	}
	return offers
}

// offerOf describes an export as the protocol does.
func offerOf(e *export.Export) Offer {
	limits := e.Limits()
	o := Offer{
		Name:           e.Name(),
		Description:    e.Description(),
		Size:           uint64(e.Size()),
		Flags:          flagHasFlags | flagSendFlush | flagSendCache,
		MinBlock:       limits.BlockSize,
		PreferredBlock: max(limits.PreferredSize, limits.BlockSize, 512),
		MaxBlock:       uint32(min(limits.MaxTransfer, maxBlock)),
	}
	if e.ReadOnly() {
		o.Flags |= flagReadOnly
	} else {
		o.Flags |= flagSendFUA | flagSendTrim | flagSendWriteZeroes
	}
	if limits.Rotational {
		o.Flags |= flagRotational
	}
	if limits.MultiConn && e.Queues() != 1 {
		o.Flags |= flagCanMultiConn
	}
	return o
}
