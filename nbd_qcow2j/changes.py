"""Operations that change the disk: pending and direct writes, zeroes, trim.

Each takes ring credits first, then room, then the exclusion of its clusters in ascending order; prepares
(tables loaded, made ours and pinned); does its I/O; and changes everything in one last hold. Where there is no room
it is asked for again by what turns out to need it: room is made by nobody who waits for an exclusion.

    Crash before the last hold: reserved clusters have refcount zero; nothing names what was written.
    Crash after it, before its commit: as before the operation, or, in place, any mixture of old and new.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from .errors import NO_ROOM, Error, RequestError
from .format.tables import OFFSET_MASK
from .journal.transaction import BASE_COST, REVOKE_COST, SECTOR_COST
from .prepared import Prepared
from .steps import Buffer, Operation, Pause, Write

if TYPE_CHECKING:
    from .disk import Disk
    from .image.tables import Table

ZERO_CLUSTERS = 64
ZERO_PAGES = 4096
"""What a trim or a write of zeroes changes in one hold: a request may be for 4 GiB, and everybody else waits."""
PAUSE = Pause()


def write(disk: Disk, data: Buffer, offset: int) -> Operation[None]:
    """Write `data` at guest offset `offset`.

    Whole clusters go directly if they are many; the rest in place, where that can be, or as pending pages.
    """
    view = memoryview(data)
    end = offset + len(view)
    size = disk.geometry.cluster_size
    at = offset
    chunk = disk.log.ring.pages_at_once * disk.page_size
    most = clusters_at_once(disk)
    while at < end:
        boundary = -(-at // size) * size
        whole = max(0, end - boundary) // size
        direct = whole * size >= disk.settings.direct_write
        if direct and at == boundary:
            length = min(whole, most) * size
            yield from write_direct(disk, at // size, view[at - offset : at - offset + length])
        else:
            stop = min(boundary if direct else end, (at // chunk + 1) * chunk)
            inside = min(stop, (at // size + 1) * size)
            if (yield from disk.in_place.write(at, view[at - offset : inside - offset])):
                stop = inside
            else:
                yield from write_pending(disk, at, view[at - offset : stop - offset])
            length = stop - at
        at += length


def clusters_at_once(disk: Disk) -> int:
    """Clusters whose links surely fit half of a transaction."""
    ring = disk.log.ring
    return max(1, min(256, (ring.max_transaction - BASE_COST) // 2 // ring.home_cost))


def write_pending(disk: Disk, offset: int, view: memoryview) -> Operation[None]:
    """Make the range pending, page by page; pages that it covers in part are merged."""
    size = disk.page_size
    end = offset + len(view)
    pages = -(-end // size) - offset // size
    cost = pages * disk.page_cost
    clusters = -(-end // disk.geometry.cluster_size) - offset // disk.geometry.cluster_size
    # Order: room in the pending table before credits: the checkpoint, which makes that room, needs credits too.
    yield from disk.take_pending(pages)
    try:
        yield from disk.log.take_credits(cost, clusters)
    except BaseException:
        disk.return_pending(pages)
        raise
    try:
        at = offset
        while at < end:
            index, inside = divmod(at, size)
            length = min(size - inside, end - at)
            part = view[at - offset : at - offset + length]
            # The last page of the disk may be short: what lies beyond the disk is zeros.
            if length == size:
                yield from _room(disk, index)
                disk.put_page(index, bytes(part))
            else:
                yield from _merge(disk, index, inside, part)
            at += length
    finally:
        disk.incoming -= pages
        disk.log.return_credits(cost, clusters)


def _room(disk: Disk, index: int) -> Operation[None]:
    """Return in the hold in which the pool has what the page needs. Raises RequestError (ENOSPC)."""
    cluster = index // disk.geometry.pages_per_cluster
    # After a replay more may be promised than there is: what needs nothing does not wait for it.
    while (needed := disk.tokens_needed(cluster)) and needed > disk.allocator.available:
        yield from disk.allocator.ensure(needed)
    disk.log.check()


def _merge(disk: Disk, index: int, inside: int, part: memoryview) -> Operation[None]:
    """Put a part of a page onto what the page holds *in the hold in which it is put*."""
    cluster = index // disk.geometry.pages_per_cluster
    flag = [False]
    flags = disk.merging.setdefault(cluster, [])
    flags.append(flag)
    try:
        base: bytes | bytearray
        while True:
            page = disk.pending.get(index)
            if page is None:
                flag[0] = False
                fresh = bytearray(disk.page_size)
                yield from disk.read_into(memoryview(fresh), index * disk.page_size)
                base = fresh
            yield from _room(disk, index)
            # Another write of the same page may have come between: it must survive.
            page = disk.pending.get(index)
            if page is not None:
                base = page.data
            elif flag[0]:
                continue
            merged = bytearray(base)
            merged[inside : inside + len(part)] = part
            disk.put_page(index, bytes(merged))
            return
    finally:
        # By identity: `remove` would take another's flag that has the same value, and nobody would tell that other.
        flags[:] = [each for each in flags if each is not flag]
        if not flags:
            disk.merging.pop(cluster, None)


def guarded(disk: Disk, operation: Operation[None], what: str) -> Operation[None]:
    """Run an operation that changes the disk: what it loses latches the device (invariant 7)."""
    disk.refuse_corrupt()
    try:
        yield from operation
    except OSError as error:
        if error.errno in NO_ROOM:
            # A plain write: nothing that was answered is lost, and nothing names what it wrote.
            raise RequestError(errno.ENOSPC, "no room in the host file system") from error
        raise disk.log.latch(error, what) from error
    except (Error, GeneratorExit):
        raise
    except BaseException as error:
        # An exception half-way may have left a change without its note: nothing may be committed on top of it.
        raise disk.log.latch(error, what) from error


def write_direct(disk: Disk, cluster: int, view: memoryview) -> Operation[None]:
    """Write whole clusters to their homes; only the metadata is journalled ("ordered")."""
    size = disk.geometry.cluster_size
    count = len(view) // size
    cost = count * disk.log.ring.home_cost
    yield from disk.log.take_credits(cost)
    held = Prepared(disk, cost)
    try:
        tables = (cluster + count - 1) // disk.geometry.l2_entries - cluster // disk.geometry.l2_entries + 1
        try:
            yield from disk.allocator.take_tokens(count + tables)
            held.tokens = count + tables
        except RequestError:
            # What is written in place needs no room; what does asks for it again.
            disk.log.check()
        yield from disk.exclude(cluster, cluster + count, held.excluded)
        homes: list[tuple[Table, int]] = []
        for number in range(cluster, cluster + count):
            table = yield from held.own_l2(number)
            homes.append((table, (yield from _home_for(disk, held, number))))
        for start, stop in _contiguous([host for _, host in homes]):
            yield Write(disk.file, homes[start][1] * size, [view[start * size : stop * size]])
        disk.log.check()
        with disk.log.whole_or_latched("direct write"):
            for number, (table, host) in enumerate(homes, cluster):
                disk.mapping.link(table, number, host, disk.log, disk.allocator)
                held.linked(number, host)
                disk.touch(number)
            per = disk.geometry.pages_per_cluster
            disk.drop_pages(cluster * per, (cluster + count) * per)
            disk.log.note_data()
    finally:
        held.undo()


def _home_for(disk: Disk, held: Prepared, cluster: int) -> Operation[int]:
    """The host cluster to write: the one it has, where that is exclusively ours, or a reserved one."""
    entry, bitmap = disk.mapping.find(cluster)
    for host in disk.mapping.host_clusters(entry):
        yield from held.pin_block(host)
    held.is_bad(cluster, entry)
    if disk.is_ours(entry, bitmap):
        host = (entry & OFFSET_MASK) >> disk.geometry.cluster_bits
        if disk.allocator.refcount(host) == 1:
            return host
    return (yield from held.reserve())


def _contiguous(hosts: list[int]) -> list[tuple[int, int]]:
    """(start, stop) runs of positions whose host clusters follow each other."""
    runs: list[tuple[int, int]] = []
    for position, host in enumerate(hosts):
        if runs and hosts[position - 1] + 1 == host:
            runs[-1] = (runs[-1][0], position + 1)
        else:
            runs.append((position, position + 1))
    return runs


def zero(disk: Disk, offset: int, length: int, *, trim: bool, may_trim: bool) -> Operation[None]:
    """Make a range read as zeros. `trim`: only whole pages need to; `may_trim`: its clusters may be freed."""
    size = disk.geometry.cluster_size
    end = offset + length
    # The last cluster may be partial: a range that reaches the end of the disk covers it.
    whole_end = -(-end // size) if end == disk.geometry.size else end // size
    first = min(-(-offset // size), max(whole_end, offset // size))
    if whole_end <= first:
        yield from _zero_part(disk, offset, end, trim=trim)
        return
    if offset < first * size:
        yield from _zero_part(disk, offset, first * size, trim=trim)
    yield from _zero_clusters(disk, first, whole_end, may_trim=may_trim)
    if end > whole_end * size:
        yield from _zero_part(disk, whole_end * size, end, trim=trim)


def _zero_part(disk: Disk, offset: int, end: int, *, trim: bool) -> Operation[None]:
    """A part of a cluster: whole pages become zero pages; of a trim, what is smaller is left as it is."""
    size = disk.page_size
    if trim:
        offset = -(-offset // size) * size
        if end != disk.geometry.size:
            end -= end % size
    step = disk.log.ring.pages_at_once * size
    while offset < end:
        stop = min(
            end, (offset // step + 1) * step, (offset // disk.geometry.cluster_size + 1) * disk.geometry.cluster_size
        )
        cluster = offset // disk.geometry.cluster_size
        while not disk.mapping.in_memory(cluster):
            yield from disk.mapping.load_l2(cluster)
        if cluster in disk.pending.clusters or not disk.reads_zero(cluster, *disk.mapping.find(cluster)):
            if stop == disk.geometry.size and stop % size:
                zeros = bytes(-(-stop // size) * size - offset)
            else:
                zeros = bytes(stop - offset)
            yield from write_pending(disk, offset, memoryview(zeros))
        offset = stop


def _zero_clusters(disk: Disk, first: int, end: int, *, may_trim: bool) -> Operation[None]:
    per_table, per_cluster, l1 = disk.geometry.l2_entries, disk.geometry.pages_per_cluster, disk.mapping.l1.entries
    most = (disk.log.ring.max_transaction - BASE_COST) // 2 // (4 * SECTOR_COST + REVOKE_COST)
    most = max(1, min(most, ZERO_CLUSTERS, ZERO_PAGES // per_cluster))
    while first < end:
        table = first // per_table
        if not l1[table] and not disk.has_backing(first):
            # No backing file here is none behind here.
            while (table + 1) * per_table < end and not l1[table + 1]:
                table += 1
            first = yield from _zero_unmapped(disk, first, min(end, (table + 1) * per_table))
        else:
            stop = min(end, (table + 1) * per_table, first + most)
            yield from _zero_mapped(disk, first, stop, may_trim=may_trim)
            first = stop
        if first < end:
            # Nothing is held here: all others get their turn.
            yield PAUSE


def _zero_unmapped(disk: Disk, first: int, end: int) -> Operation[int]:
    """Clusters below L1 entries that name no table, without a backing file: only pending pages are there.

    Returns how far it came: not to the end where the checkpoint has made a table meanwhile.
    """
    per = disk.geometry.pages_per_cluster
    cost = 64 * REVOKE_COST
    # What becomes pending from now on is written while this goes on: it may stay.
    clusters = sorted(each for each in disk.pending.clusters.keys() | disk.excluded if first <= each < end)
    for number, chosen in enumerate(clusters):
        if number and not number % ZERO_CLUSTERS:
            yield PAUSE
        disk.log.check()
        # Order: looked at in the hold in which it is seen that nothing is there: what went home has a table.
        if disk.mapping.l1.entries[chosen // disk.geometry.l2_entries]:
            return first
        if chosen not in disk.pending.clusters and chosen not in disk.excluded:
            continue
        yield from disk.log.take_credits(cost)
        held = Prepared(disk, cost)
        try:
            yield from disk.exclude(chosen, chosen + 1, held.excluded)
            if disk.mapping.l1.entries[chosen // disk.geometry.l2_entries]:
                return first
            disk.drop_pages(chosen * per, (chosen + 1) * per)
            disk.touch(chosen)
            disk.log.running.holds = True
        finally:
            held.undo()
        first = chosen + 1
    return end


def _zero_mapped(disk: Disk, first: int, end: int, *, may_trim: bool) -> Operation[None]:
    cost = (8 + (end - first) * 4) * SECTOR_COST + REVOKE_COST
    cost = min(cost, disk.log.ring.max_transaction - BASE_COST)
    yield from disk.log.take_credits(cost)
    held = Prepared(disk, cost)
    try:
        yield from disk.exclude(first, end, held.excluded)
        table = yield from held.own_l2(first)
        for cluster in range(first, end):
            entry, _ = disk.mapping.find(cluster)
            for host in disk.mapping.host_clusters(entry):
                yield from held.pin_block(host)
            held.is_bad(cluster, entry)
        disk.log.check()
        with disk.log.whole_or_latched("zero"):
            for cluster in range(first, end):
                # Over a backing file zeros must be said: an unallocated cluster would show the backing data again.
                entry, bitmap = disk.mapping.find(cluster)
                needs_flag = disk.has_backing(cluster) or (not may_trim and not disk.reads_zero(cluster, entry, bitmap))
                disk.mapping.unlink(
                    table, cluster, zero=needs_flag, keep=not may_trim, log=disk.log, allocator=disk.allocator
                )
                disk.touch(cluster)
            per = disk.geometry.pages_per_cluster
            disk.drop_pages(first * per, end * per)
            disk.log.running.holds = True
    finally:
        held.undo()


def refuse_out_of_range(disk: Disk, offset: int, length: int) -> None:
    """Raises RequestError where a request does not lie in the disk."""
    if offset < 0 or length < 0 or offset + length > disk.geometry.size:
        raise RequestError(errno.EINVAL, f"{length} bytes at {offset} lie outside a disk of {disk.geometry.size} bytes")
