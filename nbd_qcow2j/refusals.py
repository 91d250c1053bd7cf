"""What a client is told of an error: an errno and nothing else; `refusal` is the one place that chooses it.

The reason goes to nbdkit's log in one line, and an error that nobody foresaw to its debug log with its traceback.
"""

from __future__ import annotations

import errno
import traceback
from typing import Any

import nbdkit

from .errors import Error, explain_os_error, printable

# The errnos that NBD can tell a client apart; anything else is EIO.
_TOLD = frozenset(
    {errno.EPERM, errno.EIO, errno.ENOMEM, errno.EINVAL, errno.ENOSPC, errno.EOVERFLOW, errno.ENOTSUP, errno.ESHUTDOWN}
)
_SAME_AS = {errno.EACCES: errno.EPERM, errno.EROFS: errno.EPERM, errno.EDQUOT: errno.ENOSPC, errno.EFBIG: errno.ENOSPC}


class _Refusal(Exception):
    """What a callback raises after it has chosen the client's errno: its text is all that is logged."""


_format_exception = traceback.format_exception


def _format_refusal(*args: Any, **kwargs: Any) -> list[str]:
    """`traceback.format_exception`, which nbdkit calls to log what a callback raised.

    A refusal is explained by its text; a traceback would bury it.
    """
    raised = next((arg for arg in args if isinstance(arg, _Refusal)), None)
    if raised is None:
        return _format_exception(*args, **kwargs)
    # nbdkit 1.32 keeps for ever what a callback raised, and with it the frames that it went through.
    traceback.clear_frames(raised.__traceback__)
    return [str(raised)]


traceback.format_exception = _format_refusal


def _errno_for(error: BaseException) -> int:
    if isinstance(error, MemoryError):
        return errno.ENOMEM
    code = error.errno if isinstance(error, Error | OSError) else None
    code = _SAME_AS.get(code or errno.EIO, code)
    return code if code in _TOLD else errno.EIO


def refusal(error: BaseException) -> _Refusal:
    """What to raise instead of `error`, with the client's errno set."""
    if not isinstance(error, Error | OSError):
        nbdkit.debug("".join(_format_exception(error)))
    nbdkit.set_error(_errno_for(error))
    _forget_frames(error)
    return _Refusal(explain(error))


def _forget_frames(error: BaseException) -> None:
    """A refusal is never freed (`_format_refusal`) and leads to `error`: not to the buffers that this has met too."""
    seen: set[int] = set()
    found: list[BaseException | None] = [error]
    while found:
        each = found.pop()
        if each is not None and id(each) not in seen:
            seen.add(id(each))
            each.__traceback__ = None
            found += (each.__cause__, each.__context__)


def explain(error: BaseException) -> str:
    """What happened, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return explain_os_error(error)
    return printable(str(error)) if isinstance(error, Error) else f"internal error: {error!r}"
