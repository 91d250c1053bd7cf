"""Holes of the protocol that an attack on it found: each as the few steps that led through it.

Where a test's comment names a `Breakage`, that change of the engine opens the hole again, and the test fails.
"""

from __future__ import annotations

import errno

import pytest
from engine import Shape, fill
from stage import PAGES, Stage, cut, drain_pool, host_of, pending, until
from stepper import Stepper

from nbd_qcow2j import changes, checkpoint
from nbd_qcow2j.driver import Device, Runner
from nbd_qcow2j.errors import DeviceFailed, ImageError, RequestError
from nbd_qcow2j.options import Options
from nbd_qcow2j.steps import Operation, Punch, ReadInto, Step, Wait, WriteSync, ZeroRange, run_simply
from nbd_qcow2j.writer import Writer

PARTIAL = Shape("cluster_size=65536", 100 << 10, journal=1 << 18)
"""The last cluster has 36 KiB of disk."""
ROOMY = Shape("cluster_size=4096", 64 << 10, journal=1 << 19)
SMALL = Shape("cluster_size=512", 96 << 10, journal=1 << 21)
"""A ring whose transactions take the links of fifteen clusters."""


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
