"""No room in the host file system, or in the pool: who is told so, who is not, and nothing is lost by it.

Each is a hole of the protocol that an attack on it found. Where a comment names a `Breakage`, that change of the engine
opens the hole again, and the test fails.
"""

from __future__ import annotations

import errno
from dataclasses import replace

import pytest
from engine import Shape, settle
from stage import PAGES, Stage, chain, cut, drain_pool, full, host_of, pending, refused, until
from stepper import Stepper

from nbd_qcow2j.attaching import detach
from nbd_qcow2j.errors import RequestError
from nbd_qcow2j.steps import Operation, Write, run_simply

ROOMY = Shape("cluster_size=4096", 64 << 10, journal=1 << 19)
SMALL = Shape("cluster_size=512", 96 << 10, journal=1 << 21)
"""A ring whose transactions take the links of fifteen clusters."""


def crowded() -> Stage:
    """Clusters 0 to 3 have homes; 5 is pending, and its promise is worth nothing: the pool is empty, the disk full."""
    stage = Stage(ROOMY)
    stage.do(stage.write(0, 32))
    stage.home()
    stage.do(pending(stage, 40, 8), stage.flush())
    assert stage.disk.cluster_tokens == {5}
    drain_pool(stage)
    full(stage.sim)
    return stage


def test_what_needs_no_room_goes_home_beside_what_finds_none() -> None:
    # Breakage: checkpoint.py: left = _no_loss(error) -> raise
    # Breakage: changes.py: (needed := disk.tokens_needed(cluster)) and needed > disk.allocator.available
    # -> (needed := disk.tokens_needed(cluster)) > disk.allocator.available
    stage = crowded()
    stage.do(pending(stage, 8, 8), pending(stage, 17, 2), stage.flush())
    assert run_simply(stage.round())
    assert stage.disk.pending.clusters.keys() == {5}
    stage.do(stage.flush())
    cut(stage)
    stage.sim.mend()
    stage.do(stage.round())
    assert not stage.disk.pending.clusters
    stage.home()
    cut(stage)


def test_a_home_in_a_hole_of_the_host_file_keeps_no_other_from_going_home() -> None:
    # Three overwritten clusters lie side by side and are written in one call; the one in the middle finds no room.
    # Breakage: checkpoint.py: except OSError as alone: -> except KeyError as alone:
    stage = Stage(ROOMY)
    stage.do(stage.write(0, 32))
    stage.home()
    stage.do(*(pending(stage, first, 8) for first in (0, 8, 16)), stage.flush())
    hole = host_of(stage, 1) * 4096
    assert [host_of(stage, cluster) - host_of(stage, 1) for cluster in (0, 2)] == [-1, 1]

    def hook(kind: str, offset: int, length: int) -> None:
        if kind == "write" and offset <= hole < offset + length:
            raise OSError(errno.ENOSPC, "full")

    stage.sim.hook = hook
    assert run_simply(stage.round())
    assert stage.disk.pending.clusters.keys() == {1}
    assert not run_simply(stage.round(tight=True))
    stage.do(stage.flush())
    cut(stage)
    stage.sim.hook = None
    stage.do(stage.round())
    assert not stage.disk.pending.clusters
    stage.home()
    cut(stage)


def test_a_trim_of_a_cluster_whose_table_is_ours_needs_no_room() -> None:
    # Breakage: prepared.py: (what or not disk.mapping.l1.entries[index] & OFLAG_COPIED) -> True
    stage = crowded()
    stage.do(stage.trim(8, 8), stage.flush())
    cut(stage)


def test_a_direct_write_over_clusters_that_have_homes_needs_no_room() -> None:
    # Breakage: changes.py: except RequestError:\n            # What is written in place -> except KeyError:\n #
    stage = crowded()
    stage.disk.settings = replace(stage.disk.settings, direct_write=4096)
    stage.do(stage.write(0, 32), stage.flush())
    assert refused(stage.write(24, 16)).errno == errno.ENOSPC
    stage.watch.check()
    cut(stage)
    stage.sim.mend()
    stage.do(stage.write(24, 16), stage.flush())
    cut(stage)


def test_the_room_that_a_failed_growth_kept_at_the_end_is_used_where_freed_clusters_find_none() -> None:
    # Seen on ext4: what a trim had given back went to an fallocate at the end, which failed half-way and kept it.
    # Breakage: image/allocator.py: chosen.clear() -> raise
    stage = Stage(ROOMY)
    allocator, size = stage.disk.allocator, stage.disk.geometry.cluster_size
    stage.do(stage.write(0, 32))
    stage.home()
    drain_pool(stage)
    stage.do(stage.trim(0, 32), stage.flush(), stage.release())
    allocator.grow_step = 8
    freed, kept = set(allocator.found), (allocator.end + 4) * size
    assert len(freed) == 4

    def hook(kind: str, offset: int, length: int) -> None:
        if kind == "zero_range" or (kind == "allocate" and offset + length > kept):
            raise OSError(errno.ENOSPC, "full")

    stage.sim.hook = hook
    for cluster in (10, 11):
        stage.do(stage.write(cluster * 8, 8), stage.flush())
        assert host_of(stage, cluster) * size < kept
    assert refused(chain(*(stage.write(cluster * 8, 8) for cluster in range(12, 16)))).errno == errno.ENOSPC
    assert freed <= set(allocator.found)
    stage.watch.check()
    cut(stage)
    stage.sim.hook = None
    stage.do(stage.write(12 * 8, 32), stage.flush())
    cut(stage)


def test_closing_a_full_disk_ends_says_so_and_loses_nothing() -> None:
    stage = crowded()
    assert "stays attached" in str(refused(detach(stage.disk)))
    assert stage.disk.log.failed is None
    cut(stage)
    stage.sim.mend()
    settle(stage.engine, detach(stage.disk))
    cut(stage)


def test_who_waits_for_a_tail_that_cannot_go_home_is_told() -> None:
    # The only page of the tail finds no room.
    # Breakage: checkpoint.py: log.starve(left) -> pass
    stage = crowded()
    disk = stage.disk

    def waiting() -> Operation[None]:
        starved = disk.log.starvations
        while True:
            yield from disk.log.wait_for_room(starved)

    stepper = Stepper(whole_steps=True)
    waiter = stepper.add(waiting())
    stepper.move(waiter)
    assert not run_simply(stage.round(tight=True))
    stepper.run(waiter, patience=9)
    assert isinstance(waiter.error, RequestError) and waiter.error.errno == errno.ENOSPC


def test_a_direct_write_that_finds_no_room_in_a_fresh_cluster_is_refused_and_nothing_else() -> None:
    # Breakage: changes.py: if error.errno in NO_ROOM:\n            # A plain write -> if False:\n            #
    stage = Stage(PAGES)
    full(stage.sim, "write")
    assert refused(stage.write(0, 16)).errno == errno.ENOSPC
    stage.sim.mend()
    assert stage.disk.log.failed is None
    stage.watch.check()
    stage.do(stage.write(0, 16), stage.flush())
    cut(stage)


def test_a_new_table_that_finds_no_room_takes_no_token_with_it() -> None:
    # The round's table is written into a host file system that is full: once the tokens were -1 afterwards.
    # Breakage: image/mapping.py: allocator.tokens += token -> pass
    stage = Stage(PAGES)
    run_simply(stage.disk.allocator.ensure(4))
    stage.do(pending(stage, 0, 8))
    full(stage.sim, "write")
    assert not run_simply(stage.round())
    stage.sim.mend()
    stage.watch.check()
    assert stage.disk.allocator.tokens == 2
    stage.home()
    cut(stage)


def test_what_a_flushed_trim_has_freed_is_room_at_once() -> None:
    # The file cannot grow, and what was freed is only waiting to be given back: the task that does it sleeps.
    # Breakage: image/allocator.py: if self.log.epochs.releasable: -> if False:
    stage = Stage(SMALL)
    stage.do(stage.write(0, 24))
    stage.home()
    drain_pool(stage)
    full(stage.sim, "allocate")
    assert isinstance(refused(stage.write(32, 8)), RequestError)
    stage.do(stage.trim(0, 8), stage.flush())
    assert stage.disk.epochs.releasable
    stage.do(stage.write(32, 8), stage.flush())
    cut(stage)


def test_a_cluster_that_could_not_be_given_back_is_used_again_all_the_same() -> None:
    stage = Stage(SMALL)
    stage.do(stage.write(0, 24))
    stage.home()
    drain_pool(stage)
    for error in (errno.EIO, errno.ENOSPC, errno.EPERM):
        host = host_of(stage, 0)
        stage.do(stage.trim(0, 8), stage.flush())
        stage.sim.fail("punch", 1, error, times=0)
        stage.do(stage.release())
        stage.sim.mend()
        assert host in stage.disk.allocator.found and stage.disk.log.failed is None
        stage.do(stage.write(0, 8), stage.flush())
        cut(stage)


@pytest.mark.parametrize("of", ["the other image", "the host file system"])
def test_who_waits_for_others_is_not_told_what_the_checkpoint_lacks(of: str) -> None:
    # Three writes in place; two of them and a round hold all credits, the third waits for theirs. The round finds no
    # room, or cannot read: that is nothing to it.
    # Breakage: journal/log.py: elif self.running.in_ring:\n                    yield from -> else: (the same)
    stage = Stage(Shape("cluster_size=8192", 512 << 10, journal=1 << 20, backed=True))
    for first in range(0, 384, 128):
        stage.do(stage.write(first, 128))
    stage.home()
    stage.do(stage.write(400, 8), stage.flush())
    assert len(stage.disk.pending.clusters) == 1, "half of it is to be read beneath"
    stepper = Stepper(whole_steps=True)
    round_ = stepper.add(stage.round())
    if of == "the other image":
        stage.engine.backing.storage.disk.fail("read", 1, times=0)  # type: ignore[union-attr]
        stepper.move(round_)
    else:
        full(stage.sim, "write")
        until(stepper, round_, Write)
    first, second, waiter = (stepper.add(stage.write(at, length)) for at, length in ((0, 128), (128, 112), (256, 128)))
    for each in (first, second, waiter):
        stepper.move(each)
    assert waiter.waits_for == "ring room"
    while not round_.done:
        stepper.move(round_)
    assert stage.disk.log.starvations == 1
    stage.sim.mend()
    while not waiter.done and not waiter.waits_for:
        stepper.move(waiter)
    stepper.run(first, second)
    stepper.run(waiter)
    assert first.error is second.error is waiter.error is None
    cut(stage)


def test_who_waits_for_the_pages_of_others_is_not_told_what_the_checkpoint_lacks() -> None:
    # Breakage: disk.py: if self.pending.count + pages <= self.pending_most: -> if False:
    stage = Stage(ROOMY)
    disk = stage.disk
    disk.incoming = disk.pending_most - 1
    stepper = Stepper(whole_steps=True)
    waiter = stepper.add(disk.take_pending(2))
    stepper.move(waiter)
    assert waiter.waits_for == "ring room"
    disk.log.starve(RequestError(errno.ENOSPC, "no room"))
    while not waiter.done and not waiter.waits_for:
        stepper.move(waiter)
    assert not waiter.done
    disk.return_pending(disk.pending_most - 1)
    stepper.run(waiter)
    assert waiter.error is None and disk.incoming == 2
    disk.return_pending(2)


def test_a_new_refcount_block_that_finds_no_room_takes_no_cluster_with_it() -> None:
    # Breakage: image/allocator.py: self.held.difference_update(clusters)\n                self.end = first -> pass
    stage = Stage(Shape("cluster_size=512,refcount_bits=64", 256 << 10, journal=1 << 18))
    allocator = stage.disk.allocator
    make, refusals = allocator._new_block, 0

    def refusing(index: int, cluster: int) -> Operation[None]:
        nonlocal refusals
        if refusals < 3:
            refusals += 1
            stage.sim.fail("write", 1, errno.ENOSPC)
        yield from make(index, cluster)

    allocator._new_block = refusing  # type: ignore[method-assign]
    for _ in range(2000):
        end = allocator.end
        try:
            run_simply(allocator.grow_pool(16))
        except OSError:
            assert allocator.end == end and allocator.held == set(allocator.pool)
        if refusals == 3:
            break
    assert refusals == 3
    stage.do(stage.write(0, 64), stage.flush())
    cut(stage)
    stage.home()
