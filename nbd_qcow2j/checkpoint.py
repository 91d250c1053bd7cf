"""What goes home next, and when the tail may move. One round:

    1  pick clusters with pending pages, oldest first; fix the tail target and copy the set of committed
       metadata sectors, now: neither is derived later from what has changed meanwhile
    2  read what lies beneath where a cluster gets a new home, once
    3  write pages and sectors home, in host order; fdatasync through a file description of its own
    4  in one hold: link what was written into the *running* transaction; a page that is still the page
       written is home elsewhere, one that was replaced keeps its record and its place
    5  write the header slot with the new tail, synchronously; then the space may be used again

    Crash in 1 to 3: the new clusters have refcount zero; sectors at home are those of the journal.
    Crash after 4: the journal's records are replayed until the links are committed.
    Crash in 5: the slot is torn or old; the other one holds, and everything it needs is still in the ring.

The ring is *tight* when nothing but freeing its tail may go on. Then a round takes all clusters of the tail
transaction and nothing else, needs no credits (the reserve is for it), and its commit is not waited for by
anything that it needs itself. A full ring always drains.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .changes import Prepared
from .format.tables import OFFSET_MASK
from .pending import Page
from .steps import Operation, Step, Sync, Wait, Write, WriteSync

if TYPE_CHECKING:
    from .disk import Disk
    from .image.tables import Table

BATCH_CLUSTERS = 256


@dataclass(slots=True)
class _Going:
    """A guest cluster on its way home. `host` is None where it becomes zero or stays as it is."""

    cluster: int
    pages: dict[int, Page]
    table: Table | None = None
    host: int | None = None
    fresh: bool = False
    to_zero: bool = False
    writes: list[tuple[int, bytes | bytearray]] = field(default_factory=list)


def round_(
    disk: Disk, *, tight: bool = False, clusters: int = BATCH_CLUSTERS, move_tail: bool = True
) -> Operation[bool]:
    """One round; True when it did anything. Raises DeviceFailed; an ENOSPC of the home writes is no loss: False."""
    log, ring = disk.log, disk.log.ring
    log.check()
    passable = ring.passable() if move_tail else 0
    chosen = _tail_clusters(disk) if tight and not passable else _oldest(disk, clusters) if not tight else []
    cost = 0
    if chosen and not tight:
        cost = len(chosen) * ring.home_cost
        if not log.try_credits(cost):
            if log.running.in_ring and log.committing is None and log.may_commit():
                yield from log.commit()
            chosen = chosen[: max(1, min(len(chosen), (ring.max_transaction // 2) // ring.home_cost))]
            cost = len(chosen) * ring.home_cost
            if not log.try_credits(cost):
                chosen, cost = [], 0
    if not chosen and not passable:
        if tight and not log.running.empty and log.committing is None and log.may_commit():
            # What supersedes the tail's records is only in the running transaction.
            yield from log.commit()
            return True
        return False
    # Order: copied in the hold that enters the epoch. A commit above may have freed a table: its cluster may be given
    # back and reused, and an older copy would write the table's sectors over what is there now.
    home = dict(log.home) if passable else {}
    held = Prepared(disk, cost)
    try:
        going: list[_Going] = []
        for cluster in chosen:
            # Before the cluster is prepared somebody else may have excluded or emptied it.
            if tight:
                yield from disk.exclude(cluster, cluster + 1, held.excluded)
            elif cluster in disk.excluded:
                continue
            else:
                disk.excluded.add(cluster)
                held.excluded.append(cluster)
            if cluster in disk.pending.clusters:
                going.append((yield from _prepare(disk, held, cluster)))
        yield from _write_home(disk, going, home)
        if going or home:
            mark = log.data_counter
            try:
                yield Sync(disk.background)
            except OSError as error:
                # Whatever its errno, a failed sync is a lost write: it is never tried again and believed.
                raise _Synchronous(*error.args) from error
            log.synced_mark = max(log.synced_mark, mark)
        log.check()
        for each in going:
            _link(disk, each)
        held.linked()
        if going:
            disk.checkpoint_clusters += len(going)
            log.running.holds = True
        if passable:
            yield from _move_tail(disk, passable, home)
        disk.checkpoints += 1
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT) and not disk.log.failed and not isinstance(error, _Synchronous):
            return False
        raise log.latch(error, "checkpoint") from error
    finally:
        held.undo()
    if tight and going and log.committing is None and not log.running.empty and log.may_commit():
        yield from log.commit()
    return True


class _Synchronous(OSError):
    """An error of a synchronous write or a sync: a lost write, whatever its errno."""


def _oldest(disk: Disk, most: int) -> list[int]:
    found: list[int] = []
    for cluster in disk.pending.clusters:
        if cluster not in disk.excluded:
            found.append(cluster)
            if len(found) == most:
                break
    return sorted(found)


def _tail_clusters(disk: Disk) -> list[int]:
    """All clusters whose pages keep the tail where it is."""
    if not disk.log.ring.transactions:
        return []
    tail = disk.log.ring.transactions[0]
    per = disk.geometry.pages_per_cluster
    found = set()
    for index in tail.pages:
        page = disk.log.records.get(index)
        if page is not None and page.record is tail and disk.pending.get(index) is not None:
            found.add(index // per)
    return sorted(found)


def _prepare(disk: Disk, held: Prepared, cluster: int) -> Operation[_Going]:
    """Decide where a cluster goes, and what has to be written there."""
    geometry = disk.geometry
    pages = dict(disk.pending.clusters[cluster])
    going = _Going(cluster, pages)
    whole = min(geometry.pages_per_cluster, geometry.pages - cluster * geometry.pages_per_cluster) == len(pages)
    zero_page = disk.pending.zero_page
    zeros = [page.data == zero_page for page in pages.values()]
    while not disk.mapping.in_memory(cluster):
        yield from disk.mapping.load_l2(cluster)
    entry, bitmap = disk.mapping.find(cluster)
    if all(zeros) and not disk.has_backing(cluster) and not entry and not bitmap:
        return going
    going.table = table = yield from held.own_l2(cluster)
    entry, bitmap = disk.mapping.find(cluster)
    for host in disk.mapping.host_clusters(entry):
        yield from held.pin_block(host)
    if all(zeros) and (whole or disk.reads_zero(cluster, entry, bitmap)):
        going.to_zero = True
        return going
    old = (entry & OFFSET_MASK) >> geometry.cluster_bits
    ours = disk.is_ours(entry, bitmap) and disk.allocator.refcount(old) == 1
    content: bytearray | None = None
    if not whole and (any(zeros) if ours else not disk.reads_zero(cluster, entry, bitmap)):
        content = yield from disk.read_beneath(cluster)
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
        base = cluster * geometry.pages_per_cluster
        for index in sorted(pages):
            going.writes.append((start + (index - base) * geometry.page_size, pages[index].data))
    return going


def _write_home(disk: Disk, going: list[_Going], home: dict[int, tuple[bytes, int]]) -> Operation[None]:
    """Everything in host order, what is contiguous in one call."""
    writes: list[tuple[int, bytes | bytearray]] = [each for one in going for each in one.writes]
    # The *committed* copy of a sector goes home, never the live table: that holds what is not committed.
    writes += [(offset, entry[0]) for offset, entry in home.items()]
    writes.sort(key=lambda each: each[0])
    start, end = -1, -1
    buffers: list[bytes | bytearray] = []
    steps: list[Step] = []
    for offset, data in writes:
        if offset != end:
            if buffers:
                steps.append(Write(disk.background, start, buffers))
            start, buffers = offset, []
        buffers.append(data)
        end = offset + len(data)
        disk.checkpoint_bytes += len(data)
    if buffers:
        steps.append(Write(disk.background, start, buffers))
    yield from steps


def _link(disk: Disk, going: _Going) -> None:
    """In the hold of the whole round: the cluster's new home, and its pages home elsewhere."""
    log, cluster = disk.log, going.cluster
    if going.table is not None:
        if going.to_zero:
            disk.mapping.unlink(
                going.table, cluster, zero=disk.has_backing(cluster), keep=False, log=log, allocator=disk.allocator
            )
        elif going.fresh and going.host is not None:
            disk.mapping.link(going.table, cluster, going.host, log, disk.allocator)
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


def _move_tail(disk: Disk, count: int, home: dict[int, tuple[bytes, int]]) -> Operation[None]:
    log, ring = disk.log, disk.log.ring
    log.home_written(home)
    slot = ring.slot_after(count)
    # Order: the metadata that the passed transactions held is durable at home (the sync before); the slot is
    # durable before their space is used again.
    try:
        yield WriteSync(disk.background, ring.slot_offset(slot.generation), [slot.to_block()])
    except OSError as error:
        raise _Synchronous(*error.args) from error
    ring.move_tail(count, slot.generation)
    log.room_gate.open()


def settle(disk: Disk) -> Operation[None]:
    """Commit what a round has linked, if that can be done now.

    Never waits for ring room: only the checkpoint makes room, and it is the checkpoint that calls this.
    """
    log = disk.log
    if log.committing is not None:
        yield Wait(log.commit_gate)
    log.check()
    if log.committing is None and not log.running.empty and log.may_commit():
        yield from log.commit()


def is_tight(disk: Disk) -> bool:
    """Whether only freeing the tail may go on."""
    ring, running = disk.log.ring, disk.log.running
    return not ring.has_room(running=running.size, cost=ring.max_transaction // 2)


def fill(disk: Disk) -> float:
    """How full ring and pending table are, 0 to 1: what pacing follows."""
    ring = disk.log.ring
    return (ring.used + disk.log.running.size) / max(1, ring.length - ring.reserve)


def drain(disk: Disk) -> Operation[None]:
    """Send everything home and move the tail to the head: the device is closing. Raises DeviceFailed."""
    log = disk.log
    while True:
        log.check()
        if disk.pending.clusters:
            done = yield from round_(disk, tight=is_tight(disk))
            if not done:
                done = yield from round_(disk, tight=True)
        elif not log.running.empty or log.committing is not None:
            yield from log.commit_upto(log.last_number())
        elif log.ring.transactions:
            done = yield from round_(disk)
        elif disk.epochs.releasable:
            yield from disk.allocator.release()
        else:
            return
