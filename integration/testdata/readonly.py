"""A read-only export, through libnbd.

Usage: readonly.py URI SIZE

Every byte of the export is the letter r.
"""

import errno
import sys

import nbd

uri, size = sys.argv[1], int(sys.argv[2])

h = nbd.NBD()
h.set_strict_mode(0)  # let the server refuse writes, not the library
h.connect_uri(uri)
assert h.is_read_only()
assert h.get_size() == size
for call in (
    lambda: h.pwrite(b"w" * 512, 0),
    lambda: h.pwrite(b"w" * 512, 0, nbd.CMD_FLAG_FUA),
    lambda: h.zero(512, 0),
    lambda: h.trim(512, 0),
):
    try:
        call()
    except nbd.Error as e:
        assert e.errnum == errno.EPERM, f"{e}, want EPERM"
    else:
        raise AssertionError("a write to a read-only export succeeded")
h.cache(512, 0)
assert h.pread(size, 0) == b"r" * size
if h.can_flush():
    h.flush()
h.shutdown()
print("ok")
