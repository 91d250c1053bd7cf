"""Counts of references to host clusters, and refcount blocks in the same shape, so that both compare as bytes.

One byte a cluster says how often it is named; 255 says "look into `many`". Bytes lie in chunks that exist
once something in them is named: an image that is nearly all holes costs what its references cost. A refcount
block becomes the same (`decode_refcounts`), whatever its width. So a block that is right is found right by a
comparison of two byte strings, and only where they differ does anybody look at single clusters.

Limit: a hostile image may name one cluster in each chunk; `Memory` refuses that before the machine suffers.
"""

from __future__ import annotations

from array import array
from functools import lru_cache
from typing import Final

from ..errors import ImageError
from ..format.tables import table_from_bytes

CHUNK: Final = 256
"""Clusters in a chunk."""
MANY: Final = 255
_CHUNK_COST: Final = 420
_MANY_COST: Final = 160
"""What a chunk and an entry of a dictionary take in CPython, bytes."""
_NOTHING: Final = bytes(CHUNK)

_TYPES: Final = {4: "H", 5: "I"}


class Memory:
    """What the counts of one check may take: a base, and more with every table entry that was read."""

    __slots__ = ("allowed", "taken")

    def __init__(self, base_bytes: int) -> None:
        self.allowed = base_bytes
        self.taken = 0

    def take(self, size_bytes: int) -> None:
        """Raises ImageError when there is no more."""
        self.taken += size_bytes
        if self.taken > self.allowed:
            raise ImageError(
                "references are scattered too widely to be counted",
                expected=f"counts of at most {self.allowed} bytes", found=self.taken,
            )  # fmt: skip


class Counts:
    """How often each host cluster is named."""

    __slots__ = ("chunks", "many", "memory")

    def __init__(self, memory: Memory) -> None:
        self.chunks: dict[int, bytearray] = {}
        self.many: dict[int, int] = {}
        self.memory = memory

    def add(self, first: int, count: int, times: int = 1) -> None:
        """Clusters [first, first + count) are named `times` more."""
        if not times:
            return
        end = first + count
        while first < end:
            index, low = divmod(first, CHUNK)
            high = min(CHUNK, low + end - first)
            chunk = self.chunks.get(index)
            if chunk is None:
                self.memory.take(_CHUNK_COST)
                chunk = self.chunks[index] = bytearray(CHUNK)
            if high - low == 1 and chunk[low] + times < MANY:
                chunk[low] += times
            elif times < MANY and max(part := chunk[low:high]) + times < MANY:
                chunk[low:high] = part.translate(_shift(times))
            else:
                for at in range(low, high):
                    self._add_many(chunk, index * CHUNK + at, times)
            first += high - low

    def _add_many(self, chunk: bytearray, cluster: int, times: int) -> None:
        total = self.get(cluster) + times
        if total < MANY:
            chunk[cluster % CHUNK] = total
            return
        if cluster not in self.many:
            self.memory.take(_MANY_COST)
        chunk[cluster % CHUNK] = MANY
        self.many[cluster] = total

    def get(self, cluster: int) -> int:
        """How often a cluster is named."""
        chunk = self.chunks.get(cluster // CHUNK)
        value = chunk[cluster % CHUNK] if chunk else 0
        return value if value < MANY else self.many[cluster]

    def window(self, first: int, count: int) -> bytes:
        """One byte each for clusters [first, first + count); 255 for 255 and more."""
        parts = []
        end = first + count
        while first < end:
            index, low = divmod(first, CHUNK)
            high = min(CHUNK, low + end - first)
            chunk = self.chunks.get(index, _NOTHING)
            parts.append(chunk if high - low == CHUNK else chunk[low:high])
            first += high - low
        return b"".join(parts)


@lru_cache(maxsize=64)
def _shift(times: int) -> bytes:
    return bytes((value + times) & 0xFF for value in range(256))


@lru_cache(maxsize=3)
def _spread(order: int) -> tuple[bytes, ...]:
    # Spec: "Refcount blocks": entries of less than a byte start at its least significant bit.
    bits = 1 << order
    mask = (1 << bits) - 1
    return tuple(bytes(byte >> at & mask for at in range(0, 8, bits)) for byte in range(256))


def decode_refcounts(data: bytes | bytearray, order: int) -> tuple[bytes, dict[int, int]]:
    """A refcount block as one byte a cluster, 255 for 255 and more; and by index the exact value of those."""
    if order < 3:
        return b"".join(map(_spread(order).__getitem__, data)), {}
    width = 1 << (order - 3)
    low = bytes(data[width - 1 :: width])
    # Nearly every block of the world counts in its lowest bytes only; a slice finds that 50 times faster.
    if any(_is_used(data[at::width]) for at in range(width - 1)):
        values = _values(data, order)
        return bytes(min(value, MANY) for value in values), {
            index: value for index, value in enumerate(values) if value >= MANY
        }
    return low, {index: MANY for index, value in enumerate(low) if value == MANY} if MANY in low else {}


def _is_used(data: bytes | bytearray) -> bool:
    return data.count(0) != len(data)


def _values(data: bytes | bytearray, order: int) -> array[int]:
    if order == 6:
        return table_from_bytes(data)
    values = array(_TYPES[order])
    size = 1 << (order - 3)
    values.extend(int.from_bytes(data[at : at + size], "big") for at in range(0, len(data), size))
    return values
