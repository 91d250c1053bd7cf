"""The plugin that nbdkit loads: `nbdkit -U SOCKET python ./plugin.py file=IMAGE [key=value…]`.

nbdkit's callbacks, each bound to the function that answers it: a call in between would cost every request.
"""

import os
import signal
import site
import sys

# nbdkit sets up its own handlers later. Until then Ctrl-C ends the process as SIGTERM does, without a traceback.
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

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

try:
    from nbd_qcow2j import adapter
except ImportError as error:
    # Python looks for its library beside the first python3 on PATH; that of another build (pyenv, conda) has the same
    # version and modules that do not load. .venv knows where the right one is.
    with open(os.path.join(_TOP, ".venv", "pyvenv.cfg"), encoding="utf-8") as _file:
        _home = next((_line.split("=", 1)[1].strip() for _line in _file if _line.startswith("home")), "/usr/bin")
    _prefix = os.path.dirname(_home)
    _hint = f"set PYTHONHOME={_prefix}" if sys.base_prefix != _prefix else "run deploy/setup"
    sys.exit(f"nbd-qcow2j: {error}: {_hint}")

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
close = adapter.close_connection
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
