"""What a journal that was not detached says: first a plan, then somebody acts on it.

    slot      the valid header slot with the higher generation; none valid is damage
    scan      from the tail while sequence, UUID and the chain of CRCs agree
    end       the first transaction that does not agree is an ordinary torn commit, if
                * no valid transaction with a higher sequence lies anywhere in the ring, and
                * the slot knows of no later one as committed;
              otherwise it is damage: refused, never guessed at
    revokes   first pass: the newest revoke of each range
    records   second pass: a record is replayed unless a *later* transaction revokes it

Every row of that is a case of `tests/test_replay.py`. Nothing here writes.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field

from ..errors import ImageError
from ..format.journal import (
    ALIGNMENT,
    GUEST_DATA,
    REVOKE_GUEST,
    REVOKE_HOST,
    SLOTS_LENGTH,
    WRITE_DATA,
    Location,
    Record,
    Slot,
    crc_holds,
    decode_head,
    decode_transaction,
)  # fmt: skip
from ..geometry import SECTOR, Geometry

Reader = Callable[[int, int], bytes | bytearray]
"""(offset, length) to bytes, zeros past the end of the file."""


@dataclass(frozen=True, slots=True)
class FoundTransaction:
    """A transaction that was accepted. `start` is in bytes from the tail."""

    sequence: int
    start: int
    length: int
    crc: int
    records: tuple[Record, ...]


@dataclass(frozen=True, slots=True)
class ReplayPlan:
    """The state that an opening sees: sectors by host offset, pages by index, each with its sequence."""

    location: Location
    slot: Slot
    transactions: tuple[FoundTransaction, ...]
    sectors: dict[int, tuple[bytes, int]] = field(repr=False)
    pages: dict[int, tuple[bytes, int]] = field(repr=False)
    log: memoryview = field(repr=False)
    """The accepted log, byte for byte, from the tail."""

    def overlay(self, read: Reader) -> Reader:
        """`read` as it will be when the journal's metadata is home."""
        if not self.sectors:
            return read
        order = sorted(self.sectors)

        def overlaid(offset: int, length: int) -> bytes | bytearray:
            data = bytearray(read(offset, length))
            at = bisect_right(order, offset - SECTOR)
            while at < len(order) and order[at] < offset + length:
                start, content = order[at], self.sectors[order[at]][0]
                low, high = max(start, offset), min(start + SECTOR, offset + length)
                data[low - offset : high - offset] = content[low - start : high - start]
                at += 1
            return data

        return overlaid


def newest_slot(read: Reader, location: Location, *, name: str) -> Slot:
    """The header slot that counts. Raises ImageError where none is valid or it cannot be."""
    data = read(location.offset, SLOTS_LENGTH)
    found = [Slot.from_block(data[at : at + ALIGNMENT], name=name) for at in (0, ALIGNMENT)]
    valid = [slot for slot in found if slot]
    where = f"journal header of {name}"
    if not valid:
        raise ImageError("both journal header slots are damaged", where=where, expected="one with a valid CRC32C")
    slot = max(valid, key=lambda each: each.generation)
    if slot.ring_length != location.ring_length:
        raise ImageError("ring length differs", where=where, expected=location.ring_length, found=slot.ring_length)
    if (
        slot.tail_position % ALIGNMENT
        or slot.tail_position >= slot.ring_length
        or not 1 <= slot.tail_sequence < 1 << 63
    ):
        raise ImageError("tail is impossible", where=where, found=f"{slot.tail_position}, {slot.tail_sequence}")
    return slot


def plan_replay(read: Reader, location: Location, geometry: Geometry, *, name: str) -> ReplayPlan:
    """Read the journal and say what it holds. Raises ImageError: what, where, expected, found."""
    slot = newest_slot(read, location, name=name)
    if slot.page_size != geometry.page_size:
        raise ImageError(
            "page size differs", where=f"journal header of {name}", expected=geometry.page_size, found=slot.page_size
        )
    ring = read(location.ring_offset, location.ring_length)
    log = memoryview(bytes(ring[slot.tail_position :]) + bytes(ring[: slot.tail_position]))
    transactions: list[FoundTransaction] = []
    at, sequence, crc = 0, slot.tail_sequence, slot.previous_crc
    while at < len(log):
        head = decode_head(log[at:])
        if head is None or (head.sequence, head.uuid, head.previous_crc) != (sequence, slot.uuid, crc):
            break
        data = log[at : at + head.length]
        if len(data) != head.length or not crc_holds(head, data):
            break
        where = f"transaction {sequence} of {name}, ring offset {(at + slot.tail_position) % len(log)}"
        records = decode_transaction(head, data, page_size=slot.page_size, where=where)
        _check_ranges(records, location, geometry, where=where)
        transactions.append(FoundTransaction(sequence, at, head.length, head.crc, tuple(records)))
        at, sequence, crc = at + head.length, sequence + 1, head.crc
    _refuse_lost_end(log, slot, at, sequence, name=name)
    sectors, pages = _apply(transactions, geometry)
    return ReplayPlan(location, slot, tuple(transactions), sectors, pages, log[:at])


def _check_ranges(records: list[Record], location: Location, geometry: Geometry, *, where: str) -> None:
    pages_end = geometry.pages * geometry.page_size
    for record in records:
        end = record.offset + record.length
        if record.type in (GUEST_DATA, REVOKE_GUEST) and end > pages_end:
            raise ImageError("journal record lies past the end of the disk", where=where, expected=pages_end, found=end)
        if record.type == WRITE_DATA and record.offset < location.offset + location.length and end > location.offset:
            raise ImageError("journal record names the journal itself", where=where, found=record.offset)


def _refuse_lost_end(log: memoryview, slot: Slot, end: int, sequence: int, *, name: str) -> None:
    """An end that is not an ordinary torn commit is damage."""
    place = f"{name}, ring offset {(end + slot.tail_position) % len(log)}"
    if sequence - 1 < slot.last_committed:
        raise ImageError(
            "the journal has lost committed transactions", where=place,
            expected=f"transactions up to {slot.last_committed}", found=f"up to {sequence - 1}",
        )  # fmt: skip
    for at in range(0, len(log), ALIGNMENT):
        head = decode_head(log[at : at + 64])
        # A torn commit may leave its own head; only what is *beyond* it proves that something was lost.
        if head is None or head.uuid != slot.uuid or head.sequence <= sequence:
            continue
        doubled = memoryview(bytes(log[at:]) + bytes(log[:at]))[: head.length]
        if len(doubled) == head.length and crc_holds(head, doubled):
            raise ImageError(
                "the journal has a hole", where=place,
                expected=f"transaction {sequence}", found=f"nothing valid, but transaction {head.sequence} further on",
            )  # fmt: skip


class _Revokes:
    """The newest revoke of each range: few ranges are many pages, so ranges are kept, not pages."""

    def __init__(self) -> None:
        self.ranges: list[tuple[int, int, int]] = []
        self.starts: list[int] = []

    def build(self, found: list[tuple[int, int, int]]) -> None:
        """`found`: (start, end, sequence) in any order, overlapping."""
        edges = sorted({edge for start, end, _ in found for edge in (start, end)})
        newest = dict.fromkeys(edges, 0)
        for start, end, sequence in sorted(found, key=lambda each: each[2]):
            at = bisect_right(edges, start) - 1
            while edges[at] < end:
                newest[edges[at]] = sequence
                at += 1
        self.starts = edges
        self.ranges = [(edge, 0, newest[edge]) for edge in edges]

    def newest(self, offset: int) -> int:
        """Sequence of the newest revoke that covers `offset`; 0 where none does."""
        at = bisect_right(self.starts, offset) - 1
        return self.ranges[at][2] if at >= 0 else 0


def _apply(
    transactions: list[FoundTransaction], geometry: Geometry
) -> tuple[dict[int, tuple[bytes, int]], dict[int, tuple[bytes, int]]]:
    host, guest = _Revokes(), _Revokes()
    for kind, revokes in ((REVOKE_HOST, host), (REVOKE_GUEST, guest)):
        revokes.build(
            [
                (record.offset, record.offset + record.length, transaction.sequence)
                for transaction in transactions
                for record in transaction.records
                if record.type == kind
            ]
        )
    sectors: dict[int, tuple[bytes, int]] = {}
    pages: dict[int, tuple[bytes, int]] = {}
    page_size = geometry.page_size
    for transaction in transactions:
        sequence = transaction.sequence
        for record in transaction.records:
            if record.type == WRITE_DATA:
                for at in range(0, record.length, SECTOR):
                    # Invariant 4: a record in the revoke's own transaction, or a later one, is replayed.
                    if host.newest(record.offset + at) <= sequence:
                        sectors[record.offset + at] = (bytes(record.data[at : at + SECTOR]), sequence)
            elif record.type == GUEST_DATA:
                for at in range(0, record.length, page_size):
                    if guest.newest(record.offset + at) <= sequence:
                        pages[(record.offset + at) // page_size] = (bytes(record.data[at : at + page_size]), sequence)
    return sectors, pages
