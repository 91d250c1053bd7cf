"""qemu's image locks: who may have a file open together with whom.

The protocol of qemu's file driver, so that qemu and we, and two of us, refuse each other. A user of a file
has *permissions* that it uses and permissions that it lets others use at the same time. Each is a byte of
the file (the bytes need not exist), and each lock is a shared OFD lock, so several users can hold it:

    byte 100 + n    somebody uses permission n
    byte 200 + n    somebody does not share permission n

To open: lock the bytes for what we use and for what we do not share; *then* test the counterparts (is what
we use unshared by another? is what we do not share used by another?) and let go again if one is held. Of
two who open at the same moment each sees the other's locks: one or both are refused, never neither.

Spec: qemu `block/file-posix.c`, raw_apply_lock_bytes and raw_check_lock_bytes; `include/block/block-common.h`
for the permissions. One byte more, far from qemu's, says that the holder is of this program: it excludes
nobody and serves the message.

Locks of an open file description (F_OFD_SETLK) survive the fork with which nbdkit goes into the background,
and end with the last descriptor of that description, SIGKILL included: no lock is ever stale.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from .errors import ImageError, LockedError

CONSISTENT_READ: Final = 1
WRITE: Final = 2
WRITE_UNCHANGED: Final = 4
RESIZE: Final = 8
ALL: Final = CONSISTENT_READ | WRITE | WRITE_UNCHANGED | RESIZE
PERMISSIONS: Final = ((0, "consistent read"), (1, "write"), (2, "write unchanged"), (3, "resize"))
"""Bit and name, as qemu has them. Bit 4, which older versions of qemu have as well, is always shared."""

USED_BASE: Final = 100
UNSHARED_BASE: Final = 200
OUR_BYTE: Final = 300
"""Locked by every nbd-qcow2j, reader or writer; qemu ends at 263 (64 permissions)."""

_FLOCK = struct.Struct("hhqqi4x")
"""struct flock of 64-bit Linux: type, whence, start, length, pid (0 for OFD locks)."""


@dataclass(frozen=True, slots=True)
class LockUse:
    """What we do with a file, and what we let others do with it meanwhile."""

    uses: int
    shares: int
    verb: str


WRITER: Final = LockUse(CONSISTENT_READ | WRITE | RESIZE, CONSISTENT_READ | WRITE_UNCHANGED, "write to it")
"""The image served for writing, as qemu's qcow2 driver locks it: one at a time, and no ordinary reader
(a reader does not share writing). Only those who ask for it by `-U` get in; the feature bit then tells them."""
READER: Final = LockUse(CONSISTENT_READ, CONSISTENT_READ | WRITE_UNCHANGED, "read it")
"""The image served read-only, and every backing file: any number of readers, no writer."""


def acquire(fd: int, use: LockUse, *, name: str) -> None:
    """Take the locks on this open file description, or none of them.

    Raises LockedError (another process excludes this use; says which), ImageError (the file system has no
    locks).
    """
    wanted = [OUR_BYTE]
    wanted += [USED_BASE + bit for bit, _ in PERMISSIONS if use.uses >> bit & 1]
    wanted += [UNSHARED_BASE + bit for bit, _ in PERMISSIONS if not use.shares >> bit & 1]
    try:
        for byte in wanted:
            _set(fd, byte, fcntl.F_RDLCK)
        # Order: the test comes after our own locks are in place; the other way round two could both pass.
        conflict = _conflict(fd, use)
    except OSError as error:
        release(fd)
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise LockedError(_describe(fd, use, name, "all access")) from None
        reason = os.strerror(error.errno or errno.EIO)
        raise ImageError(
            f"{name}: the file system refuses to lock the image ({reason}), and without a lock two programs could "
            f"write to it; on NFS, mount it with a lock service (not `nolock`)"
        ) from None
    if conflict:
        release(fd)
        raise LockedError(_describe(fd, use, name, conflict))


def release(fd: int) -> None:
    """Let go of every lock that this open file description holds on the file."""
    # A file system without locks has an error for this as well; nothing is held there.
    with suppress(OSError):
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, 0, 0, 0))


def _set(fd: int, byte: int, kind: int) -> None:
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0))


def _held_by_another(fd: int, byte: int) -> bool:
    """Whether another description holds a lock, shared or not, on the byte."""
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0))
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)


def _conflict(fd: int, use: LockUse) -> str:
    """The name of the first permission over which another excludes us, or we it; empty if there is none."""
    for bit, name in PERMISSIONS:
        if use.uses >> bit & 1 and _held_by_another(fd, UNSHARED_BASE + bit):
            return name
    for bit, name in PERMISSIONS:
        if not use.shares >> bit & 1 and _held_by_another(fd, USED_BASE + bit):
            return name
    return ""


def _describe(fd: int, use: LockUse, name: str, permission: str) -> str:
    ours = _held_by_another(fd, OUR_BYTE)
    writing = _held_by_another(fd, USED_BASE + 1)
    who = "another nbd-qcow2j" if ours else "qemu, or another program with qemu's image locks,"
    processes = ", ".join(f"{command} (process {pid})" for pid, command in holders(fd))
    return (
        f"{name} is in use: {who} {'writes to' if writing else 'reads'} it, so we cannot {use.verb} "
        f'(its lock on "{permission}"); '
        + (f"it is held by {processes}" if processes else f"`sudo lsof {name}` shows the processes that have it open")
    )


def holders(fd: int) -> list[tuple[int, str]]:
    """Processes that hold OFD locks on the same file, as (pid, command), of those we may look at.

    From /proc/PID/fdinfo, because the kernel does not tell the owner of an OFD lock (its pid is -1).
    """
    found: list[tuple[int, str]] = []
    ours = os.fstat(fd)
    try:
        pids = [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]
    except OSError:
        return found
    for pid in pids:
        try:
            for number in os.listdir(f"/proc/{pid}/fd"):
                if pid == os.getpid() and number == str(fd):
                    continue
                if os.path.samestat(os.stat(f"/proc/{pid}/fd/{number}"), ours) and _has_lock(pid, number):
                    with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
                        found.append((pid, file.read().strip()))
                    break
        except OSError:
            continue  # it ended meanwhile, or belongs to another user
    return found


def _has_lock(pid: int, number: str) -> bool:
    with open(f"/proc/{pid}/fdinfo/{number}", encoding="ascii", errors="replace") as file:
        return any(line.startswith("lock:") and "OFDLCK" in line for line in file)
