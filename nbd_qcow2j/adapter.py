"""nbdkit's semantics: what its callbacks mean for a device, what a client is promised and told.

The handle of a connection is the device itself, so that a request is one call away from it. Clients may send
several requests at once over several connections: all of them see one device and one order of flushes
(multi-conn is meant), and every request runs in the thread of nbdkit that brought it.

An error reaches a client as an errno and nothing else (refusals.py).

What can fail is done in `get_ready`, while the person who started the server still sees it.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
from _thread import get_ident, get_native_id
from dataclasses import replace
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, NoReturn

import nbdkit

from .announcement import BEFORE_FORK, ONCE_LISTENING, Announcement
from .collector import calm
from .counters import OperationCounters
from .cpus import MOST_ASIDE, Cpus
from .driver import Device, open_device
from .errors import Error
from .lifecycle import SocketFile, StartGuard, Stopper, check_descriptors, uninterrupted
from .nbdkit_words import is_read_only, own_words
from .options import UNITS, Options, describe_options, parse_options
from .refusals import explain, refusal
from .thread_state import connection_closes, connection_opens, keep, kept, ready

if TYPE_CHECKING:
    from .metrics import MetricsServer

_FUA: int = nbdkit.FLAG_FUA
_MAY_TRIM: int = nbdkit.FLAG_MAY_TRIM
_FAST_ZERO: int = nbdkit.FLAG_FAST_ZERO
_REQ_ONE: int = nbdkit.FLAG_REQ_ONE
_HOLE: int = nbdkit.EXTENT_HOLE
_ZERO: int = nbdkit.EXTENT_ZERO

OPERATIONS = {
    name: OperationCounters() for name in ("read", "write", "flush", "trim", "write_zeroes", "cache", "block_status")
}
_READ = OPERATIONS["read"]
_WRITE = OPERATIONS["write"]
_FLUSH = OPERATIONS["flush"]
_TRIM = OPERATIONS["trim"]
_WRITE_ZEROES = OPERATIONS["write_zeroes"]
_CACHE = OPERATIONS["cache"]
_BLOCK_STATUS = OPERATIONS["block_status"]


def _fail(counters: OperationCounters, error: BaseException) -> NoReturn:
    counters.errors += 1
    raise refusal(error) from None


# ---- Starting and ending ----------------------------------------------------------------------------

_pairs: list[tuple[str, str]] = []
_options: Options
_device: Device | None = None
_metrics: MetricsServer | None = None
_socket_file = SocketFile(None)
_start_guard = StartGuard()
_announcement = Announcement(ONCE_LISTENING)
_cpus: Cpus
_closing = threading.Lock()


def dump_plugin() -> None:
    """The keys, for `nbdkit --dump-plugin`, which is all the help nbdkit lets a Python plugin give."""
    for key, metavar, text in describe_options():
        print(f"nbd_qcow2j_{key.replace('-', '_')}={key}={metavar}: {text}")
    print(f"nbd_qcow2j_units={UNITS}")
    sys.stdout.flush()


def config(key: str, value: str) -> None:
    """One `key=value` of the command line."""
    _pairs.append((key, value))


def config_complete() -> None:
    """After the last key: what is unknown, out of bounds or missing is refused by name."""
    global _options
    try:
        _options = parse_options(_pairs)
        # nbdkit tells its plugins of --readonly with the first connection: the journal would be attached by then.
        if is_read_only(own_words()):
            _options = replace(_options, read_only=True)
    except Exception as error:
        raise refusal(error) from None


def thread_model() -> int:
    """Any number of requests at once, on any connection."""
    model: int = nbdkit.THREAD_MODEL_PARALLEL
    return model


def get_ready() -> None:
    """Open, lock, validate, replay, bind: what can fail. No thread is started yet; it would not survive the fork."""
    global _device, _metrics
    try:
        with uninterrupted(_close):
            if _options.metrics is not None:
                # Not at the top: prometheus_client is a twelfth of a start, which most who serve do not need.
                from .metrics import start_metrics  # noqa: PLC0415

                with _stopper.own_listeners():
                    _metrics = start_metrics(_options.metrics)
            check_descriptors()
            _device = open_device(_options)
        _start_guard.arm(_close)
        Announcement(BEFORE_FORK).say()
    except Exception as error:
        raise refusal(error) from None


def after_fork() -> None:
    """Start the threads, in the process that stays."""
    global _socket_file, _cpus
    assert _device is not None
    _start_guard.disarm()
    try:
        _socket_file = SocketFile(_options.remove_socket)
        _cpus = Cpus(_options.cpu, OPERATIONS.values())
        _device.start(_cpus.in_background)
        if _metrics is not None:
            _metrics.serve(_device.statistics, OPERATIONS, in_flight)
        # Should nbdkit end without `cleanup`, Python's own end is the last chance to detach.
        atexit.register(_close)
        _stopper.watch(_socket_file)
        calm()
        _announcement.say()
    except Exception as error:
        raised = refusal(error)
        try:
            # nbdkit ends without `cleanup`: no thread or descriptor to be had is no reason to stay attached.
            _close()
        except Exception as second:
            print(f"nbd-qcow2j: {explain(second)}", file=sys.stderr, flush=True)
        raise raised from None


def cleanup() -> None:
    """No client is left: drain and detach."""
    try:
        _stopper.ended()
        _close()
    except Exception as error:
        # nbdkit logs what is raised and exits with 0 all the same: a supervisor must see that the journal stays.
        atexit.register(os._exit, 1)
        raise refusal(error) from None


def _close() -> None:
    """Close the device, once; returns when it is closed, whoever began."""
    global _device, _metrics
    with _closing:
        device, _device = _device, None
        metrics, _metrics = _metrics, None
        _socket_file.remove()
        try:
            if device is not None:
                device.close()
                if device.disk.corrupt:
                    print(
                        f"nbd-qcow2j: {_options.file} is marked corrupt: {device.disk.corrupt}; look at it with "
                        "nbd-qcow2j check", file=sys.stderr, flush=True,
                    )  # fmt: skip
        finally:
            if metrics is not None:
                metrics.close()


def _leave() -> None:
    """End without nbdkit, which waits for a client that does not read its replies."""
    while sum(in_flight().values()):
        time.sleep(0.01)
    code = 0
    try:
        _close()
    except Exception as error:
        print(f"nbd-qcow2j: {explain(error)}", file=sys.stderr, flush=True)
        code = 1
    # Not `sys.exit`: this is not the main thread, and that one does not come back.
    os._exit(code)


_stopper = Stopper(shutdown=nbdkit.shutdown, leave=_leave)


# ---- Connections ------------------------------------------------------------------------------------


def list_exports(readonly: bool, is_tls: bool) -> list[tuple[str, str]]:
    """One export, which is also what a client gets that names none."""
    return [("", _device.description if _device is not None else "")]


def default_export(readonly: bool, is_tls: bool) -> str:
    """The name of the export for a client that names none."""
    return ""


def open_connection(readonly: bool) -> Device:
    """The handle of a connection: the device."""
    if _device is None:
        raise refusal(Error("the server is closing")) from None
    connection_opens()
    return _device


def close_connection(device: Device) -> None:
    """The client is gone, and no request of its is left."""
    if get_ident() in kept and get_ident() not in ready:
        # With `nbdkit -s` this thread is the one that closes the image.
        _cpus.step_up()
    connection_closes()


def export_description(device: Device) -> str:
    """What the export is, for people; no path of the host."""
    return device.description


def get_size(device: Device) -> int:
    """The virtual size in bytes."""
    return device.size


def block_size(device: Device) -> tuple[int, int, int]:
    """(minimum, preferred, maximum) in bytes."""
    return device.block_sizes()


def is_rotational(device: Device) -> bool:
    """No: what is near in the guest need not be near in the image."""
    return False


def can_write(device: Device) -> bool:
    """Unless it was opened for reading."""
    return not device.read_only


def can_flush(device: Device) -> bool:
    """Yes. Nothing is promised to be durable before a flush or FUA."""
    return True


def can_fua(device: Device) -> int:
    """Native: a FUA write joins a commit, and waits for that alone."""
    native: int = nbdkit.FUA_NATIVE
    return native


def can_trim(device: Device) -> bool:
    """Yes; refused by nbdkit when the export is read-only."""
    return True


def can_zero(device: Device) -> bool:
    """Yes; refused by nbdkit when the export is read-only."""
    return True


def can_fast_zero(device: Device) -> bool:
    """Yes, and always met: at worst whole pages of zeros become pending, which is what a write of them costs."""
    return True


def can_cache(device: Device) -> int:
    """Native: it reads ahead, and copies nothing into this process."""
    native: int = nbdkit.CACHE_NATIVE
    return native


def can_extents(device: Device) -> bool:
    """Yes, across the backing chain."""
    return True


def can_multi_conn(device: Device) -> bool:
    """Yes: a flush on one connection covers what was answered on every other."""
    return True


def _join() -> None:
    """This thread is not ready: its first request, or it stepped aside. Callers look themselves, for a call costs."""
    if get_ident() in kept:
        _cpus.step_up()
    elif keep():
        _cpus.joined(get_native_id())


# ---- Requests ---------------------------------------------------------------------------------------


def pread(device: Device, buffer: Any, offset: int, flags: int) -> None:
    """Fill nbdkit's buffer."""
    started = perf_counter_ns()
    if get_ident() not in ready:
        _join()
    try:
        device.read_into(buffer, offset)
    except BaseException as error:
        _fail(_READ, error)
    _READ.observe(len(buffer), perf_counter_ns() - started)
    if _cpus.aside and len(buffer) <= MOST_ASIDE:
        _cpus.step_aside()


def pwrite(device: Device, buffer: Any, offset: int, flags: int) -> None:
    """Write nbdkit's buffer, which is used again for the next request: what is kept of it is copied."""
    started = perf_counter_ns()
    if get_ident() not in ready:
        _join()
    try:
        device.write(buffer, offset, (flags & _FUA) != 0)
    except BaseException as error:
        _fail(_WRITE, error)
    _WRITE.observe(len(buffer), perf_counter_ns() - started)
    if _cpus.aside and len(buffer) <= MOST_ASIDE:
        _cpus.step_aside()


def flush(device: Device, flags: int) -> None:
    """Return when everything that was answered before is durable."""
    started = perf_counter_ns()
    if get_ident() not in ready:
        _join()
    try:
        device.flush()
    except BaseException as error:
        _fail(_FLUSH, error)
    _FLUSH.observe(0, perf_counter_ns() - started)
    if _cpus.aside:
        _cpus.step_aside()


def trim(device: Device, count: int, offset: int, flags: int) -> None:
    """The content of the range is no longer of interest."""
    started = perf_counter_ns()
    if get_ident() not in ready:
        _join()
    try:
        device.trim(offset, count, fua=(flags & _FUA) != 0)
    except BaseException as error:
        _fail(_TRIM, error)
    _TRIM.observe(count, perf_counter_ns() - started)


def zero(device: Device, count: int, offset: int, flags: int) -> None:
    """The range reads as zeros."""
    started = perf_counter_ns()
    if get_ident() not in ready:
        _join()
    try:
        device.write_zeroes(
            offset,
            count,
            may_trim=(flags & _MAY_TRIM) != 0,
            fast=(flags & _FAST_ZERO) != 0,
            fua=(flags & _FUA) != 0,
        )
    except BaseException as error:
        _fail(_WRITE_ZEROES, error)
    _WRITE_ZEROES.observe(count, perf_counter_ns() - started)


def cache(device: Device, count: int, offset: int, flags: int) -> None:
    """The range will be read soon."""
    started = perf_counter_ns()
    if get_ident() not in ready:
        _join()
    try:
        device.cache(offset, count)
    except BaseException as error:
        _fail(_CACHE, error)
    _CACHE.observe(count, perf_counter_ns() - started)


def extents(device: Device, count: int, offset: int, flags: int) -> list[tuple[int, int, int]]:
    """(offset, length, type) of each piece of the range: zeros need not be read, and may have no cluster.

    Data in the backing file is data, as qemu-nbd has it too: qemu takes a hole that does not read as zeros for
    nothing at all, and would not copy it.
    """
    started = perf_counter_ns()
    if get_ident() not in ready:
        _join()
    found = []
    position = offset
    try:
        for extent in device.extents(offset, count, one=bool(flags & _REQ_ONE)):
            kind = 0 if not extent.zero else _ZERO if extent.allocated else _HOLE | _ZERO
            found.append((position, extent.length, kind))
            position += extent.length
    except BaseException as error:
        _fail(_BLOCK_STATUS, error)
    _BLOCK_STATUS.observe(count, perf_counter_ns() - started)
    return found


_NAMES = {
    pread.__code__: "read",
    pwrite.__code__: "write",
    flush.__code__: "flush",
    trim.__code__: "trim",
    zero.__code__: "write_zeroes",
    cache.__code__: "cache",
    extents.__code__: "block_status",
}


def in_flight() -> dict[str, int]:
    """Requests that are being answered now, by operation.

    Looked up in the threads' stacks when somebody asks: counting would cost every request.
    """
    found = dict.fromkeys(OPERATIONS, 0)
    for frame in sys._current_frames().values():
        outermost, back = frame, frame.f_back
        # Looked up once each: the threads go on meanwhile.
        while back is not None:
            outermost, back = back, back.f_back
        if outermost.f_code in _NAMES:
            found[_NAMES[outermost.f_code]] += 1
    return found
