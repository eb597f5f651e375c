"""Every NBD command against a writable export, through libnbd.

Usage: commands.py URI FILE SIZE

The export shows the raw image FILE of SIZE bytes, all zero, at least 16 MiB.
Any difference from what the protocol asks ends the script with an error.
"""

import errno
import os
import random
import sys

import nbd

uri, path, size = sys.argv[1], sys.argv[2], int(sys.argv[3])
KIB, MIB = 1 << 10, 1 << 20


def connect():
    h = nbd.NBD()
    h.set_strict_mode(0)  # let the server refuse bad requests, not the library
    h.connect_uri(uri)
    return h


def refused(name, call, *args):
    """The call, whose last argument is the offset, fails with the named errno."""
    try:
        call(*args)
    except nbd.Error as e:
        got = errno.errorcode.get(e.errnum, e.errnum)
        assert got == name, f"{call.__name__} at {args[-1]}: {got}, want {name}"
    else:
        raise AssertionError(f"{call.__name__} at {args[-1]} succeeded, want {name}")


def same(h, offset, want):
    got = h.pread(len(want), offset)
    assert got == want, f"{len(want)} bytes at {offset} differ"


def allocated():
    return os.stat(path).st_blocks * 512


h = connect()
assert h.get_size() == size, f"size {h.get_size()}, want {size}"
for can in "can_flush", "can_fua", "can_trim", "can_zero", "can_cache", "can_multi_conn":
    assert getattr(h, can)(), f"no {can}"
assert not h.is_read_only()
least, preferred, most = (h.get_block_size(i) for i in range(3))
assert least == 1, f"minimum block size {least}: a buffered raw image takes any"
assert preferred >= 512 and preferred & (preferred - 1) == 0, f"preferred block size {preferred}"
assert most >= 32 * MIB, f"maximum payload {most}"

# Read and write, at any offset and length.
same(h, 0, bytes(64 * KIB))
odd = random.Random(1).randbytes(70001)
h.pwrite(odd, 777)
same(h, 777, odd)
same(h, 0, bytes(777))
same(h, 777 + len(odd), bytes(4096))
h.pwrite(b"x", size - 1)
same(h, size - 2, b"\0x")
big = random.Random(2).randbytes(4 * MIB)
h.pwrite(big, 8 * MIB)
same(h, 8 * MIB, big)
h.flush()
with open(path, "rb") as f:
    f.seek(8 * MIB)
    assert f.read(len(big)) == big, "the file lacks what was written and flushed"

# FUA on all that takes it.
h.pwrite(b"fua" * 1000, MIB, nbd.CMD_FLAG_FUA)
same(h, MIB, b"fua" * 1000)
h.trim(4 * KIB, 2 * MIB, nbd.CMD_FLAG_FUA)
h.zero(3000, MIB, nbd.CMD_FLAG_FUA)
same(h, MIB, bytes(3000))

# Zeroes, with a hole where it can be, and without one when it must not be.
before = allocated()
h.zero(MIB, 8 * MIB)
same(h, 8 * MIB, bytes(MIB))
same(h, 9 * MIB, big[MIB : 2 * MIB])
assert allocated() <= before - MIB + 64 * KIB, "zero left the space allocated"
before = allocated()
h.zero(MIB, 9 * MIB, nbd.CMD_FLAG_NO_HOLE)
same(h, 9 * MIB, bytes(MIB))
assert allocated() >= before - 64 * KIB, "zero with NO_HOLE made a hole"
h.zero(4097, 10 * MIB + 5)
same(h, 10 * MIB, big[2 * MIB : 2 * MIB + 5] + bytes(4097) + big[2 * MIB + 4102 : 2 * MIB + 9000])
if h.can_fast_zero():
    try:
        h.zero(64 * KIB, 11 * MIB, nbd.CMD_FLAG_FAST_ZERO)
    except nbd.Error as e:
        assert e.errnum == errno.EOPNOTSUPP, f"fast zero: {e}"
        same(h, 11 * MIB, big[3 * MIB : 3 * MIB + 64 * KIB])
    else:
        same(h, 11 * MIB, bytes(64 * KIB))

# Trim and cache change no byte but those trimmed.
h.trim(64 * KIB, 11 * MIB + 64 * KIB)
same(h, 11 * MIB + 128 * KIB, big[3 * MIB + 128 * KIB : 3 * MIB + 256 * KIB])
h.cache(MIB, 11 * MIB)
h.cache(1, 0)

# What a server must refuse; the connection goes on.
refused("ENOSPC", h.pwrite, b"y" * 512, size)
refused("ENOSPC", h.pwrite, b"y" * 512, size - 511)
refused("EINVAL", h.pread, 512, size)
refused("EINVAL", h.pread, 512, size - 511)
refused("EINVAL", h.pread, 512, (1 << 63) - 512)
refused("EINVAL", h.pread, 1024, (1 << 64) - 512)
refused("ENOSPC", h.pwrite, b"y" * 1024, (1 << 64) - 512)
refused("EINVAL", h.trim, 512, size)
refused("ENOSPC", h.zero, 512, size)
same(h, size - 2, b"\0x")
assert os.stat(path).st_size == size, "the file grew"

# Many requests in flight, each with its own answer.
r = random.Random(3)
blocks = [r.randbytes(4 * KIB) for _ in range(256)]
order = list(range(256))
r.shuffle(order)


def finish(cookies):
    while cookies:
        h.poll(10_000)
        cookies = [c for c in cookies if not h.aio_command_completed(c)]


buffers = {i: nbd.Buffer.from_bytearray(bytearray(blocks[i])) for i in order}
finish([h.aio_pwrite(buffers[i], 12 * MIB + i * 4 * KIB) for i in order])
r.shuffle(order)
buffers = {i: nbd.Buffer(4 * KIB) for i in order}
finish([h.aio_pread(buffers[i], 12 * MIB + i * 4 * KIB) for i in order])
for i in order:
    assert bytes(buffers[i].to_bytearray()) == blocks[i], f"block {i} differs"

# Two connections show one disk, and a flush on one covers the other.
other = connect()
h.pwrite(b"seen by all" * 100, 3 * MIB)
other.flush()
same(other, 3 * MIB, b"seen by all" * 100)
other.shutdown()

h.shutdown()
print("ok")
