"""Attaching and detaching the journal in the header cluster, one sync at a time. Pure functions over its bytes.

On a stock overlay the extensions end, and the backing name starts, beyond the first sector: rewriting in place
could tear the name away. So the complete new extension area and the name go to a free 512-aligned place H of
the cluster; then one write of sector 0 makes header_length H. What lay in between becomes "additional header
fields", untouched, and detaching is one write of sector 0 that points back. What sector 0 said before
(header_length, the name's offset, the bytes at 104 that a short header used for extensions) is kept in front
of the journal's data in our extension.

    Crash between any two stages, or inside one: a header that says the same as before it, or as after it.

With 512-byte clusters everything is in sector 0, which is written whole.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import ImageError
from ..geometry import SECTOR
from .header import (
    EXTENSION_FEATURE_NAMES,
    EXTENSION_JOURNAL,
    FEATURE_NAME,
    INCOMPAT_JOURNAL,
    JOURNAL_BIT,
    SAVED,
    V3_LENGTH,
    Extension,
    Header,
    parse_header,
)  # fmt: skip

Stage = tuple[tuple[int, bytes], ...]
_INCOMPATIBLE_AT, _AUTOCLEAR_AT, _LENGTH_AT, _BACKING_AT, _REFTABLE_AT = 72, 88, 100, 8, 48


@dataclass(frozen=True, slots=True)
class HeaderPlan:
    """Stages in order, a sync after each; each is (offset, whole sectors) writes."""

    stages: tuple[Stage, ...]


def plan_attach(cluster: bytes, journal: bytes) -> HeaderPlan:
    """Name the journal in the header; the last stage sets bit 62 and nothing else. Raises ImageError."""
    before: tuple[Stage, ...] = ()
    header = _parse(cluster)
    if _saved(header) is not None:
        # A cut left our extension in a plain image: back to an ordinary header first.
        before = plan_detach(cluster).stages
        cluster = apply_stages(cluster, before)
        header = _parse(cluster)
    saved = SAVED.build(
        {
            "header_length": header.header_length,
            "backing_offset": header.backing_offset,
            "at_104": cluster[V3_LENGTH : V3_LENGTH + 8],
        }
    )
    others = [each for each in header.extensions if each.type != EXTENSION_JOURNAL]
    ours = Extension(EXTENSION_JOURNAL, saved + journal)
    name = header.backing_name or b""
    cluster_size = 1 << header.cluster_bits
    for extensions in ([*_named(others), ours], [*others, ours]):
        area = _build(extensions)
        behind = -(-max(SECTOR, _end_of(header)) // SECTOR) * SECTOR
        place = header.header_length if cluster_size == SECTOR else behind
        if place + len(area) + len(name) <= min(cluster_size, len(cluster)):
            break
    else:
        raise ImageError(
            "the header cluster has no room for the journal's extension: use a larger cluster size (qemu-img convert)",
            expected=f"{len(area) + len(name)} bytes from {place}", found=f"a cluster of {cluster_size}",
        )  # fmt: skip
    sector = bytearray(cluster[:SECTOR])
    sector[_LENGTH_AT : _LENGTH_AT + 4] = place.to_bytes(4, "big")
    if name:
        sector[_BACKING_AT : _BACKING_AT + 8] = (place + len(area)).to_bytes(8, "big")
    # Bits that nobody here keeps up to date; a bitmap that stays would silently be outdated.
    sector[_AUTOCLEAR_AT : _AUTOCLEAR_AT + 8] = bytes(8)
    content = area + name
    if cluster_size == SECTOR:
        sector[place:] = content.ljust(SECTOR - place, b"\0")
        first: tuple[Stage, ...] = ()
    else:
        if header.header_length == V3_LENGTH:
            # Byte 104 would be read as the compression type.
            sector[V3_LENGTH : V3_LENGTH + 8] = bytes(8)
        first = (((place, content.ljust(-(-len(content) // SECTOR) * SECTOR, b"\0")),),)
    plain = bytes(sector)
    bits = header.incompatible | INCOMPAT_JOURNAL
    sector[_INCOMPATIBLE_AT : _INCOMPATIBLE_AT + 8] = bits.to_bytes(8, "big")
    return HeaderPlan((*before, *first, ((0, plain),), ((0, bytes(sector)),)))


def plan_detach(cluster: bytes) -> HeaderPlan:
    """Take the journal out of the header; the first stage clears bit 62 and nothing else. Raises ImageError."""
    header = _parse(cluster)
    saved = _saved(header)
    sector = bytearray(cluster[:SECTOR])
    bits = header.incompatible & ~INCOMPAT_JOURNAL
    sector[_INCOMPATIBLE_AT : _INCOMPATIBLE_AT + 8] = bits.to_bytes(8, "big")
    cleared = bytes(sector)
    stages: list[Stage] = [((0, cleared),)]
    if saved is None:
        return HeaderPlan(tuple(stages))
    parsed = SAVED.parse(saved)
    if 1 << header.cluster_bits == SECTOR:
        others = [each for each in header.extensions if each.type != EXTENSION_JOURNAL]
        area = _build(_unnamed(others))
        place, name = header.header_length, header.backing_name or b""
        if name:
            sector[_BACKING_AT : _BACKING_AT + 8] = (place + len(area)).to_bytes(8, "big")
        sector[place:] = (area + name).ljust(SECTOR - place, b"\0")
        stages.append(((0, bytes(sector)),))
    else:
        end = _end_of(header)
        sector[_LENGTH_AT : _LENGTH_AT + 4] = parsed.header_length.to_bytes(4, "big")
        sector[_BACKING_AT : _BACKING_AT + 8] = parsed.backing_offset.to_bytes(8, "big")
        if parsed.header_length == V3_LENGTH:
            sector[V3_LENGTH : V3_LENGTH + 8] = parsed.at_104
        stages.append(((0, bytes(sector)),))
        # Only now is the area behind it nobody's.
        place = header.header_length
        stages.append(((place, bytes(-(-(end - place) // SECTOR) * SECTOR)),))
    return HeaderPlan(tuple(stages))


def set_refcount_table(sector: bytes, offset: int, clusters: int) -> bytes:
    """Sector 0 with another refcount table."""
    return sector[:_REFTABLE_AT] + offset.to_bytes(8, "big") + clusters.to_bytes(4, "big") + sector[_REFTABLE_AT + 12 :]


def apply_stages(cluster: bytes, stages: tuple[Stage, ...]) -> bytes:
    """The header cluster after these stages."""
    content = bytearray(cluster)
    for stage in stages:
        for offset, data in stage:
            content[offset : offset + len(data)] = data
    return bytes(content[: len(cluster)])


def _parse(cluster: bytes) -> Header:
    return parse_header(cluster, file_size=len(cluster), name="the image")


def _saved(header: Header) -> bytes | None:
    for extension in header.extensions:
        if extension.type == EXTENSION_JOURNAL and len(extension.data) >= SAVED.sizeof():
            return extension.data[: SAVED.sizeof()]
    return None


def _build(extensions: list[Extension]) -> bytes:
    parts = [
        each.type.to_bytes(4, "big") + len(each.data).to_bytes(4, "big") + each.data + bytes(-len(each.data) % 8)
        for each in extensions
    ]
    return b"".join(parts) + bytes(8)


def _end_of(header: Header) -> int:
    """One past the last byte that extensions or the backing name use."""
    end = header.header_length + len(_build(list(header.extensions)))
    if header.backing_name:
        end = max(end, header.backing_offset + len(header.backing_name))
    return end


_OUR_NAME = bytes((0, JOURNAL_BIT)) + FEATURE_NAME.ljust(46, b"\0")


def _named(extensions: list[Extension]) -> list[Extension]:
    """With our name in the feature name table, made if there is none."""
    if not any(each.type == EXTENSION_FEATURE_NAMES for each in extensions):
        return [*extensions, Extension(EXTENSION_FEATURE_NAMES, _OUR_NAME)]
    return [
        Extension(each.type, each.data + _OUR_NAME) if each.type == EXTENSION_FEATURE_NAMES else each
        for each in extensions
    ]


def _unnamed(extensions: list[Extension]) -> list[Extension]:
    cleaned = [
        Extension(each.type, each.data.replace(_OUR_NAME, b"")) if each.type == EXTENSION_FEATURE_NAMES else each
        for each in extensions
    ]
    return [each for each in cleaned if each.data or each.type != EXTENSION_FEATURE_NAMES]
