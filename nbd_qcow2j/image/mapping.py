"""Where a guest cluster lives: L1 and L2 tables. Spec: "Cluster mapping", "Extended L2 Entries".

Reading looks entries up in memory (`find`) and loads what is missing (`load_l2`). Changing is *prepare*
(`own_l2`: the table exists, is ours alone, is in memory and pinned) and then `link`, `unlink` in one hold.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, NoReturn

from ..errors import ImageError
from ..format.tables import (
    ALL_SUBCLUSTERS,
    COMPRESSED,
    L1_RESERVED,
    L2_RESERVED,
    NORMAL,
    OFFSET_MASK,
    OFLAG_COMPRESSED,
    OFLAG_COPIED,
    OFLAG_ZERO,
    UNALLOCATED,
    ZERO_ALLOC,
    ZERO_PLAIN,
    compressed_extent,
    kind_of,
)  # fmt: skip
from ..geometry import Geometry
from ..steps import Gate, Operation, Wait, Write
from .tables import Table, TableCache, l2_table

if TYPE_CHECKING:
    from ..journal.log import Log
    from ..storage import Storage
    from .allocator import Allocator

L2_COST_SECTORS = 4
"""Sectors that making an L2 table ours can change: L1 entry, refcounts of the new and the old table, one spare."""


class Mapping:
    """The active L1 table and the L2 tables below it."""

    def __init__(
        self, geometry: Geometry, l1: Table, cache: TableCache, *, name: str, ring: tuple[int, int] = (0, 0)
    ) -> None:
        self.geometry, self.l1, self.cache, self.name = geometry, l1, cache, name
        self.ring_low, self.ring_high = ring
        """Host bytes of an attached journal: nobody is shown what lies there, least of all its UUID."""
        self.making: dict[int, Gate] = {}
        """L1 indexes whose table somebody is making ours."""

    # ---- looking up

    def l2_offset(self, cluster: int) -> int:
        """Host offset of the L2 table that maps a guest cluster; 0 where there is none. Raises ImageError."""
        entry = self.l1.entries[cluster // self.geometry.l2_entries]
        if entry & L1_RESERVED:
            raise ImageError(
                "L1 entry has reserved bits set", where=f"entry {cluster // self.geometry.l2_entries} of {self.name}",
                found=hex(entry),
            )  # fmt: skip
        return entry & OFFSET_MASK

    def load_l2(self, cluster: int) -> Operation[Table | None]:
        """The L2 table of a guest cluster, None where there is none. Raises ImageError, ReadFailed."""
        while offset := self.l2_offset(cluster):
            table = yield from self.cache.load(offset, l2_table, what="L2 table")
            # It may have been copied elsewhere while it was read.
            if self.l2_offset(cluster) == offset:
                return table
        return None

    def in_memory(self, cluster: int) -> bool:
        """Whether `find` can answer."""
        offset = self.l2_offset(cluster)
        return not offset or offset in self.cache.tables

    def find(self, cluster: int) -> tuple[int, int]:
        """(L2 entry, subcluster bitmap) of a guest cluster whose table is in memory. Raises ImageError."""
        offset = self.l2_offset(cluster)
        if not offset:
            return 0, 0
        table = self.cache.tables[offset]
        index = cluster % self.geometry.l2_entries
        if self.geometry.extended_l2:
            entry, bitmap = table.entries[2 * index], table.entries[2 * index + 1]
        else:
            entry, bitmap = table.entries[index], 0
        if not entry & OFLAG_COMPRESSED:
            reserved = L2_RESERVED | (OFLAG_ZERO if self.geometry.extended_l2 else 0)
            if entry & reserved or (entry & OFFSET_MASK) % self.geometry.cluster_size:
                raise ImageError(
                    "L2 entry is impossible", where=f"guest cluster {cluster} of {self.name}",
                    expected=f"a multiple of {self.geometry.cluster_size}, no reserved bits", found=hex(entry),
                )  # fmt: skip
            if bitmap and (bitmap & bitmap >> 32 or (bitmap & ALL_SUBCLUSTERS and not entry & OFFSET_MASK)):
                self._refuse_bitmap(cluster, "none allocated that is zero as well, or without a cluster", bitmap)
            if self.ring_low <= entry & OFFSET_MASK < self.ring_high:
                self._refuse_ring(cluster, entry)
            return entry, bitmap
        if bitmap:
            self._refuse_bitmap(cluster, "none for a compressed cluster", bitmap)
        if self.ring_high:
            offset, length = compressed_extent(entry, self.geometry.cluster_bits)
            if offset < self.ring_high and offset + length > self.ring_low:
                self._refuse_ring(cluster, entry)
        return entry, bitmap

    def _refuse_bitmap(self, cluster: int, expected: str, bitmap: int) -> NoReturn:
        raise ImageError(
            "subcluster bitmap is impossible", where=f"guest cluster {cluster} of {self.name}", expected=expected,
            found=hex(bitmap),
        )  # fmt: skip

    def _refuse_ring(self, cluster: int, entry: int) -> NoReturn:
        raise ImageError(
            "L2 entry names the journal", where=f"guest cluster {cluster} of {self.name}", found=hex(entry)
        )

    def kind(self, entry: int, bitmap: int) -> int:
        """What an entry says of the whole cluster. With extended L2, NORMAL only where all is allocated."""
        if not self.geometry.extended_l2 or entry & OFLAG_COMPRESSED:
            return kind_of(entry)
        if not entry & OFFSET_MASK:
            return ZERO_PLAIN if bitmap >> 32 == ALL_SUBCLUSTERS else UNALLOCATED
        if bitmap >> 32 == ALL_SUBCLUSTERS:
            return ZERO_ALLOC
        return NORMAL

    def pieces(self, entry: int, bitmap: int, start: int, length: int) -> list[tuple[int, int, int]]:
        """(kind, start in the cluster, length) pieces of a range of a cluster that is not compressed."""
        if not self.geometry.extended_l2 or entry & OFLAG_COMPRESSED:
            return [(kind_of(entry), start, length)]
        size = self.geometry.subcluster_size
        found: list[tuple[int, int, int]] = []
        end = start + length
        while start < end:
            number = start // size
            stop = min(end, (number + 1) * size)
            if bitmap >> (32 + number) & 1:
                kind = ZERO_PLAIN
            elif bitmap >> number & 1:
                kind = NORMAL
            else:
                kind = UNALLOCATED
            if found and found[-1][0] == kind:
                found[-1] = (kind, found[-1][1], found[-1][2] + stop - start)
            else:
                found.append((kind, start, stop - start))
            start = stop
        return found

    def host_clusters(self, entry: int) -> range:
        """Host clusters on which an entry holds a reference: several for compressed data."""
        bits = self.geometry.cluster_bits
        if entry & OFLAG_COMPRESSED:
            offset, length = compressed_extent(entry, bits)
            return range(offset >> bits, ((offset + length - 1) >> bits) + 1)
        host = (entry & OFFSET_MASK) >> bits
        return range(host, host + 1) if host else range(0)

    # ---- changing

    def own_l2(
        self, cluster: int, storage: Storage, log: Log, allocator: Allocator, *, token: bool, bad: bool = False
    ) -> Operation[tuple[Table, bool]]:
        """The L2 table of a guest cluster, ours alone and pinned; and whether the token was used.

        A table that is missing is made, one that a snapshot shares is copied. Raises ImageError, OSError,
        RequestError (ENOSPC). The caller holds credits for L2_COST_SECTORS, and unpins the table.

        A table that lies on other metadata (overlap.py) is copied as well, and keeps the reference it had.
        """
        index = cluster // self.geometry.l2_entries
        while gate := self.making.get(index):
            yield Wait(gate)
        gate = self.making[index] = Gate("L2 table")
        try:
            old = yield from self.load_l2(cluster)
            if old is not None:
                old.pins += 1
                if self.l1.entries[index] & OFLAG_COPIED and not bad:
                    return old, False
                old.pins -= 1
                block = yield from allocator.load_block(old.host_offset >> self.geometry.cluster_bits)
                if block is not None:
                    block.pins += 1
            host = -1
            new_block, linked = None, False
            try:
                while not allocator.pool:
                    # After a replay more may be promised than the pool holds yet.
                    yield from allocator.ensure(allocator.available + 1)
                # Order: in the hold in which the pool was looked at.
                host = allocator.reserve(token=token)
                new_block = yield from allocator.load_block(host)
                assert new_block is not None, "a pool cluster has its refcount block"
                new_block.pins += 1
                table = Table(
                    host << self.geometry.cluster_bits,
                    old.entries[:] if old is not None else array("Q", bytes(self.geometry.cluster_size)),
                )
                # Order: written whole to its home before the transaction that links it (a shared table is never
                # changed, so the copy cannot be outdated by the time it is linked).
                yield Write(storage, table.host_offset, [table.to_bytes()])
                log.note_data()
                with log.whole_or_latched("new L2 table"):
                    self.cache.install(table)
                    table.pins += 1
                    linked = True
                    allocator.raise_new(host)
                    self.l1.entries[index] = table.host_offset | OFLAG_COPIED
                    log.note_entry(self.l1, index)
                    allocator.overlaps.add_table(host)
                    if old is not None and not bad:
                        allocator.overlaps.drop_table(old.host_offset >> self.geometry.cluster_bits)
                        if allocator.drop(old.host_offset >> self.geometry.cluster_bits):
                            log.running.forget_sectors(old.host_offset, old.length)
                            log.running.note_host_revoke(old.host_offset, old.length)
                            self.cache.forget(old.host_offset)
            finally:
                if not linked and host >= 0:
                    # The caller still counts on its token.
                    allocator.give_back(host)
                    allocator.tokens += token
                if new_block is not None:
                    new_block.pins -= 1
                if old is not None and block is not None:
                    block.pins -= 1
            return table, token
        finally:
            del self.making[index]
            gate.open()

    def set_entry(self, table: Table, cluster: int, entry: int, bitmap: int, log: Log) -> None:
        """Change an entry of a table that is ours, and note it, in this hold."""
        index = cluster % self.geometry.l2_entries
        if self.geometry.extended_l2:
            table.entries[2 * index] = entry
            table.entries[2 * index + 1] = bitmap
            index *= 2
        else:
            table.entries[index] = entry
        log.note_entry(table, index)

    def link(
        self, table: Table, cluster: int, host: int, log: Log, allocator: Allocator, *, drop: bool = True
    ) -> None:
        """Let a guest cluster live in host cluster `host`, all of it; drop what it referred to before.

        `host` is reserved, or the cluster that the entry already names. All refcount blocks are pinned.
        """
        old, _ = self.find(cluster) if drop else (0, 0)
        entry = host << self.geometry.cluster_bits | OFLAG_COPIED
        # Order: the refcount joins the transaction with the L2 entry, in one hold: a transaction that held the
        # entry alone would, replayed, name a cluster the allocator thinks free.
        if old & OFLAG_COMPRESSED or old & OFFSET_MASK != entry & OFFSET_MASK:
            allocator.raise_new(host)
            if drop:
                self.drop_references(old, allocator)
        self.set_entry(table, cluster, entry, ALL_SUBCLUSTERS if self.geometry.extended_l2 else 0, log)

    def unlink(
        self, table: Table, cluster: int, *, zero: bool, keep: bool, log: Log, allocator: Allocator, drop: bool = True
    ) -> None:
        """Make a guest cluster unallocated, or zero; `keep` leaves its host cluster with it (zero allocated)."""
        old, old_bitmap = self.find(cluster) if drop else (-1, 0)
        if keep and self.kind(old, old_bitmap) in (NORMAL, ZERO_ALLOC):
            # A cluster that is kept says zero itself: without the flag it would show its old content.
            offset, zero = old & (OFFSET_MASK | OFLAG_COPIED), True
        else:
            offset = 0
        if self.geometry.extended_l2:
            entry, bitmap = offset, (ALL_SUBCLUSTERS << 32 if zero else 0)
        else:
            entry, bitmap = offset | (OFLAG_ZERO if zero else 0), 0
        if (entry, bitmap) == (old, old_bitmap):
            return
        if not offset and drop:
            self.drop_references(old, allocator)
        self.set_entry(table, cluster, entry, bitmap, log)

    def drop_references(self, entry: int, allocator: Allocator) -> None:
        """Drop what an L2 entry referred to; several compressed clusters each hold a count on a host cluster."""
        for host in self.host_clusters(entry):
            allocator.drop(host)

    def is_compressed(self, entry: int) -> bool:
        return kind_of(entry) == COMPRESSED
