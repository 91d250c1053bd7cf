"""What goes home next, and when the tail may move. One round:

    1  pick clusters with pending pages, oldest first; fix the tail target and copy the set of committed
       metadata sectors, now: neither is derived later from what has changed meanwhile
    2  read what lies beneath where a cluster gets a new home, once
    3  write pages and sectors home, in host order, with the clean sectors of a table between two of them; fdatasync
       through a file description of its own
    4  a few clusters a hold: link what was written into the *running* transaction; a page that is still the
       page written is home elsewhere, one that was replaced keeps its record and its place
    5  write the header slot with the new tail, synchronously; then the space may be used again

    Crash in 1 to 3: the new clusters have refcount zero; sectors at home are those of the journal, clean ones are
        what they were.
        A page written over a cluster that is ours alone is in the journal as well, or was not flushed.
    Crash after 4: the journal's records are replayed until the links are committed.
    Crash in 5: the slot is torn or old; the other one holds, and everything it needs is still in the ring.

The ring is *tight* when nothing but freeing its tail may go on. Then a round takes all clusters of the tail
transaction and nothing else, needs no credits (the reserve is for it), and its commit is not waited for by
anything that it needs itself. What keeps the tail and cannot be read is recorded again (record_again.py). So a full
ring always drains, unless most of it cannot go home.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from operator import itemgetter
from typing import TYPE_CHECKING

from .errors import NO_ROOM, Error, ImageError, RequestError
from .geometry import SECTOR
from .going import Going, link, prepare, prepare_simply
from .prepared import Prepared
from .record_again import record_again
from .steps import Batch, Operation, Pause, Step, Sync, Wait, Write, WriteSync

if TYPE_CHECKING:
    from .disk import Disk
    from .journal.transaction import CommittedTransaction

BATCH_CLUSTERS = 32
BATCH_PAGES = 256
"""What one round sends home: the disk is busy with its fdatasync, and a flush that comes has to wait for the disk.
4 KiB random writes, depth 16, flush every 32: 99th percentile of a flush 3.3 ms with 32 clusters a round, 3.9 with
64, 5.8 with 256; writes a second as many."""
MOST_CLUSTERS = 256
"""As many where each cluster has a commit of its own: then a round that is longer makes fewer flushes wait. The same
with a flush each: 99th percentile 1.0 ms with 64, 0.7 with 256."""
HOLD_CLUSTERS = 16
"""Clusters that are prepared, or linked, in one hold of the lock at most: some 100 us, for which a flush may have to
wait. As many as a commit brought: where each has its own, one. Who pauses gives the interpreter lock away as well, and
what a flush waits for at worst is that. With a flush each on slow cores: 99th percentile 2.3 ms with 16, 1.1 to 1.5
with 1, and about as many writes; depth 16, flush every 32: 4,400 writes a second with 16, 3,430 with 1."""
HURRY_FROM = 0.65
"""Fill from which as many as may be: pauses must not be why the ring fills up. Between `checkpoint-start` and the fill
at which writers are slowed down; chosen, not measured."""
GAP_BYTES = 16 << 10
"""Clean sectors between two that go home which are written with them. 4 KiB random writes over 16 GiB, a flush each:
nine in ten sectors went home by a call of their own, one in thirty does so, and what the disk gets is contiguous."""
HOLD_SECTORS, HOLD_WRITTEN = 64, 256
"""Metadata sectors that are looked at, and that are noted to be home, in one hold."""
BATCH_WRITES = 32
PAUSE = Pause()


def round_(
    disk: Disk, *, tight: bool = False, clusters: int = MOST_CLUSTERS, least_bytes: int = 0, again: bool = False
) -> Operation[bool]:
    """One round; True when it did anything. Raises DeviceFailed.

    No room in the host file system, and a read that fails, are no loss: the clusters they meet stay pending. Where
    nothing else can be done: False, and who waits for the tail is told.
    With `again` pages that keep the tail and cannot be read beneath are recorded once more, that others may go on.
    The tail moves only if that frees `least_bytes` of the ring: a metadata sector that changes often goes home
    once for many changes.
    """
    log, ring = disk.log, disk.log.ring
    log.check()
    passable = ring.passable()
    if passable and ring.transactions[passable - 1].end - ring.tail < least_bytes:
        passable = 0
    chosen: list[int] = []
    hold = HOLD_CLUSTERS
    if not tight:
        chosen, commits = _oldest(disk, clusters)
        if max(fill(disk), disk.pending.count / disk.pending_most) < HURRY_FROM:
            hold = max(1, min(HOLD_CLUSTERS, len(chosen) // max(1, commits)))
    elif not passable:
        chosen = _tail_clusters(disk)
    cost = 0
    if chosen and not tight:
        cost = len(chosen) * ring.home_cost
        if not log.try_credits(cost):
            if log.running.in_ring and log.committing is None and log.may_commit():
                yield from log.commit()
            if not log.try_credits(cost):
                chosen, cost = [], 0
    if not chosen and not passable:
        if tight and log.committing is not None:
            # What supersedes the tail's records may be on its way: what the tail is then is seen when it is there.
            yield Wait(log.commit_gate)
            return True
        if tight and not log.running.empty and log.may_commit():
            # What supersedes the tail's records is only in the running transaction.
            yield from log.commit()
            return True
        if tight and not log.running.empty and not chosen:
            # Every wait ends: by the reserve this is never so; a journal that is damaged, or older, may be.
            log.starve(RequestError(errno.ENOSPC, "the journal is too full for what would empty it"))
        return False
    held = Prepared(disk, cost, relocate=True)
    # Order: copied in the hold in which the epoch was entered. A metadata cluster that was freed before is not in
    # it any more; one that is freed from now on is not used again before this round is over.
    home = dict(log.home) if passable else {}
    left: Error | None = None
    try:
        going: list[Going] = []
        for number, cluster in enumerate(chosen):
            if number and not number % hold:
                yield PAUSE
            # Before the cluster is prepared somebody else may have excluded or emptied it.
            if tight:
                yield from disk.exclude(cluster, cluster + 1, held.excluded)
            elif cluster in disk.excluded:
                continue
            else:
                disk.excluded.add(cluster)
                held.excluded.append(cluster)
            if cluster in disk.pending.clusters:
                try:
                    going.append(prepare_simply(disk, held, cluster) or (yield from prepare(disk, held, cluster)))
                    disk.unreadable.discard(cluster)
                except (RequestError, ImageError, OSError) as error:
                    # What cannot be read, or finds no room, stays pending, after those that were not tried yet:
                    # nothing is lost, and others may not need what it lacks.
                    left = _no_loss(error)
                    if left.errno not in NO_ROOM:
                        disk.unreadable.add(cluster)
                    held.abandon(cluster)
                    disk.pending.postpone(cluster)
        try:
            gaps = yield from _clean_between(disk, home)
            yield from _write_home(disk, going, home, gaps)
        except OSError as error:
            left = _no_loss(error)
            # One of them lies in a hole of the host file, perhaps: the others need no room. Each by itself.
            together, going = going, []
            for each in together:
                try:
                    yield from _write_home(disk, [each], {})
                    going.append(each)
                except OSError as alone:
                    left = _no_loss(alone)
                    held.abandon(each.cluster)
                    disk.pending.postpone(each.cluster)
            yield from _write_home(disk, [], home)
        if left is not None and not going and not passable:
            # Order: what this round took and did not need is no reason to call the ring tight.
            held.spend(held.cost)
            if not tight and is_tight(disk):
                # Whoever began to wait meanwhile is told only when the round for that has failed as well.
                return True
            # Not what finds no room: that is no property of these pages, and others would find none either.
            if tight and again and left.errno not in NO_ROOM and (yield from record_again(disk)):
                return True
            log.starve(left)
            return False
        if going or home:
            mark = log.data_counter
            try:
                yield Sync(disk.background)
            except OSError as error:
                # Whatever its errno, a failed sync is a lost write: it is never tried again and believed.
                raise _Synchronous(*error.args) from error
            log.synced_mark = max(log.synced_mark, mark)
        log.check()
        for number, each in enumerate(going, 1):
            with log.whole_or_latched("checkpoint"):
                link(disk, each)
                held.linked(each.cluster, each.host)
                log.running.holds = True
            if not number % hold:
                # What is linked is counted by the running transaction itself.
                held.spend(hold * ring.home_cost)
                yield PAUSE
                log.check()
        disk.checkpoint_clusters += len(going)
        if passable:
            yield from _move_tail(disk, passable, home)
        disk.checkpoints += 1
    except OSError as error:
        if error.errno in NO_ROOM and not isinstance(error, _Synchronous):
            log.starve(_no_loss(error))
            return False
        raise log.latch(error, "checkpoint") from error
    except (Error, GeneratorExit):
        raise
    except BaseException as error:
        # In this hold: nothing may be committed on top of a change that was left half-way.
        raise log.latch(error, "checkpoint") from error
    finally:
        # Its traceback leads to this frame, and so to all that went home.
        left = None
        held.undo()
    if tight and going and log.committing is None and not log.running.empty and log.may_commit():
        yield from log.commit()
    return True


def _no_loss(error: Error | OSError) -> Error:
    """The error, where nothing is lost by it; raises what may be a lost write."""
    if isinstance(error, Error):
        return error
    if error.errno in NO_ROOM and not isinstance(error, _Synchronous):
        return RequestError(errno.ENOSPC, "no room in the host file system")
    raise error


class _Synchronous(OSError):
    """An error of a synchronous write or a sync: a lost write, whatever its errno."""


def _oldest(disk: Disk, most: int) -> tuple[list[int], int]:
    """BATCH_CLUSTERS, two more for each commit that their pages are of, and not many more than BATCH_PAGES pages.

    Their links take half of a transaction at most: the other half is the writers'. With them, of how many commits.
    """
    ring, excluded = disk.log.ring, disk.excluded
    most = max(1, min(most, ring.max_transaction // 2 // ring.home_cost))
    enough = min(BATCH_CLUSTERS, most)
    found: list[int] = []
    count = commits = 0
    last: CommittedTransaction | None = None
    for cluster, pages in disk.pending.clusters.items():
        if cluster not in excluded:
            found.append(cluster)
            count += len(pages)
            record = next(iter(pages.values())).record
            if record is not last:
                last = record
                commits += 1
                enough = min(enough + 2, most)
            if len(found) >= enough or count >= BATCH_PAGES:
                break
    return sorted(found), commits


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


def _clean_between(disk: Disk, home: dict[int, tuple[bytes, int]]) -> Operation[list[tuple[int, bytes]]]:
    """(host offset, content) of what lies between two sectors that go home, in one table, and is at home already.

    Crash: whatever part of it is written, it is what was there.
    """
    log, tables, size, overlaps = disk.log, disk.cache.tables, disk.cache.table_size, disk.allocator.overlaps
    found: list[tuple[int, bytes]] = []
    end = -1
    for number, offset in enumerate(sorted(home)):
        if not number % HOLD_SECTORS:
            if number:
                yield PAUSE
            # Order: looked at in this hold. A commit that has failed is in neither transaction, and what it held is in
            # the live tables still: nothing of these goes home any more.
            log.check()
            # What is not committed is in memory only, and must not come home before its transaction is.
            uncommitted = {*log.running.sectors, *(log.committing.sectors if log.committing is not None else ())}
        if end < offset <= end + GAP_BYTES and end // size == offset // size:
            table = tables.get(offset - offset % size)
            # In a damaged image an L2 table may lie on the table that this is a sector of, and be older.
            if overlaps.what_else(offset - offset % size):
                table = None
            if table is not None and uncommitted.isdisjoint(range(end, offset, SECTOR)):
                found.append((end, table.sector_bytes(end, offset - end)))
        end = offset + SECTOR
    return found


def _write_home(
    disk: Disk, going: list[Going], home: dict[int, tuple[bytes, int]], gaps: Sequence[tuple[int, bytes]] = ()
) -> Operation[None]:
    """Everything in host order, what is contiguous in one call."""
    writes: list[tuple[int, bytes | bytearray]] = [each for one in going for each in one.writes]
    # The *committed* copy of a sector goes home, never the live table: that holds what is not committed.
    writes += [(offset, entry[0]) for offset, entry in home.items()]
    writes += gaps
    writes.sort(key=itemgetter(0))
    start, end = -1, -1
    buffers: list[bytes | bytearray] = []
    steps: list[Step] = []
    for offset, data in writes:
        if offset != end:
            if buffers:
                steps.append(Write(disk.background, start, buffers))
                # Some at once: to come back for each costs more than the write. Not all: who flushes waits meanwhile.
                if len(steps) == BATCH_WRITES:
                    yield Batch(steps)
                    steps = []
            start, buffers = offset, []
        buffers.append(data)
        end = offset + len(data)
        disk.checkpoint_bytes += len(data)
    if buffers:
        steps.append(Write(disk.background, start, buffers))
        yield Batch(steps)


def _move_tail(disk: Disk, count: int, home: dict[int, tuple[bytes, int]]) -> Operation[None]:
    log, ring = disk.log, disk.log.ring
    written = list(home.items())
    for at in range(0, len(written), HOLD_WRITTEN):
        if at:
            yield PAUSE
            log.check()
        log.home_written(written[at : at + HOLD_WRITTEN])
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
    log.check()
    if log.committing is not None:
        yield Wait(log.commit_gate)
    log.check()
    if log.committing is None and not log.running.empty and log.may_commit():
        yield from log.commit()


def is_tight(disk: Disk) -> bool:
    """Whether only freeing the tail may go on."""
    ring, running = disk.log.ring, disk.log.running
    return not ring.has_room(running=running.size, cost=ring.most_cost, clusters=ring.pages_at_once)


def fill(disk: Disk) -> float:
    """How full ring and pending table are, 0 to 1: what pacing follows."""
    ring = disk.log.ring
    return (ring.used + disk.log.running.size) / max(1, ring.length - ring.reserve)


def drain(disk: Disk) -> Operation[None]:
    """Send everything home and move the tail to the head: the device is closing.

    Raises DeviceFailed; RequestError (ENOSPC) when nothing more can go home: it ends, it does not wait for room.
    """
    log = disk.log
    while True:
        log.check()
        done = True
        if not disk.pending.clusters and (not log.running.empty or log.committing is not None):
            if log.committing is not None or log.may_commit():
                yield from log.commit_upto(log.last_number())
            else:
                done = yield from round_(disk, tight=True)
        elif disk.pending.clusters or log.ring.transactions:
            done = (yield from round_(disk, tight=is_tight(disk))) or (yield from round_(disk, tight=True))
        elif disk.epochs.releasable:
            yield from disk.allocator.release()
        else:
            return
        if not done:
            # Also what no flush asked for is kept, if the ring has room for it.
            yield from settle(disk)
            reason = log.starved_of
            raise RequestError(
                reason.errno,
                f"not everything can go home: {reason}; the image stays attached; what was flushed is in its journal "
                "and nothing of it is lost; mend that, then serve the image again or run nbd-qcow2j recover",
            )
