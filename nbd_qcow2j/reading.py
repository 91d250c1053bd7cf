"""What a disk holds: reading it, and saying where it holds data or zeros.

Reads wait for nobody's exclusion. A reader enters its epoch first (image/epochs.py): a cluster that it may be
reading is not handed out again, nor punched, before it has left.

    Invariant 5: pending pages first, then the mapping, in one hold.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import TYPE_CHECKING, Final

from .format.tables import NORMAL, OFFSET_MASK, UNALLOCATED, ZERO_ALLOC, compressed_extent
from .image.backing import Extent
from .image.compressed import inflate
from .steps import Compute, Operation, Read, ReadInto

if TYPE_CHECKING:
    from .disk import Disk

MOST_CLUSTERS: Final = 1 << 14
"""Clusters that one request for extents looks at."""


def read_into(disk: Disk, view: memoryview, offset: int) -> Operation[None]:
    """Fill `view` from guest offset `offset`. Raises ImageError, ReadFailed."""
    epoch = disk.epochs.enter()
    try:
        size = disk.geometry.cluster_size
        done, total = 0, len(view)
        waiting: list[tuple[int, int, int]] = []
        while done < total:
            cluster, start = divmod(offset + done, size)
            length = min(size - start, total - done)
            while not disk.mapping.in_memory(cluster):
                yield from disk.mapping.load_l2(cluster)
            entry, bitmap = disk.mapping.find(cluster)
            part = view[done : done + length]
            for low, high in _not_pending(disk, part, cluster, start):
                if disk.mapping.is_compressed(entry):
                    yield from _read_compressed(disk, part[low:high], entry, start + low)
                    continue
                for kind, at, piece in disk.mapping.pieces(entry, bitmap, start + low, high - low):
                    to = done + at - start
                    if kind == NORMAL:
                        _add(waiting, (entry & OFFSET_MASK) + at, to, piece)
                    elif kind == UNALLOCATED and disk.has_backing(cluster):
                        assert disk.backing is not None
                        yield from disk.backing.read_into(view[to : to + piece], cluster * size + at)
                    else:
                        view[to : to + piece] = bytes(piece)
            done += length
        for host, to, piece in waiting:
            yield ReadInto(disk.file, host, view[to : to + piece])
    finally:
        disk.epochs.leave(epoch)


def read_beneath(disk: Disk, cluster: int) -> Operation[bytearray]:
    """What a guest cluster holds without its pending pages. The caller has excluded it."""
    content = bytearray(disk.geometry.cluster_size)
    view = memoryview(content)
    table = yield from disk.mapping.load_l2(cluster)
    entry, bitmap = disk.mapping.find(cluster) if table is not None else (0, 0)
    if disk.mapping.is_compressed(entry):
        yield from _read_compressed(disk, view, entry, 0)
    else:
        for kind, at, length in disk.mapping.pieces(entry, bitmap, 0, len(content)):
            if kind == NORMAL:
                yield ReadInto(disk.file, (entry & OFFSET_MASK) + at, view[at : at + length])
            elif kind == UNALLOCATED and disk.has_backing(cluster):
                assert disk.backing is not None
                yield from disk.backing.read_into(view[at : at + length], cluster * len(content) + at)
    disk.cow_read_bytes += len(content)
    return content


def _add(waiting: list[tuple[int, int, int]], host: int, to: int, length: int) -> None:
    if waiting:
        last_host, last_to, last = waiting[-1]
        if last_host + last == host and last_to + last == to:
            waiting[-1] = (last_host, last_to, last + length)
            return
    waiting.append((host, to, length))


def _not_pending(disk: Disk, part: memoryview, cluster: int, start: int) -> list[tuple[int, int]]:
    """Copy what is pending into `part`, in this hold; the (low, high) ranges of it that are left."""
    pages = disk.pending.clusters.get(cluster)
    if not pages:
        return [(0, len(part))]
    size = disk.page_size
    left: list[tuple[int, int]] = []
    base = cluster * disk.geometry.pages_per_cluster
    at = 0
    while at < len(part):
        number, inside = divmod(start + at, size)
        length = min(size - inside, len(part) - at)
        page = pages.get(base + number)
        if page is not None:
            part[at : at + length] = page.data[inside : inside + length]
        elif left and left[-1][1] == at:
            left[-1] = (left[-1][0], at + length)
        else:
            left.append((at, at + length))
        at += length
    return left


def _read_compressed(disk: Disk, view: memoryview, entry: int, start: int) -> Operation[None]:
    size = disk.geometry.cluster_size
    host, length = compressed_extent(entry, disk.geometry.cluster_bits)
    data = yield Read(disk.file, host, length)
    where = f"compressed cluster at {host} of {disk.name}"
    content = yield Compute(lambda: inflate(bytes(data), disk.compression_type, size, where=where))
    view[:] = content[start : start + len(view)]


def extents(disk: Disk, offset: int, length: int, *, one: bool = False) -> Operation[list[Extent]]:
    """What a range holds: data, allocated or not; zeros. Raises ImageError, ReadFailed.

    An answer may be of the beginning of the range only: with `one` nothing is wanted but the first extent, and a
    request looks at MOST_CLUSTERS, for all others wait while it does. Whoever asks goes on from there.
    """
    found: list[Extent] = []
    size = disk.geometry.cluster_size
    end = offset + length
    # Those that become pending from now on are written while we look: either answer is right.
    pending = sorted(each for each in disk.pending.clusters if offset // size <= each <= (end - 1) // size)
    left = MOST_CLUSTERS
    while offset < end and left > 0 and not (one and len(found) > 1):
        cluster, start = divmod(offset, size)
        span = min(size - start, end - offset)
        left -= 1
        if cluster in disk.pending.clusters:
            _extend(found, span, zero=_is_zero(disk, cluster), allocated=True)
        elif not disk.mapping.l2_offset(cluster):
            per_table = disk.geometry.l2_entries * size
            span = min(end - offset, per_table - offset % per_table)
            following = bisect_left(pending, cluster)
            if following < len(pending):
                # At least one cluster: it may have gone home since.
                span = min(span, max(pending[following], cluster + 1) * size - offset)
            if disk.backing is not None:
                left -= span // size
                for extent in (yield from disk.backing.extents(offset, span)):
                    _extend(found, extent.length, zero=extent.zero, allocated=False)
            else:
                _extend(found, span, zero=True, allocated=False)
        else:
            while not disk.mapping.in_memory(cluster):
                yield from disk.mapping.load_l2(cluster)
            entry, bitmap = disk.mapping.find(cluster)
            if disk.mapping.is_compressed(entry):
                _extend(found, span, zero=False, allocated=True)
                offset += span
                continue
            for kind, at, piece in disk.mapping.pieces(entry, bitmap, start, span):
                if kind == NORMAL:
                    _extend(found, piece, zero=False, allocated=True)
                elif kind == UNALLOCATED and disk.has_backing(cluster):
                    assert disk.backing is not None
                    for extent in (yield from disk.backing.extents(cluster * size + at, piece)):
                        _extend(found, extent.length, zero=extent.zero, allocated=False)
                else:
                    _extend(found, piece, zero=True, allocated=kind == ZERO_ALLOC)
        offset += span
    return found


def _is_zero(disk: Disk, cluster: int) -> bool:
    """Whether a pending cluster is known to be zero, all its pages waiting: what was trimmed page by page."""
    pages, zero = disk.pending.clusters[cluster], disk.pending.zero_page
    return len(pages) == disk.pending.per_cluster and all(page.data == zero for page in pages.values())


def _extend(found: list[Extent], length: int, *, zero: bool, allocated: bool) -> None:
    if found and (found[-1].zero, found[-1].allocated) == (zero, allocated):
        found[-1] = Extent(found[-1].length + length, zero, allocated)
    else:
        found.append(Extent(length, zero, allocated))
