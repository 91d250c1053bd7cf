"""Whether all that the tables name has a refcount: asked before free clusters of the file are used or cut off.

A cluster without a refcount is free, says the specification; in an image whose refcounts are too low it is somebody's
data. Until all L2 tables were looked at, nothing is taken from what was there: the file is lengthened instead, and
not shortened. It is looked at little by little, by whoever needs room and once a second, so that an opening does not
wait for it. An entry takes 1.7 us (64 GiB with all clusters in order, two busy cores): 14 ms in a second.

What a table names behind the end of the file without a refcount lies right there mostly: another program's last writes,
before a cut. So the first growth looks at some tables, and where there is damage the file is lengthened behind the
journal.

What is met marks the image corrupt. What cannot be read, or is too much, leaves the question open for good.

Limit: an entry that names what lies behind the end of the file is seen only while the file has not grown over that, and
the first growth looks at no more than 4 GiB of clusters of 64 KiB (qemu looks at none).

Crash: nothing here is on disk; the next opening asks anew.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from ..errors import ImageError, ReadFailed
from ..format.tables import OFFSET_MASK, OFLAG_COMPRESSED, table_from_bytes
from ..steps import Gate, Operation, Pause, Read, Wait
from .overlap import ACTIVE_TABLE
from .tables import l2_table

if TYPE_CHECKING:
    from ..storage import Storage
    from .allocator import Allocator
    from .mapping import Mapping
    from .tables import Table

AT_ONCE: Final = 1 << 13
"""L2 entries that one call looks at."""
BEFORE_GROWTH: Final = 1 << 16
"""And those that a growth before the journal looks at, one or two of a session: 103 to 122 ms where the tables are in
the page cache, full or with one entry each, with clusters of 512 bytes to 2 MiB."""
UNUSED: Final = 16
"""A slice of zeros takes such a part of what one without zeros takes; as measured above."""
SLICE: Final = 256
"""And those in one hold: some 400 us."""
L1_PIECE: Final = 1 << 12
"""Entries of an L1 table that are looked through, or read, together."""
MAX_TABLES: Final = 1 << 20
"""Limit: L2 tables of snapshots that are told apart; an image that has more keeps its free clusters."""


class Counted:
    """The question, and how far it is answered."""

    def __init__(
        self, mapping: Mapping, allocator: Allocator, storage: Storage, snapshots: list[tuple[int, int]] | None
    ) -> None:
        """`snapshots`: (host offset, entries) of their L1 tables, None where not all of them are known."""
        self._mapping, self._allocator, self._storage = mapping, allocator, storage
        self._geometry = mapping.geometry
        self._at = 0
        """The next entry of the active L1 table."""
        self._snapshots = snapshots or []
        self._tables: list[int] = []
        """Offsets of L2 tables of snapshots, the next one last."""
        self._seen: set[int] = set()
        self._inside = 0
        """The next entry of the table that is looked at."""
        self.finished = snapshots is None
        self.holds = False
        """All was looked at, and all has a refcount."""
        self._busy = False
        self._gate = Gate("tables looked at")

    def go_on(self, entries: int = AT_ONCE) -> Operation[bool]:
        """Look at what takes as long as so many entries, or a few above. True where free clusters may be used.

        One caller at a time.
        """
        # Order: two who looked at one slice would both pass on, and leave out the one after it.
        while self._busy:
            yield Wait(self._gate)
        self._busy = True
        try:
            return (yield from self._go_on(entries))
        finally:
            self._busy = False
            self._gate.open()

    def _go_on(self, entries: int) -> Operation[bool]:
        while not self.finished and entries > 0:
            cost = SLICE
            try:
                if self._at < self._geometry.l1_entries:
                    cost = yield from self._active()
                elif self._tables:
                    cost = yield from self._of_snapshot(self._tables[-1])
                elif self._snapshots:
                    yield from self._read_snapshot()
                else:
                    self.finished = self.holds = True
            except ReadFailed:
                # It may work later.
                return False
            except ImageError:
                self.finished = True
            entries -= cost
            yield Pause()
        return self.holds

    def _active(self) -> Operation[int]:
        """A slice of the next table; what it took, in entries."""
        l1 = self._mapping.l1.entries
        stop = min(self._geometry.l1_entries, self._at + L1_PIECE)
        while not l1[self._at]:
            self._at += 1
            if self._at == stop:
                return SLICE
        first = self._at * self._geometry.l2_entries
        if self._allocator.overlaps.what_else(self._mapping.l2_offset(first)):
            # It is no table: what it says is nothing to judge by, and whoever changes it is told.
            self.finished = True
            return SLICE
        cost = yield from self._slice(lambda: self._mapping.load_l2(first), f"L1 entry {self._at}")
        self._at += self._is_done()
        return cost

    def _of_snapshot(self, offset: int) -> Operation[int]:
        if self._allocator.overlaps.what(offset >> self._geometry.cluster_bits) not in ("", ACTIVE_TABLE):
            # It is no table: to load it as one would keep whoever needs what it is from loading that.
            self.finished = True
            return SLICE
        # What a snapshot names is never changed: an active table that it shares is copied first.
        cost = yield from self._slice(
            lambda: self._mapping.cache.load(offset, l2_table, what="L2 table of a snapshot"),
            f"the L2 table of a snapshot at {offset}",
            also=offset,
        )
        if self._is_done():
            self._tables.pop()
        return cost

    def _read_snapshot(self) -> Operation[None]:
        offset, entries = self._snapshots[-1]
        data = yield Read(self._storage, offset, min(entries, L1_PIECE) * 8)
        self._snapshots.pop()
        if entries > L1_PIECE:
            self._snapshots.append((offset + L1_PIECE * 8, entries - L1_PIECE))
        found = {entry & OFFSET_MASK for entry in table_from_bytes(data)} - self._seen - {0}
        self._seen |= found
        self._tables.extend(found)
        self.finished = len(self._seen) > MAX_TABLES

    def _is_done(self) -> bool:
        """One slice more of a table was looked at: whether it was the last."""
        self._inside += SLICE
        if self._inside < self._geometry.l2_entries:
            return False
        self._inside = 0
        return True

    def _slice(self, load: Callable[[], Operation[Table | None]], what: str, also: int = 0) -> Operation[int]:
        """Look at SLICE entries in the hold in which all refcount blocks that count for them are in memory.

        And at host offset `also`. Nobody takes the cluster of an active table (overlap.py). Returns what it took, in
        entries.
        """
        allocator, bits = self._allocator, self._geometry.cluster_bits
        per_block = self._geometry.refcount_block_entries
        width = 2 if self._geometry.extended_l2 else 1
        first, end = self._inside * width, (self._inside + SLICE) * width
        pinned: dict[int, Table] = {}
        try:
            while True:
                table = yield from load()
                if table is None:
                    return SLICE
                # Anew after each wait: what the table names now is what counts.
                entries = [*filter(None, table.entries[first:end:width])]
                hosts = {(each & OFFSET_MASK) >> bits for each in entries if not each & OFLAG_COMPRESSED}
                for each in entries:
                    if each & OFLAG_COMPRESSED:
                        hosts.update(self._mapping.host_clusters(each))
                hosts.add(also >> bits)
                hosts.discard(0)
                counting = {each // per_block for each in hosts}
                missing = {index for index in counting - pinned.keys() if allocator.has_block(index)}
                if not missing:
                    break
                for index in missing:
                    block = yield from allocator.load_block(index * per_block)
                    if block is not None:
                        block.pins += 1
                        pinned[index] = block
            for index in sorted(counting):
                base = index * per_block
                among = [each - base for each in hosts if 0 <= each - base < per_block]
                counts = allocator.block(base)
                without = counts.find_zero(among) if counts is not None else min(among)
                if without >= 0:
                    self.finished = True
                    allocator.on_corrupt(f"{what} leads to host cluster {base + without}, which has no refcount")
                    break
            return max(SLICE // UNUSED, len(entries))
        finally:
            for each_block in pinned.values():
                each_block.pins -= 1
