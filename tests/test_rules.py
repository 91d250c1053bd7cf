"""One rule, one test: what runs drawn at random meet too seldom to be relied on.

Each is a rule of the engine that a mutation (mutations.py) breaks, or that was found broken.
"""

from __future__ import annotations

from random import Random

import pytest
from engine import Shape, settle
from invariants import NEVER, no_leaks, recover
from stage import BACKED, PAGES, SMALL, Stage, chain, cut, drain_pool, killed
from stepper import Stepper
from test_stateful import Kind
from test_stateful import image as fresh

from nbd_qcow2j import checkpoint
from nbd_qcow2j.attaching import detach
from nbd_qcow2j.errors import DeviceFailed
from nbd_qcow2j.steps import Sync, WriteSync, run_simply

ROOMY = Shape(PAGES.options, PAGES.size, journal=1 << 18)
"""Credits for several operations at once."""


def fill_ring(stage: Stage) -> None:
    """Commit pages into half of the ring and send them home; the tail stays."""
    ring = stage.disk.log.ring
    for turn in range(ring.length // 2 // 8192):
        stage.do(stage.write(turn % 4 * 8, 4), stage.flush())
    for _ in range(4):
        stage.do(stage.round(least_bytes=NEVER), stage.flush())
    assert not stage.disk.pending.clusters


def test_a_header_slot_whose_write_failed_is_made_durable_before_the_next_is_written() -> None:
    # The slot's write fails, its bytes stay in the page cache: on the disk its place holds the slot before the last.
    # The server is killed; the next one believes what it reads, uses the ring, and writes the next slot over the only
    # good one. A power cut that tears this one leaves a tail whose transactions have long been written over.
    stage = Stage(ROOMY)
    stage.sim.physical_sector = 4096
    for _ in range(2):
        fill_ring(stage)
        if stage.disk.log.ring.generation == 1:
            stage.do(stage.round())
    stage.sim.fail("write_sync")
    with pytest.raises(DeviceFailed):
        stage.do(stage.round())
    after = killed(stage)
    fill_ring(after)
    stepper = Stepper()
    sender = stepper.add(after.round(), "checkpoint")
    slots = after.disk.log.ring.location.offset
    while not (isinstance(sender.step, WriteSync) and sender.step.offset < slots + 8192):
        stepper.move(sender)
    stepper.move(sender)
    states = 0
    for state in after.sim.crash_states(64, Random(1)):
        recover(state, after.shape, after.oracle, seed=1)
        states += 1
    assert states > 2


def test_a_table_is_found_though_no_other_may_be_forgotten_for_it() -> None:
    # All other tables have changes that are not committed, and the cache is full: a reader that had its table
    # forgotten as soon as it was loaded would load it for ever, and the commit might wait for that reader.
    stage = Stage(SMALL)
    stage.do(stage.write(0, 8), stage.write(64, 8), stage.write(128, 8))
    stage.home()
    stage.forget_tables()
    stage.disk.cache.limit = 1
    stage.do(stage.write(8, 8))
    stepper = Stepper(Random(1))
    reader = stepper.add(chain(stage.read(64, 8), stage.read(128, 8)), "reader")
    stepper.run(reader, patience=100)
    assert reader.error is None


# ---- commit


def test_data_that_returned_while_a_sync_ran_is_synced_by_its_own_commit() -> None:
    stage = Stage(BACKED)
    stepper = Stepper()
    first = stepper.add(stage.write(0, 8, fua=True), "first")
    while not isinstance(first.step, Sync):
        stepper.move(first)
    stepper.move(first)
    run_simply(stage.write(8, 8))
    stepper.run(first)
    stage.do(stage.flush())
    cut(stage)


def test_a_commit_records_sectors_as_they_were_when_it_began() -> None:
    # While it syncs its data, another write is linked in the same sector; that one's data is not durable.
    stage = Stage(BACKED)
    stage.do(stage.write(16, 8))
    stage.home()
    stepper = Stepper()
    first = stepper.add(stage.write(0, 8, fua=True), "first")
    while not isinstance(first.step, Sync):
        stepper.move(first)
    stepper.move(first)
    run_simply(stage.write(8, 8))
    stepper.run(first)
    cut(stage)


def test_a_commit_of_data_may_be_cut_at_every_move() -> None:
    # The journal must not name the new cluster before what was written there is durable.
    stage = Stage(BACKED)
    stepper = Stepper()
    stepper.add(stage.write(0, 16, fua=True), "writer")
    while not stepper.run(limit=1):
        for state in stage.sim.crash_states(8, Random(1)):
            recover(state, stage.shape, stage.oracle, seed=1)


def test_a_table_that_a_snapshot_shares_is_copied_whole_before_the_copy_is_linked() -> None:
    # The journal holds the one sector of the copy in which an entry changes; the others are in the copy alone.
    kind = Kind(Shape("cluster_size=4096", 320 << 10), before=("write -P 17 0 8k", "write -P 18 264k 8k"))
    stage = Stage(kind.shape, sim=fresh(kind).copy())
    stage.do(stage.write(0, 8), stage.flush())
    stage.oracle.check(stage.engine.contents(), stage.oracle.now)
    recover(next(stage.sim.crash_states(1, Random(0))), stage.shape, stage.oracle, seed=1, plain=False)


@pytest.mark.parametrize("kind", ["sync", "write_sync"])
def test_what_failed_once_is_not_tried_again_and_believed(kind: str) -> None:
    stage = Stage(PAGES)
    stage.do(stage.write(0, 8))
    stage.sim.fail(kind)
    for _ in range(2):
        with pytest.raises(DeviceFailed):
            run_simply(stage.flush())
    assert stage.disk.log.failed is not None


def test_a_sync_of_the_checkpoint_that_fails_latches_the_device() -> None:
    stage = Stage(PAGES)
    stage.do(stage.write(0, 4), stage.flush())
    stage.sim.fail("sync")
    with pytest.raises(DeviceFailed):
        run_simply(stage.round())
    with pytest.raises(DeviceFailed):
        run_simply(stage.write(8, 4))
    cut(stage)


def test_a_new_table_is_durable_before_a_commit_that_syncs_nothing_else() -> None:
    # Zeros over a backing file need a table, and no data. The table's cluster has held data: what is durable there
    # when the table is not would be read as entries.
    shape = Shape("cluster_size=4096", 4 << 20, backed=True)
    stage = Stage(shape)
    stage.do(stage.write(0, 8))
    stage.home()
    stage.do(stage.trim(0, 8), stage.flush(), stage.release())
    host = stage.disk.allocator.found[-1]
    drain_pool(stage)
    stage.disk.allocator.found.append(host)
    stage.do(stage.calls.zero(4096, 8), stage.flush())
    assert stage.disk.mapping.l2_offset(512) == host * 4096
    cut(stage)


@pytest.mark.parametrize("shape", [PAGES, BACKED, Shape("cluster_size=512", 64 << 10)], ids=str)
def test_a_ring_that_is_full_drains(shape: Shape) -> None:
    # Writers and flushes go on until they must wait; only then the checkpoint begins. What they have left must do.
    stage = Stage(shape)
    stepper = Stepper(whole_steps=True)
    for turn in range(100):
        writer = stepper.add(chain(stage.write(turn % 16 * 8, 4), stage.flush()), f"writer {turn}")
        while not writer.done and not writer.waits_for:
            stepper.move(writer)
        if writer.waits_for:
            break
    assert writer.waits_for
    for _ in range(60):
        task = stepper.add(chain(stage.round(tight=checkpoint.is_tight(stage.disk)), checkpoint.settle(stage.disk)))
        stepper.run(task, patience=500)
        assert task.error is None, task.error
        if writer.done:
            break
    assert writer.done and writer.error is None, stepper.describe()
    settle(stage.engine, detach(stage.disk))
    no_leaks(stage.sim, plain=True)


def test_a_commit_that_frees_nothing_leaves_the_reserve_alone() -> None:
    # What is noted without credits has filled the running transaction; its pages are none of the tail's.
    stage = Stage(PAGES)
    stage.do(stage.write(0, 4), stage.flush())
    disk, ring = stage.disk, stage.disk.log.ring
    index = 1
    while disk.log.running.size + ring.used + ring.reserve <= ring.length:
        disk.put_page(index, bytes(4095) + b"x")
        index += 1
    assert ring.used + disk.log.running.size <= ring.length
    stepper = Stepper()
    flush = stepper.add(stage.flush(), "flush")
    while not flush.done and not flush.waits_for:
        stepper.move(flush)
    assert flush.waits_for == "ring room"
