"""Holes of the protocol that an attack on it found: each as the few steps that led through it.

Where a test's comment names a `Breakage`, that change of the engine opens the hole again, and the test fails.
"""

from __future__ import annotations

import errno
from dataclasses import replace

import pytest
from engine import Shape, fill, settle
from simdisk import SimDisk
from stage import PAGES, Stage, chain, cut, drain_pool, pending, refused
from stepper import Stepper, Task

from nbd_qcow2j import changes, checkpoint
from nbd_qcow2j.attaching import detach
from nbd_qcow2j.driver import Device, Runner
from nbd_qcow2j.errors import DeviceFailed, ImageError, RequestError
from nbd_qcow2j.format.tables import OFFSET_MASK
from nbd_qcow2j.options import Options
from nbd_qcow2j.steps import Operation, Punch, ReadInto, Step, Wait, Write, WriteSync, ZeroRange, run_simply
from nbd_qcow2j.writer import Writer

PARTIAL = Shape("cluster_size=65536", 100 << 10, journal=1 << 18)
"""The last cluster has 36 KiB of disk."""
PAIRS = Shape("cluster_size=8192", 64 << 10)
ROOMY = Shape("cluster_size=4096", 64 << 10, journal=1 << 19)
SMALL = Shape("cluster_size=512", 96 << 10, journal=1 << 21)
"""A ring whose transactions take the links of fifteen clusters."""


def until(stepper: Stepper, task: Task, kind: type[Step]) -> None:
    """Move the task until it is about to do a step of this kind."""
    while not isinstance(task.step, kind) or isinstance(task.step, Wait):
        stepper.move(task)


def host_of(stage: Stage, cluster: int) -> int:
    entry, _ = stage.disk.mapping.find(cluster)
    return (entry & OFFSET_MASK) // stage.disk.geometry.cluster_size


def full(sim: SimDisk, *kinds: str) -> None:
    for kind in kinds or ("allocate", "zero_range"):
        sim.fail(kind, 1, errno.ENOSPC, times=0)


# ---- tables and records


def test_a_round_over_more_new_tables_than_the_cache_holds_keeps_every_one_of_them() -> None:
    # Each page that goes home needs an L2 table of its own, and all of them are pinned until the round is over: the
    # last that came must not be the one that goes.
    # Breakage: image/tables.py: list(self.tables.items())[:-1] -> list(self.tables.items())
    stage = Stage(Shape("cluster_size=512", 1 << 20, journal=1 << 22))
    stage.disk.cache.limit = 8
    stage.do(*(stage.write(number * 64, 1) for number in range(30)), stage.flush(), stage.round(), stage.flush())
    assert not stage.disk.pending.clusters
    stage.oracle.check(stage.engine.contents(), stage.oracle.now)
    cut(stage)


def test_a_trim_of_a_last_cluster_that_is_partial_is_recovered() -> None:
    # A flushed page of the last cluster, then a trim to the end of the disk: the revoke is of whole clusters.
    # Breakage: disk.py: end = min(end, self.geometry.pages) -> pass
    stage = Stage(PARTIAL)
    stage.do(stage.write(128, 8), stage.flush())
    run_simply(stage.trim(128, 72))
    assert stage.disk.log.running.guest_revokes == [(16, stage.disk.geometry.pages)]
    stage.do(stage.flush())
    cut(stage)


def test_a_revoke_up_to_the_end_of_a_partial_last_cluster_is_replayed() -> None:
    # What older versions wrote: the range reaches past the disk, but not past its last cluster.
    # Breakage: journal/replay.py: pages_end if record.type == GUEST_DATA else clusters_end -> pages_end
    stage = Stage(PARTIAL)
    stage.do(stage.write(128, 8), stage.flush())
    run_simply(stage.trim(128, 72))
    stage.disk.log.running.guest_revokes[:] = [(16, 32)]
    run_simply(stage.flush())
    cut(stage)
    # One cluster more is damage.
    stage.disk.log.running.note_guest_revoke(16, 48)
    run_simply(stage.flush())
    with pytest.raises(ImageError, match="past the end"):
        cut(stage)


def test_a_merge_that_ends_does_not_take_the_flag_of_another() -> None:
    # Two small writes into one page. The first has read it when the second begins and ends, and the page goes home:
    # the first must read again, or the second is lost, flushed as it is.
    # Breakage: changes.py: flags[:] = [each for each in flags if each is not flag] -> flags.remove(flag)
    stage = Stage(ROOMY)
    stage.do(stage.write(0, 8))
    stage.home()
    stepper = Stepper()
    first = stepper.add(stage.write(2, 1))
    until(stepper, first, ReadInto)
    stepper.move(first)
    for operation in (stage.write(5, 2), stage.flush(), stage.round(), stage.flush()):
        run_simply(operation)
    assert not first.done and not stage.disk.pending.clusters
    stepper.run(first)
    stage.do(stage.flush())
    stage.oracle.check(stage.engine.contents(), stage.oracle.now)
    cut(stage)


# ---- a change that is left half-way


def half_direct_write() -> tuple[Stage, int, int]:
    """A direct write of eight fresh clusters, of which the eighth cannot be linked."""
    stage = Stage(SMALL)
    stage.do(stage.write(16, 8))
    stage.home()
    disk = stage.disk
    raise_new, count = disk.allocator.raise_new, 0

    def broken(cluster: int) -> None:
        nonlocal count
        count += 1
        if count == 8:
            raise ImageError("refcount cannot be set")
        raise_new(cluster)

    disk.allocator.raise_new = broken  # type: ignore[method-assign]
    with pytest.raises(DeviceFailed):
        run_simply(changes.guarded(disk, changes.write(disk, fill(77) * 8, 0), "write"))
    assert count == 8
    return stage, disk.log.committed, host_of(stage, 0)


def test_links_that_are_left_half_way_latch_the_device_in_their_hold() -> None:
    # Some of a direct write's clusters are linked when an exception comes: a commit that came now would make the half
    # durable.
    # Breakage: journal/log.py: raise self.latch(error, what) from error\n\n    # ---- credits -> raise
    stage, committed, _ = half_direct_write()
    with pytest.raises(DeviceFailed):
        run_simply(stage.flush())
    assert stage.disk.log.committed == committed
    stage.oracle.flushed = 0
    cut(stage)


@pytest.mark.parametrize("what", ["ensure", "release", "grow_pool"])
def test_nothing_is_zeroed_or_punched_once_the_device_is_latched(what: str) -> None:
    # Whatever a half gave back, and the mapping names: reads go on.
    # Breakage: image/allocator.py: self.log.check()\n        if self.growing: -> if self.growing:
    stage, _, host = half_direct_write()
    allocator = stage.disk.allocator
    allocator.found.clear()
    if what != "ensure":
        allocator.found.append(host)
    allocator.scan_at = allocator.scan_end
    stage.disk.epochs.releasable.append(host)
    before = stage.sim.operations
    made = {"ensure": lambda: allocator.ensure(allocator.available + 999), "release": allocator.release,
            "grow_pool": lambda: allocator.grow_pool(32)}  # fmt: skip
    with pytest.raises(DeviceFailed):
        run_simply(made[what]())
    assert stage.sim.operations == before
    data = bytearray(512)
    run_simply(stage.disk.read_into(memoryview(data), 0))
    assert data == fill(77)


@pytest.mark.parametrize("kind", [ZeroRange, Punch])
def test_a_latch_that_comes_between_two_ranges_spares_the_second(kind: type[Step]) -> None:
    # Two ranges are to be made zero, or given back, and the device is latched while the first is.
    # Breakage: image/allocator.py:             self.log.check()\n -> (nothing)
    stage = Stage(SMALL)
    stage.do(stage.write(0, 24))
    stage.home()
    drain_pool(stage)
    stage.do(stage.trim(0, 2), stage.trim(4, 2), stage.flush())
    allocator = stage.disk.allocator
    if kind is ZeroRange:
        stage.do(stage.release())
    stepper = Stepper(whole_steps=True)
    task = stepper.add(allocator.release() if kind is Punch else allocator.grow_pool(4))
    until(stepper, task, kind)
    stage.disk.log.latch(OSError(errno.EIO, "lost"), "elsewhere")
    before = stage.sim.operations
    stepper.run(task)
    assert isinstance(task.error, DeviceFailed)
    assert stage.sim.operations == before + 1


# ---- no room


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


# ---- tokens


def test_a_table_that_nobody_needs_any_more_is_promised_no_cluster() -> None:
    # Zero pages over nothing go home without a table; what is trimmed before it goes home needs none either.
    # Breakage: disk.py: self.return_table_token(index)\n\n -> pass
    stage = Stage(Shape("cluster_size=4096", 16 << 20, journal=1 << 20))
    disk = stage.disk
    for at in range(0, 16 << 20, 2 << 20):
        # One page below each L1 entry.
        run_simply(changes.write_pending(disk, at, memoryview(bytes(4096))))
    assert len(disk.table_tokens) == 8
    stage.do(stage.flush(), stage.round(), stage.flush())
    assert not disk.pending.clusters and not any(disk.mapping.l1.entries)
    assert not disk.table_tokens and not disk.allocator.tokens
    for at in range(0, 16 << 20, 2 << 20):
        stage.do(pending(stage, at >> 9, 16))
    assert set(disk.table_tokens.values()) == {2}
    for at in range(0, 16 << 20, 2 << 20):
        stage.do(stage.trim(at >> 9, 8))
    assert set(disk.table_tokens.values()) == {1}
    stage.do(stage.trim(0, 16 << 11))
    assert not disk.table_tokens and not disk.allocator.tokens
    stage.home()



def test_the_last_page_that_needs_a_table_may_vanish_while_another_makes_it() -> None:
    # A direct write makes the table with the cluster that a pending page was promised for it; the page is trimmed
    # before the table is there.
    # Breakage: disk.py: and index not in self.owning -> (away)
    stage = Stage(PAGES)
    stage.do(pending(stage, 40, 8))
    assert stage.disk.table_tokens == {0: 1}
    stage.disk.settings = replace(stage.disk.settings, direct_write=4096)
    stepper = Stepper(whole_steps=True)
    writer = stepper.add(stage.write(0, 8))
    until(stepper, writer, Write)
    assert stage.disk.owning and not stage.disk.mapping.l1.entries[0], "the table is being written"
    trimmer = stepper.add(stage.trim(40, 8))
    while not trimmer.done:
        stepper.move(trimmer)
    assert not stage.disk.pending.clusters and stage.disk.table_tokens == {0: 0}
    stepper.run(writer)
    assert writer.error is None and not stage.disk.table_tokens and not stage.disk.allocator.tokens
    stage.do(stage.flush())
    cut(stage)
    stage.home()


def test_the_promise_of_a_table_that_could_not_be_made_is_given_back_where_nobody_needs_it_any_more() -> None:
    # As before, but the new table finds no room.
    # Breakage: prepared.py: disk.return_table_token(index) -> pass
    stage = Stage(PAGES)
    stage.do(pending(stage, 40, 8))
    stage.disk.settings = replace(stage.disk.settings, direct_write=4096)
    stepper = Stepper(whole_steps=True)
    writer = stepper.add(stage.write(0, 8))
    until(stepper, writer, Write)
    trimmer = stepper.add(stage.trim(40, 8))
    while not trimmer.done:
        stepper.move(trimmer)
    full(stage.sim, "write")
    stepper.run(writer)
    assert isinstance(writer.error, RequestError) and writer.error.errno == errno.ENOSPC
    stage.sim.mend()
    assert not stage.disk.table_tokens and not stage.disk.allocator.tokens
    stage.do(stage.flush())
    cut(stage)
    stage.home()


def test_a_promise_of_a_table_that_another_made_is_given_back() -> None:
    # A direct write makes the table with a token of its own; while it is written, a page becomes pending that needs
    # the table too.
    # Breakage: prepared.py: if index in disk.table_tokens: -> if used and promised:
    stage = Stage(SMALL)
    stepper = Stepper(whole_steps=True)
    direct = stepper.add(stage.write(0, 8))
    while not stage.disk.mapping.making:
        stepper.move(direct)
    stage.calls.disk.allocator.grow_step = 8
    run_simply(stage.disk.allocator.ensure(8))
    run_simply(stage.write(20, 1, fast=True))
    assert stage.disk.table_tokens.keys() == {0}
    stepper.run(direct)
    assert direct.error is None
    assert not stage.disk.table_tokens
    stage.watch.check()
    stage.home()
    assert not stage.disk.allocator.tokens


def test_a_trim_that_waited_for_a_table_has_the_room_that_it_found() -> None:
    # Two trims need the same table over a backing file. The first finds no room to write it, and the last free
    # cluster goes to somebody else before the second is awake.
    # Breakage: prepared.py: yield from disk.allocator.take_tokens(1)\n            self.tokens += 1\n        table
    # -> while disk.allocator.available < 1:\n                yield from disk.allocator.ensure(1)\n        table
    stage = Stage(replace(ROOMY, backed=True))
    allocator = stage.disk.allocator
    drain_pool(stage)
    stepper = Stepper(whole_steps=True)
    first = stepper.add(stage.trim(0, 8))
    while not stage.disk.mapping.making:
        stepper.move(first)
    second = stepper.add(stage.trim(8, 8))
    while second.waits_for != "L2 table":
        stepper.move(second)
    full(stage.sim, "write")
    stepper.run(first)
    assert isinstance(first.error, RequestError)
    stage.sim.mend()
    taken = allocator.available
    run_simply(allocator.take_tokens(taken))
    stepper.run(second)
    assert second.error is None
    allocator.tokens -= taken
    stage.watch.check()


def test_a_page_that_came_while_its_cluster_became_zero_still_has_a_home() -> None:
    # A cluster of ours is all zero pages, and on its way to be freed, when one of them is written: no token was taken
    # for it, since the cluster had a home.
    # Breakage: going.py: if going.to_zero and disk.pending -> if False and disk.pending
    stage = Stage(PAIRS)
    stage.do(stage.write(0, 16))
    stage.home()
    stage.do(stage.calls.zero(0, 8), stage.calls.zero(8, 8), stage.flush())
    assert len(stage.disk.pending.clusters[0]) == 2 and not stage.disk.cluster_tokens
    stepper = Stepper(whole_steps=True)
    sender = stepper.add(stage.round())
    until(stepper, sender, Step)
    assert 0 in stage.disk.excluded
    run_simply(pending(stage, 0, 8))
    stepper.run(sender)
    stage.do(stage.flush())
    drain_pool(stage)
    full(stage.sim)
    assert run_simply(stage.round())
    assert not stage.disk.pending.clusters
    stage.do(stage.flush())
    cut(stage)


# ---- waits


def test_a_tight_round_that_meets_a_commit_waits_for_it() -> None:
    # Nothing else can be done until the commit is over, and what it commits may free the tail.
    # Breakage: checkpoint.py: if tight and log.committing is not None: -> if False:
    stage = Stage(PAGES)
    stage.do(pending(stage, 0, 8))
    stepper = Stepper()
    flush = stepper.add(stage.flush())
    until(stepper, flush, WriteSync)
    sender = stepper.add(stage.round(tight=True))
    stepper.move(sender)
    assert sender.waits_for == "commit"
    stepper.run(flush, sender)
    assert sender.result is True


def test_the_writer_latches_in_a_hold_of_the_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    # A task of the writer dies while a caller looks at the latch and then waits: a latch that came in between, without
    # the lock, would wake nobody.
    # Breakage: writer.py: (in _guard) self.run(_latch(self.disk, error)) -> self.disk.log.latch(error, "x")
    stage = Stage(PAGES)
    log, runner = stage.disk.log, Runner()
    held: list[bool] = []
    latch = log.latch

    def noticed(error: BaseException, what: str) -> DeviceFailed:
        held.append(runner.lock.locked())
        return latch(error, what)

    def broken(_disk: object) -> Operation[None]:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(log, "latch", noticed)
    monkeypatch.setattr(checkpoint, "settle", broken)
    stage.do(pending(stage, 0, 8))
    writer = Writer(stage.disk, runner.run, Options(file="x", commit_interval=0.01), lambda _nanoseconds: None)

    def latched() -> Operation[None]:
        while log.failed is None:
            yield Wait(log.commit_gate)

    writer.start()
    runner.run(latched())
    writer.stop()
    assert held and all(held)


# ---- in place


def device_on(stage: Stage) -> Device:
    return Device(stage.disk, Options(file="x"), [])


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), OSError(errno.EIO, "bad"), MemoryError("none left")])
def test_a_write_in_place_that_fails_leaves_nothing_excluded(error: Exception) -> None:
    # A home may lie in a hole of the host file: no room for it is no lost write, as for any other write.
    # Breakage: driver.py: if isinstance(error, OSError) and error.errno in NO_ROOM: -> if False:
    # Breakage: driver.py: (in _write_in_place) except BaseException as error: -> except OSError as error:
    stage = Stage(PAGES, in_place=True)
    stage.do(stage.write(0, 16))
    stage.home()
    device = device_on(stage)
    device.write(fill(5), 512)
    assert 0 in stage.disk.in_place.homes

    def broken(_kind: str, _offset: int, _length: int) -> None:
        raise error

    stage.sim.hook = broken
    full_disk = isinstance(error, OSError) and error.errno == errno.ENOSPC
    with pytest.raises(RequestError if full_disk else DeviceFailed):
        device.write(fill(6), 512)
    stage.sim.hook = None
    assert not stage.disk.excluded
    if full_disk:
        device.write(fill(7), 512)
        device.flush()
        data = bytearray(512)
        device.read_into(data, 512)
        assert data == fill(7)
    else:
        with pytest.raises(DeviceFailed):
            device.flush()
