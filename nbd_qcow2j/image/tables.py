"""Metadata tables in memory, and the cache that loads and forgets them.

A table may be forgotten when nobody has pinned it and none of its changes is uncommitted: what is committed
but not home is kept, sector by sector, in the log's `home` set, and laid over what a load reads.

    Crash: a load that began before such a sector went home would read the old bytes after the set forgot
    it. So whoever takes sectors out of the set marks loads in flight as stale, and they read again.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING

from ..errors import ImageError
from ..format.tables import table_from_bytes, table_to_bytes
from ..geometry import SECTOR
from ..steps import Gate, Operation, Read, Wait

if TYPE_CHECKING:
    from ..storage import Storage


class Table:
    """Entries of 64 bits: an L1, L2 or refcount table."""

    __slots__ = ("entries", "host_offset", "pins", "uncommitted")

    def __init__(self, host_offset: int, entries: array[int]) -> None:
        self.host_offset = host_offset
        self.entries = entries
        self.pins = 0
        self.uncommitted = 0
        """Sectors in the running and the committing transaction."""

    @property
    def length(self) -> int:
        return len(self.entries) * 8

    def sector_of(self, index: int) -> int:
        """Host offset of the sector that holds an entry."""
        return self.host_offset + (index >> 6) * SECTOR

    def sector_bytes(self, host_offset: int, length: int = SECTOR) -> bytes:
        """What lies at a host offset in the table: one sector, or as many whole ones as `length` bytes take."""
        first = (host_offset - self.host_offset) >> 3
        return table_to_bytes(self.entries[first : first + (length >> 3)])

    def to_bytes(self) -> bytes:
        return table_to_bytes(self.entries)


class RefcountBlock(Table):
    """Refcounts of any width, big endian as on disk. Spec: "Refcount block entry"."""

    __slots__ = ("data", "order")

    def __init__(self, host_offset: int, data: bytearray, order: int) -> None:
        super().__init__(host_offset, array("Q"))
        self.data = data
        self.order = order

    @property
    def length(self) -> int:
        return len(self.data)

    def sector_of(self, index: int) -> int:
        return self.host_offset + ((index << self.order >> 3) & -SECTOR)

    def sector_bytes(self, host_offset: int, length: int = SECTOR) -> bytes:
        first = host_offset - self.host_offset
        return bytes(self.data[first : first + length])

    def to_bytes(self) -> bytes:
        return bytes(self.data)

    def get(self, index: int) -> int:
        if self.order >= 3:
            width = 1 << self.order >> 3
            return int.from_bytes(self.data[index * width : (index + 1) * width], "big")
        bit = index << self.order
        return self.data[bit >> 3] >> (bit & 7) & ((1 << (1 << self.order)) - 1)

    def set(self, index: int, value: int) -> None:
        if self.order >= 3:
            width = 1 << self.order >> 3
            self.data[index * width : (index + 1) * width] = value.to_bytes(width, "big")
            return
        bit = index << self.order
        mask = ((1 << (1 << self.order)) - 1) << (bit & 7)
        self.data[bit >> 3] = self.data[bit >> 3] & ~mask | value << (bit & 7)

    def find_zero(self, indexes: list[int]) -> int:
        """The first of these entries that is zero; -1 where none is."""
        data = self.data
        if self.order == 4:
            # The usual width. To look at all entries of 64 GiB: 3.5 s with a call for each, 1.8 s so.
            zeros = [index for index in indexes if not data[2 * index] and not data[2 * index + 1]]
        else:
            zeros = [index for index in indexes if not self.get(index)]
        return min(zeros, default=-1)

    def zero_runs(self, first: int, end: int) -> list[tuple[int, int]]:
        """(first, end) runs of entries that are zero, among those from `first` to `end`."""
        runs: list[tuple[int, int]] = []
        start = -1
        for index in range(first, end):
            if self.get(index):
                if start >= 0:
                    runs.append((start, index))
                    start = -1
            elif start < 0:
                start = index
        if start >= 0:
            runs.append((start, end))
        return runs


class HeaderSector(Table):
    """Sector 0, journalled when the refcount table moves."""

    __slots__ = ("data",)

    def __init__(self, data: bytes) -> None:
        super().__init__(0, array("Q"))
        self.data = data

    @property
    def length(self) -> int:
        return SECTOR

    def sector_bytes(self, host_offset: int, length: int = SECTOR) -> bytes:
        return self.data


class _Load:
    __slots__ = ("gate", "stale")

    def __init__(self) -> None:
        self.gate = Gate("table load")
        self.stale = False


class TableCache:
    """L2 tables and refcount blocks by host offset, least recently used forgotten first."""

    def __init__(
        self, storage: Storage, *, table_size: int, limit_bytes: int, home: dict[int, tuple[bytes, int]], name: str
    ) -> None:
        self.storage = storage
        self.table_size = table_size
        self.limit = max(8, limit_bytes // table_size)
        self.home = home
        self.name = name
        self.tables: OrderedDict[int, Table] = OrderedDict()
        self.loading: dict[int, _Load] = {}

    def get(self, host_offset: int) -> Table | None:
        return self.tables.get(host_offset)

    def load(self, host_offset: int, make: Callable[[int, bytearray], Table], *, what: str) -> Operation[Table]:
        """The table, read if need be. One read however many ask for it. Raises ImageError, ReadFailed."""
        while True:
            table = self.tables.get(host_offset)
            if table is not None:
                self.tables.move_to_end(host_offset)
                return table
            load = self.loading.get(host_offset)
            if load is not None:
                yield Wait(load.gate)
                continue
            if host_offset % self.table_size or not 0 < host_offset < 1 << 56:
                raise ImageError(
                    f"{what} lies at an impossible offset", where=self.name,
                    expected=f"a multiple of {self.table_size} below 2^56", found=host_offset,
                )  # fmt: skip
            load = self.loading[host_offset] = _Load()
            try:
                data = yield Read(self.storage, host_offset, self.table_size)
            finally:
                del self.loading[host_offset]
                load.gate.open()
            if load.stale or host_offset in self.tables:
                continue
            self._overlay(host_offset, data)
            table = make(host_offset, data)
            self.install(table)
            return table

    def install(self, table: Table) -> None:
        """Put a table in: loaded, or new. A load of the same place that is in flight must not undo it."""
        self.mark_stale(table.host_offset)
        self.tables[table.host_offset] = table
        self.tables.move_to_end(table.host_offset)
        if len(self.tables) > self.limit:
            self._shrink()

    def forget(self, host_offset: int) -> None:
        """The cluster is no longer a table."""
        self.mark_stale(host_offset)
        self.tables.pop(host_offset, None)

    def mark_stale(self, host_offset: int) -> None:
        """What a load in flight reads there may be older than what is so."""
        load = self.loading.get(host_offset - host_offset % self.table_size)
        if load is not None:
            load.stale = True

    def _overlay(self, host_offset: int, data: bytearray) -> None:
        home = self.home
        if not home:
            return
        for at in range(0, self.table_size, SECTOR):
            entry = home.get(host_offset + at)
            if entry is not None:
                data[at : at + SECTOR] = entry[0]

    def _shrink(self) -> None:
        # Never the last: whoever has just loaded it counts on it.
        for host_offset, table in list(self.tables.items())[:-1]:
            if len(self.tables) <= self.limit:
                return
            if not table.pins and not table.uncommitted:
                del self.tables[host_offset]


def l2_table(host_offset: int, data: bytearray) -> Table:
    return Table(host_offset, table_from_bytes(data))
