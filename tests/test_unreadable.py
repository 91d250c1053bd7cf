"""What cannot be read, of the image or of a backing file: nothing is lost, and others go on.

Where a test's comment names a `Breakage`, that change of the engine makes the test fail.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import replace

import pytest
from simdisk import SimDisk
from stage import PAGES, SMALL, WIDE, Stage, cut, drain_pool, pending, refused
from stepper import Stepper, Task

from nbd_qcow2j import checkpoint
from nbd_qcow2j.attaching import detach
from nbd_qcow2j.errors import ReadFailed, RequestError
from nbd_qcow2j.steps import Operation, run_simply


def test_a_write_whose_page_cannot_be_read_is_refused_and_nothing_else() -> None:
    # Breakage: steps.py: except OSError as error:\n        raise ReadFailed -> except KeyError as error:\n (the same)
    stage = Stage(PAGES)
    stage.do(stage.write(0, 8))
    stage.home()
    stage.sim.fail("read", 1)
    assert isinstance(refused(stage.write(2, 1)), ReadFailed)
    assert stage.disk.log.failed is None
    stage.watch.check()
    stage.do(stage.write(2, 1), stage.flush())
    cut(stage)


def test_a_cluster_whose_backing_file_cannot_be_read_stays_pending_and_others_go_home() -> None:
    # The first cluster needs what lies beneath it, the second is whole.
    # Breakage: checkpoint.py: left = _no_loss(error) -> raise
    stage = Stage(replace(WIDE, journal=1 << 19))
    stage.do(pending(stage, 0, 8), pending(stage, 16, 16), stage.flush())
    beneath = stage.engine.backing.storage.disk  # type: ignore[union-attr]
    beneath.fail("read", 1, times=0)
    assert run_simply(stage.round())
    assert stage.disk.pending.clusters.keys() == {0}
    assert not run_simply(stage.round()), "nothing that can be done"
    assert isinstance(stage.disk.log.starved_of, ReadFailed) and stage.disk.log.failed is None
    assert "stays attached" in str(refused(detach(stage.disk)))
    stage.do(stage.flush())
    beneath.mend()
    cut(stage)
    stage.do(stage.round())
    assert not stage.disk.pending.clusters
    stage.home()
    cut(stage)


def full_of_what_cannot_be_read() -> tuple[Stage, SimDisk]:
    """A tight ring of halves of clusters, and the backing file, which fails: nothing can go home."""
    stage = Stage(WIDE)
    beneath: SimDisk = stage.engine.backing.storage.disk  # type: ignore[union-attr]
    number = 0
    while not checkpoint.is_tight(stage.disk):
        stage.do(pending(stage, number % 8 * 16, 8), stage.flush())
        number += 1
    beneath.fail("read", 1, times=0)
    return stage, beneath


def test_who_waits_for_a_tail_that_cannot_be_read_is_told_why() -> None:
    # The ring is full of pages whose clusters need what cannot be read. A write waits, and then is refused; when the
    # backing file is back, it is taken.
    # Breakage: checkpoint.py: log.starve(left) -> pass
    stage, beneath = full_of_what_cannot_be_read()
    waiter: Task | None = None
    stepper = Stepper(whole_steps=True)
    for number in range(8):
        waiter = stepper.add(stage.write(number * 16, 8))
        while not waiter.done and not waiter.waits_for:
            stepper.move(waiter)
        if waiter.waits_for:
            break
    assert waiter is not None and waiter.waits_for == "ring room"
    rounds = 0
    while waiter.waits_for:
        stepper.run(stepper.add(stage.round(tight=True)))
        rounds += 1
        assert rounds < 4
    stepper.run(waiter)
    assert isinstance(waiter.error, RequestError) and waiter.error.errno == errno.EIO
    assert "cannot read" in str(waiter.error) and stage.disk.log.failed is None
    beneath.mend()
    for _ in range(12):
        stage.do(stage.round(tight=checkpoint.is_tight(stage.disk)), stage.flush())
    stage.do(stage.write(0, 8), stage.flush())
    cut(stage)


def around(stage: Stage, laps: int, write: Callable[[int], Operation[None]], *, a_flush: int = 1) -> None:
    """Write, a flush after so many, until the ring was written so often, with the rounds that the writer would make."""
    ring, number = stage.disk.log.ring, 0
    end = ring.head + laps * ring.length
    while ring.head < end:
        stage.do(write(number))
        number += 1
        if number % a_flush == 0:
            stage.do(stage.flush())
        for left in range(300, 0, -1):
            assert left > 1, "the writer would go on for ever"
            tight = checkpoint.is_tight(stage.disk)
            if not tight and checkpoint.fill(stage.disk) < 0.5:
                break
            if not run_simply(stage.round(tight=tight, again=tight)) and not tight:
                break
            run_simply(checkpoint.settle(stage.disk))
            stage.watch.check()
        # What the reserve is for: the links of one transaction's pages.
        assert all(len(each.pages) <= ring.most_linked for each in ring.transactions)


@pytest.mark.parametrize("stuck", [1, 3])
def test_a_page_over_what_cannot_be_read_does_not_stop_the_tail_for_ever(stuck: int) -> None:
    # Half of a cluster, flushed, over a backing file that fails for good; then writes elsewhere, three times round the
    # ring. They are taken, what was flushed is kept, and the trim that mends it is taken as well.
    # Breakage: checkpoint.py: if tight and again and -> if False and
    stage = Stage(replace(WIDE, journal=1 << 18))
    for number in range(stuck):
        stage.do(pending(stage, number * 16, 8), stage.flush())
    beneath = stage.engine.backing.storage.disk  # type: ignore[union-attr]
    beneath.fail("read", 1, times=0)
    around(stage, 3, lambda number: pending(stage, (stuck + number % (8 - stuck)) * 16, 16))
    assert stage.disk.log.failed is None and stage.disk.pending.clusters.keys() >= set(range(stuck))
    beneath.mend()
    cut(stage)
    beneath.fail("read", 1, times=0)
    stage.do(*(stage.trim(number * 16, 16) for number in range(stuck)), stage.flush())
    for _ in range(6):
        stage.do(stage.round(), stage.flush())
    assert not stage.disk.pending.clusters
    beneath.mend()
    cut(stage)


def test_no_transaction_holds_more_than_the_reserve_can_send_home() -> None:
    # The tail has as many pages as one may have, and so has what is running: not both in one.
    # Breakage: record_again.py: + len(again) > ring.most_linked -> + len(again) < 0
    stage = Stage(replace(WIDE, journal=1 << 18))
    beneath = stage.engine.backing.storage.disk  # type: ignore[union-attr]
    beneath.fail("read", 1, times=0)
    ring, number = stage.disk.log.ring, 0
    stage.do(pending(stage, 0, 8), pending(stage, 16, 8), stage.flush())
    assert len(ring.transactions[0].pages) == ring.most_linked == 2
    while True:
        stage.do(pending(stage, 32 + number % 6 * 16, 16))
        if checkpoint.is_tight(stage.disk):
            break
        stage.do(stage.flush())
        number += 1
    assert len(stage.disk.log.running.pages) == 2
    while checkpoint.is_tight(stage.disk):
        assert run_simply(stage.round(tight=True, again=True))
        assert all(len(each.pages) <= ring.most_linked for each in ring.transactions)
    beneath.mend()
    cut(stage)


@pytest.mark.parametrize("a_flush", [1, 6])
def test_pages_that_cannot_go_home_are_packed_where_each_had_a_transaction_of_its_own(a_flush: int) -> None:
    # 110 of them fill a ring of 1 MiB, 8 KiB each; packed they take half of it, and two laps of other writes go on.
    # Breakage: record_again.py: if number and (len(found) -> if number or (len(found)
    # Breakage: record_again.py: transaction.start >= disk.lap_end -> False
    # Breakage: checkpoint.py: held.spend(held.cost) -> pass
    stage = Stage(replace(WIDE, size=1 << 20, journal=1 << 20))
    beneath = stage.engine.backing.storage.disk  # type: ignore[union-attr]
    beneath.fail("read", 1, times=0)
    ring, stuck = stage.disk.log.ring, 0
    while not checkpoint.is_tight(stage.disk):
        stage.do(pending(stage, stuck * 16, 8), stage.flush())
        stuck += 1
    assert 90 < stuck < 120
    around(stage, 2, lambda number: pending(stage, (120 + number % 8) * 16, 16), a_flush=a_flush)
    assert stage.disk.log.failed is None and stage.disk.pending.clusters.keys() >= set(range(stuck))
    kept = [each for each in ring.transactions if each.live]
    assert len(kept) < stuck // 2
    beneath.mend()
    cut(stage)


def test_a_page_may_be_recorded_again_and_the_power_be_cut_at_any_step_of_it() -> None:
    # Breakage: record_again.py: log.running.note_page(index, page) -> pass
    stage = Stage(replace(WIDE, journal=1 << 18))
    stage.do(pending(stage, 0, 8), stage.flush())
    beneath = stage.engine.backing.storage.disk  # type: ignore[union-attr]
    beneath.fail("read", 1, times=0)
    ring, number = stage.disk.log.ring, 0
    while not checkpoint.is_tight(stage.disk):
        stage.do(pending(stage, 16 + number % 7 * 16, 16), stage.flush())
        number += 1
    before, rounds = ring.tail, 0
    while checkpoint.is_tight(stage.disk):
        stepper = Stepper()
        task = stepper.add(stage.round(tight=True, again=True))
        while not task.done:
            stepper.move(task)
            beneath.mend()
            cut(stage)
            beneath.fail("read", 1, times=0)
        assert task.error is None and task.result
        rounds += 1
        assert rounds < 400
    assert ring.tail > before and 0 in stage.disk.pending.clusters
    assert not stage.disk.log.starvations


def test_pages_that_fill_the_ring_are_not_recorded_again_for_nothing() -> None:
    # All of them are over what cannot be read: round and round would free nothing. Who waits is told, and no write
    # was made for that.
    # Breakage: record_again.py: or not _helps(disk) -> (away)
    stage, beneath = full_of_what_cannot_be_read()
    for _ in range(100):
        if not run_simply(stage.round(tight=True, again=True)):
            break
    head = stage.disk.log.ring.head
    assert not run_simply(stage.round(tight=True, again=True))
    assert stage.disk.log.ring.head == head and stage.disk.log.starvations
    beneath.mend()
    cut(stage)


def test_a_refcount_block_that_cannot_be_read_costs_no_cluster() -> None:
    # The search for free clusters has found some when it meets the block.
    # Breakage: image/allocator.py: except BaseException:\n            for cluster in chosen: -> except OSError:...
    stage = Stage(replace(SMALL, journal=1 << 21))
    stage.do(stage.write(0, 24))
    stage.home()
    allocator = stage.disk.allocator
    drain_pool(stage)
    stage.do(stage.trim(0, 8), stage.flush(), stage.release())
    allocator.scan_at, found = 0, set(allocator.found)
    stage.forget_tables()
    assert found
    stage.sim.fail("read", 1)
    assert isinstance(refused(allocator.ensure(len(found) + 4)), ReadFailed)
    assert set(allocator.found) == found and stage.disk.log.failed is None
    stage.watch.check()
    stage.do(allocator.ensure(len(found) + 4))
