"""The sizes of an image: cluster, tables, refcounts, pages; what follows from the header alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

SECTOR = 512
"""The unit of journalled metadata, and what a disk is assumed to write whole."""

MAX_PAGE = 4096
"""Pages of pending guest data are min(4 KiB, cluster size)."""


@dataclass(frozen=True)
class Geometry:
    """Sizes in bytes unless the name says otherwise. Spec: "Header", "Cluster mapping"."""

    cluster_bits: int
    refcount_order: int
    size: int
    extended_l2: bool = False

    @cached_property
    def cluster_size(self) -> int:
        return 1 << self.cluster_bits

    @cached_property
    def refcount_bits(self) -> int:
        return 1 << self.refcount_order

    @cached_property
    def l2_entry_size(self) -> int:
        return 16 if self.extended_l2 else 8

    @cached_property
    def l2_entries(self) -> int:
        """Guest clusters that one L2 table maps."""
        return self.cluster_size // self.l2_entry_size

    @cached_property
    def clusters(self) -> int:
        """Guest clusters of the disk; the last may be partial."""
        return -(-self.size // self.cluster_size)

    @cached_property
    def l1_entries(self) -> int:
        """L1 entries that the disk needs; the table may be longer."""
        return -(-self.clusters // self.l2_entries)

    @cached_property
    def page_size(self) -> int:
        return min(MAX_PAGE, self.cluster_size)

    @cached_property
    def pages_per_cluster(self) -> int:
        return self.cluster_size // self.page_size

    @cached_property
    def pages(self) -> int:
        """Pages of the disk; the last may be partial."""
        return -(-self.size // self.page_size)

    @cached_property
    def subcluster_size(self) -> int:
        """32 subclusters a cluster with extended L2 entries, else the cluster itself."""
        return self.cluster_size // 32 if self.extended_l2 else self.cluster_size

    @cached_property
    def refcount_block_entries(self) -> int:
        """Host clusters that one refcount block counts."""
        return self.cluster_size * 8 // self.refcount_bits

    @cached_property
    def max_refcount(self) -> int:
        return (1 << self.refcount_bits) - 1
