"""What lies between two commits, and what became of it.

    running     collects changes; one at a time
    committing  its content is fixed; being made durable; at most one
    committed   in the ring; its metadata may not be home, its pages may have no home
    checkpointed  the tail has passed it; it no longer exists

Rules
* A page's record and a revoke meant for that same version never share a transaction: whoever makes a page
  home elsewhere first takes its record out of the *running* transaction (`forget_page`). At replay a revoke
  voids the records of *older* transactions only.
* `size` is an upper bound of what the transaction takes in the ring; credits are counted with it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..format.journal import DESCRIPTOR_LENGTH
from ..geometry import SECTOR

if TYPE_CHECKING:
    from ..image.tables import Table
    from ..pending import Page

BASE_COST = 4096 + 512 + 64
"""Bytes that a transaction takes beyond its records: its head, and rounding to blocks and to 4 KiB."""
SECTOR_COST = SECTOR + DESCRIPTOR_LENGTH
REVOKE_COST = DESCRIPTOR_LENGTH


class Transaction:
    """The changes between two commits. `number` counts transactions, also those that need no ring space."""

    __slots__ = (
        "data_mark", "freed", "guest_revokes", "holds", "host_revokes", "number", "page_cost", "pages", "sectors",
        "size",
    )  # fmt: skip

    def __init__(self, number: int, page_size: int) -> None:
        self.number = number
        self.page_cost = page_size + DESCRIPTOR_LENGTH
        self.sectors: dict[int, Table] = {}
        self.pages: dict[int, Page] = {}
        self.guest_revokes: list[tuple[int, int]] = []
        """Half-open page ranges."""
        self.host_revokes: list[tuple[int, int]] = []
        """(host offset, length) of freed metadata clusters."""
        self.freed: list[int] = []
        """Host clusters whose refcount fell to zero."""
        self.data_mark = 0
        """Value of the disk's data counter at the last direct or in-place write that belongs here."""
        self.holds = False
        self.size = BASE_COST

    @property
    def in_ring(self) -> bool:
        """Whether there is anything to write into the ring."""
        return bool(self.pages or self.sectors or self.guest_revokes or self.host_revokes)

    @property
    def empty(self) -> bool:
        return not (self.in_ring or self.holds or self.freed)

    def note_sector(self, host_offset: int, table: Table) -> None:
        """A metadata sector changed: its content is copied when the commit starts."""
        if host_offset not in self.sectors:
            self.sectors[host_offset] = table
            table.uncommitted += 1
            self.size += SECTOR_COST

    def note_page(self, index: int, page: Page) -> None:
        if index not in self.pages:
            self.size += self.page_cost
        self.pages[index] = page

    def forget_page(self, index: int) -> None:
        if self.pages.pop(index, None) is not None:
            self.size -= self.page_cost

    def note_guest_revoke(self, first: int, end: int) -> None:
        self.guest_revokes.append((first, end))
        self.size += REVOKE_COST

    def note_host_revoke(self, host_offset: int, length: int) -> None:
        self.host_revokes.append((host_offset, length))
        self.size += REVOKE_COST

    def forget_sectors(self, host_offset: int, length: int) -> None:
        """A table was freed: its sectors, changed here or not, must not be replayed over what comes after it."""
        for offset in range(host_offset, host_offset + length, SECTOR):
            table = self.sectors.pop(offset, None)
            if table is not None:
                table.uncommitted -= 1
                self.size -= SECTOR_COST


class CommittedTransaction:
    """A transaction in the ring. `live` counts its pages whose newest committed record is here and not void."""

    __slots__ = ("crc", "end", "live", "pages", "sequence", "start")

    def __init__(self, *, sequence: int, start: int, end: int, crc: int) -> None:
        self.sequence, self.start, self.end, self.crc = sequence, start, end, crc
        self.live = 0
        self.pages: list[int] = []
        """Indexes of the pages it recorded; those that are live have their `Page.record` here."""
