"""Attaching and detaching the journal in the header cluster, one sync at a time. Pure functions over its bytes.

A journal is attached by an *area* (the header's extensions, among them ours, and the backing name) and bit 62.
The header points at its area twice: header_length is where the extensions begin, and the name has an offset.

Behind: on a stock overlay the area does not end in the first sector, and rewriting it in place could tear the
name away. So the complete new area goes to a free 512-aligned place H of the cluster; then one write of sector 0
makes header_length H. What lay in between is "additional header fields" now, untouched, and detaching is one
write of sector 0 that points back.

Within: where H does not fit (512-byte clusters, small clusters with long names), the new area goes into sector 0
itself, in the one write that any change of sector 0 is. Detaching builds the old area anew.

In both, the feature name table gives way first: it comes down to our own entry, then to nothing. What sector 0
said before (header_length, the name's offset, the bytes at 104, which a short header uses for extensions and a
longer one for the compression type), and where nothing else remembers it the feature name table, is kept in
front of the journal's data in our extension (`SAVED`).

    Invariant: a header never becomes anything that was not parsed first and found to mean what it meant.
    Crash: between two stages, or inside one with any of its sectors written, the header means what it meant
    before, with or without bit 62; and both plans can be made again from there.

Between a cut and the next attach other programs may rewrite the header, and keep our extension, whose memory is
old by then. So detaching compares, too, and where pointing back would bring back something else (the old name
after a rebase), it builds the area anew; if that has no room, our extension stays, which means nothing.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from ..errors import ImageError
from ..geometry import SECTOR
from .header import (
    EXTENSION_FEATURE_NAMES,
    EXTENSION_JOURNAL,
    FEATURE_ENTRY,
    FEATURE_NAME,
    INCOMPAT_CORRUPT,
    INCOMPAT_JOURNAL,
    JOURNAL_BIT,
    NO_NAMES,
    SAVED,
    SAVED_LENGTH,
    V3_LENGTH,
    Extension,
    Header,
    parse_header,
)

Stage = tuple[tuple[int, bytes], ...]
"""(offset, whole sectors) writes in the header cluster, whose order among themselves does not matter."""

_BACKING_AT, _REFTABLE_AT, _INCOMPATIBLE_AT, _AUTOCLEAR_AT, _LENGTH_AT = 8, 48, 72, 88, 100
_SHORTEST_LENGTH_WITH_TYPE = 112
_OUR_NAME = Extension(EXTENSION_FEATURE_NAMES, bytes((0, JOURNAL_BIT)) + FEATURE_NAME.ljust(FEATURE_ENTRY - 2, b"\0"))


@dataclass(frozen=True, slots=True)
class HeaderPlan:
    """Stages in order, a sync after each."""

    stages: tuple[Stage, ...]


def plan_attach(cluster: bytes, journal_extension: bytes) -> HeaderPlan:
    """Name the journal in the header; the last stage sets bit 62 and nothing else.

    `cluster` is the header cluster, or its first 64 KiB. Autoclear bits are cleared: none of them stays true
    while somebody writes who does not know it. Raises ImageError where there is no room.
    """
    header = _parse(cluster)
    if header.version < 3 or header.incompatible & INCOMPAT_JOURNAL:
        raise ImageError(
            "a journal cannot be attached", where="header", expected="version 3, no journal yet",
            found=f"version {header.version}, incompatible features {header.incompatible:#x}",
        )  # fmt: skip
    before: tuple[Stage, ...] = ()
    if _find(header.extensions, EXTENSION_JOURNAL) is not None:
        # A cut left our extension in a plain image: back to an ordinary header first.
        before = plan_detach(cluster).stages
        cluster = apply_stages(cluster, before)
        header = _parse(cluster)
    for stages in _attach_ways(cluster, header, journal_extension):
        attached = apply_stages(cluster, stages)
        restored = _parse(apply_stages(attached, plan_detach(attached).stages))
        if _meaning(_parse(attached)) == _meaning(header) == _meaning(restored) and _names(restored) == _names(header):
            return HeaderPlan((*before, *stages))
    raise ImageError(
        "the header cluster has no room for the journal's extension: give the image a shorter backing file name "
        "(qemu-img rebase -u) or larger clusters (qemu-img convert -o cluster_size=64k)",
        where="header", expected=f"{len(_area([_ours(header, cluster, journal_extension, keep=False)]))} bytes more",
        found=f"{_end_of(header)} of {min(1 << header.cluster_bits, len(cluster))} bytes in use",
    )  # fmt: skip


def plan_detach(cluster: bytes) -> HeaderPlan:
    """Take the journal out of the header; the first stage clears bit 62 and nothing else.

    Works on a plain image whose header still holds our extension as well; without that there are no stages.
    Raises ImageError where the header is damaged.
    """
    header = _parse(cluster)
    stages: list[Stage] = []
    sector = cluster[:SECTOR]
    if header.incompatible & INCOMPAT_JOURNAL:
        sector = _with_number(sector, _INCOMPATIBLE_AT, 8, header.incompatible & ~INCOMPAT_JOURNAL)
        stages.append(((0, sector),))
    ours = _find(header.extensions, EXTENSION_JOURNAL)
    if ours is None:
        return HeaderPlan(tuple(stages))
    plain = sector + cluster[SECTOR:]
    wanted = _meaning(_parse(plain))
    for ways in (_point_back(plain, header, ours), _build_anew(plain, header, ours)):
        if ways and _means(apply_stages(plain, ways), wanted):
            stages.extend(ways)
            break
    return HeaderPlan(tuple(stages))


def set_refcount_table(sector: bytes, offset: int, clusters: int) -> bytes:
    """Sector 0 with another refcount table: its host offset in bytes, its length in clusters."""
    return _with_number(_with_number(sector, _REFTABLE_AT, 8, offset), _REFTABLE_AT + 8, 4, clusters)


def set_corrupt(sector: bytes) -> bytes:
    """Sector 0 with the corrupt bit. Spec: "Header", incompatible bit 1."""
    bits = int.from_bytes(sector[_INCOMPATIBLE_AT : _INCOMPATIBLE_AT + 8], "big")
    return with_incompatible(sector, bits | INCOMPAT_CORRUPT)


def with_incompatible(sector: bytes, bits: int) -> bytes:
    """Sector 0 with these incompatible features."""
    return _with_number(sector, _INCOMPATIBLE_AT, 8, bits)


def apply_stages(cluster: bytes, stages: Sequence[Stage]) -> bytes:
    """The header cluster after these stages."""
    content = bytearray(cluster)
    for stage in stages:
        for offset, data in stage:
            content[offset : offset + len(data)] = data
    return bytes(content)


# ---- attaching


def _attach_ways(cluster: bytes, header: Header, journal: bytes) -> Iterator[list[Stage]]:
    """The stages of every way that fits, the best first."""
    others = [each for each in header.extensions if each.type != EXTENSION_JOURNAL]
    room = min(1 << header.cluster_bits, len(cluster))
    behind = _whole_sectors(max(SECTOR, _end_of(header)))
    for place, limit in ((behind, room), (header.header_length, SECTOR)):
        for names in ("all", "ours", "none"):
            # The area that lies untouched remembers the table; one that is built anew must be told.
            ours = _ours(header, cluster, journal, keep=limit == SECTOR and names != "all")
            area = _area([*_with_names(others, names), ours])
            content = area + (header.backing_name or b"")
            if place + len(content) > limit:
                continue
            sector = _with_number(cluster[:SECTOR], _AUTOCLEAR_AT, 8, 0)
            sector = _pointing_at(sector, header, place, len(area))
            first: list[Stage] = []
            if place == behind:
                if header.header_length == V3_LENGTH:
                    # Byte 104 is the compression type as soon as the header is longer.
                    sector = _with_number(sector, V3_LENGTH, 8, 0)
                first = [((place, content.ljust(_whole_sectors(len(content)), b"\0")),)]
            else:
                sector = sector[:place] + content.ljust(SECTOR - place, b"\0")
            last = _with_number(sector, _INCOMPATIBLE_AT, 8, header.incompatible | INCOMPAT_JOURNAL)
            yield [*first, ((0, sector),), ((0, last),)]


def _ours(header: Header, cluster: bytes, journal: bytes, *, keep: bool) -> Extension:
    """Our extension: what the ordinary header said, then the journal's data."""
    types = [each.type for each in header.extensions if each.type != EXTENSION_JOURNAL]
    names = _find(header.extensions, EXTENSION_FEATURE_NAMES)
    packed = zlib.compress(names, 9) if keep and names is not None else b""
    fixed = SAVED.build(
        {
            "length": SAVED_LENGTH + len(packed),
            "names_at": types.index(EXTENSION_FEATURE_NAMES) if names is not None else NO_NAMES,
            "header_length": header.header_length, "backing_offset": header.backing_offset,
            "at_104": cluster[V3_LENGTH : V3_LENGTH + 8],
        }
    )  # fmt: skip
    return Extension(EXTENSION_JOURNAL, fixed + packed + journal)


def _with_names(extensions: list[Extension], which: str) -> list[Extension]:
    """With a feature name table of all names and ours, of ours alone, or without one."""
    if which != "all" or _find(extensions, EXTENSION_FEATURE_NAMES) is None:
        others = [each for each in extensions if each.type != EXTENSION_FEATURE_NAMES]
        return others if which == "none" else [*others, _OUR_NAME]
    # First in the table: qemu reads it up to an empty name.
    return [
        replace(each, data=_OUR_NAME.data + each.data) if each.type == EXTENSION_FEATURE_NAMES else each
        for each in extensions
    ]


# ---- detaching


def _point_back(plain: bytes, header: Header, ours: bytes) -> list[Stage]:
    """To an area that still lies where it lay: one write of sector 0. Empty where the area was not behind it."""
    if len(ours) < SAVED_LENGTH:
        return []
    saved = SAVED.parse(ours[: SAVED_LENGTH])
    if not V3_LENGTH <= saved.header_length < header.header_length or header.header_length % SECTOR:
        return []
    sector = _with_number(plain[:SECTOR], _LENGTH_AT, 4, saved.header_length)
    sector = _with_number(sector, _BACKING_AT, 8, saved.backing_offset)
    if saved.header_length == V3_LENGTH:
        sector = sector[:V3_LENGTH] + saved.at_104 + sector[V3_LENGTH + 8 :]
    start, end = header.header_length, min(_whole_sectors(_end_of(header)), len(plain))
    # Order: only now is the area behind it nobody's.
    return [((0, sector),), ((start, bytes(end - start)),)]


def _build_anew(plain: bytes, header: Header, ours: bytes) -> list[Stage]:
    """The extensions without ours and the name, at the place of the ordinary header. Empty where it has no room."""
    place, extensions = header.header_length, [each for each in header.extensions if each.type != EXTENSION_JOURNAL]
    if len(ours) >= SAVED_LENGTH:
        saved = SAVED.parse(ours[: SAVED_LENGTH])
        shortest = _SHORTEST_LENGTH_WITH_TYPE if header.compression_type else V3_LENGTH
        if shortest <= saved.header_length < place:
            place = saved.header_length
        extensions = _restored_names(extensions, saved.names_at, ours[SAVED_LENGTH : saved.length], len(plain))
    area = _area(extensions)
    content = area + (header.backing_name or b"")
    end = place + len(content)
    # What is written must not be what is in use: except in sector 0, which is written whole.
    if end > SECTOR and _whole_sectors(end) > header.header_length and _end_of(header) > SECTOR:
        return []
    sectors = _whole_sectors(end)
    new = plain[:place] + content.ljust(sectors - place, b"\0")
    sector = _pointing_at(new[:SECTOR], header, place, len(area))
    # Order: sector 0 last; until then the later ones are "additional header fields".
    first: list[Stage] = [((SECTOR, new[SECTOR:]),)] if sectors > SECTOR else []
    start, stop = max(sectors, header.header_length, SECTOR), min(_whole_sectors(_end_of(header)), len(plain))
    start -= start % SECTOR
    last: list[Stage] = [((start, bytes(stop - start)),)] if start < stop else []
    return [*first, ((0, sector),), *last]


def _restored_names(extensions: list[Extension], names_at: int, packed: bytes, limit: int) -> list[Extension]:
    """The extensions with the feature name table as it was before we came, as far as that is known."""
    names = _find(extensions, EXTENSION_FEATURE_NAMES)
    others = [each for each in extensions if each.type != EXTENSION_FEATURE_NAMES]
    if packed and names in (None, _OUR_NAME.data):
        try:
            names = zlib.decompressobj().decompress(packed, limit)
        except zlib.error:
            names = None
    elif names is not None:
        names = names.removeprefix(_OUR_NAME.data)
        if not names and names_at == NO_NAMES:
            names = None
    if names is None:
        return others
    at = min(names_at, len(others))
    return [*others[:at], Extension(EXTENSION_FEATURE_NAMES, names), *others[at:]]


# ---- headers


def _parse(cluster: bytes) -> Header:
    # Where the file ends was looked at when the image was opened.
    return parse_header(cluster, file_size=1 << 63, name="the image")


def _meaning(header: Header) -> Header:
    """A header without what attaching and detaching change."""
    extensions = tuple(
        each for each in header.extensions if each.type not in (EXTENSION_JOURNAL, EXTENSION_FEATURE_NAMES)
    )
    bits = header.incompatible & ~INCOMPAT_JOURNAL
    return replace(header, incompatible=bits, autoclear=0, header_length=0, backing_offset=0, extensions=extensions)


def _means(cluster: bytes, wanted: Header) -> bool:
    try:
        return _meaning(_parse(cluster)) == wanted
    except ImageError:
        return False


def _names(header: Header) -> bytes | None:
    return _find(header.extensions, EXTENSION_FEATURE_NAMES)


def _find(extensions: Sequence[Extension], kind: int) -> bytes | None:
    """The data of the first extension of a type."""
    return next((each.data for each in extensions if each.type == kind), None)


def _area(extensions: list[Extension]) -> bytes:
    """Extensions as they are on disk, with their end."""
    parts = [
        each.type.to_bytes(4, "big") + len(each.data).to_bytes(4, "big") + each.data + bytes(-len(each.data) % 8)
        for each in extensions
    ]
    return b"".join(parts) + bytes(8)


def used_end(header: Header) -> int:
    """One past the last sector of the header cluster that is in use, bytes."""
    return _whole_sectors(_end_of(header))


def _end_of(header: Header) -> int:
    """One past the last byte of the header cluster that is in use."""
    end = header.header_length + len(_area(list(header.extensions)))
    return max(end, header.backing_offset + len(header.backing_name or b""))


def _pointing_at(sector: bytes, header: Header, place: int, area_length: int) -> bytes:
    sector = _with_number(sector, _LENGTH_AT, 4, place)
    return _with_number(sector, _BACKING_AT, 8, place + area_length if header.backing_name else 0)


def _with_number(sector: bytes, at: int, width: int, number: int) -> bytes:
    return sector[:at] + number.to_bytes(width, "big") + sector[at + width :]


def _whole_sectors(length: int) -> int:
    return -(-length // SECTOR) * SECTOR
