"""How long the file is after a session: by what was written, not by the journal that was there meanwhile."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
from engine import Engine, Shape, settle
from invariants import no_leaks
from simdisk import SimDisk, SimStorage

from nbd_qcow2j import changes
from nbd_qcow2j.attaching import detach
from nbd_qcow2j.checkpoint import drain
from nbd_qcow2j.disk import Disk
from nbd_qcow2j.steps import Operation, run_simply

SHAPES = [
    Shape("cluster_size=512,refcount_bits=64", 1 << 20, journal=1 << 21),
    Shape("cluster_size=64k", 64 << 20, journal=1 << 18),
]


@pytest.fixture(params=SHAPES, ids=lambda shape: shape.options)
def shape(request: pytest.FixtureRequest) -> Shape:
    found: Shape = request.param
    return found


@pytest.fixture
def holes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that knows holes: here, what is zero."""

    def data_runs(storage: SimStorage, offset: int, length: int) -> list[tuple[int, bool]]:
        step = 512 if length % 65536 else 65536
        return [(step, any(storage.disk.peek(at, step))) for at in range(offset, offset + length, step)]

    monkeypatch.setattr(SimStorage, "data_runs", data_runs)


def begin(sim: SimDisk, shape: Shape, *, looked_at: bool) -> tuple[Engine, Disk]:
    engine = Engine(sim, shape, Random(1))
    disk = engine.open()
    if not looked_at:
        # As where there are more tables than a session looks at.
        assert disk.allocator.counted is not None
        disk.allocator.counted.go_on = never  # type: ignore[method-assign]
    return engine, disk


def never(entries: int = 0) -> Operation[bool]:
    """Nothing is looked at."""
    return False
    yield


def write(engine: Engine, disk: Disk, cluster: int) -> None:
    size = disk.geometry.cluster_size
    settle(engine, changes.write(disk, bytes([1 + cluster % 255]) * size, cluster * size))


def written(disk: Disk, clusters: range) -> bool:
    size = disk.geometry.cluster_size
    data = bytearray(size)
    for cluster in clusters:
        run_simply(disk.read_into(memoryview(data), cluster * size))
        if data != bytes([1 + cluster % 255]) * size:
            return False
    return True


@pytest.mark.parametrize("looked_at", [True, False], ids=["tables looked at", "not all tables looked at"])
def test_sessions_that_allocate_little_make_the_file_longer_by_that(
    tmp_path: Path, shape: Shape, looked_at: bool
) -> None:
    sim = shape.make(tmp_path)
    cluster = 0
    for session in range(6):
        before = sim.current_size
        engine, disk = begin(sim, shape, looked_at=looked_at)
        size = disk.geometry.cluster_size
        for _ in range(2):
            write(engine, disk, cluster)
            cluster += 1
        settle(engine, detach(disk))
        # Two of data, an L2 table, a refcount block; the first session has qemu-img's file rounded to clusters, too.
        assert sim.current_size <= before + (5 if session == 0 else 4) * size
        no_leaks(sim, plain=True)
    _, disk = begin(sim, shape, looked_at=True)
    assert written(disk, range(cluster))


def test_a_session_that_allocates_much_fills_the_room_before_the_journal_and_goes_on_behind_it(
    tmp_path: Path, shape: Shape
) -> None:
    sim = shape.make(tmp_path)
    engine, disk = begin(sim, shape, looked_at=False)
    ring, behind = disk.allocator.ring_clusters
    first = disk.allocator.end
    count = ring - first + 40
    for cluster in range(count):
        write(engine, disk, cluster)
        if cluster % 64 == 63:
            settle(engine, drain(disk))
    settle(engine, detach(disk))
    entries = (disk.mapping.find(cluster)[0] for cluster in range(count) if disk.mapping.in_memory(cluster))
    used = {(entry & 0x00FF_FFFF_FFFF_FE00) >> disk.geometry.cluster_bits for entry in entries}
    assert not used & set(range(ring, behind))
    taken = [each for each in range(first, ring) if disk.allocator.refcount(each)]
    assert len(taken) == ring - first, "there is room left before the journal"
    assert max(used) >= behind
    no_leaks(sim, plain=True)
    _, disk = begin(sim, shape, looked_at=True)
    assert written(disk, range(count))


@pytest.mark.usefixtures("holes")
def test_kills_do_not_make_the_file_longer(tmp_path: Path, shape: Shape) -> None:
    sim = shape.make(tmp_path)
    lengths = []
    for _ in range(4):
        engine, disk = begin(sim, shape, looked_at=False)
        write(engine, disk, 0)
        settle(engine, drain(disk))
        # Killed here, and again before anything was written.
        begin(sim, shape, looked_at=False)
        engine, disk = begin(sim, shape, looked_at=False)
        settle(engine, detach(disk))
        lengths.append(sim.current_size)
        no_leaks(sim, plain=True)
    assert len(set(lengths)) == 1
    _, disk = begin(sim, shape, looked_at=True)
    assert written(disk, range(1))


@pytest.mark.usefixtures("holes")
def test_what_a_killed_server_had_before_its_journal_and_did_not_use_takes_no_space(
    tmp_path: Path, shape: Shape, monkeypatch: pytest.MonkeyPatch
) -> None:
    sim = shape.make(tmp_path)
    engine, disk = begin(sim, shape, looked_at=False)
    first, (ring, behind) = disk.allocator.end, disk.allocator.ring_clusters
    size = disk.geometry.cluster_size
    page = min(size, 4096)
    settle(engine, changes.write(disk, b"p" * page, 0))
    settle(engine, disk.flush())
    assert disk.allocator.end > first, "the pool has begun before the journal"
    # Killed: the page goes home behind the journal, so the file cannot be cut off before it.
    engine, disk = begin(sim, shape, looked_at=False)
    punched: set[int] = set()
    punch = SimStorage.punch

    def note(storage: SimStorage, offset: int, length: int) -> None:
        punched.update(range(offset // size, (offset + length) // size))
        punch(storage, offset, length)

    monkeypatch.setattr(SimStorage, "punch", note)
    settle(engine, detach(disk))
    no_leaks(sim, plain=True)
    empty = {each for each in range(first, ring) if not any(sim.peek(each * size, size))}
    assert sim.current_size > behind * size
    # The journal is aligned: what that left is not part of the room.
    assert len(empty) > (ring - first) // 2 and len(empty - punched) * size < 4096
    used = {each for each in range(sim.current_size // size) if disk.allocator.refcount(each)}
    assert not used & punched
    _, disk = begin(sim, shape, looked_at=True)
    data = bytearray(page)
    run_simply(disk.read_into(memoryview(data), 0))
    assert data == b"p" * page


@pytest.mark.usefixtures("holes")
def test_what_holds_data_before_a_journal_of_a_killed_server_stays(tmp_path: Path, shape: Shape) -> None:
    # Scenario: refcounts are too low, and the journal was put right behind somebody's data.
    sim = shape.make(tmp_path)
    engine, disk = begin(sim, shape, looked_at=False)
    ring, _ = disk.allocator.ring_clusters
    size = disk.geometry.cluster_size
    storage = SimStorage(sim, "somebody")
    storage.write((ring - 4) * size, [b"d" * size])
    storage.sync()
    engine, disk = begin(sim, shape, looked_at=False)
    settle(engine, detach(disk))
    assert sim.current_size == (ring - 3) * size
    assert sim.peek((ring - 4) * size, size) == b"d" * size


def test_the_free_clusters_of_a_killed_server_are_found_without_its_journal(tmp_path: Path, shape: Shape) -> None:
    sim = shape.make(tmp_path)
    engine, disk = begin(sim, shape, looked_at=True)
    write(engine, disk, 0)
    settle(engine, drain(disk))
    engine, disk = begin(sim, shape, looked_at=True)
    allocator = disk.allocator
    assert allocator.counted is not None
    run_simply(allocator.counted.go_on(1 << 30))
    run_simply(allocator.grow_pool(allocator.end))
    ring, behind = allocator.ring_clusters
    free = {*allocator.pool, *allocator.found}
    assert min(free) < ring and not free & set(range(ring, behind))
