"""The table of internal snapshots. Spec: "Snapshots".

A snapshot is an L1 table of its own; what its L2 tables name is shared with the active state, and refcounts
are the only trace of that. So serving needs nothing from this file: a cluster whose refcount is not one is
copied on write, whoever else names it. `check` and `info` read the table.

What is read here is what can be walked: a table that cannot be is an ImageError, while a snapshot that names
an impossible L1 table is returned as it stands, for `check` to judge.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from ..errors import ImageError
from ..format.header import Header

MAX_SNAPSHOTS: Final = 65536
MAX_TABLE_BYTES: Final = 64 << 20
MAX_EXTRA_BYTES: Final = 1024
"""Limits: as in qemu."""
FULL_EXTRA_BYTES: Final = 16
"""What version 3 asks for: the size of the VM state and of the disk, 64 bits each."""

_ENTRY: Final = struct.Struct(">QIHHIIQII")
"""L1 table: offset, entries; lengths of id and name; seconds, nanoseconds; clock; VM state size; extra length.
Construct took most of the 2.2 s of a check of 16,384 empty entries, which takes 0.7 s without."""

Reader = Callable[[int, int], bytes | bytearray]
"""(offset, length) to bytes, zeros past the end of the file."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One entry of the table. Offsets and sizes in bytes; `l1_offset` and `l1_entries` are not checked."""

    id: str
    name: str
    l1_offset: int
    l1_entries: int
    seconds: int
    """When it was made, since 1970."""
    nanoseconds: int
    clock_ns: int
    """For how long the guest had run."""
    vm_state_size: int
    disk_size: int
    """That of the image where the entry does not say."""
    extra_length: int
    end: int
    """Where in the file the entry ends; the table ends with its last entry."""


def read_snapshot_table(header: Header, read: Reader, name: str) -> list[Snapshot]:
    """All snapshots of an image, in the order of the table. Raises ImageError where the table cannot be walked."""
    where = f"snapshot table of {name}"
    if header.snapshot_count > MAX_SNAPSHOTS:
        raise ImageError(
            "too many snapshots", where=where, expected=f"at most {MAX_SNAPSHOTS}", found=header.snapshot_count
        )
    if header.snapshot_count and not header.snapshots_offset:
        raise ImageError("there are snapshots, but no table of them", where=where, found=header.snapshot_count)
    found: list[Snapshot] = []
    at = header.snapshots_offset
    for index in range(header.snapshot_count):
        at = -(-at // 8) * 8
        (
            l1_offset, l1_entries, id_length, name_length, seconds, nanoseconds, clock_ns, vm_state_size, extra_length,
        ) = _ENTRY.unpack(bytes(read(at, _ENTRY.size)))  # fmt: skip
        if extra_length > MAX_EXTRA_BYTES:
            raise ImageError(
                "snapshot has too much extra data", where=f"entry {index} of the {where}",
                expected=f"at most {MAX_EXTRA_BYTES}", found=extra_length,
            )  # fmt: skip
        length = extra_length + id_length + name_length
        end = at + _ENTRY.size + length
        # Limit: this also ends the walk in a file of nothing but holes.
        if end - header.snapshots_offset > MAX_TABLE_BYTES:
            raise ImageError("table is too long", where=where, expected=f"at most {MAX_TABLE_BYTES} bytes")
        rest = bytes(read(at + _ENTRY.size, length))
        extra, texts = rest[:extra_length], rest[extra_length:]
        found.append(
            Snapshot(
                id=texts[:id_length].decode("utf-8", "replace"),
                name=texts[id_length:].decode("utf-8", "replace"),
                l1_offset=l1_offset, l1_entries=l1_entries, seconds=seconds, nanoseconds=nanoseconds, clock_ns=clock_ns,
                vm_state_size=int.from_bytes(extra[:8], "big") if len(extra) >= 8 else vm_state_size,
                disk_size=int.from_bytes(extra[8:16], "big") if len(extra) >= FULL_EXTRA_BYTES else header.size,
                extra_length=extra_length, end=end,
            )
        )  # fmt: skip
        at = end
    return found
