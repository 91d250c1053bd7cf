"""Small writes in place against everything else: every order of a few callers, and random runs with faults and cuts.

Method: a small write goes the driver's way (`overwrite`): in place, in one hold, without an operation where that can
be; else pending; else by the long way. The checkpoint links one cluster a hold, so that commits, writes and trims fall
between the links of a round, and moves the tail now and then only. After every move the invariants are looked at, every
read is judged by the oracle, and what a cut or a kill leaves is recovered.

    Breakage: in_place.py: if cluster in disk.merging: -> if False:
    Breakage: in_place.py: (in end) disk.log.note_data() -> pass
    Breakage: in_place.py: (in end) return self._has_no_version(cluster, offset, length) -> return True
    Breakage: in_place.py: (in begin) disk.excluded.add(cluster) -> pass
    Breakage: disk.py: self.in_place.homes.pop(cluster, None) -> pass
    Breakage: changes.py: flags[:] = [each for each in flags if each is not flag] -> flags.remove(flag)
    Breakage: going.py: disk.touch(cluster) -> pass
    Breakage: going.py: if disk.pending.get(index) is not page: -> if False:
    Breakage: journal/log.py: return index in self.records or (…) -> return index in self.records
"""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import count
from random import Random
from typing import Any

import pytest
from engine import Engine, Shape, fill, settle
from invariants import recover
from scale import scaled
from simdisk import SimDisk, SimStorage
from stage import PAGES, WIDE, Stage, chain, image
from stepper import Chooser, Stepper, every_order

from nbd_qcow2j import changes, checkpoint
from nbd_qcow2j.attaching import detach
from nbd_qcow2j.errors import DeviceFailed, RequestError
from nbd_qcow2j.format.create import new_image
from nbd_qcow2j.format.header import parse_header
from nbd_qcow2j.steps import Operation, Pause, Write, run_simply

SMALL = Shape("cluster_size=512", 64 << 10, journal=1 << 18)
PAIRS = Shape("cluster_size=8192", 64 << 10, journal=1 << 19)
ROOMY = Shape("cluster_size=4096", 64 << 10, journal=1 << 19)
SHAPES = [
    SMALL,
    PAGES,
    Shape("cluster_size=8192", 60 << 10, journal=1 << 17, backed=True),
    Shape("cluster_size=16384,extended_l2=on", 64 << 10, journal=1 << 18),
]
FAULTS = {
    "well": [],
    "room": [(kind, errno.ENOSPC, times) for kind in ("allocate", "zero_range", "write") for times in (1, 4)],
    "reads": [("read", errno.EIO, times) for times in (1, 2, 5)],
    "lost": [(kind, errno.EIO, 1) for kind in ("sync", "write_sync", "write", "punch")],
}


@pytest.fixture(autouse=True)
def one_cluster_a_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "HOLD_CLUSTERS", 1)


def overwrite(stage: Stage, first: int, length: int) -> Operation[None]:
    """A small write as driver.Device does it."""
    disk, oracle = stage.disk, stage.oracle
    number = next(stage.calls.numbers)
    started = oracle.begin(first, length, number)
    data, offset = fill(number) * length, first * 512
    home = disk.in_place.begin(offset, len(data))
    done = home < 0 and disk.try_write(data, offset)
    if home >= 0:
        returned = False
        try:
            yield Write(disk.file, home, [data])
            returned = True
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise disk.log.latch(error, "write") from error
            raise RequestError(errno.ENOSPC, "no room in the host file system") from error
        finally:
            done = disk.in_place.end(offset, len(data)) and returned
    if not done:
        yield from changes.guarded(disk, changes.write(disk, data, offset), "write")
    oracle.end(started)


def opened(shape: Shape, *, seen: Counter[str], **how: Any) -> Stage:
    """Overwrites go in place wherever they may; counts those that did, and those that were overtaken."""
    stage = Stage(shape, in_place=True, **how)
    disk = stage.disk
    begin, end = disk.in_place.begin, disk.in_place.end

    def begun(offset: int, length: int) -> int:
        home = begin(offset, length)
        seen["in place"] += home >= 0
        return home

    def ended(offset: int, length: int) -> bool:
        newest = end(offset, length)
        seen["overtaken"] += not newest
        return newest

    disk.in_place.prefers = lambda: True  # type: ignore[method-assign]
    disk.in_place.begin, disk.in_place.end = begun, ended  # type: ignore[method-assign]
    return stage


# ---- every order

Scene = Callable[[Stage], list[Operation[Any]]]


def settled(stage: Stage) -> None:
    """The first clusters have homes, and are known to be ours."""
    stage.do(stage.write(0, 32))
    stage.home()
    stage.do(overwrite(stage, 0, 1), overwrite(stage, 16, 1), stage.flush())


def a_merge_and_a_flush(stage: Stage) -> list[Operation[Any]]:
    settled(stage)
    return [overwrite(stage, 0, 4), chain(overwrite(stage, 2, 3), stage.flush()), stage.read(0, 8)]


def a_trim_and_reuse(stage: Stage) -> list[Operation[Any]]:
    settled(stage)
    return [
        chain(overwrite(stage, 0, 4), stage.flush()),
        chain(stage.trim(0, 8), stage.flush(), stage.release(), stage.write(40, 16), stage.flush()),
    ]


def a_direct_write(stage: Stage) -> list[Operation[Any]]:
    settled(stage)
    return [chain(overwrite(stage, 2, 4), stage.flush()), chain(stage.write(0, 16), stage.flush()), stage.read(0, 8)]


def a_pending_page_on_its_way_home(stage: Stage) -> list[Operation[Any]]:
    # The page has a record, so it must not be written in place before the record is void, however it stands.
    settled(stage)
    stage.disk.in_place.prefers = lambda: False  # type: ignore[method-assign]
    stage.do(overwrite(stage, 0, 8), stage.flush())
    stage.disk.in_place.prefers = lambda: True  # type: ignore[method-assign]
    return [
        chain(stage.round(), stage.flush(), stage.round()),
        chain(overwrite(stage, 0, 4), overwrite(stage, 4, 2), stage.flush(), overwrite(stage, 0, 2)),
    ]


def zeroes_and_a_read(stage: Stage) -> list[Operation[Any]]:
    settled(stage)
    return [overwrite(stage, 8, 8), chain(stage.calls.zero(10, 4), stage.flush()), stage.read(8, 8)]


def merges_on_both_sides_of_a_home_write(stage: Stage) -> list[Operation[Any]]:
    # What one merge has read is old when the other's page has gone home, or when the write in place has returned.
    settled(stage)
    return [overwrite(stage, 0, 2), overwrite(stage, 2, 2), overwrite(stage, 5, 1), chain(stage.flush(), stage.round())]


def a_cluster_that_becomes_zero(stage: Stage) -> list[Operation[Any]]:
    # Its home is known when it is freed and given to somebody else.
    stage.do(stage.write(0, 32))
    stage.home()
    stage.do(overwrite(stage, 0, 1), stage.flush(), stage.calls.zero(0, 8), stage.calls.zero(8, 8), stage.flush())
    return [
        chain(stage.round(), stage.flush(), stage.release(), stage.write(48, 16), stage.flush()),
        chain(overwrite(stage, 1, 2), stage.flush(), overwrite(stage, 4, 2), stage.flush()),
        stage.read(48, 16),
    ]


def commits_between_the_links_of_a_round(stage: Stage) -> list[Operation[Any]]:
    stage.do(stage.write(0, 8))
    stage.home()
    stage.disk.settings = type(stage.disk.settings)(direct_write=1 << 20)
    stage.do(*(stage.write(first, 8) for first in (8, 16, 24)), overwrite(stage, 2, 2), stage.flush())
    return [
        chain(stage.round(least_bytes=1 << 30), stage.round()),
        chain(overwrite(stage, 8, 2), stage.flush(), overwrite(stage, 24, 8), stage.flush()),
        stage.flush(),
    ]


SCENES: list[tuple[Shape, Scene]] = [
    (ROOMY, a_merge_and_a_flush),
    (WIDE, a_merge_and_a_flush),
    (ROOMY, a_trim_and_reuse),
    (ROOMY, a_direct_write),
    (ROOMY, a_pending_page_on_its_way_home),
    (ROOMY, zeroes_and_a_read),
    (ROOMY, merges_on_both_sides_of_a_home_write),
    (PAIRS, a_cluster_that_becomes_zero),
    (ROOMY, commits_between_the_links_of_a_round),
]
APART = {merges_on_both_sides_of_a_home_write}
"""Scenes in which the beginning of a step and its return are moves of their own: a read that is old when it returns."""


def orders(limit: int) -> Iterator[Chooser]:
    """The first half of the orders, as many drawn; all, if they are no more."""
    seen = 0
    for order in every_order(limit // 2):
        seen += 1
        yield order
    if seen == limit // 2:
        yield from (Random(seed) for seed in range(limit - seen))


def run_scene(shape: Shape, scene: Scene, limit: int) -> None:
    seen = Counter[str]()
    for chooser in orders(limit):
        stage = opened(shape, seen=seen)
        stepper = Stepper(chooser, whole_steps=scene not in APART)
        try:
            for number, operation in enumerate(scene(stage)):
                stepper.add(operation, f"caller {number}")
            while not stepper.run(limit=1, patience=3000):
                stage.watch.check(stepper.tasks)
            stage.watch.check()
            assert not [task.error for task in stepper.tasks if task.error is not None]
            stage.oracle.check(stage.engine.contents(), stage.oracle.now)
            # All that was flushed, and whatever of the rest the page cache kept.
            for state in stage.sim.crash_states(3, Random(1)):
                recover(state, shape, stage.oracle, seed=1)
            seen["orders"] += 1
        except BaseException:
            print(f"{chooser!r}: {stepper.history}")
            raise
    print(dict(seen))
    assert seen["orders"] > 1 and seen["in place"]


@pytest.mark.parametrize(("shape", "scene"), SCENES)
def test_every_order_with_small_writes_in_place_gives_what_is_allowed(shape: Shape, scene: Scene) -> None:
    run_scene(shape, scene, 100 if scene in APART else 30)


@pytest.mark.sweep
@pytest.mark.parametrize(("shape", "scene"), SCENES)
def test_many_orders_with_small_writes_in_place(shape: Shape, scene: Scene) -> None:
    run_scene(shape, scene, scaled(250))


# ---- at random


def client(stage: Stage, rng: Random, requests: int, seen: Counter[str]) -> Operation[None]:
    """Requests near one place, most of them small writes; refusals are noted, a device that failed is left."""
    sectors, page = stage.shape.size // 512, stage.disk.page_size // 512
    hot = rng.randrange(sectors)
    for _ in range(requests):
        first = rng.randrange(sectors) if rng.random() < 0.4 else min(sectors - 1, hot + rng.randrange(12))
        length = min(sectors - first, rng.choice((1, 1, 2, 4, 8, 8, 9, 16, 30)))
        kind = rng.choices(("overwrite", "write", "zero", "trim", "flush", "read"), (9, 2, 1, 1, 3, 2))[0]
        if kind == "trim" or rng.random() < 0.5:
            unit = page if kind == "trim" else 8
            first -= first % unit
            length = min(sectors - first, max(unit, length - length % unit))
        try:
            if kind == "overwrite":
                yield from overwrite(stage, first, length)
            elif kind == "write":
                yield from stage.write(first, length)
            elif kind == "zero":
                yield from stage.calls.zero(first, length, may_trim=rng.random() < 0.5)
            elif kind == "trim":
                yield from stage.trim(first, length)
            elif kind == "flush":
                yield from stage.flush()
            else:
                yield from stage.read(first, length)
        except DeviceFailed:
            return
        except RequestError:
            seen["refused"] += 1


def background(stage: Stage, rng: Random) -> Operation[None]:
    """What the writer does, in any order."""
    disk = stage.disk
    while True:
        tight = checkpoint.is_tight(disk)
        choice = rng.randrange(5)
        try:
            if tight or choice <= 1:
                least = 0 if tight else rng.choice((0, 0, 1 << 13, 1 << 20))
                clusters = rng.choice((1, 4, 64))
                yield from checkpoint.round_(disk, tight=tight, clusters=clusters, least_bytes=least, again=tight)
            elif choice == 2:
                yield from checkpoint.settle(disk)
            elif choice == 3:
                yield from disk.allocator.release()
            else:
                yield from disk.allocator.ensure(2)
        except DeviceFailed:
            return
        except RequestError:
            pass
        yield Pause()


def play(seed: int, shape: Shape, faults: list[tuple[str, int, int]], seen: Counter[str]) -> None:
    """One to three lives of a server on one disk."""
    rng = Random(seed)
    sim, oracle = image(shape).copy(), None
    for life in range(rng.choice((1, 2, 3))):
        stage = opened(shape, seen=seen, sim=sim, oracle=oracle)
        oracle = stage.oracle
        stage.calls.numbers = count(1 + 10_000 * life)
        if life == 0:
            for _ in range(3):
                first = rng.randrange(shape.size // 512)
                stage.do(stage.write(first, min(shape.size // 512 - first, 24)))
                for _ in range(3):
                    stage.home()
        stepper = Stepper(rng, whole_steps=rng.random() < 0.3)
        clients = [
            stepper.add(client(stage, rng, rng.randint(3, 16), seen), f"client {number}")
            for number in range(rng.choice((1, 2, 3)))
        ]
        stepper.add(background(stage, rng), "writer", daemon=True)
        for kind, error, times in rng.sample(faults, min(len(faults), rng.choice((0, 1, 2)))):
            sim.fail(kind, rng.randint(1, 12), error, times=times)
        for _ in range(4):
            for _ in range(rng.randint(1, 80)):
                if stepper.run(limit=1):
                    break
                stage.watch.check(stepper.tasks)
            for state in sim.crash_states(4, rng):
                recover(state, shape, oracle, seed=seed, plain=False)
                seen["states"] += 1
            if all(task.done for task in clients):
                break
        assert not [task.error for task in stepper.tasks if task.error is not None]
        failed = stage.disk.log.failed is not None
        assert not failed or any(error == errno.EIO and kind != "read" for kind, error, _ in faults), (
            f"latched, and nothing was lost: {stage.disk.log.failed}"
        )
        seen["latched" if failed else "well"] += 1
        sim.mend()
        if rng.random() < 0.5:
            sim = rng.choice(list(sim.crash_states(8, rng)))
        sim.kill(rng)
        recover(sim.copy(), shape, oracle, seed=seed, plain=False)


def run_random(shape: Shape, faults: str, seeds: range) -> None:
    seen = Counter[str]()
    for seed in seeds:
        try:
            play(seed, shape, FAULTS[faults], seen)
        except BaseException:
            print(f"seed {seed}, {shape}, {faults}")
            raise
    print(dict(seen))
    assert seen["in place"] and seen["states"] > len(seeds)


@pytest.mark.parametrize("faults", FAULTS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.options)
def test_small_writes_in_place_lose_nothing(shape: Shape, faults: str) -> None:
    run_random(shape, faults, range(4))


@pytest.mark.sweep
@pytest.mark.parametrize("faults", FAULTS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.options)
def test_small_writes_in_place_lose_nothing_with_many_seeds(shape: Shape, faults: str) -> None:
    run_random(shape, faults, range(1000, 1000 + scaled(20)))


def test_a_small_write_below_a_table_that_two_entries_name_is_refused() -> None:
    # In place it would change what the other guest address shows.
    piece = 2 << 20
    shape = Shape("cluster_size=4096", 4 * piece, journal=1 << 19)
    sim = SimDisk.of(*new_image(shape.size, cluster_size=4096))
    engine = Engine(sim, shape, Random(1))
    disk = engine.open()
    for at in (0, piece):
        settle(engine, changes.write(disk, bytes([1 + at // piece]) * 8192, at))
    settle(engine, detach(disk))
    storage = SimStorage(sim, "damaged")
    sector = bytearray(4096)
    storage.read_into(sector, 0)
    l1 = parse_header(bytes(sector), file_size=sim.current_size, name="image").l1_offset
    entries = bytearray(512)
    storage.read_into(entries, l1)
    entries[8:16] = entries[:8]
    storage.write(l1, [bytes(entries)])
    storage.sync()
    disk = Engine(sim, shape, Random(1)).open()
    # Or it would be met first.
    disk.allocator.counted = None
    with pytest.raises(RequestError, match="another L2 table"):
        run_simply(changes.guarded(disk, changes.write(disk, b"x" * 512, piece), "write"))
    run_simply(disk.flush())
    data = bytearray(512)
    run_simply(disk.read_into(memoryview(data), 0))
    assert bytes(data) == b"\1" * 512
