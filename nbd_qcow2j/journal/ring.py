"""Where the ring has room, and who may use it.

Positions count bytes since the journal was attached (or, after replay, from the tail that was found) and
never wrap; `place` turns them into offsets in the file.

    tail ......... head ......... tail + length
      in the ring         free

Credits: an operation takes its worst case before it takes anything else. `reserve` belongs to what frees the
tail: it covers one running transaction of the largest size and the links that send the tail's pages home.

    Invariant: used + running + outstanding + reserve <= length for whoever is not freeing the tail.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from ..format.journal import ALIGNMENT, DESCRIPTOR_LENGTH, Location, Slot
from ..geometry import Geometry
from .transaction import BASE_COST, SECTOR_COST, CommittedTransaction

HOME_SECTORS = 8
"""Metadata sectors that sending one cluster home can change: its L2 entry, the refcounts of the old and the
new cluster (a compressed one lies in two or more), the L1 entry, a new L2 table's and its predecessor's refcounts."""


class Ring:
    """Room and order of the committed transactions."""

    def __init__(self, location: Location, geometry: Geometry, *, uuid: bytes) -> None:
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
        pages = max(1, (self.max_transaction - BASE_COST) // page_cost)
        self.home_cost = HOME_SECTORS * SECTOR_COST + DESCRIPTOR_LENGTH
        slack = 8 * SECTOR_COST
        """What growing the pool notes without credits."""
        self.reserve = min(self.max_transaction + BASE_COST + slack + pages * self.home_cost, self.length * 3 // 4)

    @property
    def used(self) -> int:
        return self.head - self.tail

    def has_room(self, *, running: int, cost: int) -> bool:
        """Whether an operation that needs `cost` bytes may have them."""
        return self.used + running + self.outstanding + cost + self.reserve <= self.length

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
        for _ in range(count):
            last = self.transactions.popleft()
            self.tail, self.tail_crc = last.end, last.crc
        self.generation = generation
