"""Pages that keep the tail and cannot go home are recorded once more, so that the tail may pass them.

A page over a cluster that cannot be read (a damaged backing file, a damaged compressed cluster) has its only durable
copy in the ring. If the tail stopped there, the ring would fill up behind it, and then nobody could write, nor even
trim what stands in the way. So the newest versions go into the running transaction, as if they had been written again;
its commit supersedes the old records.

    Crash before the commit: the old records are in the ring still, for the tail has not moved.
    Crash after it: the same page is recorded twice; replay takes the newer, which is the same.

The pages of such clusters are packed into one transaction, wherever they are recorded. Only where that leaves room
once the tail has been round the ring is it done at all: else the ring would be written round and round for nothing,
and whoever waits is told instead.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .steps import Operation, Wait

if TYPE_CHECKING:
    from .disk import Disk


def record_again(disk: Disk) -> Operation[bool]:
    """Commit what the tail transaction holds anew; False where that would not help. Raises DeviceFailed."""
    log, ring = disk.log, disk.log.ring
    if not ring.transactions or not _helps(disk):
        return False
    if log.committing is not None:
        # What it holds may supersede the tail's records. Or a page of them may be in it, and be gone from pending.
        yield Wait(log.commit_gate)
        return True
    tail = ring.transactions[0]
    recorded = {index: page for index in tail.pages if (page := log.records.get(index)) is not None}
    # Of the tail all that keeps it; what was replaced or went home since is in what is running.
    again = {at: page for at, page in recorded.items() if page.record is tail and disk.pending.get(at) is page}
    for cluster in disk.unreadable:
        pages = {at: page for at, page in disk.pending.clusters[cluster].items() if log.records.get(at) is page}
        if len(again.keys() | pages.keys()) * disk.page_cost > ring.max_transaction // 2:
            break
        again.update(pages)
    # The reserve is for this: one transaction of the largest size beyond what is running.
    if ring.used + log.running.size + ring.outstanding + len(again) * disk.page_cost > ring.length:
        return False
    # Order: noted and closed in one hold. A page that is replaced or goes home later finds its record committing.
    for index, page in again.items():
        log.running.note_page(index, page)
    if not log.may_commit():
        for index in again:
            log.running.forget_page(index)
        return False
    yield from log.commit()
    return True


def _helps(disk: Disk) -> bool:
    """Whether there would be room for a request if nothing but what cannot be read were in the ring, packed."""
    ring, clusters = disk.log.ring, disk.pending.clusters
    disk.unreadable &= clusters.keys()
    pages = sum(len(clusters[each]) for each in disk.unreadable)
    packed = pages * disk.page_cost * 9 // 8 + 2 * ring.max_transaction
    reserve = ring.reserve_for(len(disk.unreadable) + ring.pages_at_once)
    return packed + reserve + ring.most_cost <= ring.length
