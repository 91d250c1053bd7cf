"""How many clusters a round of the checkpoint prepares, or links, in one hold of the lock; and a long trim.

As many as a commit brought, so that who flushes each write is kept for one cluster at most; sixteen at most; and
sixteen where ring or pending table fill up, for then pauses cost more than they give.
"""

from __future__ import annotations

from typing import Any

import pytest
from engine import Shape
from stage import Stage, pending

from nbd_qcow2j import checkpoint
from nbd_qcow2j.changes import ZERO_CLUSTERS
from nbd_qcow2j.checkpoint import HOLD_CLUSTERS, HURRY_FROM, fill
from nbd_qcow2j.steps import Operation, Pause

SHAPE = Shape("cluster_size=4096", 256 << 10, journal=4 << 20)


def pauses(stage: Stage, operation: Operation[Any]) -> int:
    """Run it alone; how often it paused."""
    found = 0

    def counted() -> Operation[bool]:
        nonlocal found
        result = None
        while True:
            try:
                step = operation.send(result)
            except StopIteration as stop:
                return bool(stop.value)
            found += isinstance(step, Pause)
            result = yield step

    stage.do(counted())
    return found


def written(clusters: int, *, a_commit: int) -> Stage:
    """Clusters that are pending, so many of them in each commit."""
    stage = Stage(SHAPE)
    for cluster in range(clusters):
        stage.do(pending(stage, cluster * 8, 8))
        if (cluster + 1) % a_commit == 0:
            stage.do(stage.flush())
    return stage


@pytest.mark.parametrize(
    ("clusters", "a_commit", "hold"), [(8, 1, 1), (8, 2, 2), (8, 8, 8), (12, 4, 4), (34, 34, HOLD_CLUSTERS)]
)
def test_a_hold_has_as_many_clusters_as_a_commit_brought(clusters: int, a_commit: int, hold: int) -> None:
    # Breakage: checkpoint.py: len(chosen) // max(1, commits) -> HOLD_CLUSTERS
    stage = written(clusters, a_commit=a_commit)
    # Between two that are prepared; and after so many that are linked.
    assert pauses(stage, stage.round()) == (clusters - 1) // hold + clusters // hold
    assert stage.disk.checkpoint_clusters == clusters


@pytest.mark.parametrize("what", ["ring", "pending table"])
def test_nobody_pauses_for_each_cluster_where_it_fills_up(what: str) -> None:
    # Breakage: checkpoint.py: max(fill(disk), disk.pending.count / disk.pending_most) -> fill(disk)
    # Breakage: checkpoint.py: max(fill(disk), disk.pending.count / disk.pending_most)
    # -> (disk.pending.count / disk.pending_most)
    for quick in (False, True):
        stage = written(8, a_commit=1)
        disk, ring = stage.disk, stage.disk.log.ring
        if what == "ring":
            # As if it were so short that this much of it is full.
            part = HURRY_FROM + (0.01 if quick else -0.01)
            ring.length = int((ring.used + disk.log.running.size) / part) + ring.reserve
        else:
            disk.pending_most = 12 if quick else 13
        assert (max(fill(disk), disk.pending.count / disk.pending_most) > HURRY_FROM) == quick
        assert (pauses(stage, stage.round()) == 0) == quick


def test_who_notes_that_metadata_is_home_lets_others_have_their_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    # Breakage: checkpoint.py: range(0, len(written), HOLD_WRITTEN) -> range(0, len(written), HOLD_WRITTEN + 1)
    found = {}
    for hold in (1, 2, 100):
        monkeypatch.setattr(checkpoint, "HOLD_WRITTEN", hold)
        stage = written(8, a_commit=8)
        stage.do(stage.round())
        stage.do(stage.flush())
        sectors = len(stage.disk.log.home)
        assert sectors == 3
        assert stage.disk.log.ring.passable()
        found[hold] = pauses(stage, stage.round())
        assert not stage.disk.log.home
    assert found == {1: 2, 2: 1, 100: 0}


def test_a_long_trim_lets_others_have_their_turn() -> None:
    # Breakage: changes.py: if first < end:\n            # Nothing is held -> if False: (the same)
    stage = Stage(Shape("cluster_size=4096", 2 << 20, journal=8 << 20))
    assert pauses(stage, stage.trim(0, 4096)) == 0, "nothing is there"
    stage.do(stage.write(0, 4096))
    stage.home()
    assert pauses(stage, stage.trim(0, 8 * ZERO_CLUSTERS)) == 0
    stage.do(stage.write(0, 4096))
    assert pauses(stage, stage.trim(0, 4096)) == 512 // ZERO_CLUSTERS - 1
    stage.home()


def test_a_long_trim_of_what_has_no_table_lets_others_have_their_turn() -> None:
    # Breakage: changes.py: if number and not number % ZERO_CLUSTERS: -> if False:
    stage = Stage(Shape("cluster_size=4096", 2 << 20, journal=8 << 20))
    count = 2 * ZERO_CLUSTERS + 2
    for cluster in range(count):
        stage.do(pending(stage, cluster * 8, 8))
        if cluster % 16 == 15:
            stage.do(stage.flush())
    assert not stage.disk.mapping.l1.entries[0] and len(stage.disk.pending.clusters) == count
    assert pauses(stage, stage.trim(0, 4096)) == 2
    assert not stage.disk.pending.clusters
    stage.home()
