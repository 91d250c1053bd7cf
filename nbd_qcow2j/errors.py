"""The errors of this package: whose fault it is, and what the caller may do next.

`RequestError`  the client asked for what is refused; the device is well.
`OptionError`   the person who started the server gave an option that cannot be; nothing was opened.
`ImageError`    the file is not what the specification says, or uses what is not served: refuse to open.
`DeviceFailed`  a write or a sync was lost: the device is latched, reads go on (design: invariant 7).

Each carries an errno; `refusals.py` is the one place that maps them to NBD. A message says what, where,
expected and found, on one line, without a traceback.
"""

from __future__ import annotations

import errno as _errno

NO_ROOM = frozenset({_errno.ENOSPC, _errno.EDQUOT, _errno.EFBIG})
"""What a write or an fallocate is answered where the host file system has no room for it. From a plain write
nothing is lost by it; from a sync or a synchronous write it is a lost write like any other."""


def printable(name: str) -> str:
    """A name of a file, or a text with one in it, on one line and without what a terminal would obey."""
    return name if name.isprintable() else "".join(map(_escaped, name))


def _escaped(each: str) -> str:
    if each.isprintable():
        return each
    # A byte that is no UTF-8, as Python's surrogateescape has it.
    return f"\\x{ord(each) - 0xDC00:02x}" if "\udc80" <= each <= "\udcff" else ascii(each)[1:-1]


def explain_os_error(error: OSError) -> str:
    """What the system said, and of which file, in one line."""
    where = f"{printable(str(error.filename))}: " if error.filename else ""
    return f"{where}{error.strerror or error}"


class Error(Exception):
    """Base of what this package raises on purpose; `errno` is what an NBD client may be told."""

    errno: int = _errno.EIO


class RequestError(Error):
    """A request that is refused while the device is well: EINVAL, ENOSPC, EPERM, ENOTSUP."""

    def __init__(self, errno: int, message: str) -> None:
        super().__init__(message)
        self.errno = errno


class ReadFailed(RequestError):
    """The disk could not read: the request fails, nothing is lost, the same may work later."""

    def __init__(self, message: str) -> None:
        super().__init__(_errno.EIO, message)


class OptionError(Error):
    """An option that cannot be: its name, what was found and what is allowed."""

    errno = _errno.EINVAL


class ImageError(Error):
    """The file is damaged, or uses a feature that is not served; nothing was written."""

    errno = _errno.EIO

    def __init__(self, what: str, *, where: str = "", expected: object = None, found: object = None) -> None:
        parts = [what]
        if where:
            parts.append(f"at {where}")
        if expected is not None:
            parts.append(f"expected {expected}")
        if found is not None:
            parts.append(f"found {found}")
        super().__init__(", ".join(parts))
        self.what, self.where, self.expected, self.found = what, where, expected, found


class NotQcow2(ImageError):
    """The file is in another format, or in none."""


class LockedError(ImageError):
    """Another process holds the image: ours, or qemu."""

    errno = _errno.EBUSY


class DeviceFailed(Error):
    """A write or a sync was lost: the device is latched, writes and flushes fail with EIO. Or it is being closed."""

    errno = _errno.EIO
