"""No power cut at any moment of any scenario loses what was flushed, leaks a cluster, or leaves what cannot be opened.

The scenarios are a fixed list, on tiny geometries: clusters of 512 bytes and 4 KiB (16 KiB where there are
subclusters), rings of 16 to 32 blocks of 4 KiB. Smaller rings do not exist: 16 blocks is what the format demands, as
the largest transaction and the reserve that frees the tail must fit. How each is cut is in `windows.py`.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import images
import pytest
from engine import Oracle, Shape
from simdisk import SECTOR, SimDisk
from windows import QUICK, THOROUGH, Effort, Explorer, Life, explore, numbers, run, skip_room_before_journal

from nbd_qcow2j import checkpoint

SMALL = Shape("cluster_size=512", 40 << 10)
ROOMY = Shape("cluster_size=512", 40 << 10, journal=32 << 12)
NARROW = Shape("cluster_size=512,refcount_bits=1", 40 << 10, journal=24 << 12)
PAGE = Shape("cluster_size=4096", 64 << 10)
WIDE = Shape("cluster_size=4096,refcount_bits=64", 64 << 10, journal=32 << 12)
LARGE = Shape("cluster_size=16384,refcount_bits=64", 64 << 10)
SUB = Shape("cluster_size=16384,refcount_bits=64,extended_l2=on", 64 << 10)
PAIRS = Shape("cluster_size=8192", 64 << 10, journal=32 << 12)
"""Two pages in a cluster."""
TABLE = Shape("cluster_size=512,refcount_bits=64", 64 << 10)


def attach(life: Life) -> None:
    with life.window():
        life.open()


def first_commit(life: Life) -> None:
    life.open()
    with life.window():
        life.write(3)
        life.flush()
        life.write(9, 3)
        life.write(17, 6)
        life.flush()


def commit_that_wraps(life: Life) -> None:
    life.open()
    ring = life.disk.log.ring
    while ring.length - ring.head > 8192:
        life.write(16)
        life.commit()
        if ring.length - ring.head > 8192:
            life.go_home()
    assert 0 < ring.length - ring.head <= 8192
    # Three units of 4 KiB: more than is left.
    life.write(8, 20 if life.disk.page_size == 512 else 16, pending=True)
    with life.window():
        life.flush()
        assert ring.head > ring.length
        life.write(8, 8, pending=True)
        life.write(24, 3)
        life.flush()
        life.go_home()


def full_ring(life: Life) -> None:
    life.open()
    ring = life.disk.log.ring
    at = 0
    while ring.has_room(running=life.disk.log.running.size, cost=2 * life.disk.page_cost):
        life.write(at % 64, 4)
        life.commit()
        at += 8
    assert life.disk.pending.clusters
    with life.window():
        # Each of these waits until the checkpoint has freed the tail.
        for _ in range(3):
            life.write(at % 64, 4)
            life.flush()
            at += 8


def commit_with_direct_data(life: Life) -> None:
    life.open()
    with life.window():
        life.write(8, 8)
        life.flush()
        # In place now.
        life.write(8, 8)
        life.write(32, 1)
        life.flush()


def in_place(life: Life) -> None:
    life.open()
    life.write(8, 8)
    life.write(16, 8)
    # Nothing allocates in two transactions: overwrites go to where the clusters are.
    for _ in range(2):
        life.write(8, 1, in_place=True)
        life.flush()
    before = life.disk.pending.count
    with life.window():
        life.write(9, 3, in_place=True)
        life.write(16, 4, in_place=True)
        life.flush()
        assert life.disk.pending.count == before
        # Over it, in every other way, and back.
        life.write(9, 2, pending=True)
        life.write(10, 1, in_place=True)
        life.flush()
        life.write(12, 1, in_place=True)
        life.trim(8, 8)
        life.write(16, 1, in_place=True)
        life.flush()


def revoke_over_pending(life: Life) -> None:
    life.open()
    life.write(8, 8, pending=True)
    life.write(16, 8, pending=True)
    life.flush()
    life.write(8, 2)
    with life.window():
        life.write(8, 8)
        life.trim(16, 8)
        life.flush()
        life.write(16, 8, pending=True)
        life.flush()


def revoke_over_direct(life: Life) -> None:
    life.open()
    life.write(8, 16)
    life.flush()
    life.write(8, 8, pending=True)
    life.flush()
    with life.window():
        # A record of pages whose cluster was written directly before, and again after.
        life.write(8, 8)
        life.flush()
        life.write(8, 8, pending=True)
        life.trim(16, 8)
        life.flush()
        life.release()
        life.write(16, 8)
        life.flush()


def revoke_over_metadata_reused_as_data(life: Life) -> None:
    # The L2 tables are copied at their first change and freed; their clusters are the next ones used.
    life.open()
    life.be_tight()
    with life.window():
        life.write(8, 8)
        life.flush()
        life.release()
        life.write(24, 8)
        life.write(0, 3)
        life.flush()
        life.checkpoint()
        life.flush()
        life.release()
        life.write(40, 8)
        life.flush()


def use_all_below(life: Life) -> int:
    """Use every free cluster before the end of the file; returns the first sector that was not written."""
    allocator, at = life.disk.allocator, 0
    life.be_tight()
    skip_room_before_journal(life.disk)
    end = allocator.end
    while allocator.end == end:
        life.write(at, 8)
        at += 8
    life.flush()
    life.release()
    return at


def growth_past_the_journal(life: Life) -> None:
    life.open()
    life.be_tight()
    ring, behind = life.disk.allocator.ring_clusters
    life.disk.allocator.end = ring - 3
    at = 0
    with life.window():
        # Up to the journal, then on behind it, with a refcount block there.
        while life.disk.allocator.end < behind + 3:
            life.write(at, 8)
            life.flush()
            at += 8
        life.write(1, 2, pending=True)
        life.flush()
        life.checkpoint()
        life.close()


def table_growth(life: Life) -> None:
    life.open()
    at = use_all_below(life)
    table = life.disk.allocator.reftable.host_offset
    with life.window():
        life.write(at, 8)
        life.flush()
        assert life.disk.allocator.reftable.host_offset != table
        life.release()
        # The old table's cluster is reused.
        life.write(at + 8, 8)
        life.write(1, 2, pending=True)
        life.flush()
        life.checkpoint()
        life.flush()
        life.checkpoint()


def table_growth_by_the_checkpoint(life: Life) -> None:
    life.open()
    at = use_all_below(life)
    life.go_home()
    table = life.disk.allocator.reftable.host_offset
    with life.window():
        life.write(at, 7, pending=True)
        life.flush()
        life.write(at + 8, 7, pending=True)
        life.checkpoint()
        life.close()
        assert life.disk.allocator.reftable.host_offset != table


def checkpoint_of_whole_clusters(life: Life) -> None:
    life.open()
    life.write(0, 32, pending=True)
    life.flush()
    with life.window():
        life.checkpoint()
        # In place the second time, with a page that is not flushed.
        life.write(0, 16, pending=True)
        life.checkpoint()
        life.flush()
        life.go_home()
        assert life.disk.checkpoint_clusters >= 4


def checkpoint_of_parts(life: Life) -> None:
    # Parts of clusters over whatever lies beneath: nothing, a backing file, compressed or shared clusters, subclusters.
    life.open()
    life.write(3, 2)
    life.write(33, 5)
    life.write(60, 1)
    life.flush()
    life.write(4, 9)
    with life.window():
        life.checkpoint(clusters=2)
        life.flush()
        life.checkpoint()
        life.flush()
        life.go_home()
        assert life.disk.checkpoint_clusters >= 2
        life.write(32, 3)
        life.flush()


def checkpoint_of_zero_clusters(life: Life) -> None:
    life.open()
    life.write(0, 16, pending=True)
    life.write(32, 16)
    life.flush()
    life.zero(0, 8, may_trim=False)
    life.zero(34, 9)
    life.trim(8, 8)
    life.flush()
    with life.window():
        life.write(2, 2)
        life.checkpoint()
        life.zero(32, 8, may_trim=False)
        life.flush()
        life.write(33, 1)
        life.checkpoint()
        life.flush()
        life.go_home()
        life.trim(0, 64)
        life.flush()


def l2_allocation(life: Life) -> None:
    # Small clusters: an L2 table maps 32 KiB, the disk has two.
    life.open()
    life.write(1, 2)
    life.flush()
    life.go_home()
    with life.window():
        life.write(66, 8)
        life.flush()
        life.write(79, 1)
        life.flush()
        life.go_home()
        assert life.disk.mapping.l2_offset(79)


def tail_move(life: Life) -> None:
    life.open()
    for at in (0, 8, 16, 24, 8):
        life.write(at, 3)
        life.flush()
    with life.window():
        for _ in range(5):
            life.checkpoint(clusters=1)
            life.flush()
        life.write(40, 3)
        life.flush()


def discard_then_reuse(life: Life) -> None:
    life.open()
    life.write(0, 32)
    life.flush()
    life.go_home()
    life.be_tight()
    with life.window():
        life.trim(0, 16)
        life.write(40, 8)
        life.flush()
        life.release()
        life.write(48, 8)
        life.write(2, 3)
        life.flush()
        life.checkpoint()
        life.trim(40, 16)
        life.flush()
        life.release()
        life.write(56, 8)
        life.flush()


def detach(life: Life) -> None:
    life.open()
    life.write(0, 12, pending=True)
    life.flush()
    life.write(24, 8)
    life.trim(0, 8)
    life.write(50, 1)
    with life.window():
        life.close()


def recover(life: Life) -> None:
    # Killed with everything in the journal; what was not flushed is in the page cache.
    life.open()
    life.write(0, 12, pending=True)
    life.write(32, 8)
    life.flush()
    life.checkpoint(clusters=1)
    life.write(5, 2)
    life.flush()
    life.write(40, 8)
    life.checkpoint()
    life.commit()
    life.sim.kill()
    with life.window():
        life.open()
        life.write(16, 3)
        life.flush()
        life.close()


def recorded_again(life: Life) -> None:
    # Half a cluster over a backing file that cannot be read keeps the tail; the rest can go home.
    life.open()
    life.write(0, 8, pending=True)
    life.flush()
    beneath = life.disk.backing.storage.disk  # type: ignore[union-attr]
    beneath.fail("read", 1, times=0)
    at = 16
    while not checkpoint.is_tight(life.disk):
        life.write(at, 16, pending=True)
        life.flush()
        at = at + 16 if at < 112 else 16
    tail = life.disk.log.ring.tail
    with life.window():
        while checkpoint.is_tight(life.disk):
            assert run(checkpoint.round_(life.disk, tight=True, again=True), life.disk)
        assert life.disk.log.ring.tail > tail and 0 in life.disk.pending.clusters
        life.write(0, 3)
        life.flush()
    beneath.mend()


def the_free_tail_at_detach(life: Life) -> None:
    # Clusters behind the journal are used, and then the last of them are free again.
    life.open()
    life.write(0, 64)
    life.flush()
    life.go_home()
    life.trim(16, 48)
    life.flush()
    with life.window():
        life.close()
        life.open()
        life.trim(0, 80)
        life.close()


class Scenario(NamedTuple):
    script: Callable[[Life], None]
    kind: str
    shape: Shape
    discard: bool = True


def over(script: Callable[[Life], None], kind: str, *shapes: Shape, discard: bool = True) -> list[Scenario]:
    return [Scenario(script, kind, shape, discard) for shape in shapes]


def backed(shape: Shape) -> Shape:
    return Shape(shape.options, shape.size, shape.journal, backed=True)


SCENARIOS = [
    *over(attach, "plain", SMALL, PAGE),
    *over(attach, "overlay", backed(SMALL), backed(PAGE)),
    *over(first_commit, "plain", NARROW, PAGE),
    *over(commit_that_wraps, "plain", SMALL, PAGE),
    *over(full_ring, "plain", SMALL, PAGE),
    *over(in_place, "plain", SMALL, PAGE),
    *over(commit_with_direct_data, "plain", SMALL, WIDE),
    *over(revoke_over_pending, "plain", SMALL, PAGE),
    *over(revoke_over_direct, "plain", SMALL, PAGE),
    *over(revoke_over_metadata_reused_as_data, "foreign-l2", SMALL, PAGE),
    *over(growth_past_the_journal, "plain", TABLE),
    *over(table_growth, "padded", TABLE),
    *over(table_growth_by_the_checkpoint, "padded", TABLE),
    *over(checkpoint_of_whole_clusters, "plain", NARROW, WIDE),
    *over(checkpoint_of_parts, "plain", ROOMY, LARGE),
    *over(checkpoint_of_parts, "overlay", backed(ROOMY), backed(PAGE), backed(LARGE)),
    *over(checkpoint_of_parts, "compressed", ROOMY, PAGE),
    *over(checkpoint_of_parts, "snapshot", ROOMY, PAGE),
    *over(checkpoint_of_parts, "subclusters", SUB, backed(SUB)),
    *over(checkpoint_of_zero_clusters, "plain", SMALL, PAGE, SUB),
    *over(checkpoint_of_zero_clusters, "overlay", backed(SMALL), backed(PAGE), backed(SUB)),
    *over(l2_allocation, "plain", SMALL),
    *over(l2_allocation, "snapshot", SMALL),
    *over(tail_move, "plain", SMALL, PAGE),
    *over(discard_then_reuse, "plain", SMALL, PAGE),
    *over(discard_then_reuse, "plain", SMALL, PAGE, discard=False),
    *over(discard_then_reuse, "compressed", PAGE),
    *over(detach, "plain", NARROW, PAGE),
    *over(detach, "overlay", backed(SMALL), backed(PAGE)),
    *over(recover, "plain", SMALL, PAGE),
    *over(recover, "snapshot", PAGE),
    *over(recorded_again, "overlay", backed(PAIRS)),
    *over(the_free_tail_at_detach, "plain", SMALL, PAGE),
    *over(the_free_tail_at_detach, "plain", PAGE, discard=False),
]


def name(scenario: Scenario) -> str:
    shape = scenario.shape
    words = [scenario.script.__name__, scenario.kind, shape.options, "backed" if shape.backed else ""]
    return ",".join(filter(None, [*words, "" if scenario.discard else "keep"]))


def cut(scenario: Scenario, effort: Effort, directory: Path, proved: Callable[[str, int], None]) -> None:
    image = images.make(scenario.kind, scenario.shape, directory)
    explorer = explore(scenario.script, image, scenario.shape, effort, discard=scenario.discard)
    counts = explorer.counts
    print(f"{name(scenario)}: {counts}, seed {explorer.seed}")
    proved("states cut", counts.states)
    assert counts.moments > 4 and counts.first > 4 and counts.second
    if explorer.copied_flags:
        for sim in explorer.closed(effort.judged):
            judge(sim, directory / "judged.qcow2")


def judge(sim: SimDisk, path: Path) -> None:
    """qemu-img finds neither errors nor leaks; the backing file, which may not exist, is left out."""
    sim.to_file(path)
    file = {"driver": "qcow2", "file": {"driver": "file", "filename": str(path)}, "backing": None}
    words = ["qemu-img", "check", "--output=json", f"json:{json.dumps(file)}"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    report = json.loads(done.stdout)
    found = {key: report.get(key, 0) for key in ("check-errors", "corruptions", "leaks")}
    assert done.returncode == 0 and not any(found.values()), f"{found} {done.stderr}"


@pytest.mark.parametrize("scenario", SCENARIOS, ids=name)
def test_no_cut_loses_a_flushed_sector_or_leaks_a_cluster(
    scenario: Scenario, tmp_path: Path, proved: Callable[[str, int], None]
) -> None:
    cut(scenario, QUICK, tmp_path, proved)


@pytest.mark.sweep
@pytest.mark.parametrize("scenario", SCENARIOS, ids=name)
def test_no_cut_loses_a_flushed_sector_or_leaks_a_cluster_thoroughly(
    scenario: Scenario, tmp_path: Path, proved: Callable[[str, int], None]
) -> None:
    cut(scenario, THOROUGH, tmp_path, proved)


@pytest.mark.parametrize("script", [commit_that_wraps, tail_move, full_ring], ids=lambda script: script.__name__)
def test_a_physical_sector_of_4_kib_that_tears_around_a_write_of_the_journal_harms_nothing(
    script: Callable[[Life], None], tmp_path: Path, proved: Callable[[str, int], None]
) -> None:
    # Transactions and slots own their blocks of 4 KiB: whatever is left of a block that was being written, garbage in
    # sectors that were not written included, costs nothing but that write.
    image = images.make("plain", PAGE, tmp_path)
    explorer = Explorer(image, PAGE, QUICK)
    sim = image.copy()
    sim.physical_sector, sim.tear_neighbours = 4096, True
    life = Life(sim, PAGE, Oracle([0] * (PAGE.size // SECTOR)))

    def watch(_: bool) -> None:
        effects = [effect for effect in sim.log if effect.sectors]
        if effects and all(effect.kind == "write_sync" for effect in effects):
            for state in sim.crash_states(60, explorer.rng):
                life.oracle.check(numbers(explorer.recovered(state, 0)))

    life.watcher = watch
    script(life)
    states = len(explorer.levels[0])
    print(f"{script.__name__}: {states} states with torn physical sectors")
    proved("states cut", states)
    assert states > 100
