"""What lies beneath an image: a chain of read-only layers, raw or qcow2.

The format comes from the header extension and is *never probed*: a guest can write a qcow2 header into a raw
disk. Names are relative to the image that names them. A chain has a bounded depth and no file twice.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from ..errors import ImageError, printable
from ..format.header import INCOMPAT_JOURNAL, Header, check_usable, parse_header
from ..format.tables import NORMAL, OFFSET_MASK, UNALLOCATED, compressed_extent, table_from_bytes
from ..steps import Compute, DataRuns, FileSize, Operation, Read, ReadInto, run_simply
from .compressed import inflate
from .mapping import Mapping
from .tables import Table, TableCache

if TYPE_CHECKING:
    from ..storage import Storage

MAX_DEPTH = 64
CACHE_BYTES = 4 << 20
HEADER_READ = 1 << 16


@dataclass(frozen=True, slots=True)
class Extent:
    """`length` bytes that are alike: known to read as zeros or not, allocated in the image or not."""

    length: int
    zero: bool
    allocated: bool


class Layer(Protocol):
    """Something to read from. Sizes and offsets in bytes; past its own end it reads as zeros."""

    name: str
    size: int
    format: str

    def read_into(self, view: memoryview, offset: int) -> Operation[None]: ...
    def extents(self, offset: int, length: int) -> Operation[list[Extent]]: ...
    def close(self) -> None: ...


class RawLayer:
    """A raw backing file."""

    format = "raw"

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.name = storage.name
        self.size = storage.size()

    def read_into(self, view: memoryview, offset: int) -> Operation[None]:
        yield ReadInto(self.storage, offset, view)

    def extents(self, offset: int, length: int) -> Operation[list[Extent]]:
        runs = yield DataRuns(self.storage, offset, length)
        return [Extent(piece, zero=not data, allocated=data) for piece, data in runs]

    def close(self) -> None:
        self.storage.close()


class Qcow2Layer:
    """A qcow2 backing file, with what lies beneath it."""

    format = "qcow2"

    def __init__(self, storage: Storage, header: Header, backing: Layer | None) -> None:
        self.storage, self.backing = storage, backing
        self.name = storage.name
        self.size = header.size
        self.geometry = header.geometry
        self.compression_type = header.compression_type
        cache = TableCache(
            storage, table_size=self.geometry.cluster_size, limit_bytes=CACHE_BYTES, home={}, name=self.name
        )
        # The table may claim to be longer than the disk needs: nothing there is ever looked up.
        data = run_simply(_read(storage, header.l1_offset, self.geometry.l1_entries * 8))
        self.mapping = Mapping(self.geometry, Table(header.l1_offset, table_from_bytes(data)), cache, name=self.name)

    def read_into(self, view: memoryview, offset: int) -> Operation[None]:
        size = self.geometry.cluster_size
        inside = max(0, min(len(view), self.size - offset))
        view[inside:] = bytes(len(view) - inside)
        done = 0
        while done < inside:
            cluster, start = divmod(offset + done, size)
            length = min(size - start, inside - done)
            while not self.mapping.in_memory(cluster):
                yield from self.mapping.load_l2(cluster)
            entry, bitmap = self.mapping.find(cluster)
            part = view[done : done + length]
            if self.mapping.is_compressed(entry):
                host, compressed = compressed_extent(entry, self.geometry.cluster_bits)
                data = bytes((yield Read(self.storage, host, compressed)))
                content = yield Compute(self._inflater(data, host))
                part[:] = content[start : start + length]
            else:
                for kind, at, piece in self.mapping.pieces(entry, bitmap, start, length):
                    target = part[at - start : at - start + piece]
                    if kind == NORMAL:
                        yield ReadInto(self.storage, (entry & OFFSET_MASK) + at, target)
                    elif kind == UNALLOCATED and self.backing is not None:
                        yield from self.backing.read_into(target, cluster * size + at)
                    else:
                        target[:] = bytes(piece)
            done += length

    def _inflater(self, data: bytes, host: int) -> Callable[[], bytes]:
        where = f"compressed cluster at {host} of {self.name}"
        return lambda: inflate(data, self.compression_type, self.geometry.cluster_size, where=where)

    def extents(self, offset: int, length: int) -> Operation[list[Extent]]:
        size = self.geometry.cluster_size
        found: list[Extent] = []
        end = min(offset + length, max(self.size, offset))
        past = offset + length - end
        while offset < end:
            cluster, start = divmod(offset, size)
            span = min(size - start, end - offset)
            if not self.mapping.l2_offset(cluster):
                per_table = self.geometry.l2_entries * size
                span = min(end - offset, per_table - offset % per_table)
                yield from self._beneath(found, offset, span)
            else:
                while not self.mapping.in_memory(cluster):
                    yield from self.mapping.load_l2(cluster)
                entry, bitmap = self.mapping.find(cluster)
                if self.mapping.is_compressed(entry):
                    add_extent(found, span, zero=False, allocated=True)
                else:
                    for kind, at, piece in self.mapping.pieces(entry, bitmap, start, span):
                        if kind == NORMAL:
                            add_extent(found, piece, zero=False, allocated=True)
                        elif kind == UNALLOCATED:
                            yield from self._beneath(found, cluster * size + at, piece)
                        else:
                            add_extent(found, piece, zero=True, allocated=True)
            offset += span
        if past:
            add_extent(found, past, zero=True, allocated=False)
        return found

    def _beneath(self, found: list[Extent], offset: int, length: int) -> Operation[None]:
        if self.backing is None:
            add_extent(found, length, zero=True, allocated=False)
            return
        for extent in (yield from self.backing.extents(offset, length)):
            add_extent(found, extent.length, zero=extent.zero, allocated=extent.allocated)

    def close(self) -> None:
        self.storage.close()
        if self.backing is not None:
            self.backing.close()


def add_extent(found: list[Extent], length: int, *, zero: bool, allocated: bool) -> None:
    """Append, merged with the extent before where they are alike."""
    if found and (found[-1].zero, found[-1].allocated) == (zero, allocated):
        length += found.pop().length
    found.append(Extent(length, zero, allocated))


def _read(storage: Storage, offset: int, length: int) -> Operation[bytes]:
    return bytes((yield Read(storage, offset, length)))


def _header(storage: Storage) -> Operation[Header]:
    size = yield FileSize(storage)
    data = bytes((yield Read(storage, 0, HEADER_READ)))
    return parse_header(data, file_size=size, name=storage.name)


def open_backing(header: Header, image_path: str, *, policy: str, opener: Callable[[str], Storage]) -> Layer | None:
    """The chain beneath an image, None where there is none. Raises ImageError."""
    return _open(header, image_path, policy, opener, [_identity(image_path)])


def _identity(path: str) -> tuple[int, int]:
    try:
        found = os.stat(path)
    except OSError as error:
        raise ImageError(f"backing file {printable(path)} cannot be opened: {error.strerror}") from None
    return found.st_dev, found.st_ino


def backing_path(name: str, image_path: str) -> str | None:
    """The file that an image at `image_path` means by the name of its backing file; None where that is none.

    What another program would take for a protocol (`nbd:`, `json:`) is no file. Relative names are relative to the
    image, those after `file:` as well.
    """
    if ":" in name.split("/", 1)[0] and not name.startswith("file:"):
        return None
    return os.path.join(os.path.dirname(os.path.abspath(image_path)), name.removeprefix("file:"))


def _open(
    header: Header, image_path: str, policy: str, opener: Callable[[str], Storage], chain: list[tuple[int, int]]
) -> Layer | None:
    if header.backing_name is None:
        return None
    name = os.fsdecode(header.backing_name)
    shown = printable(name)
    if policy == "deny":
        raise ImageError(f"{printable(image_path)} has a backing file ({shown}), and backing=deny refuses one")
    path = backing_path(name, image_path)
    if path is None:
        raise ImageError(
            f"backing file {shown} of {printable(image_path)} is no plain path; name a file with qemu-img rebase -u"
        )
    if header.backing_format is None:
        raise ImageError(
            f"{printable(image_path)} does not say which format its backing file has, and it is not guessed: "
            f"qemu-img rebase -u -f qcow2 -F FORMAT -b {printable(shlex.quote(name))} "
            f"{printable(shlex.quote(image_path))}"
        )
    identity = _identity(path)
    if identity in chain:
        raise ImageError(
            f"the backing chain of {printable(image_path)} is a loop: {printable(path)} is in it twice"
        )
    if len(chain) > MAX_DEPTH:
        raise ImageError(f"the backing chain is deeper than {MAX_DEPTH} files", where=printable(image_path))
    if header.backing_format not in ("raw", "qcow2"):
        raise ImageError(
            "format of the backing file is not served", where=printable(image_path), expected="raw or qcow2",
            found=printable(header.backing_format),
        )  # fmt: skip
    storage = opener(path)
    try:
        if header.backing_format == "raw":
            return RawLayer(storage)
        below = run_simply(_header(storage))
        check_usable(below, write=False, name=path)
        if below.incompatible & INCOMPAT_JOURNAL:
            raise ImageError(
                f"backing file {printable(path)} was not closed cleanly: nbd-qcow2j recover "
                f"{printable(shlex.quote(path))}"
            )
        return Qcow2Layer(storage, below, _open(below, path, policy, opener, [*chain, identity]))
    except BaseException:
        storage.close()
        raise
