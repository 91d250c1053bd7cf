"""What the disk says of where its data is, with pages that have no home yet; and how little it looks at for that."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
from engine import Engine, Shape

from nbd_qcow2j import changes, reading
from nbd_qcow2j.disk import Disk
from nbd_qcow2j.image.mapping import Mapping
from nbd_qcow2j.steps import Operation, run_simply

CLUSTER = 1 << 16
HUGE = Shape("cluster_size=65536", 1 << 40, journal=1 << 20)
TINY = Shape("cluster_size=512", 64 << 20, journal=1 << 20)


def opened(shape: Shape, directory: Path) -> Disk:
    return Engine(shape.make(directory), shape, Random(1)).open()


def change(disk: Disk, operation: Operation[None]) -> None:
    run_simply(changes.guarded(disk, operation, "change"))


def leave_pending(disk: Disk, offset: int, data: bytes) -> None:
    """A write whose pages wait."""
    disk.settings = replace(disk.settings, direct_write=1 << 20)
    change(disk, changes.write(disk, data, offset))
    assert offset // CLUSTER in disk.pending.clusters


def told(disk: Disk, offset: int, length: int, *, one: bool = False) -> list[tuple[int, str]]:
    """Length and kind of each extent."""
    found = run_simply(disk.extents(offset, length, one=one))
    return [(each.length, "data" if not each.zero else "zero" if each.allocated else "hole") for each in found]


@pytest.fixture
def looked_at(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The clusters that were looked up in the L1 table."""
    clusters: list[int] = []
    original = Mapping.l2_offset

    def l2_offset(self: Mapping, cluster: int) -> int:
        clusters.append(cluster)
        return original(self, cluster)

    monkeypatch.setattr(Mapping, "l2_offset", l2_offset)
    return clusters


def test_pages_that_wait_do_not_make_each_hole_be_looked_at(tmp_path: Path, looked_at: list[int]) -> None:
    disk = opened(HUGE, tmp_path)
    places = [5 * CLUSTER + 4096, (1 << 39) + 8192, (1 << 40) - 4096]
    for place in places:
        leave_pending(disk, place, b"x" * 4096)
    assert len(disk.pending.clusters) == 3
    looked_at.clear()
    found = told(disk, 0, 1 << 40)
    assert [kind for _, kind in found] == ["hole", "data", "hole", "data", "hole", "data"]
    ends = [sum(length for length, _ in found[: count + 1]) for count in range(len(found))]
    assert ends == [end for place in places for end in (place // CLUSTER * CLUSTER, (place // CLUSTER + 1) * CLUSTER)]
    # 2,048 L2 tables of 512 MiB that are not there, and a few pieces more: not 16,777,216 clusters.
    assert len(looked_at) < 2100


def test_whoever_wants_one_extent_gets_the_whole_of_it_and_hardly_more(tmp_path: Path, looked_at: list[int]) -> None:
    disk = opened(HUGE, tmp_path)
    for cluster in (0, 1, 2, 9):
        leave_pending(disk, cluster * CLUSTER, b"x" * 4096)
    assert told(disk, 512, 1 << 32, one=True)[0] == (3 * CLUSTER - 512, "data")
    assert told(disk, 3 * CLUSTER, 1 << 32, one=True)[0] == (6 * CLUSTER, "hole")
    assert len(looked_at) < 16


def test_one_request_looks_at_so_many_clusters_and_no_more(tmp_path: Path) -> None:
    # All of them in tables that are there, so each is looked at: the answer ends early, and whoever asks goes on.
    disk = opened(TINY, tmp_path)
    change(disk, changes.write(disk, b"x" * (16 << 20), 0))
    most = reading.MOST_CLUSTERS * 512
    assert told(disk, 0, 64 << 20) == [(most, "data")]
    assert told(disk, most, 64 << 20)[0] == ((16 << 20) - most, "data")


def test_a_cluster_that_was_trimmed_page_by_page_is_zero_before_it_goes_home(tmp_path: Path) -> None:
    disk = opened(HUGE, tmp_path)
    change(disk, changes.write(disk, b"x" * (2 * CLUSTER), 0))
    run_simply(disk.flush())
    for page in range(CLUSTER // 4096 - 1):
        change(disk, changes.zero(disk, page * 4096, 4096, trim=True, may_trim=True))
    run_simply(disk.flush())
    assert len(disk.pending.clusters[0]) == CLUSTER // 4096 - 1
    # A page is not known to be zero: the rest is where the cluster is.
    assert told(disk, 0, 2 * CLUSTER) == [(2 * CLUSTER, "data")]
    change(disk, changes.zero(disk, CLUSTER - 4096, 4096, trim=True, may_trim=True))
    assert told(disk, 0, 2 * CLUSTER)[0][1] in ("zero", "hole")
    assert told(disk, 0, 2 * CLUSTER)[1] == (CLUSTER, "data")
    leave_pending(disk, 4000, b"y")
    assert told(disk, 0, 2 * CLUSTER)[0] == (2 * CLUSTER, "data")
