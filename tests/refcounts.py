"""Refcounts against references, by a walk of its own: an opinion that shares no code with the package.

What refers to a host cluster: the header, the active L1 table, the refcount table and its blocks, the snapshot
table, each snapshot's L1 table, and what those tables name; compressed data refers to every cluster it touches.
Bit 63 of an active entry says that the refcount is exactly one.
"""

from __future__ import annotations

import struct
from itertools import compress

from simdisk import SimDisk

OFFSET = 0x00FF_FFFF_FFFF_FE00


def reference_counts(disk: SimDisk, *, copied_flags: bool = True) -> dict[int, int]:
    """The refcounts of a plain image, by host cluster; fails where they are not the references.

    Without `copied_flags` an entry may lack its flag: such images are read, and made well where they are changed.
    """
    read = disk.peek
    header = read(0, 112)
    bits = struct.unpack_from(">I", header, 20)[0]
    l1_entries, l1_offset, table_offset, table_clusters = struct.unpack_from(">IQQI", header, 36)
    snapshots, snapshots_offset = struct.unpack_from(">IQ", header, 60)
    incompatible, order = struct.unpack_from(">Q", header, 72)[0], struct.unpack_from(">I", header, 96)[0]
    assert not incompatible >> 62 & 1, "still attached"
    size, step = 1 << bits, 2 if incompatible & 16 else 1
    references: dict[int, int] = {0: 1}
    copied: list[tuple[int, bool, str]] = []

    def refer(offset: int, length: int = 1) -> None:
        assert offset % size == 0, f"{offset:#x} is no cluster"
        for cluster in range(offset >> bits, (offset + max(length, 1) - 1 >> bits) + 1):
            references[cluster] = references.get(cluster, 0) + 1

    def walk(offset: int, entries: int, *, active: bool) -> None:
        refer(offset, entries * 8)
        for number, entry in enumerate(struct.unpack(f">{entries}Q", read(offset, entries * 8))):
            table = entry & OFFSET
            if not table:
                continue
            refer(table)
            if active:
                copied.append((table >> bits, bool(entry >> 63), f"L1 entry {number}"))
            mapping = struct.unpack(f">{size // 8}Q", read(table, size))[::step]
            for index in compress(range(len(mapping)), mapping):
                mapped = mapping[index]
                if mapped >> 62 & 1:
                    shift = 62 - (bits - 8)
                    start = mapped & (1 << shift) - 1
                    sectors = (mapped >> shift & (1 << bits - 8) - 1) + 1
                    end = (start & -512) + sectors * 512
                    refer(start & -size, end - (start & -size))
                elif mapped & OFFSET:
                    refer(mapped & OFFSET)
                    if active:
                        copied.append(((mapped & OFFSET) >> bits, bool(mapped >> 63), f"L2 entry {number}.{index}"))

    walk(l1_offset, l1_entries, active=True)
    at = snapshots_offset
    for _ in range(snapshots):
        at = -(-at // 8) * 8
        entry = read(at, 40)
        walk(*struct.unpack_from(">QI", entry, 0), active=False)
        at += 40 + struct.unpack_from(">I", entry, 36)[0] + sum(struct.unpack_from(">HH", entry, 12))
    if snapshots:
        refer(snapshots_offset, at - snapshots_offset)
    refer(table_offset, table_clusters * size)
    blocks = struct.unpack(f">{table_clusters * size // 8}Q", read(table_offset, table_clusters * size))
    counts: dict[int, int] = {}
    for index, block in enumerate(blocks):
        if not block:
            continue
        refer(block)
        base = index * (size * 8 >> order)
        for number, value in _values(read(block, size), order):
            counts[base + number] = value
    both = {each: (counts.get(each, 0), references.get(each, 0)) for each in counts.keys() | references.keys()}
    wrong = {cluster: pair for cluster, pair in both.items() if pair[0] != pair[1]}
    assert not wrong, f"refcounts against references: {dict(sorted(wrong.items())[:8])}"
    for cluster, flag, what in copied:
        count = counts[cluster]
        assert flag == (count == 1) or not (flag or copied_flags), f"{what}: copied is {flag}, the refcount is {count}"
    return counts


def _values(data: bytes, order: int) -> list[tuple[int, int]]:
    """(index, refcount) of a block, without the zeros."""
    if not any(data):
        return []
    if order >= 3:
        count = len(data) << 3 >> order
        values = struct.unpack(f">{count}{'BHIQ'[order - 3]}", data)
        return [(at, values[at]) for at in compress(range(count), values)]
    mask, per_byte = (1 << (1 << order)) - 1, 8 >> order
    return [
        (at * per_byte + part, byte >> (part << order) & mask)
        for at, byte in enumerate(data)
        if byte
        for part in range(per_byte)
        if byte >> (part << order) & mask
    ]
