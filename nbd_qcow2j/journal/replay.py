"""What a journal that was not detached says: first a plan, then somebody acts on it.

    slots
      newer      a slot of another format version                         refused: use the newer program
      none       neither slot is valid                                    refused
      length     the slot that counts has another ring length             refused
      pages      ... has another page size                                refused
      tail       ... has an impossible tail                               refused
      (counts)   the valid one with the higher generation                 go on
    log: scanned from the tail while sequence, UUID, the chain of CRCs and its own CRC agree
      type       an accepted transaction has a record of unknown type     refused: use the version that wrote it
      record     ... one of impossible length or offset                   refused
      lost       the slot knows of a later one as committed               refused
      hole       a valid transaction of this UUID with the next sequence
                 or a higher one lies anywhere beyond the end             refused
      replay     none of these: the end is an ordinary torn commit        replayed up to it

    revokes   first pass: the newest revoke of each range
    records   second pass: a record is replayed unless a *later* transaction revokes it

The rows of slots are looked at in this order, then those of the log; what is damaged is never guessed at.
`tests/test_replay.py` has the same table, finds exactly one row for every combination of damage, and that it holds.
Nothing here writes.

Limit: replay takes memory of about three times the journal's used part.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import TYPE_CHECKING

from ..errors import ImageError
from ..format.journal import (
    ALIGNMENT,
    GUEST_DATA,
    HEAD_LENGTH,
    REVOKE_GUEST,
    REVOKE_HOST,
    SLOTS_LENGTH,
    WRITE_DATA,
    Crc,
    Location,
    Record,
    Slot,
    TransactionHead,
    decode_head,
    decode_transaction,
)  # fmt: skip
from ..geometry import SECTOR, Geometry
from ..steps import Operation, Read

if TYPE_CHECKING:
    from ..storage import Storage

CHUNK = 1 << 20
"""Bytes of the ring that are looked at together."""

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


def newest_slot(data: bytes | bytearray, location: Location, geometry: Geometry, *, name: str) -> Slot:
    """The header slot that counts, of the two in `data`. Raises ImageError where none is valid or it cannot be."""
    found = [Slot.from_block(data[at : at + ALIGNMENT], name=name) for at in (0, ALIGNMENT)]
    valid = [slot for slot in found if slot]
    where = f"journal header of {name}"
    if not valid:
        raise ImageError("both journal header slots are damaged", where=where, expected="one with a valid CRC32C")
    slot = max(valid, key=lambda each: each.generation)
    if slot.ring_length != location.ring_length:
        raise ImageError("ring length differs", where=where, expected=location.ring_length, found=slot.ring_length)
    if slot.page_size != geometry.page_size:
        raise ImageError("page size differs", where=where, expected=geometry.page_size, found=slot.page_size)
    if (
        slot.tail_position % ALIGNMENT
        or slot.tail_position >= slot.ring_length
        or not 1 <= slot.tail_sequence < 1 << 63
    ):
        raise ImageError("tail is impossible", where=where, found=f"{slot.tail_position}, {slot.tail_sequence}")
    # One a slot write, one a commit: numbers that no history reaches must not reach the end of their field.
    if slot.generation >= 1 << 63 or slot.last_committed >= 1 << 63:
        raise ImageError(
            "generation or last sequence is impossible", where=where, expected="below 2^63",
            found=f"{slot.generation}, {slot.last_committed}",
        )  # fmt: skip
    return slot


class _Ring:
    """The ring as bytes from the tail on."""

    def __init__(self, storage: Storage, location: Location, slot: Slot) -> None:
        self.storage, self.location, self.origin = storage, location, slot.tail_position
        self.length = location.ring_length

    def read(self, at: int, length: int) -> Operation[bytearray]:
        """`length` bytes at `at` from the tail, at most one lap."""
        place = (at + self.origin) % self.length
        first = min(length, self.length - place)
        data: bytearray = yield Read(self.storage, self.location.ring_offset + place, first)
        if first < length:
            data += yield Read(self.storage, self.location.ring_offset, length - first)
        return data

    def holds(self, at: int, head: TransactionHead) -> Operation[bool]:
        """Whether the transaction at `at` has the CRC that its head names; read piece by piece, nothing is kept."""
        if head.length > self.length:
            return False
        crc = Crc(head)
        for start in range(0, head.length, CHUNK):
            crc.add((yield from self.read(at + start, min(CHUNK, head.length - start))))
        return crc.holds

    def where(self, at: int, name: str) -> str:
        return f"{name}, ring offset {(at + self.origin) % self.length}"


def plan_replay(
    storage: Storage, location: Location, geometry: Geometry, *, file_size: int, name: str
) -> Operation[ReplayPlan]:
    """Read the journal and say what it holds. Raises ImageError: what, where, expected, found."""
    if location.offset + location.length > file_size:
        # The ring was written with real zeros, and synced, before the header named it.
        raise ImageError(
            "the journal lies behind the end of the file, which may have been cut short", where=name,
            expected=f"at least {location.offset + location.length} bytes", found=file_size,
        )  # fmt: skip
    slot = newest_slot((yield Read(storage, location.offset, SLOTS_LENGTH)), location, geometry, name=name)
    ring = _Ring(storage, location, slot)
    found: list[tuple[int, TransactionHead]] = []
    at, sequence, crc = 0, slot.tail_sequence, slot.previous_crc
    while at < ring.length:
        head = decode_head((yield from ring.read(at, HEAD_LENGTH)))
        if head is None or (head.sequence, head.uuid, head.previous_crc) != (sequence, slot.uuid, crc):
            break
        if at + head.length > ring.length or not (yield from ring.holds(at, head)):
            break
        found.append((at, head))
        at, sequence, crc = at + head.length, sequence + 1, head.crc
    log = memoryview((yield from ring.read(0, at))) if at else memoryview(b"")
    transactions: list[FoundTransaction] = []
    for start, head in found:
        where = f"transaction {head.sequence} of {ring.where(start, name)}"
        records = decode_transaction(
            head, log[start : start + head.length], page_size=slot.page_size, where=where
        )  # fmt: skip
        _check_ranges(records, location, geometry, file_size=file_size, where=where)
        transactions.append(FoundTransaction(head.sequence, start, head.length, head.crc, tuple(records)))
    yield from _refuse_lost_end(ring, slot, at, sequence, name=name)
    sectors, pages = _apply(transactions, geometry)
    return ReplayPlan(location, slot, tuple(transactions), sectors, pages, log)


def _check_ranges(
    records: list[Record], location: Location, geometry: Geometry, *, file_size: int, where: str
) -> None:
    pages_end = geometry.pages * geometry.page_size
    # A revoke may be of whole clusters, of which the disk's last may be partial.
    clusters_end = -(-geometry.size // geometry.cluster_size) * geometry.cluster_size
    # A table is written whole, and durable, before a transaction names it: none lies behind the end of the file.
    metadata_end = -(-file_size // geometry.cluster_size) * geometry.cluster_size
    for record in records:
        end = record.offset + record.length
        if record.type in (GUEST_DATA, REVOKE_GUEST):
            most = pages_end if record.type == GUEST_DATA else clusters_end
            if end > most:
                raise ImageError("journal record lies past the end of the disk", where=where, expected=most, found=end)
        if record.type not in (WRITE_DATA, REVOKE_HOST):
            continue
        if record.offset < location.offset + location.length and end > location.offset:
            raise ImageError("journal record names the journal itself", where=where, found=record.offset)
        if end > metadata_end:
            raise ImageError(
                "journal record names metadata behind the end of the file", where=where, expected=metadata_end,
                found=end,
            )  # fmt: skip
        # Of the header cluster only sector 0 is ever journalled.
        if record.offset < geometry.cluster_size and (record.type, record.offset, end) != (WRITE_DATA, 0, SECTOR):
            raise ImageError(
                "journal record names the header cluster", where=where, expected="sector 0 alone",
                found=f"{record.length} bytes at {record.offset}",
            )  # fmt: skip


def _refuse_lost_end(ring: _Ring, slot: Slot, end: int, sequence: int, *, name: str) -> Operation[None]:
    """An end that is not an ordinary torn commit is damage."""
    place = ring.where(end, name)
    if sequence - 1 < slot.last_committed:
        raise ImageError(
            "the journal has lost committed transactions", where=place,
            expected=f"transactions up to {slot.last_committed}", found=f"up to {sequence - 1}",
        )  # fmt: skip
    looked_at = 0
    for start in range(end, ring.length, CHUNK):
        chunk = memoryview((yield from ring.read(start, min(CHUNK, ring.length - start))))
        for inside in range(0, len(chunk), ALIGNMENT):
            head = decode_head(chunk[inside : inside + HEAD_LENGTH])
            # What lies here of earlier laps has lower sequences. A torn commit leaves its own head, no valid CRC.
            if head is None or head.uuid != slot.uuid or head.sequence < sequence:
                continue
            looked_at += head.length if head.length <= ring.length else 0
            # Limit: one torn commit, no more, leaves a head like this; a ring full of them would take for ever.
            if looked_at <= 2 * ring.length and not (yield from ring.holds(start + inside, head)):
                continue
            raise ImageError(
                "the journal has a hole", where=place,
                expected=f"transaction {sequence} after the one before it",
                found=f"nothing that follows, but transaction {head.sequence} at {ring.where(start + inside, name)}",
            )  # fmt: skip


class _Revokes:
    """The newest revoke of each range: few ranges are many pages, so ranges are kept, not pages."""

    def __init__(self) -> None:
        self.starts: list[int] = []
        self.sequences: list[int] = []
        """Of the newest revoke from `starts` on to the next."""

    def build(self, found: list[tuple[int, int, int]]) -> None:
        """`found`: (start, end, sequence) in any order, overlapping."""
        self.starts = sorted({edge for start, end, _ in found for edge in (start, end)})
        waiting = sorted(found, reverse=True)
        covering: list[tuple[int, int]] = []
        for edge in self.starts:
            while waiting and waiting[-1][0] <= edge:
                _, end, sequence = waiting.pop()
                heappush(covering, (-sequence, end))
            # Each range is put in and taken out once, however many lie over each other.
            while covering and covering[0][1] <= edge:
                heappop(covering)
            self.sequences.append(-covering[0][0] if covering else 0)

    def newest(self, offset: int) -> int:
        """Sequence of the newest revoke that covers `offset`; 0 where none does."""
        at = bisect_right(self.starts, offset) - 1
        return self.sequences[at] if at >= 0 else 0


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
