"""The bytes of a new image: header, refcount table, one refcount block, L1 table; nothing else."""

from __future__ import annotations

from ..errors import OptionError
from ..geometry import Geometry
from .header import (
    EXTENSION_BACKING_FORMAT,
    EXTENSION_FEATURE_NAMES,
    FIXED,
    INCOMPAT_EXTENDED_L2,
    MAX_BACKING_NAME,
    MAX_L1_BYTES,
)  # fmt: skip

_FEATURES = (
    (0, 0, b"dirty bit"),
    (0, 1, b"corrupt bit"),
    (0, 2, b"external data file"),
    (0, 3, b"compression type"),
    (0, 4, b"extended L2 entries"),
    (1, 0, b"lazy refcounts"),
    (2, 0, b"bitmaps"),
    (2, 1, b"raw external data"),
)


_JOURNAL_ROOM = 128
"""Bytes that the journal's header extension takes while it is attached, and a few more."""


def new_image(
    size: int, *, cluster_size: int = 1 << 16, refcount_bits: int = 16, backing_name: bytes | None = None,
    backing_format: str | None = None, extended_l2: bool = False,
) -> tuple[list[tuple[int, bytes]], int]:  # fmt: skip
    """((offset, bytes) to write, length of the file) of an empty image. Raises OptionError."""
    bits = cluster_size.bit_length() - 1
    if not 9 <= bits <= 21 or cluster_size != 1 << bits:
        raise OptionError(f"cluster size: expected a power of two from 512 to 2M, found {cluster_size}")
    if extended_l2 and bits < 14:
        raise OptionError(f"cluster size: extended L2 entries need at least 16K, found {cluster_size}")
    if size < 0 or size % 512:
        raise OptionError(f"size: expected a multiple of 512 bytes, found {size}")
    if backing_name is not None and len(backing_name) > MAX_BACKING_NAME:
        raise OptionError(f"backing file: expected a name of at most {MAX_BACKING_NAME} bytes")
    geometry = Geometry(bits, refcount_bits.bit_length() - 1, size, extended_l2)
    if geometry.l1_entries * 8 > MAX_L1_BYTES:
        most = MAX_L1_BYTES // 8 * geometry.l2_entries * cluster_size
        larger = "; larger ones take more, up to 2M" if bits < 21 else ""
        raise OptionError(
            f"size: expected at most {most} bytes with clusters of {cluster_size} bytes{larger}, found {size}"
        )
    l1_clusters = -(-geometry.l1_entries * 8 // cluster_size)
    per_block = geometry.refcount_block_entries
    blocks = table_clusters = 1
    while True:
        total = 1 + table_clusters + blocks + l1_clusters
        wanted_blocks = -(-total // per_block)
        wanted = wanted_blocks, -(-wanted_blocks * 8 // cluster_size)
        if wanted == (blocks, table_clusters):
            break
        blocks, table_clusters = max(blocks, wanted[0]), max(table_clusters, wanted[1])
    table, first_block, l1 = (
        cluster_size,
        (1 + table_clusters) * cluster_size,
        (1 + table_clusters + blocks) * cluster_size,
    )
    writes = [
        (
            0,
            _header(
                geometry,
                table=table,
                table_clusters=table_clusters,
                l1=l1,
                backing_name=backing_name,
                backing_format=backing_format,
            ),
        )
    ]
    writes.append((table, b"".join((first_block + each * cluster_size).to_bytes(8, "big") for each in range(blocks))))
    width = refcount_bits
    ones = int("".join("1".zfill(width)), 2)
    if width >= 8:
        counts = ones.to_bytes(width // 8, "big") * total
    else:
        value = 0
        for cluster in range(total):
            value |= 1 << cluster * width
        counts = value.to_bytes(-(-total * width // 8), "little")
    writes.append((first_block, counts))
    return writes, total * cluster_size


def _header(
    geometry: Geometry,
    *,
    table: int,
    table_clusters: int,
    l1: int,
    backing_name: bytes | None,
    backing_format: str | None,
) -> bytes:
    extensions: list[tuple[int, bytes]] = []
    if backing_format is not None:
        extensions.append((EXTENSION_BACKING_FORMAT, backing_format.encode("ascii")))
    names = b"".join(bytes((kind, bit)) + text.ljust(46, b"\0") for kind, bit, text in _FEATURES)
    for with_names in (True, False):
        chosen = [*extensions, (EXTENSION_FEATURE_NAMES, names)] if with_names else extensions
        area = b"".join(
            kind.to_bytes(4, "big") + len(data).to_bytes(4, "big") + data + bytes(-len(data) % 8)
            for kind, data in chosen
        ) + bytes(8)
        # The journal will want its place in the header; in a small cluster that matters more than the names.
        room = _JOURNAL_ROOM if with_names else 0
        if 112 + len(area) + len(backing_name or b"") + room <= geometry.cluster_size:
            break
    else:
        raise OptionError("backing file: its name does not fit the header cluster; use a larger cluster size")
    fixed: bytes = FIXED.build(
        {
            "version": 3, "backing_offset": 112 + len(area) if backing_name else 0,
            "backing_length": len(backing_name or b""), "cluster_bits": geometry.cluster_bits, "size": geometry.size,
            "crypt_method": 0, "l1_entries": geometry.l1_entries, "l1_offset": l1 if geometry.l1_entries else 0,
            "refcount_table_offset": table, "refcount_table_clusters": table_clusters, "snapshot_count": 0,
            "snapshots_offset": 0,
        }
    )  # fmt: skip
    incompatible = INCOMPAT_EXTENDED_L2 if geometry.extended_l2 else 0
    more = (
        incompatible.to_bytes(8, "big")
        + bytes(16)
        + geometry.refcount_order.to_bytes(4, "big")
        + (112).to_bytes(4, "big")
    )
    return fixed + more + bytes(8) + area + (backing_name or b"")
