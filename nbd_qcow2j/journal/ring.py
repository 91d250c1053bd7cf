"""Where the ring has room, and who may use it.

Positions count bytes since the journal was attached (or, after replay, from the tail that was found) and
never wrap; `place` turns them into offsets in the file.

    tail ......... head ......... tail + length
      in the ring         free

Credits: an operation takes its worst case before it takes anything else. `reserve` belongs to what frees the
tail: one running transaction of the largest size; the links that send one transaction's pages home; and, as sending
all that is pending home may take more of the ring than it frees, what that is: with pages of 512 bytes a link is
larger than the page's record. So it grows with the clusters that are pending.

    Invariant: used + running + outstanding + reserve <= length for whoever is not freeing the tail.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence, Sized

from ..format.journal import ALIGNMENT, DESCRIPTOR_LENGTH, HEAD_LENGTH, Location, Slot
from ..geometry import SECTOR, Geometry
from .transaction import BASE_COST, SECTOR_COST, CommittedTransaction

MOST_COMPARED = 256
"""Pages of a transaction up to which its length is compared with that of its links: beyond, rounding is nothing."""
HOME_SECTORS = 7
"""Metadata sectors that sending one cluster home can change: its L2 entry, the refcounts of the new and the
old cluster (a compressed one lies in neighbours: two sectors), the L1 entry, a new L2 table's and its predecessor's
refcounts."""
GROWTH_SECTORS = 8
"""Metadata sectors that growing the pool can change: the header, and the refcount table's for new blocks."""
MOVE_SECTORS = 4
"""And where it moves that table, beside the refcounts of the one that is freed: the header, one more because those need
not begin with a sector, and two of the new table."""
PAGES_AT_ONCE = 64
"""Pages that one operation may make pending."""


class Ring:
    """Room and order of the committed transactions."""

    def __init__(self, location: Location, geometry: Geometry, *, uuid: bytes, largest_reftable: int = 0) -> None:
        """`largest_reftable`: clusters of the largest refcount table that may be freed while this ring is in use."""
        self.location = location
        self.length = location.ring_length
        self.uuid = uuid
        self.page_size = geometry.page_size
        self.tail = self.head = 0
        self.origin = 0
        """Byte of the ring at which position 0 lies."""
        self.next_sequence = 1
        self.tail_crc = self.head_crc = 0
        self.generation = 1
        self.outstanding = 0
        self.transactions: deque[CommittedTransaction] = deque()
        page_cost = geometry.page_size + DESCRIPTOR_LENGTH
        self.max_transaction = max(
            self.length // 16, BASE_COST + 2 * page_cost, BASE_COST + 2 * HOME_SECTORS * SECTOR_COST
        )
        self.home_cost = HOME_SECTORS * SECTOR_COST + DESCRIPTOR_LENGTH
        self.most_linked = max(1, (self.max_transaction - BASE_COST) // page_cost)
        """Clusters that one transaction's pages may be of."""
        self._growth = _growth(self.page_size, self.most_linked)
        self.waiting: Sized = ()
        """The clusters that are pending; the pending table's own."""
        self.coming = 0
        """Clusters that operations in flight may make pending."""
        self.most_cost = min(self.max_transaction - BASE_COST, self.max_transaction // 2 + ALIGNMENT)
        """The largest cost that an operation takes."""
        # Each cluster more takes this much of the room: some must fit into an empty ring, or nobody could write.
        a_cluster = 2 * (page_cost + self.home_cost + self._growth)
        room = self.length - self.max_transaction - BASE_COST - self.most_cost
        moved = -(-largest_reftable * geometry.refcount_bits // (SECTOR * 8)) + MOVE_SECTORS
        self.slack = min(max(GROWTH_SECTORS, moved) * SECTOR_COST, room - a_cluster)
        """What growing the pool notes without credits. A larger refcount table frees the one before: with clusters of
        512 bytes, and refcounts of 64 bits, a sector of refcounts for each 64 clusters of it. A ring that is too small
        for the largest table of all, 64 KiB, has what it can."""
        self._fixed_reserve = self.max_transaction + BASE_COST + self.slack
        most = (room - self.slack) // a_cluster
        self.pages_at_once = max(1, min(PAGES_AT_ONCE, (self.max_transaction - BASE_COST) // 2 // page_cost, most))

    @property
    def used(self) -> int:
        return self.head - self.tail

    def reserve_for(self, clusters: int) -> int:
        """What must be free where so many clusters are pending."""
        linked = clusters if clusters < self.most_linked else self.most_linked
        return self._fixed_reserve + linked * self.home_cost + clusters * self._growth

    @property
    def reserve(self) -> int:
        return self.reserve_for(len(self.waiting) + self.coming)

    def has_room(self, *, running: int, cost: int, clusters: int = 0) -> bool:
        """Whether an operation that needs `cost` bytes, and may make so many clusters pending, may have them."""
        reserve = self.reserve_for(len(self.waiting) + self.coming + clusters)
        return self.used + running + self.outstanding + cost + reserve <= self.length

    def place(self, position: int, length: int) -> Sequence[tuple[int, int]]:
        """The (file offset, length) pieces of a range of positions: one, or two where it wraps."""
        at = (position + self.origin) % self.length
        first = min(length, self.length - at)
        base = self.location.ring_offset
        return ((base + at, first),) if first == length else ((base + at, first), (base, length - first))

    def begin(self, length: int) -> tuple[int, int]:
        """Take room at the head for a transaction that is about to be written: its position and sequence."""
        if length % ALIGNMENT or self.used + length > self.length:
            raise AssertionError(f"ring overrun: {length} bytes, {self.used} of {self.length} used")
        position, sequence = self.head, self.next_sequence
        self.head += length
        self.next_sequence += 1
        return position, sequence

    def passable(self) -> int:
        """How many transactions from the tail have no page left that has its only durable copy here."""
        count = 0
        for transaction in self.transactions:
            if transaction.live:
                break
            count += 1
        return count

    def slot_after(self, count: int) -> Slot:
        """The header slot that says: the first `count` transactions are no longer needed."""
        if count:
            last = self.transactions[count - 1]
            tail, sequence, crc = last.end, last.sequence + 1, last.crc
        else:
            tail, sequence, crc = self.tail, self.tail_sequence, self.tail_crc
        last_committed = self.transactions[-1].sequence if self.transactions else sequence - 1
        return Slot(
            uuid=self.uuid, page_size=self.page_size, generation=self.generation + 1, ring_length=self.length,
            tail_position=(tail + self.origin) % self.length, tail_sequence=sequence, previous_crc=crc,
            last_committed=last_committed,
        )  # fmt: skip

    @property
    def tail_sequence(self) -> int:
        return self.transactions[0].sequence if self.transactions else self.next_sequence

    def slot_offset(self, generation: int) -> int:
        """Slots alternate: a torn write of one leaves the other."""
        return self.location.offset + (generation % 2) * ALIGNMENT

    def move_tail(self, count: int, generation: int) -> None:
        """The slot that says so is durable: the space may be used again."""
        if count:
            last = self.transactions[count - 1]
            self.tail, self.tail_crc = last.end, last.crc
        for _ in range(count):
            self.transactions.popleft()
        self.generation = generation


def _growth(page_size: int, most: int) -> int:
    """Bytes by which the ring may fill, for each cluster, when a transaction of up to `most` pages is sent home.

    The links of its pages are committed, then the tail passes it.
    """

    def length(entries: int, data: int) -> int:
        blocks = -(-(HEAD_LENGTH + DESCRIPTOR_LENGTH * entries) // SECTOR)
        return -(-(blocks * SECTOR + data) // ALIGNMENT) * ALIGNMENT

    # Fewest descriptors: pages that follow each other are one. Most: no sector follows another, each page is revoked.
    grown = 0
    for count in range(1, min(most, MOST_COMPARED) + 1):
        links = length((HOME_SECTORS + 1) * count, HOME_SECTORS * count * SECTOR)
        grown = max(grown, -(-(links - length(1, count * page_size)) // count))
    return grown
