"""Small writes in place: into which clusters, when that is cheaper than the journal, and what it takes.

A write in place goes past the journal, so no version of its pages may be pending or recorded: it would be replayed
over what was written. `begin` and `end` surround it, each in one hold; between them the cluster is excluded, and
lives where it lives.

    Crash before the commit that a flush waits for: any mixture of old and new sectors, as of any write that was
        not flushed. That commit syncs the data first (journal/log.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .format.tables import OFFSET_MASK
from .steps import Operation, Write

if TYPE_CHECKING:
    from .disk import Disk

MANY_OVERWRITES = 32
"""Overwrites a transaction from which an fdatasync costs less than to journal them and to send them home."""
MAX_HOMES = 1 << 16
"""Clusters whose home is remembered: 4 GiB of the default size, 6.5 MiB of memory."""
NEIGHBOURS = 32
"""Clusters that are looked at together."""


class InPlace:
    """What is known of clusters that may be written in place, and of how many overwrites there are."""

    def __init__(self, disk: Disk) -> None:
        self.disk = disk
        self.homes: dict[int, int] = {}
        """Guest cluster -> host offset of a cluster that was found to be ours alone.
        Forgotten (`Disk.touch`) by whoever changes where the cluster lives, in the hold of the change."""
        self.allocated_in = -1
        """Number of the last transaction that has a page whose cluster had no home when it became pending."""
        self._overwrites = self._counted_in = self._overwrites_before = 0
        """Small writes into clusters that have a home: in transaction `_counted_in`, and in the one before it."""
        self._bits = disk.geometry.cluster_bits
        self._below = disk.geometry.cluster_size - 1

    # ---- when

    def prefers(self) -> bool:
        """Whether overwrites go in place now: where nothing else allocates, or where they are many a flush.

        A flush of both kinds pays for an fdatasync, of the checkpoint's data as well, and for the ring; one that
        writes the ring anyhow takes a few overwrites along. 4 KiB random writes over 16 GiB, flush every 32, of
        which one in fifteen met an allocated cluster: in place always, half of the commits began with an fdatasync.
        """
        if not self.disk.settings.in_place:
            return False
        number = self.disk.log.running.number
        if number != self._counted_in:
            self._overwrites_before = self._overwrites if number == self._counted_in + 1 else 0
            self._overwrites, self._counted_in = 0, number
        return number - self.allocated_in > 1 or self._overwrites_before >= MANY_OVERWRITES

    def count(self) -> bool:
        """An overwrite came: whether it goes in place."""
        prefers = self.prefers()
        self._overwrites += 1
        return prefers

    # ---- one write

    def begin(self, offset: int, length: int) -> int:
        """Exclude a cluster that may be written in place, and return the host offset; -1 where it takes more.

        Only where the range has no page that is pending, or whose record may be replayed over what is written.
        """
        cluster = offset >> self._bits
        home = self.homes.get(cluster, -1)
        if home < 0 or not self.count():
            return -1
        disk = self.disk
        if (offset + length - 1) >> self._bits != cluster or disk.log.failed is not None or disk.log.ended:
            return -1
        if cluster in disk.excluded or not self._has_no_version(cluster, offset, length):
            return -1
        disk.excluded.add(cluster)
        return home + (offset & self._below)

    def end(self, offset: int, length: int) -> bool:
        """The write returned. False: a page of the range got a newer version meanwhile, which must be written over.

        The cluster lived where it lives as long as it was excluded. A merge that read a page of it before the
        write returned is told to read again; one that was done has made the page pending: False.
        """
        disk = self.disk
        cluster = offset >> self._bits
        disk.excluded.discard(cluster)
        if disk.exclusion_gate.waiters:
            disk.exclusion_gate.open()
        if cluster in disk.merging:
            disk.read_again(cluster)
        # Order: noted in the hold in which the write is known to have returned, so that the commit that a later
        # flush waits for begins its sync after it.
        disk.log.note_data()
        return self._has_no_version(cluster, offset, length)

    def _has_no_version(self, cluster: int, offset: int, length: int) -> bool:
        """Whether no page of a range is pending or recorded."""
        disk = self.disk
        first = offset >> disk.page_bits
        last = (offset + length - 1) >> disk.page_bits
        pages, log = disk.pending.clusters.get(cluster), disk.log
        if first == last:
            return not ((pages and first in pages) or log.has_record(first))
        return not any((pages and index in pages) or log.has_record(index) for index in range(first, last + 1))

    def write(self, offset: int, view: memoryview) -> Operation[bool]:
        """Write a part of a cluster into its home if it is ours alone; False where it must become pending instead."""
        if not self.prefers() or not (yield from self._learn(offset >> self._bits)):
            return False
        home = self.begin(offset, len(view))
        if home < 0:
            return False
        done = False
        try:
            yield Write(self.disk.file, home, [view])
            done = True
        finally:
            done = self.end(offset, len(view)) and done
        return done

    # ---- where

    def _learn(self, cluster: int) -> Operation[bool]:
        """Whether a cluster's home is known to be ours alone, by its entry and by its refcount."""
        disk = self.disk
        if cluster in self.homes:
            return True
        if cluster in disk.pending.clusters or not disk.mapping.l2_offset(cluster):
            return False
        offset = disk.mapping.l2_offset(cluster)
        reason = yield from disk.allocator.why_bad_table(offset)
        if offset != disk.mapping.l2_offset(cluster):
            return False
        if reason:
            disk.mark_corrupt(f"L1 entry {cluster // disk.geometry.l2_entries} names host offset {offset}, {reason}")
            disk.refuse_corrupt()
        table = yield from disk.mapping.load_l2(cluster)
        if table is None or table.host_offset != offset:
            return False
        entry, bitmap = disk.mapping.find(cluster)
        if not disk.is_ours(entry, bitmap):
            return False
        host = (entry & OFFSET_MASK) >> self._bits
        yield from disk.allocator.load_block(host)
        # Order: looked at again in the hold that remembers it; it may have moved while the block was read.
        if not disk.mapping.in_memory(cluster) or disk.mapping.find(cluster) != (entry, bitmap):
            return False
        if reason := disk.allocator.why_bad(host):
            disk.mark_corrupt(f"guest cluster {cluster} names host cluster {host}, {reason}")
            disk.refuse_corrupt()
        if cluster in disk.excluded or disk.corrupt or disk.allocator.refcount(host) != 1:
            return False
        if len(self.homes) >= MAX_HOMES:
            self.homes.clear()
        self.homes[cluster] = entry & OFFSET_MASK
        self._learn_neighbours(cluster)
        return True

    def _learn_neighbours(self, cluster: int) -> None:
        """In the same hold, what can be said of those around without a wait: to learn each by itself costs more."""
        disk = self.disk
        allocator, overlaps = disk.allocator, disk.allocator.overlaps
        first = cluster - cluster % NEIGHBOURS
        for each in range(first, min(first + NEIGHBOURS, disk.geometry.clusters)):
            table, entry = disk.find_own(each)
            if table is None or not entry or each in disk.excluded or each in self.homes:
                continue
            if table.host_offset >> self._bits not in overlaps.counted:
                continue
            host = (entry & OFFSET_MASK) >> self._bits
            if allocator.block(host) is not None and allocator.refcount(host) == 1 and not overlaps.what(host):
                self.homes[each] = entry & OFFSET_MASK
