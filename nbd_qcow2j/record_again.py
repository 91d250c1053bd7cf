"""Pages that keep the tail and cannot go home are recorded once more, so that the tail may pass them.

A page over a cluster that cannot be read (a damaged backing file, a damaged compressed cluster) has its only durable
copy in the ring. If the tail stopped there, the ring would fill up behind it, and then nobody could write, nor even
trim what stands in the way. So the newest versions go into the running transaction, as if they had been written again;
its commit supersedes the old records.

    Crash before the commit: the old records are in the ring still, for the tail has not moved.
    Crash after it: the same page is recorded twice; replay takes the newer, which is the same.

The pages of such clusters are packed, many of them in one transaction, wherever they are recorded. Only where that
leaves room once the tail has been round the ring is it done at all: else the ring would be written round and round for
nothing, and whoever waits is told instead.
"""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

from .steps import Operation, Wait

if TYPE_CHECKING:
    from .disk import Disk
    from .pending import Page

MOST_TRANSACTIONS = 1024
"""That are looked at in one hold."""


def record_again(disk: Disk) -> Operation[bool]:
    """Commit what the tail transaction holds anew; False where that would not help. Raises DeviceFailed."""
    log, ring = disk.log, disk.log.ring
    if not ring.transactions or not _helps(disk):
        return False
    if log.committing is not None:
        # What it holds may supersede the tail's records. Or a page of them may be in it, and be gone from pending.
        yield Wait(log.commit_gate)
        return True
    again = _oldest_records(disk)
    if log.running.pages and len(log.running.pages) + len(again) > ring.most_linked:
        # The reserve holds the links of as many pages as an ordinary transaction has: no tail may have more.
        if not log.may_commit():
            return False
        yield from log.commit()
        return True
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


def _oldest_records(disk: Disk) -> dict[int, Page]:
    """All pages that keep the tail; and, the oldest records first, what else cannot be read, up to half a transaction.

    Each once while the tail goes round: else it would take more room than it frees.
    """
    log, ring = disk.log, disk.log.ring
    if ring.tail >= disk.lap_end:
        disk.lap_end = ring.head
    per, most = disk.geometry.pages_per_cluster, ring.max_transaction // 2 // disk.page_cost
    found: dict[int, Page] = {}
    for number, transaction in enumerate(islice(ring.transactions, MOST_TRANSACTIONS)):
        if number and (len(found) >= most or transaction.start >= disk.lap_end):
            break
        for index in transaction.pages:
            page = log.records.get(index)
            # What was replaced or went home since is in what is running.
            if page is None or page.record is not transaction or disk.pending.get(index) is not page:
                continue
            if not number or (index // per in disk.unreadable and len(found) < most):
                found[index] = page
    return found


def _helps(disk: Disk) -> bool:
    """Whether there would be room for a request if nothing but what cannot be read were in the ring, packed."""
    ring, clusters = disk.log.ring, disk.pending.clusters
    disk.unreadable &= clusters.keys()
    pages = sum(len(clusters[each]) for each in disk.unreadable)
    packed = pages * disk.page_cost * 9 // 8 + 2 * ring.max_transaction
    reserve = ring.reserve_for(len(disk.unreadable) + ring.pages_at_once)
    return packed + reserve + ring.most_cost <= ring.length
