"""Which host clusters hold metadata, so that nothing else is ever written there. Spec: "Host cluster management".

A healthy image names each cluster once. In a damaged or hostile one an L2 entry may name the header, the ring, a
table; following it with a write would destroy the image. So whoever is about to write in place, to change a table
or to drop a reference asks here first (`changes.Prepared`), and the allocator never hands out what is known here.

    in place     an L2 entry names metadata, or a cluster without a refcount: the write is refused
    L2 table     it lies on other metadata, two L1 entries name it, or it has no refcount: likewise
    refcount block  it lies on other metadata or behind the end of the file, or two entries name it: taken as not
                 there, so all that it counts has no refcount, is never freed and never handed out

A data cluster without a refcount that nobody writes to is met by counted.py, before it is handed out. What is not
seen without counting all references (two L2 entries with one data cluster, an active entry on a snapshot's L2 table)
is `check`'s to find.

Crash: nothing here is on disk. A mark that a cut took away is made again when the damage is met again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Final

from ..errors import ImageError
from ..format.tables import OFFSET_MASK
from ..geometry import Geometry

ACTIVE_TABLE: Final = "an L2 table"
MAX_KEPT: Final = 1 << 18
"""Limit: a table of 65,536 snapshots may claim more than memory should hold; what is beyond is `check`'s to find."""


class Overlaps:
    """The metadata of an image by host cluster. Kept up by whoever moves a table."""

    def __init__(self, geometry: Geometry, *, ring: tuple[int, int], l1: tuple[int, int], name: str) -> None:
        """`ring` and `l1` are half-open ranges of host clusters."""
        self.bits, self.name = geometry.cluster_bits, name
        self.ring, self.l1, self.reftable = ring, l1, (0, 0)
        self.tables: set[int] = set()
        """Clusters of active L2 tables."""
        self.blocks: set[int] = set()
        self.kept: dict[int, str] = {}
        """Clusters of the snapshot table and of the snapshots' L1 tables."""
        self.snapshots: set[tuple[int, int]] = set()
        """(host offset, entries) of the snapshots' L1 tables."""
        self.snapshots_known = True
        """Whether these are all of them."""
        self._keepable = MAX_KEPT
        self.counted: set[int] = set()
        """Clusters of L2 tables that were seen to have a refcount: whoever changes a table asks once."""
        self.bad_tables: set[int] = set()
        self.bad_blocks: set[int] = set()

    def read(self, reftable: tuple[int, int], blocks: Iterable[int], tables: Iterable[int], *, end: int) -> None:
        """Take in the refcount table's range of clusters, its entries, and those of the L1 table.

        `end` is the length of the file in clusters: a new block is durable, and so in the file, before its entry is.

        Raises ImageError where the tables that everything hangs on lie on each other, or are too many.
        """
        self.reftable = reftable
        ranges = [("header", (0, 1)), ("journal", self.ring), ("L1 table", self.l1), ("refcount table", reftable)]
        ranges = [(what, (low, high)) for what, (low, high) in ranges if low < high]
        for index, (what, (low, high)) in enumerate(ranges):
            for other, (from_, to) in ranges[:index]:
                if low < to and from_ < high:
                    raise ImageError(
                        f"the {what} lies on the {other}; qemu-img check -r all may mend it, reading may go on with "
                        "--read-only", where=self.name, found=f"host clusters {low} to {high}, {from_} to {to}",
                    )  # fmt: skip
        named = [*filter(None, blocks)]
        self.blocks, self.bad_blocks = self._distinct([entry >> self.bits for entry in named], end, "refcount blocks")
        self.bad_blocks |= {
            entry >> self.bits for entry in set(named) if entry & ((1 << self.bits) - 1) or entry >> self.bits >= end
        }
        self.tables, self.bad_tables = self._distinct(
            [(entry & OFFSET_MASK) >> self.bits for entry in tables if entry], end, "L2 tables"
        )
        both = self.tables & self.blocks
        self.bad_blocks |= both
        self.bad_tables |= both

    def _distinct(self, clusters: list[int], end: int, what: str) -> tuple[set[int], set[int]]:
        """The clusters, and those of them that are named twice or are something else. Raises ImageError."""
        # Limit: tables that do not lie on each other are no more than the file has clusters.
        if len(clusters) > end:
            raise ImageError(
                f"more {what} than the file has clusters; qemu-img check -r all may mend it, reading may go on with "
                "--read-only", where=self.name, expected=f"at most {end}", found=len(clusters),
            )  # fmt: skip
        distinct = set(clusters)
        bad: set[int] = set()
        if len(distinct) < len(clusters):
            bad.update(cluster for cluster, times in Counter(clusters).items() if times > 1)
        for low, high in ((0, 1), self.ring, self.l1, self.reftable):
            bad |= distinct.intersection(range(low, high)) if high - low < len(distinct) else {
                cluster for cluster in distinct if low <= cluster < high
            }
        return distinct, bad

    def keep(self, offset: int, length: int, what: str) -> None:
        """Take in something of the snapshots, bytes [offset, offset + length)."""
        first, end = offset >> self.bits, (offset + length - 1 >> self.bits) + 1
        # Limit: counted also where it is kept already, or snapshots with one table would take for ever.
        self._keepable -= end - first
        if self._keepable >= 0:
            self.kept.update(dict.fromkeys(range(first, end), what))
        else:
            # Nobody looks whether these have refcounts, so nothing may be taken for free by its refcount.
            self.snapshots_known = False

    def _fixed(self, cluster: int) -> str:
        if cluster == 0:
            return "the header"
        # Asked of every cluster that is looked at: no loop, which would make its list each time.
        if self.ring[0] <= cluster < self.ring[1]:
            return "the journal"
        if self.l1[0] <= cluster < self.l1[1]:
            return "the active L1 table"
        if self.reftable[0] <= cluster < self.reftable[1]:
            return "the refcount table"
        return ""

    def what(self, cluster: int) -> str:
        """What metadata a host cluster is; empty where it is none that is known."""
        if cluster in self.tables:
            return ACTIVE_TABLE
        if cluster in self.blocks:
            return "a refcount block"
        return self.kept.get(cluster) or self._fixed(cluster)

    def add_table(self, cluster: int) -> None:
        """A new L2 table, which has a refcount."""
        self.tables.add(cluster)
        self.counted.add(cluster)

    def drop_table(self, cluster: int) -> None:
        """The L1 table no longer names it."""
        self.tables.discard(cluster)
        self.counted.discard(cluster)

    def what_else(self, table_offset: int) -> str:
        """What an L2 table's cluster is besides; empty where it is that table alone."""
        cluster = table_offset >> self.bits
        if cluster not in self.bad_tables:
            return ""
        return self._fixed(cluster) or ("a refcount block" if cluster in self.blocks else "another L2 table")
