"""What goes home: pages and metadata, what is revoked by it, what waits for it. One rule, one test.

Each is a rule of the engine that a mutation (mutations.py) breaks, or that was found broken.
"""

from __future__ import annotations

from itertools import count
from random import Random
from typing import Any

import pytest
from engine import Engine, Shape, room_before_journal, settle
from invariants import recover
from simdisk import SimDisk, SimStorage
from stage import PAGES, Stage, chain, cut, drain_pool, image
from stepper import Stepper, Task
from windows import skip_room_before_journal

from nbd_qcow2j import changes, checkpoint
from nbd_qcow2j.attaching import detach
from nbd_qcow2j.errors import DeviceFailed
from nbd_qcow2j.format.create import new_image
from nbd_qcow2j.format.header import parse_header
from nbd_qcow2j.steps import Operation, Pause, Read, ReadInto, Step, Sync, Write, WriteSync, run_simply

ROOMY = Shape(PAGES.options, PAGES.size, journal=1 << 18)
"""Credits for several operations at once."""
LONG = Shape(PAGES.options, 1 << 20, journal=1 << 18)
"""An L2 table of which three sectors are used."""


# ---- home elsewhere


def upto(stage: Stage, operation: Operation[Any], step: type[Step], *, begun: bool = False) -> tuple[Stepper, Task]:
    """Run an operation up to a step of this type, which is still to begin, or is in flight."""
    stepper = Stepper()
    task = stepper.add(operation)
    while type(task.step) is not step:
        stepper.move(task)
    if begun:
        stepper.move(task)
    stage.watch.check(stepper.tasks)
    return stepper, task


def finish(stage: Stage, stepper: Stepper) -> None:
    """What was kept waiting ends; the contents are right, also after a flush and a cut."""
    stepper.run(patience=500)
    assert all(task.error is None for task in stepper.tasks)
    stage.watch.check()
    stage.oracle.check(stage.engine.contents(), stage.oracle.now)
    stage.do(stage.flush())
    cut(stage)


@pytest.mark.parametrize("committed", [True, False], ids=["committed", "not committed"])
@pytest.mark.parametrize("how", ["direct", "trim"])
def test_a_record_is_void_when_its_page_is_written_or_trimmed_elsewhere(committed: bool, how: str) -> None:
    stage = Stage(PAGES)
    stage.do(stage.write(0, 4))
    if committed:
        stage.do(stage.flush())
    stage.do(stage.write(0, 8) if how == "direct" else stage.trim(0, 8), stage.flush())
    cut(stage)


def test_a_record_that_is_being_committed_is_void_as_well() -> None:
    stage = Stage(PAGES)
    stage.do(stage.write(0, 4))
    stepper, _ = upto(stage, stage.flush(), WriteSync, begun=True)
    run_simply(stage.write(0, 8))
    finish(stage, stepper)


def test_a_page_that_goes_home_before_its_commit_leaves_the_running_transaction() -> None:
    stage = Stage(PAGES)
    stage.do(stage.write(0, 4), stage.round(), stage.flush())
    cut(stage)


def test_a_page_that_is_replaced_on_its_way_home_keeps_its_place() -> None:
    stage = Stage(PAGES)
    stage.do(stage.write(0, 4), stage.flush())
    stepper, _ = upto(stage, stage.round(), Sync)
    run_simply(stage.write(0, 3))
    finish(stage, stepper)
    stage.home()
    stage.oracle.check(stage.engine.contents(), stage.oracle.now)


def test_a_trim_waits_for_a_write_in_place() -> None:
    stage = Stage(ROOMY)
    stage.do(stage.write(0, 8))
    stage.home()
    stepper, _ = upto(stage, stage.write(0, 8), Write)
    trim = stepper.add(stage.trim(0, 8), "trim")
    while not trim.done and not trim.waits_for:
        stepper.move(trim)
    stage.watch.check(stepper.tasks)
    finish(stage, stepper)


def test_a_cluster_that_moved_while_its_refcount_was_read_is_not_written_in_place() -> None:
    # A trim is reading the refcount block, and a small write waits for that read to learn that the cluster is ours.
    # Before it looks the trim is over, and the host cluster is another guest cluster's.
    stage = Stage(PAGES, in_place=True)
    stage.do(stage.write(0, 8))
    stage.home()
    drain_pool(stage)
    stage.forget_tables()
    stage.do(stage.read(0, 8))
    others = chain(stage.trim(0, 8), stage.flush(), stage.release(), stage.write(8, 8), stage.flush())
    stepper, task = upto(stage, others, Read)
    write = stepper.add(stage.write(0, 4))
    while not write.waits_for:
        stepper.move(write)
    assert write.waits_for == "table load"
    home = stage.disk.mapping.find(0)
    while not task.done:
        stepper.move(task)
    assert stage.disk.mapping.find(1) == home and not write.done
    finish(stage, stepper)


def test_a_merge_reads_again_what_was_written_beneath_it() -> None:
    stage = Stage(PAGES)
    stage.do(stage.write(0, 8))
    stage.home()
    stepper, _ = upto(stage, stage.write(1, 2), ReadInto, begun=True)
    run_simply(stage.write(0, 8))
    finish(stage, stepper)


def test_a_merge_keeps_the_merge_that_came_between() -> None:
    stage = Stage(PAGES)
    stage.do(stage.write(0, 8))
    stage.home()
    stepper, _ = upto(stage, stage.write(1, 2), ReadInto, begun=True)
    run_simply(stage.write(5, 2))
    finish(stage, stepper)


def test_a_page_that_has_become_zero_returns_its_promise() -> None:
    stage = Stage(PAGES)
    run_simply(changes.write_pending(stage.disk, 0, memoryview(bytes(4096))))
    assert stage.disk.allocator.tokens
    stage.do(stage.flush(), stage.round(), stage.flush())
    assert stage.disk.allocator.tokens == len(stage.disk.table_tokens)


def test_what_goes_home_is_what_was_committed() -> None:
    stage = Stage(PAGES)
    stage.do(stage.write(0, 8), stage.flush(), stage.write(8, 8), stage.round())
    cut(stage)


def test_a_sector_that_is_committed_again_on_its_way_home_stays_in_the_set() -> None:
    stage = Stage(PAGES)
    stage.do(stage.write(0, 8), stage.flush())
    stepper, _ = upto(stage, stage.round(), Sync)
    for operation in (stage.write(8, 8), stage.flush()):
        run_simply(operation)
        stage.watch.check(stepper.tasks)
    finish(stage, stepper)


def test_a_load_that_is_overtaken_by_its_table_going_home_reads_again() -> None:
    stage = Stage(PAGES)
    stage.do(stage.write(0, 8), stage.flush())
    stage.forget_tables()
    stepper, _ = upto(stage, stage.read(0, 8), Read, begun=True)
    run_simply(stage.round())
    assert not stage.disk.log.home
    finish(stage, stepper)


def test_a_slow_reader_keeps_a_freed_cluster() -> None:
    stage = Stage(PAGES)
    stage.do(stage.write(0, 8))
    stage.home()
    drain_pool(stage)
    stepper, _ = upto(stage, stage.read(0, 8), ReadInto)
    for operation in (stage.trim(0, 8), stage.flush(), stage.release(), stage.write(8, 16)):
        run_simply(operation)
        stage.watch.check(stepper.tasks)
    finish(stage, stepper)


def test_a_round_that_cannot_take_all_takes_the_oldest() -> None:
    # Each flush has a page of its own, and the cluster that came first lies behind all others: it is the one that holds
    # the tail.
    stage = Stage(Shape(PAGES.options, 1 << 20, journal=1 << 19))
    ring = stage.disk.log.ring
    fits = ring.max_transaction // 2 // ring.home_cost
    stage.do(stage.write(255 * 8, 4), stage.flush())
    for cluster in range(fits + 10):
        stage.do(stage.write(cluster * 8, 4), stage.flush())
    assert not checkpoint.is_tight(stage.disk)
    stage.do(stage.round())
    assert 255 not in stage.disk.pending.clusters and len(stage.disk.pending.clusters) >= 10


# ---- metadata that goes home


@pytest.mark.parametrize("between", ["clean", "running", "committing"])
def test_what_lies_between_two_sectors_goes_home_with_them_unless_it_is_not_committed(between: str) -> None:
    # One L2 table: its first sector has entries 0 to 63, its second 64 to 127, its third 128 to 191.
    stage = Stage(LONG)
    stage.do(stage.write(0, 8), stage.write(128 * 8, 8))
    stage.home()
    home = stage.disk.mapping.l2_offset(0)
    stage.do(stage.trim(0, 8), stage.trim(128 * 8, 8), stage.flush())
    stepper = None
    if between != "clean":
        stage.do(stage.write(64 * 8, 8))
    if between == "committing":
        stepper, _ = upto(stage, stage.flush(), WriteSync)
    assert set(stage.disk.log.home) >= {home, home + 1024} and home + 512 not in stage.disk.log.home
    seen = len(stage.sim.history)
    run_simply(stage.round())
    assert not stage.disk.log.home
    written = [(each.offset, each.length) for each in stage.sim.history[seen:] if each.kind == "write"]
    if between == "clean":
        assert (home, 1536) in written
    else:
        assert {(home, 512), (home + 1024, 512)} <= set(written)
    cut(stage)
    if stepper is not None:
        finish(stage, stepper)
    stage.home()
    cut(stage)


@pytest.mark.parametrize("call", ["sync", "write_sync"])
def test_what_a_failed_commit_held_does_not_go_home(call: str) -> None:
    # A round has copied what is committed, and pauses. A commit fails: what it held is in no transaction any more, and
    # in the live table still. The round goes on, and meets the latch only after it has written.
    # A ring in whose rounds there is a pause.
    stage = Stage(Shape(PAGES.options, 1 << 20, journal=1 << 23))
    stage.do(stage.write(0, 8), stage.write(128 * 8, 8))
    stage.home()
    home = stage.disk.mapping.l2_offset(0)
    stage.do(stage.trim(0, 8), stage.trim(128 * 8, 8), stage.flush())
    stage.do(*(stage.write(cluster * 8, 4) for cluster in range(200, 220)), stage.flush(), stage.write(64 * 8, 8))
    assert home + 512 not in stage.disk.log.home
    stepper, round_ = upto(stage, stage.round(), Pause)
    flush = stepper.add(stage.flush())
    stage.sim.fail(call)
    while not flush.done:
        stepper.move(flush)
    seen = len(stage.sim.history)
    while not round_.done:
        stepper.move(round_)
    assert isinstance(flush.error, DeviceFailed) and isinstance(round_.error, DeviceFailed)
    for each in stage.sim.history[seen:]:
        assert not (each.kind == "write" and each.offset <= home + 512 < each.offset + each.length)
    for sim in stage.sim.crash_states(20, Random(0)):
        recover(sim, stage.shape, stage.oracle, seed=1)


@pytest.mark.parametrize("is_read", [True, False])
def test_a_table_read_from_where_another_lies_is_not_written_between_its_sectors(is_read: bool) -> None:
    # Scenario: an L1 entry names the L1 table; the guest reads below it, so the L1 table is in the cache as an L2
    # table, as it was then. Its first and third sector go home, and what is remembered of the second is old.
    cluster, piece = 2048, 512 << 10
    shape = Shape("cluster_size=2048", 128 << 20, journal=1 << 19)
    sim = SimDisk.of(*new_image(shape.size, cluster_size=cluster))
    data = bytearray(cluster)
    storage = SimStorage(sim, "damaged")
    storage.read_into(data, 0)
    l1 = parse_header(bytes(data), file_size=sim.current_size, name="image").l1_offset
    storage.write(l1 + 3 * 512, [bytes(504) + (l1 | 1 << 63).to_bytes(8, "big")])
    storage.sync()
    engine = Engine(sim, shape, Random(1))
    disk = engine.open()
    # Or it would be met first.
    disk.allocator.counted = None
    sector = bytearray(512)
    if is_read:
        run_simply(disk.read_into(memoryview(sector), 255 * piece))
    for entries in ((64,), (0, 128)):
        for entry in entries:
            run_simply(changes.guarded(disk, changes.write(disk, bytes([1 + entry]) * 512, entry * piece), "write"))
            run_simply(disk.flush())
        for _ in range(3):
            run_simply(checkpoint.round_(disk))
            run_simply(disk.flush())
    settle(engine, detach(disk))
    disk = Engine(sim, shape, Random(1), read_only=True).open()
    for entry in (64, 0, 128):
        run_simply(disk.read_into(memoryview(sector), entry * piece))
        assert bytes(sector) == bytes([1 + entry]) * 512


# ---- freed metadata


@pytest.mark.parametrize("apart", [True, False], ids=["committed before", "in one transaction"])
def test_sectors_of_a_table_that_moved_are_not_written_over_what_came_after_it(apart: bool) -> None:
    # The refcount table gets an entry, then it is full and moves; its old cluster becomes a guest's.
    shape = Shape("cluster_size=512,refcount_bits=64", 64 << 10, journal=1 << 20)
    sim = image(shape).copy()
    capacity = 64 * 64 * 512
    storage = SimStorage(sim)
    storage.truncate(capacity - 65 * 512 - (shape.journal + 8192) - room_before_journal(512))
    storage.sync()
    stage = Stage(shape, sim=sim)
    disk = stage.disk
    skip_room_before_journal(disk)
    old = disk.allocator.reftable.host_offset
    number = count()
    while disk.allocator.reftable.host_offset == old:
        stage.do(stage.write(next(number) * 8 % 120, 8))
        if apart:
            stage.do(stage.flush())
    stage.do(stage.flush(), stage.release())
    assert old // 512 in disk.allocator.found
    for _ in range(12):
        if old // 512 not in disk.allocator.found and old // 512 not in disk.allocator.pool:
            break
        stage.do(stage.trim(0, 8), stage.flush(), stage.write(0, 8), stage.flush())
    assert old // 512 in stage.watch._named(live=True)
    cut(stage)
    for _ in range(3):
        stage.do(stage.round(), stage.flush())
        cut(stage)
    stage.oracle.check(stage.engine.contents(), stage.oracle.now)
