"""What persistent bitmaps occupy in an image. Spec: "Bitmaps extension".

Serving never reads a bitmap (an image that has them is not written to); `check` must know their clusters, or
would call them leaked.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import construct as c

from ..errors import ImageError
from ..format.tables import table_from_bytes
from ..geometry import Geometry
from .snapshots import Reader

MAX_BITMAPS: Final = 65535
MAX_DIRECTORY_BYTES: Final = 64 << 20
MAX_BITMAP_BYTES: Final = 512 << 20
MAX_NAME: Final = 1023
"""Limits: as in qemu."""
_IN_USE: Final = 1 << 0
_FLAGS: Final = 0x3
_ALL_ONES: Final = 1 << 0
_OFFSET: Final = 0x00FF_FFFF_FFFF_FE00
_RESERVED: Final = 0xFF00_0000_0000_01FE

_EXTENSION: Final = c.Struct(
    "bitmaps" / c.Int32ub, "reserved" / c.Int32ub, "directory_size" / c.Int64ub, "directory_offset" / c.Int64ub
)
_ENTRY: Final = c.Struct(
    "table_offset" / c.Int64ub,
    "table_entries" / c.Int32ub,
    "flags" / c.Int32ub,
    "type" / c.Int8ub,
    "granularity_bits" / c.Int8ub,
    "name_length" / c.Int16ub,
    "extra_length" / c.Int32ub,
)


def bitmap_ranges(extension: bytes, geometry: Geometry, read: Reader, name: str) -> Iterator[tuple[str, int, int]]:
    """(what, offset, length in bytes) of everything that bitmaps occupy.

    Raises ImageError at the first thing that cannot be; what was yielded before it holds.
    """
    where = f"bitmaps extension of {name}"
    if len(extension) != _EXTENSION.sizeof():
        raise ImageError("wrong length", where=where, expected=_EXTENSION.sizeof(), found=len(extension))
    found = _EXTENSION.parse(extension)
    if not 0 < found.bitmaps <= MAX_BITMAPS or found.reserved:
        raise ImageError("wrong number of bitmaps", where=where, expected=f"1 to {MAX_BITMAPS}", found=found.bitmaps)
    if not 0 < found.directory_size <= MAX_DIRECTORY_BYTES or found.directory_offset % geometry.cluster_size:
        raise ImageError(
            "directory at an impossible place", where=where, expected=f"aligned, at most {MAX_DIRECTORY_BYTES} bytes",
            found=f"{found.directory_size} bytes at {found.directory_offset:#x}",
        )  # fmt: skip
    yield "bitmap directory", found.directory_offset, found.directory_size
    directory = bytes(read(found.directory_offset, found.directory_size))
    at = 0
    for index in range(found.bitmaps):
        where = f"bitmap {index} of {name}"
        if at + _ENTRY.sizeof() > len(directory):
            raise ImageError("directory ends early", where=where, expected=f"{found.bitmaps} bitmaps", found=index)
        entry = _ENTRY.parse(directory[at : at + _ENTRY.sizeof()])
        at += -(-(_ENTRY.sizeof() + entry.name_length + entry.extra_length) // 8) * 8
        _check_entry(entry, geometry, where)
        if at > len(directory):
            raise ImageError("directory ends early", where=where, expected=at, found=len(directory))
        yield "bitmap table", entry.table_offset, entry.table_entries * 8
        table = table_from_bytes(read(entry.table_offset, entry.table_entries * 8))
        for word in table:
            offset = word & _OFFSET
            if word & _RESERVED or offset % geometry.cluster_size or (offset and word & _ALL_ONES):
                raise ImageError("bitmap table has an impossible entry", where=where, found=f"{word:#x}")
        for word in filter(_OFFSET.__and__, table):
            yield "bitmap data", word & _OFFSET, geometry.cluster_size
    if at != len(directory):
        raise ImageError("directory is too long", where=f"bitmaps of {name}", expected=at, found=len(directory))


def _check_entry(entry: c.Container, geometry: Geometry, where: str) -> None:
    size = entry.table_entries * geometry.cluster_size
    needed = -(-geometry.size // ((geometry.cluster_size * 8) << min(entry.granularity_bits, 31)))
    if (
        not entry.table_entries
        or not entry.table_offset
        or entry.table_offset % geometry.cluster_size
        or size > MAX_BITMAP_BYTES
        or not 9 <= entry.granularity_bits <= 31
        or entry.flags & ~_FLAGS
        or entry.name_length > MAX_NAME
        or entry.type != 1
        or entry.extra_length
        # One that was in use at a crash may have any size: it is not valid anyway.
        or (not entry.flags & _IN_USE and entry.table_entries != needed)
    ):
        raise ImageError(
            "impossible bitmap", where=where,
            found=f"type {entry.type}, flags {entry.flags:#x}, granularity 2^{entry.granularity_bits}, "
            f"table of {entry.table_entries} entries at {entry.table_offset:#x}",
        )  # fmt: skip
