"""The block device: its state, exclusion, what is pending, flush. Reading is in `reading.py`, changing in `changes.py`.

Everything here runs in one hold of the state lock between two yields (steps.py). Reads and pending writes
never wait for the exclusion of a cluster; whoever changes where a cluster lives, or writes its home, does.

    Invariant 5: pending pages first, then the mapping, in one hold.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from . import reading
from .errors import RequestError
from .format.header_rewrite import set_corrupt
from .format.tables import (
    ALL_SUBCLUSTERS,
    L1_RESERVED,
    NORMAL,
    OFFSET_MASK,
    OFLAG_COPIED,
    UNALLOCATED,
    ZERO_ALLOC,
    ZERO_PLAIN,
)
from .geometry import Geometry
from .image.backing import Extent, Layer
from .in_place import InPlace
from .journal.ring import PAGES_AT_ONCE
from .pending import Page, PendingPages
from .steps import Buffer, Gate, Operation, Wait

if TYPE_CHECKING:
    from .image.allocator import Allocator
    from .image.mapping import Mapping
    from .image.tables import Table, TableCache
    from .journal.log import Log
    from .storage import Storage


ALL_BITS = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Settings:
    """What the engine may be told; sizes in bytes. Defaults are those of options.py."""

    journal_size: int = 32 << 20
    direct_write: int = 64 << 10
    in_place: bool = True
    l2_cache: int = 16 << 20
    pending_limit: int = 64 << 20
    discard: bool = True


def _pages(data: Buffer, size: int) -> Sequence[Page]:
    return [Page(bytes(data[at : at + size])) for at in range(0, len(data), size)]


class Disk:
    """State of an open image. Made by `opening.py`."""

    def __init__(
        self, *, name: str, geometry: Geometry, file: Storage, background: Storage, mapping: Mapping, cache: TableCache,
        allocator: Allocator, log: Log, backing: Layer | None, compression_type: int, settings: Settings,
        read_only: bool,
    ) -> None:  # fmt: skip
        self.name, self.geometry, self.file, self.background = name, geometry, file, background
        self.mapping, self.cache, self.allocator, self.log = mapping, cache, allocator, log
        self.backing, self.compression_type, self.settings, self.read_only = (
            backing,
            compression_type,
            settings,
            read_only,
        )
        self.epochs = log.epochs
        self.pending = PendingPages(geometry)
        log.ring.waiting = self.pending.clusters
        self.pending_most = max(settings.pending_limit >> geometry.page_size.bit_length() - 1, 2 * PAGES_AT_ONCE)
        """Pages that may be pending; a replay may leave more, then writers wait. At least two operations' worth, so
        that whoever waits finds the checkpoint at work (it begins at half)."""
        self.incoming = 0
        """Pages for which operations in flight have taken room in the pending table."""
        self.cluster_tokens: set[int] = set()
        """Pending guest clusters that hold a pool cluster's token."""
        self.table_tokens: dict[int, int] = {}
        """L1 index that holds one, for an L2 table -> pending clusters that will need it."""
        self.owning: list[int] = []
        """L1 indexes whose L2 table is being made ours: who does that may count on its token."""
        self.excluded: set[int] = set()
        self.unreadable: set[int] = set()
        """Pending clusters that could not go home for what cannot be read; some may have gone since."""
        self.lap_end = 0
        """Position in the ring from which on their pages are recorded again already (record_again.py)."""
        self.exclusion_gate = Gate("cluster exclusion")
        self.merging: dict[int, list[list[bool]]] = {}
        """Guest cluster -> flags of read-modify-writes in flight; set when what they read may be old."""
        self.in_place = InPlace(self)
        self.page_size = geometry.page_size
        self.page_cost = log.running.page_cost
        self.page_bits = geometry.page_size.bit_length() - 1
        # The fast paths read these instead of going through three objects: a pending write costs 3 us in all.
        self._bits = geometry.cluster_bits
        self._below = geometry.cluster_size - 1
        self._l2_bits = geometry.l2_entries.bit_length() - 1
        self._l2_mask = geometry.l2_entries - 1
        self._l1 = mapping.l1.entries
        self._tables = cache.tables
        self._ring_low, self._ring_high = mapping.ring_low, mapping.ring_high
        self._host_mask = OFFSET_MASK & ~self._below
        # An extended entry says too little by itself.
        self._not_plain = ALL_BITS if geometry.extended_l2 else ALL_BITS & ~(OFLAG_COPIED | self._host_mask)
        self.cow_read_bytes = 0
        self.checkpoint_clusters = self.checkpoint_bytes = self.checkpoints = 0
        self.replayed_transactions = 0
        self.corrupt = ""
        """Why the image is marked corrupt: no more writes, reads go on, what was accepted goes home."""
        allocator.on_corrupt = self.mark_corrupt

    # ---- corruption

    def mark_corrupt(self, reason: str) -> None:
        """Set the corrupt bit, in the running transaction. Spec: "Header", incompatible bit 1."""
        if self.corrupt:
            return
        self.corrupt = reason
        # What was learned before is not to be used: the way in place goes through here no more.
        self.in_place.homes.clear()
        header = self.allocator.header
        header.data = set_corrupt(header.data)
        # No credits: the ring's slack covers one sector. Crash: a mark that was not committed is made again when
        # the damage is met again; nothing was written over it.
        self.log.running.note_sector(0, header)

    def refuse_corrupt(self) -> None:
        """Raises RequestError (EIO) once the image is marked corrupt."""
        if self.corrupt:
            raise RequestError(
                errno.EIO, f"{self.name} is marked corrupt and takes no more writes, reading goes on: {self.corrupt}; "
                "close it, then look at it with nbd-qcow2j check",
            )  # fmt: skip

    # ---- exclusion

    def exclude(self, first: int, end: int, taken: list[int]) -> Operation[None]:
        """Keep others from changing where these guest clusters live; what was taken is noted for `admit`."""
        for cluster in range(first, end):
            while cluster in self.excluded:
                yield Wait(self.exclusion_gate)
            self.excluded.add(cluster)
            taken.append(cluster)

    def admit(self, taken: list[int]) -> None:
        if taken:
            self.excluded.difference_update(taken)
            self.exclusion_gate.open()

    # ---- what lies where

    def pages_in(self, cluster: int) -> int:
        """Pages of a guest cluster: fewer in the last one of a disk that is no multiple of it."""
        per = self.geometry.pages_per_cluster
        return min(per, self.geometry.pages - cluster * per)

    def has_backing(self, cluster: int) -> bool:
        """Whether the backing file has anything for a guest cluster."""
        return self.backing is not None and cluster << self.geometry.cluster_bits < self.backing.size

    def is_ours(self, entry: int, bitmap: int) -> bool:
        """Whether a cluster may be written in place, as far as its entry says: all allocated, refcount one."""
        return bool(
            entry & OFLAG_COPIED and self.mapping.kind(entry, bitmap) == NORMAL
            and (not self.geometry.extended_l2 or bitmap & ALL_SUBCLUSTERS == ALL_SUBCLUSTERS)
        )  # fmt: skip

    def reads_zero(self, cluster: int, entry: int, bitmap: int) -> bool:
        """Whether a cluster is known to read as zeros, pending pages aside."""
        kind = self.mapping.kind(entry, bitmap)
        if kind in (ZERO_PLAIN, ZERO_ALLOC):
            return True
        return kind == UNALLOCATED and bitmap & ALL_SUBCLUSTERS == 0 and not self.has_backing(cluster)

    # ---- reading

    def find_contiguous(self, offset: int, length: int) -> int:
        """Host offset of a range in one allocated cluster with nothing pending; -1 where it takes more."""
        bits = self._bits
        cluster = offset >> bits
        if (offset + length - 1) >> bits != cluster or cluster in self.pending.clusters:
            return -1
        l1_entry = self._l1[cluster >> self._l2_bits]
        table = self._tables.get(l1_entry & OFFSET_MASK)
        if table is None or l1_entry & L1_RESERVED:
            return -1
        entry = table.entries[cluster & self._l2_mask]
        host = entry & self._host_mask
        # An entry into the ring is refused, in words, on the long way.
        if not host or entry & self._not_plain or self._ring_low <= host < self._ring_high:
            return -1
        return host + (offset & self._below)

    def find_own(self, cluster: int) -> tuple[Table | None, int]:
        """The L2 table, if it is ours alone and in memory, and a plain entry of ours or 0; (None, 0) otherwise."""
        l1_entry = self._l1[cluster >> self._l2_bits]
        table = self._tables.get(l1_entry & OFFSET_MASK)
        if table is None or not l1_entry & OFLAG_COPIED or l1_entry & L1_RESERVED or self.geometry.extended_l2:
            return None, 0
        entry = table.entries[cluster & self._l2_mask]
        return (table, entry) if not entry or (entry & OFLAG_COPIED and not entry & self._not_plain) else (None, 0)

    def read_into(self, view: memoryview, offset: int) -> Operation[None]:
        """Fill `view` from guest offset `offset`. Raises ImageError, ReadFailed."""
        return reading.read_into(self, view, offset)

    def extents(self, offset: int, length: int, *, one: bool = False) -> Operation[list[Extent]]:
        """What a range, or its beginning, holds: data, allocated or not; zeros. Raises ImageError, ReadFailed."""
        return reading.extents(self, offset, length, one=one)

    # ---- pending pages

    def tokens_needed(self, cluster: int) -> int:
        """Pool clusters that must be promised before a page of this cluster may become pending."""
        if cluster in self.pending.clusters:
            return 0
        index = cluster // self.geometry.l2_entries
        l1_entry = self.mapping.l1.entries[index]
        needed = 0 if l1_entry & OFLAG_COPIED or index in self.table_tokens else 1
        if l1_entry and self.mapping.in_memory(cluster) and self.is_ours(*self.mapping.find(cluster)):
            return needed
        return needed + 1

    def take_pending(self, pages: int) -> Operation[None]:
        """Wait until this many pages more may be pending, and count them as incoming.

        Raises DeviceFailed, RequestError (ENOSPC).
        """
        log, starved = self.log, self.log.starvations
        while self.pending.count + self.incoming + pages > self.pending_most:
            log.check()
            if self.pending.count + pages <= self.pending_most:
                # Only requests under way are in the way. They end, whatever the checkpoint lacks.
                yield Wait(log.room_gate)
            else:
                yield from log.wait_for_room(starved)
        self.incoming += pages

    def return_pending(self, pages: int) -> None:
        """They are pending now, or will not be."""
        self.incoming -= pages
        self.log.room_gate.open()

    def put_page(self, index: int, data: bytes) -> None:
        """Make a page pending and note it in the running transaction. Room and credits are at hand."""
        cluster = index // self.geometry.pages_per_cluster
        if cluster not in self.pending.clusters:
            self.take_tokens(cluster)
        page = Page(data)
        self.pending.put(index, page)
        self.log.running.note_page(index, page)

    def take_tokens(self, cluster: int) -> None:
        """Promise what the cluster's first pending page needs; after a replay that may be more than there is."""
        needed = self.tokens_needed(cluster)
        self.allocator.tokens += needed
        index = cluster // self.geometry.l2_entries
        if index in self.table_tokens:
            self.table_tokens[index] += 1
        elif not self.mapping.l1.entries[index] & OFLAG_COPIED:
            self.table_tokens[index] = 1
            needed -= 1
        if needed:
            self.cluster_tokens.add(cluster)

    def return_token(self, cluster: int) -> None:
        """The cluster has no pending pages any more."""
        if cluster in self.cluster_tokens:
            self.cluster_tokens.discard(cluster)
            self.allocator.tokens -= 1
        if self.table_tokens:
            index = cluster // self.geometry.l2_entries
            if index in self.table_tokens:
                self.table_tokens[index] -= 1
                self.return_table_token(index)

    def return_table_token(self, index: int) -> None:
        """Give it back if no pending cluster needs the L2 table any more, and nobody is making it."""
        if self.table_tokens.get(index) == 0 and index not in self.owning:
            del self.table_tokens[index]
            self.allocator.tokens -= 1

    def begin_simply(self, cluster: int) -> bool:
        """Promise what the first pending page of a cluster needs, where that is one pool cluster and there is one.

        As `take_tokens`, for what is most common: a cluster without a home, whose L2 table is ours and in memory.
        A write that makes a cluster pending takes 6.6 us in a loop without this, 3.7 with it; after a wait for a
        client, with no code in the caches, 27 and 21.
        """
        index = cluster >> self._l2_bits
        l1_entry = self._l1[index]
        table = self._tables.get(l1_entry & OFFSET_MASK)
        if (
            table is None or not l1_entry & OFLAG_COPIED or l1_entry & L1_RESERVED or self.table_tokens
            or self._not_plain == ALL_BITS or table.entries[cluster & self._l2_mask]
        ):  # fmt: skip
            return False
        allocator = self.allocator
        if len(allocator.pool) <= allocator.tokens:
            return False
        allocator.tokens += 1
        self.cluster_tokens.add(cluster)
        self.in_place.allocated_in = self.log.running.number
        return True

    def try_write(self, data: Buffer, offset: int) -> bool:
        """Make whole pages of one cluster pending, if nothing has to be waited for. The hot path."""
        length, log = len(data), self.log
        bits, page_bits = self._bits, self.page_bits
        cluster = offset >> bits
        if (offset | length) & (self.page_size - 1) or (offset + length - 1) >> bits != cluster:
            return False
        if log.failed is not None or log.ended or length >= self.settings.direct_write or self.corrupt:
            return False
        first, count = offset >> page_bits, length >> page_bits
        ring, running = log.ring, log.running
        pending = self.pending
        busy = running.size + ring.outstanding + count * self.page_cost
        reserve = ring.reserve_for(len(pending.clusters) + ring.coming + 1)
        if busy > ring.max_transaction or ring.head - ring.tail + busy + reserve > ring.length:
            return False
        if pending.count + self.incoming + count > self.pending_most:
            return False
        # Order: copied before anything is promised: where there is no memory for it, nothing has changed.
        pages = (Page(bytes(data)),) if count == 1 else _pages(data, self.page_size)
        if cluster not in pending.clusters and not self.begin_simply(cluster):
            if self.find_contiguous(offset, length) < 0:
                if self.mapping.in_memory(cluster):
                    self.in_place.allocated_in = running.number
                elif self.in_place.prefers():
                    # Whether it has a home says a table that is not in memory.
                    return False
            elif cluster not in self.in_place.homes and self.in_place.count():
                # It may be possible to write it in place: somebody has to look.
                return False
            if self.tokens_needed(cluster) > self.allocator.available:
                return False
            self.take_tokens(cluster)
        for index, page in enumerate(pages, first):
            pending.put(index, page)
            running.note_page(index, page)
        return True

    # ---- pages that are home elsewhere

    def drop_pages(self, first: int, end: int) -> None:
        """Pages [first, end) are home elsewhere: out of the running transaction and the pending table, revoked."""
        # The last cluster may be partial: replay refuses a revoke that reaches past the disk.
        end = min(end, self.geometry.pages)
        log = self.log
        running = log.running
        recorded = False
        for index in range(first, end):
            running.forget_page(index)
            recorded = recorded or log.has_record(index)
            if self.pending.get(index) is not None and self.pending.drop(index):
                self.return_token(index // self.geometry.pages_per_cluster)
        # A record at or after the tail would be replayed over the newer state, whether or not the page is
        # still pending; the revoke is void for records of its own transaction (invariant 4).
        if recorded:
            running.note_guest_revoke(first, end)

    def touch(self, cluster: int) -> None:
        """A cluster lives elsewhere, or has other content: what is remembered of it, or was read, may be old."""
        self.in_place.homes.pop(cluster, None)
        self.read_again(cluster)

    def read_again(self, cluster: int) -> None:
        """What a read-modify-write of this cluster has read may be old now."""
        for flag in self.merging.get(cluster, ()):
            flag[0] = True

    # ---- flush

    def flush(self) -> Operation[None]:
        """Return when everything that completed before is durable. Raises DeviceFailed."""
        return self.log.commit_upto()
