"""Positional I/O on the image file: the seam between the engine and the disk.

`Storage` is what the engine's steps need (`steps.py`); `FileStorage` does it on one open file
description; the tests have a simulated disk behind the same protocol.

Rules
  * Nothing here keeps a file position, a buffer or a cache: a call is one system call, or a few.
  * `write_sync` makes its own range durable and nothing else; `sync` makes durable what was written,
    by any description, before it began. Both report a write-back error of the file, whoever wrote,
    once per description. An error is never swallowed and a sync is never tried again here: the kernel
    marks the pages of a failed write-back clean, so the second sync would succeed and mean nothing.
  * A short read or write goes on where it stopped; EINTR is not an error.
  * Errors of an open file are `OSError`s without a path. Errors of `open` and `reopen` are `ImageError`s
    for the person who starts the server, and name the path.

Order: the caller does not write beyond the end of the file while an `allocate` or `truncate` is under
way. Where the file system has no fallocate, `allocate` sets the length by ftruncate, which would cut off
what a write had just appended.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Final, Protocol, Self

from .errors import ImageError, printable
from .locks import READER, LockUse, acquire
from .steps import Buffer

MAX_BUFFERS: Final = 1024
"""IOV_MAX: buffers that one pwritev takes."""
MAX_BYTES: Final = 1 << 30
"""Bytes in one pwritev; the kernel stops short of 2 GiB."""

FALLOC_FL_KEEP_SIZE: Final = 0x01
FALLOC_FL_PUNCH_HOLE: Final = 0x02
FALLOC_FL_ZERO_RANGE: Final = 0x10
SYNC_FILE_RANGE_WRITE: Final = 2
UNSUPPORTED: Final = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV})
"""What a file system answers to a kind of fallocate that it does not have."""

_ZEROS = bytes(1 << 20)


MOST_RUNS = 4096
"""Pieces that `data_runs` tells apart; what comes after them may hold data for all it knows."""


class Storage(Protocol):
    """What the engine asks of a disk. Offsets and lengths are bytes, any alignment."""

    name: str
    """For messages to the operator: the path as it was given."""
    can_punch: bool
    """False once the file system has said that it cannot punch holes."""

    def read_into(self, buffer: bytearray | memoryview, offset: int) -> None:
        """Fill `buffer` from `offset`; zeros past the end of the file."""

    def write(self, offset: int, buffers: Sequence[Buffer]) -> None:
        """Write the buffers one after the other from `offset`; durable after a later `sync`."""

    def write_sync(self, offset: int, buffers: Sequence[Buffer]) -> None:
        """Write, and make durable this range and nothing else, with the length needed to read it."""

    def sync(self) -> None:
        """Make durable everything that was written before the call."""

    def allocate(self, offset: int, length: int) -> None:
        """Give the range space; what was never written reads as zeros; the file grows to its end."""

    def punch(self, offset: int, length: int) -> None:
        """Give the range's space back; zeros afterwards if `can_punch` is still true, else unchanged."""

    def zero_range(self, offset: int, length: int) -> None:
        """Make the range read as zeros, its space kept or given where that is cheap; the file may grow."""

    def truncate(self, size: int) -> None:
        """Set the length of the file in bytes."""

    def size(self) -> int:
        """Length of the file in bytes."""

    def data_runs(self, offset: int, length: int) -> list[tuple[int, bool]]:
        """(length, whether it may hold data) of the pieces of a range; what may not is a hole, or past the end."""

    def start_writeback(self, offset: int, length: int) -> None:
        """Begin to write the range out, without waiting. A hint; but an error it meets is a lost write."""

    def advise_needed(self, offset: int, length: int) -> None:
        """Begin to read the range. A hint: never fails."""

    def drop_cached(self) -> None:
        """Let the page cache forget the file's clean pages. A hint: never fails."""

    def close(self) -> None:
        """Let go of the file. Idempotent; nothing is synced."""


class FileStorage:
    """`Storage` on one open file description of a regular file (or, read-only, of a block device)."""

    __slots__ = ("_fd", "_has_dsync", "can_punch", "name", "read_only")

    def __init__(self, fd: int, name: str, *, read_only: bool) -> None:
        """Takes over the descriptor; `open` is the usual way in."""
        self._fd = fd
        self.name = printable(name)
        self.read_only = read_only
        self.can_punch = not read_only
        self._has_dsync = True

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, read_only: bool, create: bool = False) -> FileStorage:
        """Open the file; with `create` make it, empty, and refuse one that is there.

        Raises ImageError: it is missing, may not be opened, or is nothing that can be served.
        """
        name = os.fspath(path)
        if not create:
            # Looked at before the open as well: to open a FIFO, a tape or a directory has effects or
            # errors of its own.
            try:
                _check_kind(os.stat(name), name, read_only=read_only)
            except OSError as error:
                raise _cannot_open(name, error, read_only=read_only) from None
        flags = (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC | os.O_NOCTTY
        if create:
            flags |= os.O_CREAT | os.O_EXCL
        try:
            fd = os.open(name, flags, 0o644)
        except OSError as error:
            raise _cannot_open(name, error, read_only=read_only) from None
        try:
            _check_kind(os.fstat(fd), name, read_only=read_only)
        except BaseException:
            os.close(fd)
            raise
        return cls(fd, name, read_only=read_only)

    @classmethod
    def open_backing(cls, path: str) -> FileStorage:
        """Open a backing file, and keep writers from it. Raises ImageError, LockedError."""
        file = cls.open(path, read_only=True)
        try:
            file.lock(READER)
        except BaseException:
            file.close()
            raise
        return file

    def reopen(self) -> FileStorage:
        """A second open file description of the same file, even if it was renamed or unlinked since.

        It has no locks, and is told of write-back errors on its own (design: invariant 7).
        """
        flags = (os.O_RDONLY if self.read_only else os.O_RDWR) | os.O_CLOEXEC
        try:
            fd = os.open(f"/proc/self/fd/{self._fd}", flags)
        except OSError as error:
            reason = os.strerror(error.errno or errno.EIO)
            raise ImageError(
                f"{self.name}: cannot open the file a second time through /proc/self/fd: {reason}"
            ) from None
        return FileStorage(fd, self.name, read_only=self.read_only)

    def lock(self, use: LockUse) -> None:
        """Take qemu's byte-range locks on this description (`locks.WRITER`, `locks.READER`).

        Raises LockedError: another process holds the file in a way that excludes this use.
        """
        acquire(self._fd, use, name=self.name)

    def fileno(self) -> int:
        """The file descriptor, -1 once closed."""
        return self._fd

    def read_into(self, buffer: bytearray | memoryview, offset: int) -> None:
        view = memoryview(buffer).cast("B")
        done = os.preadv(self._fd, (view,), offset)
        total = len(view)
        while done < total:
            rest = view[done:]
            count = os.preadv(self._fd, (rest,), offset + done)
            if count == 0:
                rest[:] = bytes(len(rest))
                return
            done += count

    def write(self, offset: int, buffers: Sequence[Buffer]) -> None:
        if len(buffers) == 1:
            # The way of every small write: one call, which is never short but on a full disk.
            done, length = os.pwritev(self._fd, buffers, offset), _size(buffers[0])
            if done == length:
                return
            offset, buffers = offset + done, _skip(buffers, done)
        self._pwrite_all(offset, buffers, 0)

    def write_sync(self, offset: int, buffers: Sequence[Buffer]) -> None:
        if self._has_dsync:
            try:
                self._pwrite_all(offset, buffers, os.RWF_DSYNC)
                return
            except OSError as error:
                # EOPNOTSUPP: the kernel does not know the flag, nothing was written.
                if error.errno != errno.EOPNOTSUPP:
                    raise
                self._has_dsync = False
        self._pwrite_all(offset, buffers, 0)
        os.fdatasync(self._fd)

    def sync(self) -> None:
        os.fdatasync(self._fd)

    def allocate(self, offset: int, length: int) -> None:
        if length and not self._fallocate(0, offset, length) and self.size() < offset + length:
            os.ftruncate(self._fd, offset + length)

    def punch(self, offset: int, length: int) -> None:
        if length and self.can_punch:
            self.can_punch = self._fallocate(FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length)

    def zero_range(self, offset: int, length: int) -> None:
        if not length or self._fallocate(FALLOC_FL_ZERO_RANGE, offset, length):
            return
        self.punch(offset, length)
        if self.can_punch:
            self.allocate(offset, length)
            return
        whole, rest = divmod(length, len(_ZEROS))
        self.write(offset, [_ZEROS] * whole + [memoryview(_ZEROS)[:rest]])

    def truncate(self, size: int) -> None:
        os.ftruncate(self._fd, size)

    def size(self) -> int:
        # lseek, not fstat: it knows the length of a block device as well, and nobody uses the position.
        return os.lseek(self._fd, 0, os.SEEK_END)

    def data_runs(self, offset: int, length: int) -> list[tuple[int, bool]]:
        found: list[tuple[int, bool]] = []
        end = offset + length
        while offset < end:
            try:
                data = min(end, os.lseek(self._fd, offset, os.SEEK_DATA))
                hole = min(end, os.lseek(self._fd, data, os.SEEK_HOLE)) if data < end else end
            except OSError as error:
                if error.errno == errno.ENXIO:
                    # No data from here to the end of the file.
                    data, hole = end, end
                elif error.errno in UNSUPPORTED or error.errno == errno.EINVAL:
                    data, hole = offset, end
                else:
                    raise
            if len(found) >= MOST_RUNS:
                data, hole = offset, end
            if data > offset:
                found.append((data - offset, False))
            if hole > data:
                found.append((hole - data, True))
            offset = hole
        return found

    def start_writeback(self, offset: int, length: int) -> None:
        if length and _libc.sync_file_range(self._fd, offset, length, SYNC_FILE_RANGE_WRITE) != 0:
            number = ctypes.get_errno()
            # Not swallowed: an error met while pages are handed to the disk may be told here only.
            if number not in UNSUPPORTED and number not in (errno.EINVAL, errno.ESPIPE, errno.EINTR):
                raise OSError(number, os.strerror(number))

    def advise_needed(self, offset: int, length: int) -> None:
        with suppress(OSError):
            os.posix_fadvise(self._fd, offset, length, os.POSIX_FADV_WILLNEED)

    def drop_cached(self) -> None:
        with suppress(OSError):
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"FileStorage({self.name!r}, fd={self._fd}, read_only={self.read_only})"

    def _pwrite_all(self, offset: int, buffers: Sequence[Buffer], flags: int) -> None:
        """pwritev in calls of at most MAX_BUFFERS buffers; a short one goes on where it stopped."""
        if len(buffers) <= MAX_BUFFERS and (total := sum(map(_size, buffers))) <= MAX_BYTES:
            # The way of every small commit.
            done = os.pwritev(self._fd, buffers, offset, flags) if total else 0
            if done == total:
                return
            offset, buffers = offset + done, _skip(buffers, done)
        for batch, length in _batches(buffers):
            rest, end = batch, offset + length
            while True:
                done = os.pwritev(self._fd, rest, offset, flags)
                offset += done
                if offset >= end:
                    break
                # Never seen; but to go on would be for ever.
                if done == 0:
                    raise OSError(errno.EIO, "a write of the image wrote nothing")
                rest = _skip(rest, done)

    def _fallocate(self, mode: int, offset: int, length: int) -> bool:
        """False where the file system does not have this kind; OSError for everything else."""
        while _libc.fallocate(self._fd, mode, offset, length) != 0:
            number = ctypes.get_errno()
            if number in UNSUPPORTED:
                return False
            if number != errno.EINTR:
                raise OSError(number, os.strerror(number))
        return True


def _size(buffer: Buffer) -> int:
    return buffer.nbytes if isinstance(buffer, memoryview) else len(buffer)


def _batches(buffers: Sequence[Buffer]) -> Iterator[tuple[list[Buffer], int]]:
    """The buffers in lists that one pwritev takes, each with its bytes; empty ones are left out."""
    batch: list[Buffer] = []
    length = 0
    for buffer in buffers:
        size = _size(buffer)
        if not size:
            continue
        if batch and (len(batch) == MAX_BUFFERS or length + size > MAX_BYTES):
            yield batch, length
            batch, length = [], 0
        batch.append(buffer)
        length += size
    if batch:
        yield batch, length


def _skip(buffers: Sequence[Buffer], count: int) -> list[Buffer]:
    """What is left of the buffers after `count` bytes."""
    for index, buffer in enumerate(buffers):
        view = memoryview(buffer).cast("B")
        if count < len(view):
            return [view[count:], *buffers[index + 1 :]]
        count -= len(view)
    return []


def _check_kind(status: os.stat_result, name: str, *, read_only: bool) -> None:
    mode = status.st_mode
    if stat.S_ISREG(mode) or (read_only and stat.S_ISBLK(mode)):
        return
    if stat.S_ISBLK(mode):
        raise ImageError(
            f"{name} is a block device: an image on a block device cannot be served for writing, because neither the "
            f"image nor its journal can grow there; put the image in a file, or serve it with read-only=true"
        )
    if stat.S_ISDIR(mode):
        raise ImageError(f"{name} is a directory; give the path of a disk image")
    raise ImageError(f"{name} is not a regular file; give the path of a disk image")


def _cannot_open(name: str, error: OSError, *, read_only: bool) -> ImageError:
    hints = {
        errno.ENOENT: "; `nbd-qcow2j create` makes an image",
        errno.EEXIST: "; it was left as it is",
        errno.EROFS: "; served read-only it can be",
        errno.EACCES: "; served read-only it can be" if not read_only and os.access(name, os.R_OK) else "",
    }
    number = error.errno or errno.EIO
    failure = ImageError(f"{name}: {os.strerror(number)}{hints.get(number, '')}")
    failure.errno = number
    return failure


def _load_libc() -> ctypes.CDLL:
    """The two calls that Python's os module lacks. Offsets are 64 bits on every platform Debian serves us on."""
    libc = ctypes.CDLL(None, use_errno=True)
    offset = ctypes.c_int64
    libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, offset, offset)
    libc.sync_file_range.argtypes = (ctypes.c_int, offset, offset, ctypes.c_uint)
    return libc


_libc = _load_libc()
