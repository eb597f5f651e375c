package layout

import "encoding/binary"

// RefcountTableReserved are the bits that must be 0 in a refcount table entry.
const RefcountTableReserved uint64 = 0x1ff

// CheckRefcountTable reports what is wrong with a refcount table entry.
func (g Geometry) CheckRefcountTable(word uint64) error {
	switch {
	case word&RefcountTableReserved != 0:
		return invalid("refcount table entry", Hex(word), "must not have reserved bits set")
	case !g.validOffset(int64(word)):
		return invalid("refcount table entry", Hex(word), "must be a multiple of the cluster size below 64 PiB")
	}
	return nil
}

// Refcount reads the refcount at index i of a refcount block.
func (g Geometry) Refcount(block []byte, i int) uint64 {
	switch g.RefcountOrder {
	case 3:
		return uint64(block[i])
	case 4:
		return uint64(binary.BigEndian.Uint16(block[2*i:]))
	case 5:
		return uint64(binary.BigEndian.Uint32(block[4*i:]))
	case 6:
		return binary.BigEndian.Uint64(block[8*i:])
	}
	at, shift, mask := g.subByte(i)
	return uint64(block[at] >> shift & mask)
}

// SetRefcount writes the refcount at index i of a refcount block. The value is
// at most MaxRefcount.
func (g Geometry) SetRefcount(block []byte, i int, v uint64) {
	switch g.RefcountOrder {
	case 3:
		block[i] = uint8(v)
	case 4:
		binary.BigEndian.PutUint16(block[2*i:], uint16(v))
	case 5:
		binary.BigEndian.PutUint32(block[4*i:], uint32(v))
	case 6:
		binary.BigEndian.PutUint64(block[8*i:], v)
	default:
		at, shift, mask := g.subByte(i)
		block[at] = block[at]&^(mask<<shift) | uint8(v)&mask<<shift
	}
}

// subByte finds a refcount of 1, 2 or 4 bits: the first stands in the least
// significant bits of its byte.
func (g Geometry) subByte(i int) (at int, shift uint, mask uint8) {
	perByte := uint(3 - g.RefcountOrder)
	width := uint(1) << g.RefcountOrder
	return i >> perByte, uint(i) & (1<<perByte - 1) * width, 1<<width - 1
}
