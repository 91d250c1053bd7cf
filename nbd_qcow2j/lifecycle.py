"""How the server ends: its signals, its clients' connections, its socket file.

**Stopping.** On a signal nbdkit stops accepting, and each of its threads ends after one more request: an idle
`/dev/nbd0` would keep it, and the journal attached, for ever. So the signal comes to us:

1. `set_wakeup_fd` makes Python's C-level handler write to a socket pair, in whatever thread the signal
   arrived. The Python-level handler does nothing, and could do nothing: it would run on the main thread, which
   sits in nbdkit's accept loop.
2. A thread reads the other end and asks for `nbdkit.shutdown()`, which ends the accept loop.
3. It shuts the reading side of every accepted connection on which nothing is under way: threads that wait for a
   request see the end of the stream, those at work still answer. A busy connection winds down by itself.
   Order: never in the middle of a request. nbdkit 1.32.4 and 1.32.5 call `abort` when a connection fails while
   several of their threads have replies to send to it (their assertion `sock >= 0`; mended in 1.34).
4. A thread that sends to a client which does not read waits for ever, and cannot be woken for the same reason.
   So if nbdkit has not ended after `GRACE_SECONDS`, `leave` is called, which closes the device and the process.

nbdkit then calls `cleanup`, which drains and detaches.

A connection is known by its local address, which it shares with the listening socket it came from: nothing
else in the process, such as the metrics server's connections, is touched.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import stat
import threading
from collections.abc import Callable, Collection, Iterator

from .errors import OptionError

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
"""Those on which nbdkit ends: a closed terminal and Ctrl-\\ are no reason to stay attached either."""
GRACE_SECONDS = 1.0
SPARE_DESCRIPTORS = 8
"""Kept to look at connections with when their clients have taken all others: one to list them, one for a duplicate,
and what nbdkit takes for the client that it was accepting."""
NEEDED_DESCRIPTORS = SPARE_DESCRIPTORS + 16
"""That serving will take: the image twice, two socket pairs, trio's epoll, what nbdkit listens on, a client, a few."""
# How long nothing may have arrived on a connection for it to be idle: between two looks.
SWEEP_SECONDS = 0.05


def check_descriptors() -> None:
    """Whether there are enough for what comes after the fork, where a daemon tells nobody. Raises OptionError."""
    taken: list[int] = []
    try:
        for _ in range(NEEDED_DESCRIPTORS):
            taken.append(os.dup(2))
    except OSError as error:
        raise OptionError(
            f"{error.strerror}: serving needs {NEEDED_DESCRIPTORS - len(taken)} descriptors more than ulimit -n allows"
        ) from None
    finally:
        for each in taken:
            os.close(each)


def _sockets() -> Iterator[socket.socket]:
    """Each socket of this process, as a duplicate: nobody can close the original's number under us."""
    for name in os.listdir("/proc/self/fd"):
        try:
            if not stat.S_ISSOCK(os.stat(f"/proc/self/fd/{name}").st_mode):
                continue
            duplicate = os.dup(int(name))
        except OSError:
            continue
        try:
            found = socket.socket(fileno=duplicate)
        except OSError:
            os.close(duplicate)
            continue
        with found:
            yield found


def _local_address(connection: socket.socket) -> tuple[int, object] | None:
    """What a listening socket and the connections it accepted have in common, None if it has no name."""
    name = connection.getsockname()
    if connection.family == socket.AF_UNIX:
        return (connection.family, name) if name else None
    # The connection's host is the one the client dialled, where the listening socket may say 0.0.0.0.
    return connection.family, name[1]


def _is_listening(connection: socket.socket) -> bool:
    return bool(connection.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


def _listening_inodes() -> frozenset[int]:
    found = set()
    for candidate in _sockets():
        with contextlib.suppress(OSError):
            if _is_listening(candidate):
                found.add(os.fstat(candidate.fileno()).st_ino)
    return frozenset(found)


def shut_idle(addresses: Collection[tuple[int, object]], empty_before: Collection[int]) -> frozenset[int]:
    """Shut the reading side of each connection that has nothing to read, and had nothing at the last look.

    Returns the inodes of those that have nothing now, for the next look.
    """
    empty = set()
    for connection in _sockets():
        # A client that has just gone is not an error.
        with contextlib.suppress(OSError):
            if _is_listening(connection) or _local_address(connection) not in addresses:
                continue
            inode = os.fstat(connection.fileno()).st_ino
            if _has_input(connection):
                continue
            empty.add(inode)
            if inode in empty_before:
                connection.shutdown(socket.SHUT_RD)
    return frozenset(empty)


def _has_input(connection: socket.socket) -> bool:
    try:
        return bool(connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
    except BlockingIOError:
        return False


class StartGuard:
    """Calls a function if the process leaves between `get_ready` and `after_fork`.

    nbdkit binds after `get_ready`; when it cannot, a socket file being there or a port in use, it calls `exit` and
    none of our callbacks, and the journal would stay attached for no reason. So the C library is asked to call
    us. The parent of a daemon leaves by `exit` as well: the first fork disarms. Limit: other C libraries than
    glibc have no `__register_atfork`; there the guard does nothing and the next start finds an empty journal.
    """

    def __init__(self) -> None:
        self._function: Callable[[], object] | None = None
        # What glibc calls the shared object that registered: whatever is registered under it goes with it.
        self._owner = ctypes.create_string_buffer(1)
        self._libc = ctypes.CDLL(None)
        self._at_exit = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(self._call)
        self._before_fork = ctypes.CFUNCTYPE(None)(self._forget)

    def arm(self, function: Callable[[], object]) -> None:
        """From now on, `exit` calls `function`."""
        if hasattr(self._libc, "__register_atfork"):
            self._function = function
            self._libc["__register_atfork"](self._before_fork, None, None, self._owner)
            self._libc["__cxa_atexit"](self._at_exit, None, self._owner)

    def disarm(self) -> None:
        """Nothing is called any more; needed before Python ends, for then there is nothing to call."""
        self._forget()
        self._libc["__cxa_finalize"](self._owner)

    def _call(self, _argument: object) -> None:
        if self._function is not None:
            self._function()

    def _forget(self) -> None:
        self._function = None


@contextlib.contextmanager
def uninterrupted(undo: Callable[[], object]) -> Iterator[None]:
    """A signal that ends the process waits until the block has ended, and then `undo` is called first.

    On the main thread, while nobody handles signals yet and there is no other thread.
    """
    # Not those that are ignored (nohup): they would wait as well, and end nothing.
    ending = {number for number in SIGNALS if signal.getsignal(number) is signal.SIG_DFL}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ending)
    try:
        yield
        if signal.sigpending() & ending:
            undo()
    finally:
        # What waited kills the process here. Not later: the command of nbdkit's --run would inherit the mask.
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class SocketFile:
    """The Unix socket that is to vanish with the server, as long as the file there is still ours."""

    __slots__ = ("_identity", "_path")

    def __init__(self, path: str | None) -> None:
        self._path = path
        self._identity = _identity(path) if path else None

    def remove(self) -> None:
        """Remove it, unless another server has put its own there. May be called twice.

        A directory that nobody may write to any more (nbdkit's --user) keeps it: no reason not to close the image.
        """
        path, self._path = self._path, None
        if path and self._identity and _identity(path) == self._identity:
            with contextlib.suppress(OSError):
                os.unlink(path)


def _identity(path: str) -> tuple[int, int] | None:
    try:
        found = os.stat(path, follow_symlinks=False)
    except OSError:
        return None
    return (found.st_dev, found.st_ino) if stat.S_ISSOCK(found.st_mode) else None


class Stopper:
    """Ends the server on SIGTERM, SIGINT, SIGHUP and SIGQUIT.

    `own_listeners()` surrounds what listens for us; `watch()` is called on the main thread, after the fork: a
    thread started earlier is lost when nbdkit daemonises. `shutdown` asks nbdkit to end, `leave` ends the process
    when nbdkit cannot; the socket file is removed as soon as nobody can connect any more.
    """

    def __init__(self, *, shutdown: Callable[[], object], leave: Callable[[], object]) -> None:
        self._shutdown, self._leave = shutdown, leave
        self._not_nbd: frozenset[int] = frozenset()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._wake: socket.socket | None = None
        self._receive: socket.socket | None = None
        self._spare: list[int] = []

    @contextlib.contextmanager
    def own_listeners(self) -> Iterator[None]:
        """What begins to listen inside is ours, not nbdkit's."""
        # Not everything that listens before nbdkit binds: systemd may have handed it its sockets.
        before = _listening_inodes()
        yield
        self._not_nbd |= _listening_inodes() - before

    def nbd_addresses(self) -> frozenset[tuple[int, object]]:
        """What clients connect to."""
        found = set()
        for candidate in _sockets():
            with contextlib.suppress(OSError):
                if _is_listening(candidate) and os.fstat(candidate.fileno()).st_ino not in self._not_nbd:
                    found.add(_local_address(candidate))
        return frozenset(address for address in found if address is not None)

    def watch(self, socket_file: SocketFile) -> None:
        """Take over the signals, and start the thread that waits for one."""
        # Both ends stay open to the last: Python complains of a signal that it cannot write down.
        self._receive, self._wake = socket.socketpair()
        self._wake.setblocking(False)
        self._spare = [os.dup(self._receive.fileno()) for _ in range(SPARE_DESCRIPTORS)]
        self._thread = threading.Thread(
            target=self._run, args=(self._receive, self.nbd_addresses(), socket_file), name="stopper", daemon=True
        )
        self._thread.start()
        # Order: the descriptor before the handlers, so that no signal is lost between them.
        signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)
        for number in SIGNALS:
            signal.signal(number, _nothing)

    def _run(self, receive: socket.socket, addresses: Collection[tuple[int, object]], socket_file: SocketFile) -> None:
        receive.recv(1)
        if self._ended.is_set():
            return
        self._shutdown()
        socket_file.remove()
        # Order: no more clients are accepted now, who would take them.
        while self._spare:
            os.close(self._spare.pop())
        empty: frozenset[int] = frozenset()
        for _ in range(round(GRACE_SECONDS / SWEEP_SECONDS)):
            # Without a descriptor to look with there is still `leave`.
            with contextlib.suppress(OSError):
                empty = shut_idle(addresses, empty)
            if self._ended.wait(SWEEP_SECONDS):
                return
        self._leave()

    def ended(self) -> None:
        """The connections are gone: stop looking for them. On the main thread."""
        self._ended.set()
        # Ignored, not handled: Python gives what it handles back to the system when it ends, and then a third
        # Ctrl-C would still kill the process, and a supervisor see a failure.
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        if self._wake is not None:
            with contextlib.suppress(OSError):
                self._wake.send(b"\0")
        if self._thread is not None:
            self._thread.join()


def _nothing(_number: int, _frame: object) -> None:
    pass
