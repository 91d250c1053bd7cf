"""Pages that have no home yet: delayed allocation, delayed copy-on-write.

A page is immutable: a write puts a *new* one in its place, so what a committing transaction or a reader
holds never changes under it. Pages are grouped by guest cluster, clusters in the order in which they became
pending: the checkpoint takes the oldest first.

    Invariant: whoever looks a page up looks here first, then in the mapping, in one hold of the lock.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from .geometry import Geometry

if TYPE_CHECKING:
    from .journal.transaction import CommittedTransaction


class Page:
    """One version of a page. `record` is the committed transaction that holds it, None before and after."""

    __slots__ = ("data", "record")

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.record: CommittedTransaction | None = None


class PendingPages:
    """guest cluster -> page index -> page."""

    def __init__(self, geometry: Geometry) -> None:
        self.page_size = geometry.page_size
        self.per_cluster = geometry.pages_per_cluster
        self.zero_page = bytes(geometry.page_size)
        self.clusters: dict[int, dict[int, Page]] = {}
        self.since: dict[int, float] = {}
        """guest cluster -> when it became pending, the oldest first."""
        self.clock: Callable[[], float] = lambda: 0.0
        """The driver's: nothing here depends on the time, it is noted for whoever asks how old the oldest is."""
        self.count = 0

    @property
    def size_bytes(self) -> int:
        return self.count * self.page_size

    def get(self, index: int) -> Page | None:
        cluster = self.clusters.get(index // self.per_cluster)
        return cluster.get(index) if cluster else None

    def put(self, index: int, page: Page) -> None:
        number = index // self.per_cluster
        cluster = self.clusters.get(number)
        if cluster is None:
            cluster = self.clusters[number] = {}
            self.since[number] = self.clock()
        if index not in cluster:
            self.count += 1
        cluster[index] = page

    def drop(self, index: int) -> bool:
        """Take a page out; True when its cluster has none left."""
        number = index // self.per_cluster
        cluster = self.clusters.get(number)
        if cluster is None or cluster.pop(index, None) is None:
            return False
        self.count -= 1
        if cluster:
            return False
        del self.clusters[number], self.since[number]
        return True

    def postpone(self, cluster: int) -> None:
        """Let the checkpoint take the others first."""
        self.clusters[cluster] = self.clusters.pop(cluster)

    def start_clock(self, clock: Callable[[], float]) -> None:
        """From now on ages are known; what was replayed from a journal is as old as this moment."""
        self.clock = clock
        self.since = dict.fromkeys(self.clusters, clock())

    def oldest_age(self) -> float:
        """Seconds since the cluster that waits longest became pending; 0 when none waits."""
        first = next(iter(self.since.values()), None)
        return 0.0 if first is None else self.clock() - first
