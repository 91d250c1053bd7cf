"""The table in the docstring of journal/replay.py, as cases: every combination of damage is one row, and it holds."""

from __future__ import annotations

import re
import struct
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from itertools import product

import pytest
from crc32c import crc32c
from hypothesis import given
from hypothesis import strategies as st

from nbd_qcow2j.errors import ImageError
from nbd_qcow2j.format.create import new_image
from nbd_qcow2j.format.header import parse_header
from nbd_qcow2j.format.journal import (
    ALIGNMENT,
    BLOCK,
    HEAD_LENGTH,
    MIN_RING,
    SLOTS_LENGTH,
    Location,
    Slot,
    encode_transaction,
)
from nbd_qcow2j.geometry import Geometry
from nbd_qcow2j.journal.replay import ReplayPlan, _Revokes, plan_replay
from nbd_qcow2j.opening import replayed_header
from nbd_qcow2j.steps import run_simply

GEOMETRY = Geometry(12, 4, 1 << 20)
LOCATION = Location(1 << 16, SLOTS_LENGTH + MIN_RING)
RING = LOCATION.ring_length
FILE_SIZE = LOCATION.offset + LOCATION.length + 4096
UUID, OTHER = b"u" * 16, b"o" * 16
TAIL = RING - 12288
"""The second transaction wraps at the ring's end."""
LENGTH = 8192


class Bytes:
    """A file that is only read."""

    name = "image"

    def __init__(self, data: bytes) -> None:
        self.data = data

    def read_into(self, buffer: bytearray | memoryview, offset: int) -> None:
        found = self.data[offset : offset + len(buffer)]
        buffer[:] = found.ljust(len(buffer), b"\0")


def plan(content: bytes, *, file_size: int = FILE_SIZE, location: Location = LOCATION) -> ReplayPlan:
    """What a journal area says."""
    storage = Bytes(bytes(location.offset) + content)
    return run_simply(plan_replay(storage, location, GEOMETRY, file_size=file_size, name="image"))  # type: ignore[arg-type]


def slot(**fields: int) -> Slot:
    return replace(
        Slot(
            uuid=UUID, page_size=4096, generation=8, ring_length=RING, tail_position=TAIL, tail_sequence=5,
            previous_crc=77, last_committed=4,
        ),
        **fields,
    )  # fmt: skip


def put(ring: bytearray, at: int, data: bytes) -> None:
    """Lay bytes into the ring at a distance from the tail."""
    for index in range(0, len(data), BLOCK):
        place = (TAIL + at + index) % RING
        ring[place : place + BLOCK] = data[index : index + BLOCK]


@cache
def transaction(sequence: int, previous: int, uuid: bytes = UUID, page: int = 3, fill: int = 1) -> bytes:
    """One page and one sector of metadata: 8 KiB."""
    encoded = encode_transaction(
        sequence=sequence, uuid=uuid, previous_crc=previous, host_revokes=(), guest_revokes=(),
        sectors=[(8192, bytes([fill]) * 512)], pages=[(page * 4096, bytes([fill]) * 4096)],
    )  # fmt: skip
    assert encoded.length == LENGTH
    return b"".join(encoded.buffers)


def crc_of(data: bytes) -> int:
    return int.from_bytes(data[40:44], "big")


def forged(data: bytes, at: int, value: bytes) -> bytes:
    """The transaction with other bytes, and a CRC that holds."""
    data = data[:at] + value + data[at + len(value) :]
    data = data[:40] + bytes(4) + data[44:]
    return data[:40] + crc32c(data).to_bytes(4, "big") + data[44:]


def descriptor(data: bytes, *, kind: int | None = None, length: int | None = None, offset: int | None = None) -> bytes:
    """The transaction with another first descriptor (of its sector of metadata)."""
    found = struct.unpack_from(">IIQ", data, HEAD_LENGTH)
    wanted = [new if new is not None else old for new, old in zip((kind, length, offset), found, strict=True)]
    return forged(data, HEAD_LENGTH, struct.pack(">IIQ", *wanted))


# ---- slots

SLOTS: dict[str, Callable[[Slot], bytes]] = {
    "valid": lambda each: each.to_block(),
    "torn": lambda each: each.to_block()[:40] + bytes(ALIGNMENT - 40),
    "empty": lambda each: bytes(ALIGNMENT),
    "newer": lambda each: with_version(each.to_block()),
    "length": lambda each: replace(each, ring_length=RING * 2).to_block(),
    "pages": lambda each: replace(each, page_size=512).to_block(),
    "tail": lambda each: replace(each, tail_position=RING).to_block(),
}
UNREADABLE = ("torn", "empty")


def with_version(block: bytes) -> bytes:
    size = 80
    body = block[:8] + (2).to_bytes(4, "big") + block[12:size]
    return (body + crc32c(body).to_bytes(4, "big")).ljust(ALIGNMENT, b"\0")


def counting(states: tuple[str, str], newest: int) -> str:
    """The state of the slot that counts."""
    return states[newest] if states[newest] not in UNREADABLE else states[1 - newest]


SLOT_ROWS: dict[str, tuple[Callable[[tuple[str, str], int], bool], str | None]] = {
    "newer": (lambda states, newest: "newer" in states, "not known to this version"),
    "none": (lambda states, newest: all(each in UNREADABLE for each in states), "both journal header slots"),
    "length": (lambda states, newest: "newer" not in states and counting(states, newest) == "length", "ring length"),
    "pages": (lambda states, newest: "newer" not in states and counting(states, newest) == "pages", "page size"),
    "tail": (lambda states, newest: "newer" not in states and counting(states, newest) == "tail", "tail is impossible"),
    "(counts)": (lambda states, newest: "newer" not in states and counting(states, newest) == "valid", None),
}


def test_every_combination_of_slots_is_one_row() -> None:
    # Scenario: the newer slot has passed the first of three transactions; the older one has not.
    first = transaction(5, 77)
    ring = bytearray(RING)
    previous = 77
    for number in range(3):
        data = transaction(5 + number, previous)
        put(ring, number * LENGTH, data)
        previous = crc_of(data)
    passed = slot(generation=9, tail_position=(TAIL + LENGTH) % RING, tail_sequence=6, previous_crc=crc_of(first))
    slots = slot(), passed
    seen: Counter[str] = Counter()
    for states in product(SLOTS, repeat=2):
        for newest in (0, 1):
            rows = [name for name, (when, _) in SLOT_ROWS.items() if when(states, newest)]
            assert len(rows) == 1, (states, newest, rows)
            seen[rows[0]] += 1
            mine = slots if newest else slots[::-1]
            content = b"".join(SLOTS[state](each) for state, each in zip(states, mine, strict=True)) + ring
            says = SLOT_ROWS[rows[0]][1]
            if says is not None:
                with pytest.raises(ImageError, match=says):
                    plan(content)
            else:
                used_old = states[newest] in UNREADABLE
                assert len(plan(content).transactions) == (3 if used_old else 2), (states, newest)
    print(f"{sum(seen.values())} combinations of slots: {dict(seen)}")
    assert seen.keys() == SLOT_ROWS.keys()


# ---- log


@dataclass(frozen=True)
class State:
    """What became of a transaction. `make` is given it whole, and what lay in its place a lap ago."""

    make: Callable[[bytes, bytes], bytes]
    valid: bool = False
    """A transaction of this journal, its CRC holds."""
    follows: bool = True
    offends: str = ""
    """The row that refuses it once it is accepted."""


LOG: dict[str, State] = {
    "whole": State(lambda new, old: new, valid=True),
    "nothing to do": State(lambda new, old: descriptor(new, kind=0), valid=True),
    "never written": State(lambda new, old: bytes(LENGTH)),
    "a lap ago": State(lambda new, old: old),
    "torn": State(lambda new, old: new[: LENGTH // 2] + bytes(LENGTH // 2)),
    "half of an old one": State(lambda new, old: new[:4096] + old[4096:]),
    "head of an old one": State(lambda new, old: old[:512] + new[512:]),
    "too long": State(lambda new, old: forged(new, 32, (RING // ALIGNMENT + 1).to_bytes(4, "big"))),
    "other UUID": State(lambda new, old: forged(new, 16, OTHER)),
    "other chain": State(lambda new, old: forged(new, 36, b"\1\2\3\4"), valid=True, follows=False),
    "unknown type": State(lambda new, old: descriptor(new, kind=9), valid=True, offends="type"),
    "copy data": State(lambda new, old: descriptor(new, kind=2), valid=True, offends="type"),
    "deduplication": State(lambda new, old: descriptor(new, kind=4), valid=True, offends="type"),
    "odd length": State(lambda new, old: descriptor(new, length=500), valid=True, offends="record"),
    "no length": State(lambda new, old: descriptor(new, length=0), valid=True, offends="record"),
    "beyond its data": State(lambda new, old: descriptor(new, length=16384), valid=True, offends="record"),
    "odd offset": State(lambda new, old: descriptor(new, offset=8200), valid=True, offends="record"),
    "2^56": State(lambda new, old: descriptor(new, offset=1 << 56), valid=True, offends="record"),
    "behind the file": State(lambda new, old: descriptor(new, offset=FILE_SIZE + 4096), valid=True, offends="record"),
    "in the ring": State(lambda new, old: descriptor(new, offset=LOCATION.offset + 512), valid=True, offends="record"),
    "in the header": State(lambda new, old: descriptor(new, offset=512), valid=True, offends="record"),
    "behind the disk": State(
        lambda new, old: descriptor(new, kind=6, length=4096, offset=1 << 20), valid=True, offends="record"
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Pattern:
    """Three transactions, 5 to 7, and which of them the slot knows as committed."""

    states: tuple[str, ...]
    last_committed: int

    @property
    def accepted(self) -> int:
        count = 0
        for name in self.states:
            if not (LOG[name].valid and LOG[name].follows):
                break
            count += 1
        return count

    @property
    def offence(self) -> str:
        return next((LOG[name].offends for name in self.states[: self.accepted] if LOG[name].offends), "")

    @property
    def lost(self) -> bool:
        return 4 + self.accepted < self.last_committed

    @property
    def hole(self) -> bool:
        return any(LOG[name].valid for name in self.states[self.accepted :])

    def content(self) -> bytes:
        ring = bytearray(RING)
        previous, old_previous = 77, 55
        for number, name in enumerate(self.states):
            old = transaction(2 + number, old_previous, fill=9)
            new = transaction(5 + number, previous, page=3 + number, fill=number + 1)
            data = LOG[name].make(new, old)
            put(ring, number * LENGTH, data)
            previous = crc_of(data) if LOG[name].valid else crc_of(new)
            old_previous = crc_of(old)
        return slot(last_committed=self.last_committed).to_block() + bytes(ALIGNMENT) + bytes(ring)


LOG_ROWS: dict[str, tuple[Callable[[Pattern], bool], str | None]] = {
    "type": (lambda each: each.offence == "type", "type that this version cannot replay"),
    "record": (
        lambda each: each.offence == "record",
        "journal record (is impossible|names|lies past the end of the disk)",
    ),
    "lost": (lambda each: not each.offence and each.lost, "lost committed transactions"),
    "hole": (lambda each: not each.offence and not each.lost and each.hole, "the journal has a hole"),
    "replay": (lambda each: not each.offence and not each.lost and not each.hole, None),
}


def test_every_combination_of_a_log_is_one_row() -> None:
    seen: Counter[str] = Counter()
    for states in product(LOG, repeat=3):
        for last_committed in (4, 5, 6, 7):
            pattern = Pattern(states, last_committed)
            rows = [name for name, (when, _) in LOG_ROWS.items() if when(pattern)]
            assert len(rows) == 1, (pattern, rows)
            seen[rows[0]] += 1
            says = LOG_ROWS[rows[0]][1]
            try:
                found = plan(pattern.content())
            except ImageError as error:
                assert says is not None, f"{pattern}: {error}"
                assert re.search(says, str(error)), f"{pattern}, row {rows[0]}: {error}"
                assert "image" in str(error)
            else:
                assert says is None, f"{pattern} was replayed, row {rows[0]}"
                assert len(found.transactions) == pattern.accepted
                assert len(found.log) == pattern.accepted * LENGTH
    print(f"{sum(seen.values())} combinations of a log: {dict(seen)}")
    assert seen.keys() == LOG_ROWS.keys()


@pytest.mark.parametrize("behind", ["zeros", "a lap ago", "noise"])
def test_a_transaction_torn_at_any_block_is_not_there(behind: str) -> None:
    first = transaction(5, 77)
    second, old = transaction(6, crc_of(first), fill=2), transaction(3, 55, fill=9)
    rest = {"zeros": bytes(LENGTH), "a lap ago": old, "noise": bytes(range(1, 255)) * 40}[behind]
    used = 512 + 512 + 4096
    for cut in range(0, used, BLOCK):
        for torn in (second[:cut] + rest[cut:LENGTH], rest[: cut + BLOCK] + second[cut + BLOCK :]):
            if torn == second:
                continue
            ring = bytearray(RING)
            put(ring, 0, first)
            put(ring, LENGTH, torn)
            found = plan(slot(last_committed=5).to_block() + bytes(ALIGNMENT) + bytes(ring))
            assert [each.sequence for each in found.transactions] == [5]


def test_an_empty_ring_is_an_empty_journal() -> None:
    found = plan(slot().to_block() + slot(generation=9).to_block() + bytes(RING))
    assert (found.transactions, found.sectors, found.pages, len(found.log)) == ((), {}, {}, 0)


def test_a_ring_that_is_full_to_the_last_byte_is_replayed() -> None:
    ring, previous = bytearray(RING), 77
    for number in range(RING // LENGTH):
        data = transaction(5 + number, previous, page=number)
        put(ring, number * LENGTH, data)
        previous = crc_of(data)
    found = plan(slot(last_committed=4 + RING // LENGTH).to_block() + bytes(ALIGNMENT) + bytes(ring))
    assert len(found.transactions) == len(found.pages) == RING // LENGTH
    assert bytes(found.log) == bytes(ring[TAIL:] + ring[:TAIL])


def test_a_ring_of_forged_heads_is_refused_before_it_takes_for_ever() -> None:
    # Scenario: every 4 KiB begins with a head of this UUID and a length of the whole ring.
    location = Location(1 << 16, SLOTS_LENGTH + (4 << 20))
    head = transaction(9, 1)[:32] + (location.ring_length // ALIGNMENT).to_bytes(4, "big")
    ring = head.ljust(ALIGNMENT, b"\0") * (location.ring_length // ALIGNMENT)
    content = slot(ring_length=len(ring), tail_position=0).to_block() + bytes(ALIGNMENT) + ring
    with pytest.raises(ImageError, match="the journal has a hole"):
        plan(content, location=location, file_size=location.offset + location.length)


def test_a_journal_that_the_file_does_not_hold_is_refused() -> None:
    content = slot().to_block() + bytes(ALIGNMENT) + bytes(RING)
    with pytest.raises(ImageError, match="behind the end of the file"):
        plan(content, file_size=LOCATION.offset + LOCATION.length - 1)


@pytest.mark.parametrize("at", [0, 4], ids=["version", "flags"])
def test_a_location_of_a_newer_format_is_refused(at: int) -> None:
    body = bytearray(LOCATION.to_bytes()[:-4])
    body[at : at + 4] = (2).to_bytes(4, "big")
    with pytest.raises(ImageError, match="not known to this version"):
        Location.from_bytes(body + crc32c(bytes(body)).to_bytes(4, "big"), cluster_size=4096, name="image")


# ---- revokes


def journal(*transactions: dict[str, object]) -> ReplayPlan:
    """A journal of transactions given as the arguments of `encode_transaction`."""
    ring, previous, at = bytearray(RING), 77, 0
    for number, arguments in enumerate(transactions):
        nothing: dict[str, object] = {"host_revokes": (), "guest_revokes": (), "sectors": (), "pages": ()}
        encoded = encode_transaction(
            sequence=5 + number, uuid=UUID, previous_crc=previous, **{**nothing, **arguments}  # type: ignore[arg-type]
        )  # fmt: skip
        put(ring, at, b"".join(encoded.buffers))
        at, previous = at + encoded.length, encoded.crc
    return plan(slot().to_block() + bytes(ALIGNMENT) + bytes(ring))


def test_the_newest_record_of_a_page_and_of_a_sector_counts() -> None:
    found = journal(
        {"pages": [(4096, b"a" * 4096)], "sectors": [(8192, b"a" * 512)]},
        {"pages": [(4096, b"b" * 4096)], "sectors": [(8192, b"b" * 512)]},
    )
    assert found.pages == {1: (b"b" * 4096, 6)}
    assert found.sectors == {8192: (b"b" * 512, 6)}


def test_a_revoke_voids_older_records_and_neither_its_own_nor_later_ones() -> None:
    page, sector = {"pages": [(4096, b"a" * 4096)]}, {"sectors": [(8192, b"a" * 512)]}
    revoke = {"guest_revokes": [(0, 1 << 20)], "host_revokes": [(4096, 8192)]}
    assert not journal(page, revoke).pages
    assert not journal(sector, revoke).sectors
    both = journal(page | sector | revoke)
    assert (set(both.pages), set(both.sectors)) == ({1}, {8192})
    after = journal(revoke, page | sector)
    assert (set(after.pages), set(after.sectors)) == ({1}, {8192})
    again = journal(page, revoke, page)
    assert again.pages == {1: (b"a" * 4096, 7)}


def test_a_revoke_ends_where_it_says() -> None:
    pages = {"pages": [(at * 4096, b"a" * 4096) for at in range(6)]}
    found = journal(pages, {"guest_revokes": [(8192, 4096), (16384, 4096)]})
    assert sorted(found.pages) == [0, 1, 3, 5]


# ---- a journalled header


def test_a_journalled_header_may_move_the_refcount_table_and_nothing_else() -> None:
    data = new_image(1 << 20)[0][0][1].ljust(65536, b"\0")
    header = parse_header(data, file_size=1 << 20, name="image")
    moved = data[:48] + struct.pack(">QI", 4 << 16, 2) + data[60:]
    found = replayed_header(header, moved, file_size=1 << 20, name="image")
    assert (found.refcount_table_offset, found.refcount_table_clusters) == (4 << 16, 2)
    for at, value in ((24, struct.pack(">Q", 1 << 19)), (40, struct.pack(">Q", 1 << 16)), (23, b"\x0c"), (79, b"\4")):
        with pytest.raises(ImageError, match=r"differs in more than the refcount table|extended"):
            replayed_header(header, moved[:at] + value + moved[at + len(value) :], file_size=1 << 20, name="image")


def test_records_that_share_their_data_are_refused() -> None:
    # Many descriptors with one piece of data: a small journal that would be a large state.
    area = bytearray(BLOCK)
    count = 8
    for number in range(count):
        struct.pack_into(">IIQII", area, 64 + 24 * number, 6, 4096, number * 4096, 1, 0)
    length = 8192
    struct.pack_into(">4sIQ16sIII20x", area, 0, b"qjbk", count, 5, UUID, length // 4096, 77, 0)
    data = bytes(area).ljust(length, b"\1")
    crc = crc32c(data)
    data = data[:40] + crc.to_bytes(4, "big") + data[44:]
    ring = bytearray(RING)
    put(ring, 0, data)
    with pytest.raises(ImageError, match="its data is another's"):
        plan(slot().to_block() + bytes(ALIGNMENT) + bytes(ring))


@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(1, 20), st.integers(1, 9)), max_size=30),
    st.lists(st.integers(0, 70), max_size=20),
)
def test_the_newest_revoke_of_a_place_is_found(ranges: list[tuple[int, int, int]], places: list[int]) -> None:
    revokes = _Revokes()
    revokes.build([(start, start + length, sequence) for start, length, sequence in ranges])
    for place in places:
        covering = [sequence for start, length, sequence in ranges if start <= place < start + length]
        assert revokes.newest(place) == max(covering, default=0)
