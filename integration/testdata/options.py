"""The handshake's options, through libnbd.

Usage: options.py URI NAME...

The server has exactly the named exports, and URI leads to any of them.
"""

import errno
import sys

import nbd

uri, names = sys.argv[1], sys.argv[2:]

h = nbd.NBD()
h.set_opt_mode(True)
h.connect_uri(uri)
seen = []
h.opt_list(lambda name, description: seen.append(name))
assert sorted(seen) == sorted(names), f"listed {seen}, want {names}"
for name in names:
    h.set_export_name(name)
    h.opt_info()
    assert h.get_size() > 0
h.set_export_name("no such export")
for call in h.opt_info, h.opt_go:
    try:
        call()
    except nbd.Error as e:
        assert e.errnum == errno.ENOENT, f"unknown export: {e}"
    else:
        raise AssertionError("an unknown export was found")
h.set_export_name(names[-1])
h.opt_go()
h.pread(512, 0)
h.shutdown()

h = nbd.NBD()
h.set_opt_mode(True)
h.connect_uri(uri)
h.opt_abort()
print("ok")
