"""The second half of a check: every refcount against the references, every COPIED flag against its refcount.

Works in the order of the refcount table, each block once. A block that agrees is one comparison of bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from ..format.tables import REFTABLE_OFFSET_MASK
from ..geometry import Geometry
from .findings import CheckReport, Incomplete
from .references import CHUNK, MANY, Counts, decode_refcounts
from .snapshots import Reader

_IS_ONE: Final = bytes(int(value == 1) for value in range(256))
_IS_NOT_ONE: Final = bytes(int(value != 1) for value in range(256))
_IS_USED: Final = bytes(int(value > 0) for value in range(256))


@dataclass(frozen=True)
class Comparison:
    """What is compared, and where the findings go."""

    geometry: Geometry
    clusters: int
    """Host clusters of the file, and as many more as something in it names."""
    reftable: list[int]
    references: Counts
    copied: Counts
    """References from active L1 and L2 entries that have the COPIED flag."""
    plain: Counts
    """And from those that have it not."""
    read: Reader
    report: CheckReport

    def run(self) -> None:
        """Compare everything, and note where the image ends."""
        per, size = self.geometry.refcount_block_entries, self.geometry.cluster_size
        last = 0
        read_from, refcounts, exact = -1, b"", dict[int, int]()
        for index in self._blocks():
            first = index * per
            count = max(0, min(per, self.clusters - first))
            offset = self.reftable[index] & REFTABLE_OFFSET_MASK if index < len(self.reftable) else 0
            if offset & (size - 1):
                if count:
                    # As in qemu, each cluster whose refcount cannot be read is an error of the check.
                    self.report.fail(f"refcounts of {count} clusters from {first} on cannot be read", count)
                continue
            # Entries of a hostile table may all name one block.
            if offset != read_from:
                try:
                    data = self.read(offset, size) if offset else bytes(size)
                except Incomplete as reason:
                    self.report.fail(f"{reason}: refcounts from cluster {first} on were not compared")
                    return
                read_from = offset
                refcounts, exact = decode_refcounts(data, self.geometry.refcount_order)
            if count:
                found, window = refcounts[:count], self.references.window(first, count)
                if found != window or MANY in window:
                    self._compare_block(first, found, exact, window)
                last = max(last, *(first + len(each.rstrip(b"\0")) - 1 for each in (found, window)))
            self._compare_flags(first, refcounts)
        self.report.image_end_offset = (last + 1) * size

    def _blocks(self) -> list[int]:
        """Indexes of the refcount blocks that can matter: they exist, or something they count is named."""
        per = self.geometry.refcount_block_entries
        end = -(-self.clusters // per)
        found = {index for index, entry in enumerate(self.reftable[:end]) if entry & REFTABLE_OFFSET_MASK}
        for counts in (self.references, self.copied, self.plain):
            for chunk in counts.chunks:
                found.update(range(chunk * CHUNK // per, ((chunk + 1) * CHUNK - 1) // per + 1))
        return sorted(found)

    def _compare_block(self, first: int, refcounts: bytes, exact: dict[int, int], window: bytes) -> None:
        limit = self.geometry.max_refcount
        for at in _differing(refcounts, window):
            cluster = first + at
            refcount = refcounts[at] if refcounts[at] < MANY else exact[at]
            references = window[at] if window[at] < MANY else self.references.get(cluster)
            if references > limit:
                self.report.corrupt(
                    f"cluster {cluster} is named {references} times, a refcount says {limit} at most",
                    references - limit,
                )  # fmt: skip
                references = limit
            if refcount < references:
                self.report.corrupt(f"cluster {cluster} refcount={refcount} reference={references}")
            elif refcount > references:
                self.report.leak(f"cluster {cluster} refcount={refcount} reference={references}")

    def _compare_flags(self, first: int, refcounts: bytes) -> None:
        """COPIED says "the refcount is one", in both directions."""
        for counts, mask, text in ((self.copied, _IS_NOT_ONE, "set"), (self.plain, _IS_ONE, "not set")):
            named, wrong = counts.window(first, len(refcounts)), refcounts.translate(mask)
            if not _both(named.translate(_IS_USED), wrong):
                continue
            for at in range(len(refcounts)):
                if named[at] and wrong[at]:
                    times = counts.get(first + at)
                    self.report.corrupt(
                        f"cluster {first + at}: COPIED is {text} in {times} entries, its refcount is {refcounts[at]}",
                        times,
                    )  # fmt: skip

    def look_into_ring(self, offset: int, length: int) -> None:
        """Nothing may name a cluster of an attached journal; the image ends after it."""
        bits = self.geometry.cluster_bits
        first, end = offset >> bits, -(-(offset + length) >> bits)
        for at, value in enumerate(self.references.window(first, end - first)):
            if value:
                self.report.corrupt(f"cluster {first + at} belongs to the journal, but is named {value} times")
        self.report.image_end_offset = max(self.report.image_end_offset, end << bits)


def _both(left: bytes, right: bytes) -> bool:
    """Whether two strings of zeros and ones have a one at the same place."""
    return bool(int.from_bytes(left, "little") & int.from_bytes(right, "little"))


def _differing(left: bytes, right: bytes) -> Iterator[int]:
    """Where two strings differ, or where a value is too large for them to say."""
    for start in range(0, len(left), CHUNK):
        a, b = left[start : start + CHUNK], right[start : start + CHUNK]
        if a != b or MANY in a:
            yield from (start + at for at in range(len(a)) if a[at] != b[at] or a[at] == MANY)
