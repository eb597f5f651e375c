package cli

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strings"

	"platter/formats/qcow2/layout"
)

// encryptInfo tells how an image is encrypted. Of the old AES there is no more
// to say than the format.
type encryptInfo struct {
	IVGen          string     `json:"ivgen-alg,omitempty"`
	DetachedHeader *bool      `json:"detached-header,omitempty"`
	Hash           string     `json:"hash-alg,omitempty"`
	Cipher         string     `json:"cipher-alg,omitempty"`
	UUID           string     `json:"uuid,omitempty"`
	IVGenHash      string     `json:"ivgen-hash-alg,omitempty"`
	Format         string     `json:"format"`
	CipherMode     string     `json:"cipher-mode,omitempty"`
	Slots          []luksSlot `json:"slots,omitempty"`
	PayloadOffset  int64      `json:"payload-offset,omitempty"`
	MasterKeyIters int64      `json:"master-key-iters,omitempty"`
}

// luksSlot has pointers for what only a slot in use tells.
type luksSlot struct {
	Active    bool   `json:"active"`
	Iters     *int64 `json:"iters,omitempty"`
	KeyOffset int64  `json:"key-offset"`
	Stripes   *int64 `json:"stripes,omitempty"`
}

func describeEncryption(h *layout.Header, f io.ReaderAt) (*encryptInfo, error) {
	if h.Encryption != layout.LUKS {
		return &encryptInfo{Format: h.Encryption.String()}, nil
	}
	x, _ := h.Extension(layout.ExtensionEncryption)
	if len(x) < 8 {
		return nil, errors.New("the image doesn't tell where it stands")
	}
	return readLUKS(f, int64(binary.BigEndian.Uint64(x)))
}

// The LUKS1 header, as the on-disk format specification 1.2.3 of cryptsetup has
// it. Offsets within the container count sectors.
const (
	luksMagic      = "LUKS\xba\xbe"
	luksHeaderSize = 592
	luksSlotsAt    = 208
	luksSlotSize   = 48
	luksSlots      = 8
	luksActive     = 0x00ac71f3
	luksSector     = 512
)

// readLUKS reads the LUKS header at an offset of the file.
func readLUKS(f io.ReaderAt, off int64) (*encryptInfo, error) {
	b := make([]byte, luksHeaderSize)
	if _, err := f.ReadAt(b, off); err != nil {
		return nil, fmt.Errorf("at %#x: %w", off, err)
	}
	be := binary.BigEndian
	if version := be.Uint16(b[6:]); string(b[:6]) != luksMagic || version != 1 {
		return nil, fmt.Errorf("at %#x: no LUKS header of version 1", off)
	}
	text := func(at, n int) string {
		s, _, _ := bytes.Cut(b[at:at+n], []byte{0})
		return string(s)
	}
	// The mode is MODE-IVGEN or MODE-IVGEN:HASH.
	mode, ivgen, _ := strings.Cut(text(40, 32), "-")
	ivgen, ivhash, _ := strings.Cut(ivgen, ":")
	keyBits := 8 * be.Uint32(b[108:])
	if mode == "xts" {
		keyBits /= 2 // it has two keys
	}
	info := &encryptInfo{Format: "luks", DetachedHeader: new(bool), IVGen: ivgen, IVGenHash: ivhash,
		CipherMode: mode, Cipher: fmt.Sprintf("%s-%d", text(8, 32), keyBits), Hash: text(72, 32),
		PayloadOffset:  int64(be.Uint32(b[104:])) * luksSector,
		MasterKeyIters: int64(be.Uint32(b[164:])), UUID: text(168, 40),
	}
	for i := range luksSlots {
		s := b[luksSlotsAt+i*luksSlotSize:]
		slot := luksSlot{Active: be.Uint32(s) == luksActive, KeyOffset: int64(be.Uint32(s[40:])) * luksSector}
		if slot.Active {
			iters, stripes := int64(be.Uint32(s[4:])), int64(be.Uint32(s[44:]))
			slot.Iters, slot.Stripes = &iters, &stripes
		}
		info.Slots = append(info.Slots, slot)
	}
	return info, nil
}
