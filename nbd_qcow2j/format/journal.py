"""The journal on disk. All numbers are big endian; a *block* is 512 bytes.

Where it lies: the header extension 0x716a726e (only meaningful while incompatible bit 62 is set) names
one contiguous, unrefcounted range of the image file, aligned to 4 KiB and to a cluster:

    4 KiB   header slot 0        one block used, the rest zero
    4 KiB   header slot 1
    rest    the ring             a multiple of 4 KiB, written with real zeros at attach

Header slot (`qjournal`): magic, format version, block size, page size, UUID of the attachment, generation,
ring length, position and sequence number of the tail, CRC of the transaction before the tail, last
sequence number known committed, CRC32C of all that. A slot is valid if and only if magic and CRC hold;
the valid slot with the higher generation counts. Slots alternate, so a torn one leaves the other.

Transaction (`qjbk`): starts on a 4 KiB boundary of the ring, wraps at its end, and is

    64 bytes   head: magic, descriptors, sequence, UUID, length in 4 KiB units, CRC before, CRC
    24 each    descriptors: type, length, offset, block of the data in this transaction; then zeros
    512 each   blocks of data, in the order of the descriptors

It is valid if and only if magic, UUID and sequence are those expected, the CRC *before* is that of the
transaction before it, and its own CRC32C (over all its bytes, that field as zero) holds. So half of an
old transaction cannot complete a new one, and the guest, whose data lies in the ring, cannot forge one:
it never sees the UUID.

What we assume of the disk: a synchronous write that returned is there after a power cut; a 512-byte block
is written whole or not at all, and alone. Only the journal itself bears more: of slots and transactions, which
have 4 KiB of their own, a write may take others of its 4 KiB with it; not so while what was accepted is written again
after a crash (opening.py). Metadata and overwrites go home in units
of 512 bytes; what lies beside them is not in the journal.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Final

import construct as c
from crc32c import crc32c

from ..errors import ImageError

VERSION: Final = 1
BLOCK: Final = 512
ALIGNMENT: Final = 4096
SLOTS_LENGTH: Final = 2 * ALIGNMENT
HEADER_MAGIC: Final = b"qjournal"
TRANSACTION_MAGIC: Final = b"qjbk"

# Descriptor types. 2 (copy data) is never written, 4 and 5 are reserved for deduplication.
NO_OP: Final = 0
WRITE_DATA: Final = 1
REVOKE_HOST: Final = 3
GUEST_DATA: Final = 6
REVOKE_GUEST: Final = 7

_HEAD: Final = struct.Struct(">4sIQ16sIII20x")
_DESCRIPTOR: Final = struct.Struct(">IIQII")
HEAD_LENGTH: Final = _HEAD.size
DESCRIPTOR_LENGTH: Final = _DESCRIPTOR.size
_CRC: Final = struct.Struct(">I")
_CRC_AT: Final = 40
MAX_LENGTH: Final = 0xFFFF_F000
"""Limit: lengths in descriptors have 32 bits; longer ranges are several entries."""
JOINED: Final = 1 << 16
"""Length up to which a transaction becomes one buffer: cheaper than to go through its pieces, while copying is."""
MIN_RING: Final = 16 * ALIGNMENT
MAX_RING: Final = 1 << 30

_SLOT = c.Struct(
    "magic" / c.Const(HEADER_MAGIC),
    "version" / c.Int32ub,
    "block_size" / c.Int32ub,
    "page_size" / c.Int32ub,
    "previous_crc" / c.Int32ub,
    "uuid" / c.Bytes(16),
    "generation" / c.Int64ub,
    "ring_length" / c.Int64ub,
    "tail_position" / c.Int64ub,
    "tail_sequence" / c.Int64ub,
    "last_committed" / c.Int64ub,
).compile()
_LOCATION = c.Struct(
    "version" / c.Int32ub,
    "flags" / c.Int32ub,
    "offset" / c.Int64ub,
    "length" / c.Int64ub,
).compile()
_SLOT_LENGTH: Final = _SLOT.sizeof()
_LOCATION_LENGTH: Final = _LOCATION.sizeof()


def _with_crc(body: bytes) -> bytes:
    return body + crc32c(body).to_bytes(4, "big")


@dataclass(frozen=True, slots=True)
class Location:
    """Where the journal lies in the image file, bytes: the content of our header extension."""

    offset: int
    length: int

    @property
    def ring_offset(self) -> int:
        return self.offset + SLOTS_LENGTH

    @property
    def ring_length(self) -> int:
        return self.length - SLOTS_LENGTH

    def to_bytes(self) -> bytes:
        body = _LOCATION.build({"version": VERSION, "flags": 0, "offset": self.offset, "length": self.length})
        return _with_crc(body)

    @staticmethod
    def from_bytes(data: bytes, *, cluster_size: int, name: str) -> Location:
        """Read the extension's content. Raises ImageError."""
        size = _LOCATION_LENGTH
        where = f"header extension 0x716a726e of {name}"
        if len(data) < size + 4:
            raise ImageError("journal extension too short", where=where, expected=size + 4, found=len(data))
        if crc32c(data[:size]) != int.from_bytes(data[size : size + 4], "big"):
            raise ImageError("journal extension is damaged", where=where, expected="its CRC32C", found="another")
        version = int.from_bytes(data[:4], "big")
        if version != VERSION:
            raise ImageError(
                "journal format is not known to this version; use the newer nbd-qcow2j that wrote it",
                where=where, expected=VERSION, found=version,
            )  # fmt: skip
        parsed = _LOCATION.parse(data[:size])
        if parsed.flags:
            raise ImageError(
                "journal has a feature that is not known to this version; use the newer nbd-qcow2j that wrote it",
                where=where, expected="no flags", found=f"flags {parsed.flags:#x}",
            )  # fmt: skip
        location = Location(parsed.offset, parsed.length)
        ring = location.ring_length
        aligned = not (location.offset % max(cluster_size, ALIGNMENT) or location.length % ALIGNMENT)
        if not (aligned and 0 < location.offset < 1 << 56 and MIN_RING <= ring <= MAX_RING):
            raise ImageError(
                "journal location is impossible", where=where,
                expected=f"aligned, a ring of {MIN_RING} to {MAX_RING} bytes",
                found=f"offset {location.offset}, length {location.length}",
            )  # fmt: skip
        return location


@dataclass(frozen=True, slots=True)
class Slot:
    """One header slot. Positions are bytes from the start of the ring."""

    uuid: bytes
    page_size: int
    generation: int
    ring_length: int
    tail_position: int
    tail_sequence: int
    previous_crc: int
    last_committed: int

    def to_block(self) -> bytes:
        """The 4 KiB that the slot owns: written whole, so that a drive's own sectors do not matter."""
        body = _SLOT.build(
            {
                "version": VERSION,
                "block_size": BLOCK,
                **{name: getattr(self, name) for name in self.__slots__},
            }
        )
        return _with_crc(body).ljust(ALIGNMENT, b"\0")

    @staticmethod
    def from_block(data: bytes | bytearray, *, name: str) -> Slot | None:
        """The slot, or None where it is not valid (torn or never written). Raises ImageError for a newer format."""
        size = _SLOT_LENGTH
        if data[:8] != HEADER_MAGIC or crc32c(bytes(data[:size])) != int.from_bytes(data[size : size + 4], "big"):
            return None
        parsed = _SLOT.parse(bytes(data[:size]))
        if parsed.version != VERSION or parsed.block_size != BLOCK:
            raise ImageError(
                "journal format is not known to this version; use the newer nbd-qcow2j that wrote it",
                where=f"journal header of {name}", expected=f"version {VERSION}, blocks of {BLOCK}",
                found=f"version {parsed.version}, blocks of {parsed.block_size}",
            )  # fmt: skip
        return Slot(**{field: parsed[field] for field in Slot.__slots__})


@dataclass(frozen=True, slots=True)
class Record:
    """What one descriptor says: `data` is empty for a revoke."""

    type: int
    offset: int
    length: int
    data: memoryview | bytes = b""


@dataclass(slots=True)
class EncodedTransaction:
    """Ready for the ring: buffers to write one after the other, their length, the transaction's CRC."""

    buffers: Sequence[bytes | bytearray]
    length: int
    crc: int


def _packer(descriptors: int) -> struct.Struct:
    """Packs a head and so many descriptors."""
    return struct.Struct(_HEAD.format + _DESCRIPTOR.format.removeprefix(">") * descriptors)


_packer_of_few = cache(_packer)
"""Those that fill no more than a block are kept."""


def encode_transaction(
    *,
    sequence: int,
    uuid: bytes,
    previous_crc: int,
    host_revokes: Iterable[tuple[int, int]],
    guest_revokes: Iterable[tuple[int, int]],
    sectors: Iterable[tuple[int, bytes]],
    pages: Iterable[tuple[int, bytes]],
) -> EncodedTransaction:
    """Build a transaction. Sectors and pages are (offset, content) in ascending order; offsets in bytes."""
    # Five numbers of each descriptor, one after the other: one call packs those of a small transaction. Each call
    # counts here: after a wait for a client the code is in no cache, and takes three times what a loop of it takes.
    fields: list[int] = []
    for kind, ranges in ((REVOKE_HOST, host_revokes), (REVOKE_GUEST, guest_revokes)):
        for offset, length in ranges:
            start = offset
            # A descriptor's length has 32 bits.
            while offset + length - start > MAX_LENGTH:
                fields += (kind, MAX_LENGTH, start, 0, 0)
                start += MAX_LENGTH
            fields += (kind, offset + length - start, start, 0, 0)
    revokes = len(fields)
    data: list[bytes | bytearray] = []
    block = 0
    for kind, items in ((WRITE_DATA, sectors), (GUEST_DATA, pages)):
        start = end = -1
        for offset, content in items:
            data.append(content)
            size = len(content)
            # Sector 0 stands alone, also where the next cluster is the next sector: replay lets nothing else touch it.
            if offset == end and end - start < MAX_LENGTH - (1 << 22) and (start or kind == GUEST_DATA):
                end += size
                fields[-4] = end - start
            else:
                start, end = offset, offset + size
                fields += (kind, size, offset, block, 0)
            block += size // BLOCK
    count = len(fields) // 5
    head = -(-(HEAD_LENGTH + DESCRIPTOR_LENGTH * count) // BLOCK)
    # The data follows the descriptors: so many blocks further on than was counted.
    for at in range(revokes + 3, len(fields), 5):
        fields[at] += head
    length = -(-(head + block) * BLOCK // ALIGNMENT) * ALIGNMENT
    area = bytearray(head * BLOCK)
    packer = _packer_of_few(count) if head == 1 else _packer(count)
    packer.pack_into(
        area, 0, TRANSACTION_MAGIC, count, sequence, uuid, length // ALIGNMENT, previous_crc, 0, *fields
    )  # fmt: skip
    if padding := length - (head + block) * BLOCK:
        data.append(bytes(padding))
    if length <= JOINED:
        area = bytearray().join((area, *data))
        data.clear()
    crc = crc32c(area)
    for piece in data:
        crc = crc32c(piece, crc)
    _CRC.pack_into(area, _CRC_AT, crc)
    return EncodedTransaction([area, *data], length, crc)


@dataclass(frozen=True, slots=True)
class TransactionHead:
    """The head of a transaction as found: nothing of it is believed before `decode_transaction`."""

    descriptors: int
    sequence: int
    uuid: bytes
    length: int
    previous_crc: int
    crc: int


def decode_head(data: bytes | bytearray | memoryview) -> TransactionHead | None:
    """The head at the start of `data`, or None where there is none."""
    if len(data) < HEAD_LENGTH or bytes(data[:4]) != TRANSACTION_MAGIC:
        return None
    _, descriptors, sequence, uuid, units, previous_crc, crc = _HEAD.unpack_from(data)
    length = units * ALIGNMENT
    if not length or HEAD_LENGTH + DESCRIPTOR_LENGTH * descriptors > length:
        return None
    return TransactionHead(descriptors, sequence, uuid, length, previous_crc, crc)


class Crc:
    """Whether a transaction's CRC32C is the one its head names; its bytes are added in order, in pieces."""

    __slots__ = ("expected", "value")

    def __init__(self, head: TransactionHead) -> None:
        self.expected = head.crc
        self.value = -1

    def add(self, data: bytes | bytearray) -> None:
        """The first piece holds the head at least."""
        if self.value < 0:
            first = bytearray(data[:HEAD_LENGTH])
            first[_CRC_AT : _CRC_AT + 4] = bytes(4)
            self.value = crc32c(memoryview(data)[HEAD_LENGTH:], crc32c(first))
        else:
            self.value = crc32c(data, self.value)

    @property
    def holds(self) -> bool:
        return self.value == self.expected


def decode_transaction(head: TransactionHead, data: memoryview, *, page_size: int, where: str) -> list[Record]:
    """The records of a transaction whose CRC holds. Raises ImageError for what we do not know how to replay.

    Limit: data lies in the order of the descriptors and belongs to one each, so records hold no more than the ring.
    """
    records: list[Record] = []
    following = -(-(HEAD_LENGTH + DESCRIPTOR_LENGTH * head.descriptors) // BLOCK)
    for number in range(head.descriptors):
        kind, length, offset, block, _ = _DESCRIPTOR.unpack_from(data, HEAD_LENGTH + number * DESCRIPTOR_LENGTH)
        place = f"{where}, descriptor {number}"
        if kind == NO_OP:
            continue
        if kind in (WRITE_DATA, GUEST_DATA):
            unit = BLOCK if kind == WRITE_DATA else page_size
            start = block * BLOCK
            if not length or length % unit or offset % unit or start + length > head.length:
                raise ImageError("journal record is impossible", where=place, found=f"{length} bytes at {offset}")
            if block < following:
                raise ImageError(
                    "journal record is impossible: its data is another's", where=place,
                    expected=f"block {following} or a later one", found=block,
                )  # fmt: skip
            following = block + length // BLOCK
            records.append(Record(kind, offset, length, data[start : start + length]))
        elif kind in (REVOKE_HOST, REVOKE_GUEST):
            unit = BLOCK if kind == REVOKE_HOST else page_size
            if not length or length % unit or offset % unit:
                raise ImageError("journal revoke is impossible", where=place, found=f"{length} bytes at {offset}")
            records.append(Record(kind, offset, length))
        else:
            raise ImageError(
                "journal record is of a type that this version cannot replay; use the version that wrote it",
                where=place, expected="0, 1, 3, 6 or 7", found=kind,
            )  # fmt: skip
        if offset + length > (1 << 56 if kind in (WRITE_DATA, REVOKE_HOST) else 1 << 62):
            raise ImageError("journal record names an impossible offset", where=place, found=offset)
    return records
