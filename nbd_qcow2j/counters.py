"""Plain integers that the hot path counts with; metrics.py renders them at scrape.

Counters are not locked: an increment that two threads lose between them costs a metric one request, a lock costs
every request more than the counter does.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass

BOUNDS_SECONDS = (
    0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0,
)  # fmt: skip
_BOUNDS_NS = tuple(int(bound * 1e9) for bound in BOUNDS_SECONDS)
MANY = 64
BOUNDS_PAGES = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A histogram at one moment: counts by bucket, the last without an upper bound, and the sum of what was seen."""

    bounds: tuple[float, ...]
    buckets: tuple[int, ...]
    total: float


class Histogram:
    """Counts by bucket of what was observed."""

    __slots__ = ("bounds", "buckets", "scale", "total")

    def __init__(self, bounds: tuple[float, ...] = BOUNDS_SECONDS, *, scale: float = 1e-9) -> None:
        """`scale` turns what is observed (nanoseconds) into the unit of the bounds (seconds)."""
        self.bounds = bounds
        self.scale = scale
        self.buckets = [0] * (len(bounds) + 1)
        self.total = 0

    def observe(self, value: int) -> None:
        self.buckets[bisect_left(self.bounds, value * self.scale)] += 1
        self.total += value

    def snapshot(self) -> Snapshot:
        return Snapshot(self.bounds, tuple(self.buckets), self.total * self.scale)


class OperationCounters:
    """Requests of one kind."""

    __slots__ = ("buckets", "bytes", "errors", "on_many", "requests", "sum_ns")

    def __init__(self) -> None:
        self.on_many: Callable[[], object] = lambda: None
        """Called after every MANY requests."""
        self.requests = self.bytes = self.errors = self.sum_ns = 0
        self.buckets = [0] * (len(_BOUNDS_NS) + 1)

    def observe(self, length: int, nanoseconds: int) -> None:
        """A request was answered."""
        self.requests += 1
        self.bytes += length
        self.sum_ns += nanoseconds
        self.buckets[bisect_left(_BOUNDS_NS, nanoseconds)] += 1
        if not self.requests % MANY:
            self.on_many()

    def snapshot(self) -> Snapshot:
        return Snapshot(BOUNDS_SECONDS, tuple(self.buckets), self.sum_ns * 1e-9)


@dataclass(frozen=True, slots=True)
class Statistics:
    """A device at one moment; units are in the names."""

    state: str
    journal_size_bytes: int
    journal_used_bytes: int
    pending_bytes: int
    oldest_pending_seconds: float
    commits: int
    commit_bytes: int
    commit_seconds: Snapshot
    commit_pages: Snapshot
    fsync_seconds: Snapshot
    checkpoints: int
    checkpoint_clusters: int
    checkpoint_bytes: int
    checkpoint_starvations: int
    checkpoint_seconds: Snapshot
    cow_read_bytes: int
    clusters_allocated: int
    clusters_freed: int
    replayed_transactions: int
    pool_clusters: int
