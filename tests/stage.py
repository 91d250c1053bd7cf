"""An open disk on a simulated file, its oracle and invariants, and what callers do to it: for tests of a few steps."""

from __future__ import annotations

import errno
import tempfile
from dataclasses import replace
from functools import cache
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

import pytest
from calls import Calls
from engine import Engine, Oracle, Shape
from invariants import Watch, recover, squeeze
from simdisk import SimDisk
from stepper import Stepper, Task

from nbd_qcow2j import checkpoint
from nbd_qcow2j.errors import RequestError
from nbd_qcow2j.format.tables import OFFSET_MASK
from nbd_qcow2j.steps import Operation, Step, Wait, run_simply

SMALL = Shape("cluster_size=512", 96 << 10, journal=1 << 18)
PAGES = Shape("cluster_size=4096", 64 << 10)
BACKED = Shape("cluster_size=4096", 64 << 10, backed=True)
WIDE = Shape("cluster_size=8192", 64 << 10, backed=True)
"""Two pages in a cluster."""


@cache
def image(shape: Shape) -> SimDisk:
    with tempfile.TemporaryDirectory() as directory:
        return shape.make(Path(directory))


class Stage:
    """An open disk, its oracle, and what callers do to it."""

    def __init__(
        self, shape: Shape, *, in_place: bool = False, sim: SimDisk | None = None, oracle: Oracle | None = None,
        keeps_cache: bool = False,
    ) -> None:  # fmt: skip
        """On the fresh image; or on what an earlier life left, where `oracle` says what may be there.

        `keeps_cache`: where the page cache was asked to forget, it did not; that was a hint.
        """
        self.shape = shape
        self.sim = image(shape).copy() if sim is None else sim
        self.engine = Engine(self.sim, shape, Random(1))
        self.engine.settings = type(self.engine.settings)(
            journal_size=shape.journal, direct_write=4096, discard=True, in_place=in_place
        )
        if keeps_cache:
            self.engine.file.drop_cached = lambda: None  # type: ignore[method-assign]
        self.disk = self.engine.open()
        squeeze(self.disk)
        contents = self.engine.contents()
        if oracle is not None:
            oracle.check(contents)
            oracle.forget(contents)
        self.oracle = Oracle(contents) if oracle is None else oracle
        self.calls = Calls(self.disk, self.oracle, count(1 if oracle is None else 1000))
        self.watch = Watch(self.engine)
        self.cluster = self.disk.geometry.cluster_size // 512

    def do(self, *operations: Operation[Any]) -> None:
        """One after the other, alone."""
        for each in operations:
            run_simply(each)
            self.watch.check()

    def write(self, first: int, length: int, **how: bool) -> Operation[None]:
        return self.calls.write(first, length, **how)

    def trim(self, first: int, length: int) -> Operation[None]:
        return self.calls.trim(first, length)

    def read(self, first: int, length: int) -> Operation[Any]:
        return self.calls.read(first, length)

    def flush(self) -> Operation[None]:
        return self.calls.flush()

    def round(self, **how: Any) -> Operation[Any]:
        return checkpoint.round_(self.disk, **how)

    def release(self) -> Operation[None]:
        return self.disk.allocator.release()

    def home(self) -> None:
        """Everything goes home, and the tail to the head."""
        self.do(self.flush(), self.round(), self.flush(), self.round(), self.flush(), self.round(), self.release())

    def forget_tables(self) -> None:
        """As the cache does it where it is full: all that may go."""
        tables = self.disk.cache.tables
        for table in list(tables.values()):
            if not table.pins and not table.uncommitted:
                del tables[table.host_offset]


def chain(*operations: Operation[Any]) -> Operation[None]:
    """One caller's requests, one after the other."""
    for each in operations:
        yield from each


def pending(stage: Stage, first: int, length: int) -> Operation[None]:
    """A write of which every page becomes pending, as the driver makes it where it can."""
    disk = stage.disk
    disk.settings = replace(disk.settings, direct_write=1 << 20)
    return stage.write(first, length, fast=True)


def drain_pool(stage: Stage) -> None:
    """What is freed from now on is the next to be handed out: nothing else is free below the end of the file."""
    stage.disk.allocator.grow_step = 1
    allocator = stage.disk.allocator
    while allocator.pool:
        cluster = allocator.pool.popleft()
        allocator.held.discard(cluster)
    allocator.found.clear()
    allocator.scan_at = allocator.scan_end


def refused(operation: Operation[Any]) -> RequestError:
    """What an operation that must be refused is refused with."""
    with pytest.raises(RequestError) as caught:
        run_simply(operation)
    return caught.value


def cut(stage: Stage) -> None:
    """Cut the power, and see that what recovers is what the oracle allows."""
    recover(next(stage.sim.crash_states(1, Random(0))), stage.shape, stage.oracle, seed=1)


def until(stepper: Stepper, task: Task, kind: type[Step]) -> None:
    """Move the task until it is about to do a step of this kind."""
    while not isinstance(task.step, kind) or isinstance(task.step, Wait):
        stepper.move(task)


def host_of(stage: Stage, cluster: int) -> int:
    """The host cluster in which a guest cluster lives."""
    entry, _ = stage.disk.mapping.find(cluster)
    return (entry & OFFSET_MASK) // stage.disk.geometry.cluster_size


def full(sim: SimDisk, *kinds: str) -> None:
    """From now on there is no room for these kinds of steps."""
    for kind in kinds or ("allocate", "zero_range"):
        sim.fail(kind, 1, errno.ENOSPC, times=0)


def killed(stage: Stage) -> Stage:
    """The server is killed and started again on the page cache it left."""
    stage.sim.mend()
    stage.sim.kill()
    return Stage(stage.shape, sim=stage.sim, oracle=stage.oracle, keeps_cache=True)
