"""The qcow2 header: bytes to `Header`, and what is refused. Spec: "Header", "Header extensions".

Construct reads the fixed part; every offset and count is checked before anybody uses it. Rewriting the header
cluster for the journal is in `header_rewrite.py`.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import construct as c

from ..errors import ImageError, NotQcow2, printable
from ..geometry import Geometry
from .tables import MAX_HOST_OFFSET

MAGIC: Final = b"QFI\xfb"
EXTENSION_END: Final = 0
EXTENSION_BACKING_FORMAT: Final = 0xE2792ACA
EXTENSION_FEATURE_NAMES: Final = 0x6803F857
EXTENSION_BITMAPS: Final = 0x23852875
EXTENSION_JOURNAL: Final = 0x716A726E
JOURNAL_BIT: Final = 62
INCOMPAT_DIRTY: Final = 1 << 0
INCOMPAT_CORRUPT: Final = 1 << 1
INCOMPAT_DATA_FILE: Final = 1 << 2
INCOMPAT_COMPRESSION: Final = 1 << 3
INCOMPAT_EXTENDED_L2: Final = 1 << 4
INCOMPAT_JOURNAL: Final = 1 << JOURNAL_BIT
INCOMPAT_KNOWN: Final = (
    INCOMPAT_DIRTY
    | INCOMPAT_CORRUPT
    | INCOMPAT_DATA_FILE
    | INCOMPAT_COMPRESSION
    | INCOMPAT_EXTENDED_L2
    | INCOMPAT_JOURNAL
)
AUTOCLEAR_BITMAPS: Final = 1 << 0
FEATURE_NAME: Final = b"journal (nbd-qcow2j)"
FEATURE_ENTRY: Final = 48
"""Bytes of an entry in the feature name table: kind, bit, name."""
MAX_SIZE: Final = 1 << 62
"""Limit: offsets of a client are signed 64-bit numbers; rounded up to a cluster they must stay so."""
MAX_L1_BYTES: Final = 32 << 20
MAX_REFCOUNT_TABLE_BYTES: Final = 8 << 20
MAX_SNAPSHOTS: Final = 65536
MAX_BACKING_NAME: Final = 1023
MAX_FORMAT_NAME: Final = 15
"""Limits: as in qemu."""
V3_LENGTH: Final = 104
"""The shortest header of version 3; a longer one has the compression type in its next byte."""

SAVED: Final = c.Struct(
    "length" / c.Int16ub,
    "names_at" / c.Int16ub,
    "header_length" / c.Int32ub,
    "backing_offset" / c.Int64ub,
    "at_104" / c.Bytes(8),
).compile()
"""What `header_rewrite.py` keeps of the ordinary header, in front of the journal's data in our extension.

`length` counts all of it, with the feature name table that may follow (deflated). `names_at` says which of the
extensions that table was, NO_NAMES where there was none.
"""
NO_NAMES: Final = 0xFFFF

FIXED: Final = c.Struct(
    "magic" / c.Const(MAGIC),
    "version" / c.Int32ub,
    "backing_offset" / c.Int64ub,
    "backing_length" / c.Int32ub,
    "cluster_bits" / c.Int32ub,
    "size" / c.Int64ub,
    "crypt_method" / c.Int32ub,
    "l1_entries" / c.Int32ub,
    "l1_offset" / c.Int64ub,
    "refcount_table_offset" / c.Int64ub,
    "refcount_table_clusters" / c.Int32ub,
    "snapshot_count" / c.Int32ub,
    "snapshots_offset" / c.Int64ub,
).compile()
_V3: Final = c.Struct(
    "incompatible" / c.Int64ub,
    "compatible" / c.Int64ub,
    "autoclear" / c.Int64ub,
    "refcount_order" / c.Int32ub,
    "header_length" / c.Int32ub,
).compile()
FIXED_LENGTH: Final = FIXED.sizeof()
SAVED_LENGTH: Final = SAVED.sizeof()


@dataclass(frozen=True, slots=True)
class Extension:
    """A header extension; `data` without its padding."""

    type: int
    data: bytes


@dataclass(frozen=True)
class Header:
    """A header whose numbers were checked. Offsets and sizes in bytes, feature sets as bits."""

    version: int
    backing_offset: int
    backing_name: bytes | None
    backing_format: str | None
    cluster_bits: int
    size: int
    crypt_method: int
    l1_entries: int
    l1_offset: int
    refcount_table_offset: int
    refcount_table_clusters: int
    snapshot_count: int
    snapshots_offset: int
    incompatible: int
    compatible: int
    autoclear: int
    refcount_order: int
    header_length: int
    compression_type: int
    extensions: tuple[Extension, ...]

    @cached_property
    def geometry(self) -> Geometry:
        return Geometry(
            self.cluster_bits, self.refcount_order, self.size, bool(self.incompatible & INCOMPAT_EXTENDED_L2)
        )


def parse_header(data: bytes, *, file_size: int, name: str) -> Header:
    """The header in an image's first 64 KiB. Spec: "Header", "Header extensions".

    A file that is shorter may be padded with zeros or not. Raises ImageError: what, where, expected, found.
    Limit: extensions and backing name are looked for in the first 64 KiB of larger clusters.
    """
    where = f"header of {name}"
    if file_size < FIXED_LENGTH or len(data) < FIXED_LENGTH:
        raise NotQcow2(
            f"{name} is shorter than a qcow2 header", expected=f"at least {FIXED_LENGTH} bytes",
            found=min(file_size, len(data)),
        )  # fmt: skip
    if data[:4] != MAGIC:
        raise NotQcow2(f"{name} is not a qcow2 image", expected=MAGIC.hex(), found=bytes(data[:4]).hex())
    fixed = FIXED.parse(bytes(data[: FIXED_LENGTH]))
    if fixed.version not in (2, 3):
        raise ImageError("qcow2 version is not supported", where=where, expected="2 or 3", found=fixed.version)
    if not 9 <= fixed.cluster_bits <= 21:
        raise ImageError("cluster size is impossible", where=where, expected="9 to 21 bits", found=fixed.cluster_bits)
    cluster_size = 1 << fixed.cluster_bits
    incompatible = compatible = autoclear = 0
    order, length, compression = 4, FIXED_LENGTH, 0
    if fixed.version == 3:
        more = _V3.parse(bytes(data[FIXED_LENGTH : V3_LENGTH]).ljust(V3_LENGTH - FIXED_LENGTH, b"\0"))
        incompatible, compatible, autoclear = more.incompatible, more.compatible, more.autoclear
        order, length = more.refcount_order, more.header_length
        if not V3_LENGTH <= length <= min(cluster_size, len(data)) or length % 8:
            raise ImageError(
                "header length is impossible", where=where, found=length,
                expected=f"104 to {min(cluster_size, len(data))}, a multiple of 8",
            )  # fmt: skip
        if length > V3_LENGTH:
            compression = data[V3_LENGTH]
    if order > 6:
        raise ImageError("refcount width is impossible", where=where, expected="an order of 0 to 6", found=order)
    if compression > 1 or bool(incompatible & INCOMPAT_COMPRESSION) != bool(compression):
        raise ImageError(
            "compression type is not supported", where=where, expected="zlib, or zstd with its bit", found=compression
        )
    _check_tables(fixed, cluster_size, file_size, where)
    extended = bool(incompatible & INCOMPAT_EXTENDED_L2)
    if extended and fixed.cluster_bits < 14:
        raise ImageError("clusters too small for extended L2 entries", where=where, expected=16384, found=cluster_size)
    geometry = Geometry(fixed.cluster_bits, order, fixed.size, extended)
    if fixed.l1_entries < geometry.l1_entries:
        raise ImageError(
            "L1 table too small", where=where, expected=f"{geometry.l1_entries} entries", found=fixed.l1_entries
        )
    end = fixed.backing_offset or cluster_size
    backing_name = None
    if fixed.backing_offset:
        name_end = fixed.backing_offset + fixed.backing_length
        if (
            fixed.backing_length > MAX_BACKING_NAME
            or fixed.backing_offset < length
            or name_end > min(cluster_size, len(data))
        ):
            raise ImageError(
                "backing file name lies at an impossible place", where=where,
                expected=f"inside the header cluster, at most {MAX_BACKING_NAME} bytes",
                found=f"{fixed.backing_length} bytes at {fixed.backing_offset}",
            )  # fmt: skip
        backing_name = bytes(data[fixed.backing_offset : name_end]) or None
        if backing_name is not None and b"\0" in backing_name:
            raise ImageError("backing file name has a zero byte, which no name has", where=where, found=backing_name)
    extensions = _extensions(data[: min(end, cluster_size)], length, where)
    formats = [each.data for each in extensions if each.type == EXTENSION_BACKING_FORMAT]
    if len(set(formats)) > 1:
        # Programs differ in which one counts: one would show as data what another follows as a chain.
        raise ImageError(
            "the format of the backing file is named more than once: name it again with qemu-img rebase -u -F",
            where=where, expected="one", found=", ".join(map(repr, formats[:4])),
        )  # fmt: skip
    if formats and len(formats[0]) > MAX_FORMAT_NAME:
        raise ImageError(
            "name of the backing file's format is too long", where=where,
            expected=f"at most {MAX_FORMAT_NAME} bytes", found=len(formats[0]),
        )  # fmt: skip
    return Header(
        version=fixed.version, backing_offset=fixed.backing_offset, backing_name=backing_name,
        backing_format=formats[0].decode("ascii", "replace") if formats else None, cluster_bits=fixed.cluster_bits,
        size=fixed.size, crypt_method=fixed.crypt_method, l1_entries=fixed.l1_entries, l1_offset=fixed.l1_offset,
        refcount_table_offset=fixed.refcount_table_offset, refcount_table_clusters=fixed.refcount_table_clusters,
        snapshot_count=fixed.snapshot_count, snapshots_offset=fixed.snapshots_offset, incompatible=incompatible,
        compatible=compatible, autoclear=autoclear, refcount_order=order, header_length=length,
        compression_type=compression, extensions=extensions,
    )  # fmt: skip


def _check_tables(fixed: c.Container, cluster_size: int, file_size: int, where: str) -> None:
    for what, offset, used in (
        ("L1 table", fixed.l1_offset, fixed.l1_entries),
        ("refcount table", fixed.refcount_table_offset, True),
        ("snapshot table", fixed.snapshots_offset, fixed.snapshot_count),
    ):
        if offset % cluster_size or offset >= MAX_HOST_OFFSET:
            raise ImageError(
                f"{what} lies at an impossible offset", where=where,
                expected=f"a multiple of {cluster_size} below 2^56", found=offset,
            )  # fmt: skip
        if used and not offset:
            raise ImageError(f"the header names no {what}", where=where)
        # A table may end behind the end of the file, where it reads as zeros; one that begins there was cut off.
        if used and offset >= file_size:
            raise ImageError(
                f"{what} lies behind the end of the file, which may have been cut short", where=where,
                expected=f"an offset below {file_size}", found=offset,
            )  # fmt: skip
    if not fixed.refcount_table_clusters:
        raise ImageError("the header names no refcount table", where=where)
    for what, found, limit in (
        ("L1 table", fixed.l1_entries * 8, MAX_L1_BYTES),
        ("refcount table", fixed.refcount_table_clusters * cluster_size, MAX_REFCOUNT_TABLE_BYTES),
    ):
        if found > limit:
            raise ImageError(f"{what} too large", where=where, expected=f"at most {limit} bytes", found=found)
    if fixed.snapshot_count > MAX_SNAPSHOTS:
        raise ImageError(
            "too many snapshots", where=where, expected=f"at most {MAX_SNAPSHOTS}", found=fixed.snapshot_count
        )
    if fixed.size > MAX_SIZE:
        raise ImageError("disk size is impossible", where=where, expected="at most 2^62 bytes", found=fixed.size)


def _extensions(data: bytes, at: int, where: str) -> tuple[Extension, ...]:
    found: list[Extension] = []
    while at + 8 <= len(data):
        kind, length = int.from_bytes(data[at : at + 4], "big"), int.from_bytes(data[at + 4 : at + 8], "big")
        if kind == EXTENSION_END:
            break
        if at + 8 + length > len(data):
            raise ImageError(
                "header extension is too long", where=where, expected=f"at most {len(data) - at - 8}", found=length
            )
        found.append(Extension(kind, bytes(data[at + 8 : at + 8 + length])))
        at += 8 + -(-length // 8) * 8
    return tuple(found)


def journal_extension_of(header: Header) -> bytes | None:
    """The journal's own data in our extension; None without it, or without bit 62: it means nothing then."""
    if header.incompatible & INCOMPAT_JOURNAL:
        for extension in header.extensions:
            if extension.type == EXTENSION_JOURNAL and len(extension.data) >= SAVED_LENGTH:
                return extension.data[int.from_bytes(extension.data[:2], "big") :]
    return None


def feature_names(header: Header) -> dict[tuple[int, int], str]:
    """What the image calls its features, by (0 incompatible, 1 compatible, 2 autoclear; bit).

    Spec: "Feature name table".
    """
    found: dict[tuple[int, int], str] = {}
    for extension in header.extensions:
        if extension.type == EXTENSION_FEATURE_NAMES:
            for at in range(0, len(extension.data) - FEATURE_ENTRY + 1, FEATURE_ENTRY):
                kind, bit = extension.data[at : at + 2]
                text = extension.data[at + 2 : at + FEATURE_ENTRY].split(b"\0", 1)[0].decode("utf-8", "replace")
                if text:
                    found.setdefault((kind, bit), text)
    return found


def check_usable(header: Header, *, write: bool, name: str) -> None:
    """Refuse what is not served, by the name of the feature, and say what to do instead. Raises ImageError.

    Spec: "Header", incompatible features. The journal (bit 62) is known here.
    """
    bits = header.incompatible
    name, quoted = printable(name), printable(shlex.quote(name))
    if header.crypt_method:
        raise ImageError(
            f"{name} is encrypted, which is not served: decrypt it into another image with qemu-img convert",
            where="crypt_method in its header", expected="0 (none)",
            found={1: "1 (AES)", 2: "2 (LUKS)"}.get(header.crypt_method, header.crypt_method),
        )  # fmt: skip
    if bits & INCOMPAT_DATA_FILE:
        raise ImageError(
            f"{name} keeps its data in an external data file, which is not served: make one file of the two with "
            f"qemu-img convert -O qcow2 {quoted} NEW"
        )
    if unknown := bits & ~INCOMPAT_KNOWN:
        names = feature_names(header)
        listed = ", ".join(
            f"{names.get((0, bit), 'a feature without a name')} (incompatible bit {bit})"
            for bit in range(64)
            if unknown >> bit & 1
        )
        raise ImageError(f"{name} uses what is not known here: {listed}; use the program that made it")
    if not write:
        return
    if header.version < 3:
        raise ImageError(
            f"{name} is a version 2 image, which can only be served read-only: "
            f"qemu-img amend -f qcow2 -o compat=1.1 {quoted} makes it version 3"
        )
    if bits & INCOMPAT_CORRUPT and bits & INCOMPAT_JOURNAL:
        raise ImageError(
            f"{name} is marked corrupt: nbd-qcow2j recover {quoted} sends home what its journal holds, then "
            f"qemu-img check -r all {quoted} mends it; until then serve it read-only"
        )
    if bits & INCOMPAT_CORRUPT:
        raise ImageError(
            f"{name} is marked corrupt: nbd-qcow2j check --repair all {quoted} or qemu-img check -r all {quoted} mends "
            "it; until then serve it read-only"
        )
    if bits & INCOMPAT_DIRTY:
        raise ImageError(
            f"{name} is marked dirty, its refcounts may be wrong: nbd-qcow2j check --repair all {quoted} or qemu-img "
            f"check -r all {quoted} mends them; until then serve it read-only"
        )
    # Without the bit the bitmaps were outdated before we came, and every program knows it.
    if header.autoclear & AUTOCLEAR_BITMAPS and any(each.type == EXTENSION_BITMAPS for each in header.extensions):
        raise ImageError(
            f"{name} has persistent bitmaps, which writing would outdate: qemu-img bitmap --remove {quoted} BITMAP "
            f"takes them away one by one (qemu-img info names them), or serve it read-only"
        )
