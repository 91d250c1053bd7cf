"""The plugin that nbdkit loads: `nbdkit -U SOCKET python ./plugin.py file=IMAGE [key=value…]`.

nbdkit's callbacks, each bound to the function that answers it: a call in between would cost every request.
"""

import os
import site
import sys

_TOP = os.path.dirname(os.path.abspath(__file__))
# `sys.executable` means nothing inside nbdkit, and only the environment made for the version of Python that
# nbdkit embeds has modules that load: so it is found by that version, beside this file.
_VERSION = f"python{sys.version_info.major}.{sys.version_info.minor}"
_PACKAGES = os.path.join(_TOP, ".venv", "lib", _VERSION, "site-packages")
if not os.path.isdir(_PACKAGES):
    sys.exit(f"nbd-qcow2j: {_PACKAGES} does not exist: run {os.path.join(_TOP, 'deploy', 'setup')}")
site.addsitedir(_PACKAGES)
if _TOP not in sys.path:
    sys.path.insert(0, _TOP)

from nbd_qcow2j import adapter  # noqa: E402

API_VERSION = 2

# Starting and ending
dump_plugin = adapter.dump_plugin
config = adapter.config
config_complete = adapter.config_complete
thread_model = adapter.thread_model
get_ready = adapter.get_ready
after_fork = adapter.after_fork
cleanup = adapter.cleanup

# Connections
list_exports = adapter.list_exports
default_export = adapter.default_export
open = adapter.open_connection
export_description = adapter.export_description
get_size = adapter.get_size
block_size = adapter.block_size
is_rotational = adapter.is_rotational
can_write = adapter.can_write
can_flush = adapter.can_flush
can_fua = adapter.can_fua
can_trim = adapter.can_trim
can_zero = adapter.can_zero
can_fast_zero = adapter.can_fast_zero
can_cache = adapter.can_cache
can_extents = adapter.can_extents
can_multi_conn = adapter.can_multi_conn

# Requests
pread = adapter.pread
pwrite = adapter.pwrite
flush = adapter.flush
trim = adapter.trim
zero = adapter.zero
cache = adapter.cache
extents = adapter.extents
