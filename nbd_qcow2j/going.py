"""One cluster's way home: where it goes and what is written there, and, when that is durable, the link.

`prepare` decides and changes nothing that is not given back by `Prepared.undo`; between it and `link` the checkpoint
writes and syncs (checkpoint.py).

    Crash before the link is committed: the new cluster has refcount zero, the pages are in the journal.
    Crash after it: the pages are revoked by the same transaction.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .errors import ImageError
from .format.tables import OFFSET_MASK
from .pending import Page
from .prepared import Prepared
from .reading import read_beneath
from .steps import Operation

if TYPE_CHECKING:
    from .disk import Disk
    from .image.tables import Table


@dataclass(slots=True)
class Going:
    """A guest cluster on its way home. `host` is None where it becomes zero or stays as it is."""

    cluster: int
    pages: dict[int, Page]
    table: Table | None = None
    host: int | None = None
    fresh: bool = False
    to_zero: bool = False
    drop: bool = True
    """Whether what the cluster referred to is dropped; not where it is metadata (overlap.py)."""
    writes: list[tuple[int, bytes | bytearray]] = field(default_factory=list)


def prepare_simply(disk: Disk, held: Prepared, cluster: int) -> Going | None:
    """As `prepare`, for what is most common and needs no wait; None where it takes more.

    That is: the L2 table is ours, healthy and in memory; the cluster is unallocated with nothing beneath it that
    shows, or ours alone; no page is zero; the refcount block is in memory.
    """
    pages = disk.pending.clusters[cluster]
    table, entry = disk.find_own(cluster)
    if table is None or table.host_offset >> disk.geometry.cluster_bits not in disk.allocator.overlaps.counted:
        return None
    zero_page = disk.pending.zero_page
    for page in pages.values():
        if page.data == zero_page:
            return None
    allocator, bits = disk.allocator, disk.geometry.cluster_bits
    fresh = not entry
    if fresh:
        if cluster not in disk.cluster_tokens or not allocator.pool:
            return None
        if disk.has_backing(cluster) and len(pages) < disk.pages_in(cluster):
            return None
        host = allocator.pool[0]
    else:
        host = (entry & OFFSET_MASK) >> bits
    block = allocator.block(host)
    if block is None or (not fresh and (allocator.refcount(host) != 1 or allocator.overlaps.what(host))):
        return None
    if fresh:
        disk.cluster_tokens.discard(cluster)
        held.promised.add(cluster)
        allocator.reserve(token=True)
        held.reserved.add(host)
    for each in (table, block):
        each.pins += 1
        held.pinned.append(each)
    going = Going(cluster, dict(pages), table, host, fresh)
    going.writes = _page_writes(disk, host << bits, cluster, pages)
    return going


def _page_writes(disk: Disk, start: int, cluster: int, pages: dict[int, Page]) -> list[tuple[int, bytes | bytearray]]:
    base, size = cluster * disk.geometry.pages_per_cluster, disk.page_size
    return [(start + (index - base) * size, pages[index].data) for index in pages]


def prepare(disk: Disk, held: Prepared, cluster: int) -> Operation[Going]:
    """Decide where a cluster goes, and what has to be written there."""
    geometry = disk.geometry
    pages = dict(disk.pending.clusters[cluster])
    going = Going(cluster, pages)
    whole = len(pages) == disk.pages_in(cluster)
    zero_page = disk.pending.zero_page
    zeros = [page.data == zero_page for page in pages.values()]
    while not disk.mapping.in_memory(cluster):
        yield from disk.mapping.load_l2(cluster)
    entry, bitmap = _find(disk, held, going, whole=whole)
    if going.drop and all(zeros) and not disk.has_backing(cluster) and not entry and not bitmap:
        return going
    going.table = table = yield from held.own_l2(cluster)
    entry, bitmap = _find(disk, held, going, whole=whole)
    for host in disk.mapping.host_clusters(entry):
        yield from held.pin_block(host)
    going.drop = going.drop and not held.is_bad(cluster, entry)
    if all(zeros) and (whole or disk.reads_zero(cluster, entry, bitmap)):
        going.to_zero = True
        return going
    old = (entry & OFFSET_MASK) >> geometry.cluster_bits
    ours = going.drop and disk.is_ours(entry, bitmap) and disk.allocator.refcount(old) == 1
    content: bytearray | None = None
    if not whole and (any(zeros) if ours else not disk.reads_zero(cluster, entry, bitmap)):
        content = yield from read_beneath(disk, cluster)
        base = cluster * geometry.pages_per_cluster
        for index, page in pages.items():
            at = (index - base) * geometry.page_size
            content[at : at + geometry.page_size] = page.data
        if not any(content) and any(zeros):
            # A cluster that has become all zero is freed.
            going.to_zero = True
            return going
    assert table is not None
    if ours:
        going.host = old
        content = None
    else:
        going.fresh = True
        if cluster in disk.cluster_tokens:
            disk.cluster_tokens.discard(cluster)
            held.promised.add(cluster)
            held.tokens += 1
        else:
            yield from disk.allocator.take_tokens(1)
            held.tokens += 1
        going.host = yield from held.reserve()
    start = going.host << geometry.cluster_bits
    if content is not None:
        going.writes.append((start, content))
    else:
        # A pool cluster reads as zeros: only the pages have to be written.
        going.writes = _page_writes(disk, start, cluster, pages)
    return going


def _find(disk: Disk, held: Prepared, going: Going, *, whole: bool) -> tuple[int, int]:
    """The cluster's L2 entry; one that cannot be is taken as none where all of the cluster is about to be written."""
    try:
        return disk.mapping.find(going.cluster)
    except ImageError as error:
        if not whole:
            raise
        held.found_corrupt(str(error))
        going.drop = False
        return 0, 0


def link(disk: Disk, going: Going) -> None:
    """In one hold: the cluster's new home, and its pages home elsewhere."""
    log, cluster = disk.log, going.cluster
    if going.to_zero and disk.pending.clusters.get(cluster) != going.pages:
        # It would lose its home while a page that came since counts on that, and has no token for another.
        return
    if going.table is not None:
        if going.to_zero:
            disk.mapping.unlink(
                going.table, cluster, zero=disk.has_backing(cluster), keep=False, log=log, allocator=disk.allocator,
                drop=going.drop,
            )  # fmt: skip
        elif going.fresh and going.host is not None:
            disk.mapping.link(going.table, cluster, going.host, log, disk.allocator, drop=going.drop)
    disk.touch(cluster)
    running = log.running
    revoke: list[tuple[int, int]] = []
    for index in sorted(going.pages):
        page = going.pages[index]
        if disk.pending.get(index) is not page:
            continue
        if running.pages.get(index) is page:
            running.forget_page(index)
        # Invariant 4: the record of this very version has left the running transaction before the revoke joins it.
        if log.has_record(index):
            if revoke and revoke[-1][1] == index:
                revoke[-1] = (revoke[-1][0], index + 1)
            else:
                revoke.append((index, index + 1))
        if disk.pending.drop(index):
            disk.return_token(cluster)
    for first, end in revoke:
        running.note_guest_revoke(first, end)
