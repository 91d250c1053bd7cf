"""L1, L2 and refcount entries: bits to names. Spec: "Cluster mapping", "Host cluster management".

Tables are kept as arrays of native integers (an L2 table of 64 KiB swaps in 8 us; construct needs
6 ms for it), so this file is masks and a few functions, no construct.
"""

from __future__ import annotations

import sys
from array import array
from typing import Final

OFLAG_COPIED: Final = 1 << 63
"""L1 and L2 entries: the refcount of what is named is exactly one."""
OFLAG_COMPRESSED: Final = 1 << 62
OFLAG_ZERO: Final = 1 << 0
"""L2 entries of version 3 without extended L2: the cluster reads as zeros."""
OFFSET_MASK: Final = 0x00FF_FFFF_FFFF_FE00
"""Bits 9 to 55: the host offset of a cluster or a table."""
L1_RESERVED: Final = 0x7F00_0000_0000_01FF
L2_RESERVED: Final = 0x3F00_0000_0000_01FE
"""Reserved bits of a standard cluster descriptor (bit 0 is the zero flag)."""
REFTABLE_OFFSET_MASK: Final = 0xFFFF_FFFF_FFFF_FE00
MAX_HOST_OFFSET: Final = 1 << 56
"""Limit: an L2 entry cannot name a host offset at or above this."""
ALL_SUBCLUSTERS: Final = 0xFFFF_FFFF

# What an L2 entry says of a cluster.
UNALLOCATED: Final = 0
ZERO_PLAIN: Final = 1
ZERO_ALLOC: Final = 2
NORMAL: Final = 3
COMPRESSED: Final = 4

_SWAP = sys.byteorder == "little"


def kind_of(entry: int) -> int:
    """What a standard L2 entry (not extended) says. Compressed wins over the zero flag, as in qemu."""
    if entry & OFLAG_COMPRESSED:
        return COMPRESSED
    if entry & OFLAG_ZERO:
        return ZERO_ALLOC if entry & OFFSET_MASK else ZERO_PLAIN
    return NORMAL if entry & OFFSET_MASK else UNALLOCATED


def compressed_extent(entry: int, cluster_bits: int) -> tuple[int, int]:
    """Host byte offset and length of compressed data, the length up to the end of its last sector.

    Spec: "Compressed Clusters Descriptor": x = 62 - (cluster_bits - 8) bits of byte offset, then the
    number of *additional* 512-byte sectors. The data may end before the last sector does.
    """
    shift = 62 - (cluster_bits - 8)
    offset = entry & ((1 << shift) - 1)
    sectors = ((entry >> shift) & ((1 << (cluster_bits - 8)) - 1)) + 1
    return offset, sectors * 512 - (offset & 511)


def table_from_bytes(data: bytes | bytearray | memoryview) -> array[int]:
    """Big-endian 64-bit entries as native integers."""
    table = array("Q")
    table.frombytes(data)
    if _SWAP:
        table.byteswap()
    return table


def table_to_bytes(table: array[int]) -> bytes:
    """Native integers as big-endian 64-bit entries."""
    if _SWAP:
        table = table[:]
        table.byteswap()
    return table.tobytes()
