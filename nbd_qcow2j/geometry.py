"""The sizes of an image: cluster, tables, refcounts, pages; what follows from the header alone."""

from __future__ import annotations

from dataclasses import dataclass, field

SECTOR = 512
"""The unit of journalled metadata, and what a disk is assumed to write whole."""

MAX_PAGE = 4096
"""Pages of pending guest data are min(4 KiB, cluster size)."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """Sizes in bytes unless the name says otherwise. Spec: "Header", "Cluster mapping"."""

    cluster_bits: int
    refcount_order: int
    size: int
    extended_l2: bool = False

    # What follows from these. Worked out once, in slots: the engine asks twenty times for each cluster that goes
    # home, and a cached_property took three times as long to read.
    cluster_size: int = field(init=False)
    refcount_bits: int = field(init=False)
    l2_entry_size: int = field(init=False)
    l2_entries: int = field(init=False)
    """Guest clusters that one L2 table maps."""
    clusters: int = field(init=False)
    """Guest clusters of the disk; the last may be partial."""
    l1_entries: int = field(init=False)
    """L1 entries that the disk needs; the table may be longer."""
    page_size: int = field(init=False)
    pages_per_cluster: int = field(init=False)
    pages: int = field(init=False)
    """Pages of the disk; the last may be partial."""
    subcluster_size: int = field(init=False)
    """32 subclusters a cluster with extended L2 entries, else the cluster itself."""
    refcount_block_entries: int = field(init=False)
    """Host clusters that one refcount block counts."""
    max_refcount: int = field(init=False)

    def __post_init__(self) -> None:
        cluster_size, refcount_bits = 1 << self.cluster_bits, 1 << self.refcount_order
        l2_entry_size = 16 if self.extended_l2 else 8
        l2_entries = cluster_size // l2_entry_size
        clusters = -(-self.size // cluster_size)
        page_size = min(MAX_PAGE, cluster_size)
        for name, value in {
            "cluster_size": cluster_size,
            "refcount_bits": refcount_bits,
            "l2_entry_size": l2_entry_size,
            "l2_entries": l2_entries,
            "clusters": clusters,
            "l1_entries": -(-clusters // l2_entries),
            "page_size": page_size,
            "pages_per_cluster": cluster_size // page_size,
            "pages": -(-self.size // page_size),
            "subcluster_size": cluster_size // 32 if self.extended_l2 else cluster_size,
            "refcount_block_entries": cluster_size * 8 // refcount_bits,
            "max_refcount": (1 << refcount_bits) - 1,
        }.items():
            object.__setattr__(self, name, value)
