"""What the commands that look into an image share."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import ImageError
from ..format.header import Header
from ..journal.replay import ReplayPlan
from ..locks import READER
from ..opening import read_header, read_journal
from ..steps import run_simply
from ..storage import FileStorage

TRIES = 5
"""Of reading a journal while a server writes to it."""


@contextmanager
def looked_into(path: str, *, share: bool = False) -> Iterator[tuple[FileStorage, Header, ReplayPlan | None]]:
    """An image opened and locked for reading, its header, and its journal if that is attached. Raises ImageError.

    With `share` it is not locked, and may be changing under a server.
    """
    with FileStorage.open(path, read_only=True) as file:
        if not share:
            file.lock(READER)
        for left in range(TRIES - 1 if share else 0, -1, -1):
            header, _ = run_simply(read_header(file, name=path))
            try:
                plan = run_simply(read_journal(file, header, name=path))
                break
            except ImageError:
                # The tail may have moved while the ring was read, and what was behind it be overwritten.
                if not left:
                    raise
        yield file, header, plan


def add_force_share(parser: argparse.ArgumentParser) -> None:
    """The option of `qemu-img info` for an image that is in use."""
    parser.add_argument(
        "-U", "--force-share", action="store_true",
        help="look at it while it is being served: what is shown was so a moment ago, at best",
    )  # fmt: skip
