"""What the commands that look into an image share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..format.header import Header
from ..journal.replay import ReplayPlan
from ..locks import READER
from ..opening import read_header, read_journal
from ..steps import run_simply
from ..storage import FileStorage


@contextmanager
def looked_into(path: str) -> Iterator[tuple[FileStorage, Header, ReplayPlan | None]]:
    """An image opened and locked for reading, its header, and its journal if that is attached. Raises ImageError."""
    with FileStorage.open(path, read_only=True) as file:
        file.lock(READER)
        header, _ = run_simply(read_header(file, name=path))
        yield file, header, run_simply(read_journal(file, header, name=path))
