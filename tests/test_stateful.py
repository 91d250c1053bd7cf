"""Anything at any time: a machine that Hypothesis drives, on tiny disks, with an oracle and invariants.

Method: rules start requests on several connections, let those in flight go on move by move (stepper.py), make the
writer commit, checkpoint and release, let time pass, close, kill, cut the power at a state of Hypothesis' choice and
open again. Space is squeezed: a freed cluster is reused at the next occasion, tables are forgotten. After every move
`invariants.Watch` looks at the engine; a read may find what the oracle allows, and so may whoever recovers a disk.
What fails is shrunk and printed as the sequence of rules that replays it.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from errno import EIO, ENOSPC
from functools import cache
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

import pytest
from calls import Calls
from engine import SECTOR, Engine, Oracle, Shape
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from invariants import NEVER, Watch, no_leaks, recover, squeeze
from scale import scaled
from simdisk import SimDisk
from stepper import Deadlock, Stepper, Task

from nbd_qcow2j import checkpoint
from nbd_qcow2j.attaching import detach
from nbd_qcow2j.disk import Disk
from nbd_qcow2j.errors import DeviceFailed, RequestError
from nbd_qcow2j.steps import Operation

CONNECTIONS = 4
COMMIT_SECONDS, CHECKPOINT_SECONDS, ROOM_SECONDS = 1.0, 2.0, 1.0
UNSHRUNK = "STATEFUL_UNSHRUNK"
"""Set in the environment: a failure is reported as it was found. To shrink one takes minutes."""
PATIENCE = 3000
"""Moves after which what is in flight should long have ended."""


@dataclass(frozen=True)
class Kind:
    """A shape, and what is done to the fresh image: commands of qemu-io, then a snapshot."""

    shape: Shape
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    """Commands before and after a snapshot is made; without any there is none."""

    @property
    def plain(self) -> bool:
        return not self.before

    def __repr__(self) -> str:
        marks = ",backed" * self.shape.backed + ",snapshot" * (not self.plain)
        return f"<{self.shape.options},{self.shape.size}{marks}>"


KINDS = [
    Kind(Shape("cluster_size=512", 80 << 10)),
    Kind(Shape("cluster_size=512,refcount_bits=1", 24 << 10, backed=True)),
    Kind(Shape("cluster_size=4096", 64 << 10)),
    Kind(Shape("cluster_size=4096,refcount_bits=64", 48 << 10, backed=True)),
    Kind(Shape("cluster_size=16384,extended_l2=on", 64 << 10)),
    Kind(Shape("cluster_size=16384,extended_l2=on", 64 << 10, backed=True)),
    Kind(
        Shape("cluster_size=4096", 64 << 10),
        before=("write -P 17 0 20k", "write -c -P 34 20k 4k", "write -c -P 35 24k 4k"),
        after=("write -P 51 4k 4k", "write -z 8k 4k"),
    ),
    Kind(Shape("cluster_size=4096", 64 << 10), before=("write -P 17 0 20k", "write -c -P 34 20k 4k")),
    Kind(Shape("cluster_size=512", 40 << 10), before=("write -P 17 0 36k",), after=("write -P 51 1k 2k",)),
]


@cache
def image(kind: Kind) -> SimDisk:
    """The fresh image; every run starts with a copy of it."""
    with tempfile.TemporaryDirectory() as directory:
        disk = kind.shape.make(Path(directory))
        if kind.plain:
            return disk
        path = Path(directory) / "image.qcow2"
        for commands in (kind.before, None, kind.after):
            if commands == ():
                continue
            if commands is None:
                words = ["qemu-img", "snapshot", "-c", "kept", str(path)]
            else:
                words = ["qemu-io", "-f", "qcow2", *(word for each in commands for word in ("-c", each)), str(path)]
            subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
        return SimDisk.from_file(path)


OPENING_MOVES = st.sampled_from((1000, 1000, 1000, 3, 8, 15, 25, 40, 60))
"""Of an opening, before anything else may happen: most are let come to their end."""
TOTALS: Counter[str] = Counter()
"""What was done since it was last cleared: for the test to print."""


class Connections(RuleBasedStateMachine):
    """A server, its clients, and the disk below."""

    @initialize(
        kind=st.sampled_from(KINDS), discard=st.booleans(), direct=st.sampled_from((512, 4096, 1 << 16)),
        in_place=st.booleans(), seed=st.integers(0, 999),
    )  # fmt: skip
    def start(self, kind: Kind, discard: bool, direct: int, in_place: bool, seed: int) -> None:
        self.kind, self.shape, self.seed = kind, kind.shape, seed
        self.discard, self.direct, self.in_place = discard, direct, in_place
        self.sectors = kind.shape.size // SECTOR
        self.sim = image(kind).copy()
        fresh = Engine(self.sim.copy(), self.shape, Random(0), read_only=True)
        fresh.open()
        self.oracle = Oracle(fresh.contents())
        self.numbers = count(1)
        self.lives = 0
        self.open(1000)

    # ---- a life

    def open(self, moves: int) -> None:
        self.lives += 1
        TOTALS["lives of a server"] += 1
        self.sim.mend()
        self.engine = Engine(self.sim, self.shape, Random(self.seed * 1000 + self.lives))
        self.engine.settings = self.engine.settings.__class__(
            journal_size=self.shape.journal, direct_write=self.direct, discard=self.discard,
            in_place=self.in_place,
        )
        self.stepper = Stepper(Random(self.seed))
        self.clients: list[Task] = []
        self.rounds: list[Task] = []
        self.closing: Task | None = None
        self.watch: Watch | None = None
        self.faults = 0
        self.pressed = False
        self.now = self.committed_at = self.checkpointed_at = self.room_at = 0.0
        self.opening: Task | None = self.stepper.add(self.engine.opening(), "open")
        self.move(self.opening, moves)

    def opened(self, task: Task) -> None:
        assert task.error is None, task.error
        self.opening = None
        self.engine.disk = task.result
        self.calls = Calls(self.disk, self.oracle, self.numbers)
        squeeze(self.disk)
        self.disk.log.on_pressure = self.press
        self.watch = Watch(self.engine)
        self.watch.check()
        contents = self.engine.contents()
        self.oracle.check(contents)
        self.oracle.forget(contents)

    @property
    def disk(self) -> Disk:
        assert self.engine.disk is not None
        return self.engine.disk

    def press(self) -> None:
        self.pressed = True

    @property
    def serving(self) -> bool:
        return self.watch is not None and self.closing is None

    def move(self, task: Task, moves: int = 1) -> None:
        """Some moves of a task, the invariants between them."""
        for _ in range(moves):
            if task.done or task.waits_for:
                return
            self.stepper.move(task)
            TOTALS["moves"] += 1
            if task.done:
                self.ended(task)
            if self.watch is not None:
                self.watch.check(self.stepper.tasks)

    def ended(self, task: Task) -> None:
        self.stepper.tasks.remove(task)
        if task is self.opening:
            self.opened(task)
            return
        error, name = task.error, task.name
        if task in self.rounds:
            self.rounds.remove(task)
        if error is None:
            if task is self.closing:
                self.closed()
            return
        assert self.faults, f"{name}: {error}"
        if isinstance(error, RequestError):
            assert error.errno == ENOSPC, error
        elif isinstance(error, OSError):
            assert name == "read", f"{name}: {error!r}"
        else:
            assert isinstance(error, DeviceFailed) and self.disk.log.failed is not None, f"{name}: {error!r}"

    def closed(self) -> None:
        """The image is plain, durable and without leaks."""
        self.watch = None
        self.oracle.flushed = self.oracle.tick()
        for state in (self.sim.copy(), next(self.sim.crash_states(1, Random(0)))):
            no_leaks(state, plain=self.kind.plain)
            self.recover(state, 1)

    def recover(self, state: SimDisk, seed: int) -> None:
        recover(state, self.shape, self.oracle, seed=seed, plain=self.kind.plain)
        TOTALS["disks recovered"] += 1

    # ---- requests

    def request(self, name: str, operation: Operation[Any]) -> None:
        TOTALS["requests"] += 1
        busy = [task for task in self.clients if not task.done]
        if len(busy) >= CONNECTIONS:
            self.finish(busy[0])
        task = self.stepper.add(operation, name)
        self.clients = [each for each in busy if not each.done] + [task]
        self.move(task)

    def _range(self, first: int, length: int, unit: int) -> tuple[int, int]:
        first = first % self.sectors // unit * unit
        return first, min(self.sectors - first, max(unit, length // unit * unit))

    @precondition(lambda self: self.serving)
    @rule(
        first=st.integers(0, 159), length=st.sampled_from((1, 1, 2, 3, 8, 8, 9, 16, 30)), whole=st.booleans(),
        fua=st.booleans(), fast=st.booleans(),
    )  # fmt: skip
    def write(self, first: int, length: int, whole: bool, fua: bool, fast: bool) -> None:
        unit = self.disk.page_size // SECTOR if whole else 1
        first, length = self._range(first, length, unit)
        self.request("write", self.calls.write(first, length, fua=fua, fast=fast))

    @precondition(lambda self: self.serving)
    @rule(
        places=st.lists(st.tuples(st.integers(0, 159), st.sampled_from((1, 3, 8))), min_size=2, max_size=8),
        flush=st.booleans(),
    )  # fmt: skip
    def write_many(self, places: list[tuple[int, int]], flush: bool) -> None:
        """A client that is quick: each is answered, or has its turn with the others, before the next."""
        for first, length in places:
            self.write(first=first, length=length, whole=length == 8, fua=False, fast=True)
        if flush:
            self.flush()

    @precondition(lambda self: self.serving)
    @rule(first=st.integers(0, 159), clusters=st.integers(1, 4), fua=st.booleans())
    def write_clusters(self, first: int, clusters: int, fua: bool) -> None:
        size = self.disk.geometry.cluster_size // SECTOR
        first, length = self._range(first, size * max(clusters, 8 // size), size)
        self.request("write", self.calls.write(first, length, fua=fua))

    @precondition(lambda self: self.serving)
    @rule(
        first=st.integers(0, 159), length=st.sampled_from((1, 3, 8, 16, 40)), trim=st.booleans(),
        may_trim=st.booleans(), clusters=st.booleans(),
    )  # fmt: skip
    def zero(self, first: int, length: int, trim: bool, may_trim: bool, clusters: bool) -> None:
        unit = self.disk.geometry.cluster_size if clusters else self.disk.page_size if trim else SECTOR
        first, length = self._range(first, length, unit // SECTOR)
        self.request("trim" if trim else "zero", self.calls.zero(first, length, trim=trim, may_trim=may_trim))

    @precondition(lambda self: self.serving)
    @rule(first=st.integers(0, 159), length=st.sampled_from((1, 8, 24, 160)))
    def read(self, first: int, length: int) -> None:
        first, length = self._range(first, length, 1)
        self.request("read", self.calls.read(first, length))

    @precondition(lambda self: self.serving)
    @rule()
    def flush(self) -> None:
        self.request("flush", self.calls.flush())

    # ---- the writer

    @precondition(lambda self: self.serving)
    @rule()
    def commit(self) -> None:
        self.move(self.stepper.add(self.calls.commit(), "commit"))

    @precondition(lambda self: self.serving and not self.rounds)
    @rule(tight=st.booleans(), clusters=st.sampled_from((1, 2, 64)), tail=st.booleans())
    def checkpoint_step(self, tight: bool, clusters: int, tail: bool) -> None:
        least = 0 if tail else NEVER
        self.round(checkpoint.round_(self.disk, tight=tight, clusters=clusters, least_bytes=least, again=tight))

    def round(self, operation: Operation[Any]) -> Task:
        """One checkpoint at a time, as in the writer."""
        task = self.stepper.add(operation, "checkpoint")
        self.rounds.append(task)
        self.move(task)
        return task

    def _background(self, *, idle: bool) -> Operation[bool]:
        """A round as the writer decides it."""
        disk, log = self.disk, self.disk.log
        log.check()
        tight = checkpoint.is_tight(disk)
        if not (tight or checkpoint.fill(disk) >= 0.5 or (idle and (disk.pending.clusters or log.ring.transactions))):
            return False
        try:
            done = yield from checkpoint.round_(disk, tight=tight, again=tight)
        except RequestError:
            return False
        if done:
            yield from checkpoint.settle(disk)
        return done

    @precondition(lambda self: self.serving)
    @rule()
    def release(self) -> None:
        self.move(self.stepper.add(self.disk.allocator.release(), "release"))

    @precondition(lambda self: self.serving)
    @rule()
    def forget_tables(self) -> None:
        tables = self.disk.cache.tables
        for table in list(tables.values()):
            if not table.pins and not table.uncommitted:
                del tables[table.host_offset]

    @precondition(lambda self: self.serving)
    @rule(seconds=st.sampled_from((0.5, 1.0, 2.5)))
    def time_passes(self, seconds: float) -> None:
        """What has a deadline begins when it has passed: commit, checkpoint of an idle disk, room."""
        self.now += seconds
        if self.now - self.committed_at >= COMMIT_SECONDS:
            self.committed_at = self.now
            self.commit()
        if self.now - self.room_at >= ROOM_SECONDS:
            self.room_at = self.now
            self.release()
        if self.now - self.checkpointed_at >= CHECKPOINT_SECONDS and not self.rounds:
            self.checkpointed_at = self.now
            self.round(self._background(idle=True))

    # ---- who is next

    @rule(order=st.lists(st.integers(0, 5), min_size=1, max_size=30))
    def go_on(self, order: list[int]) -> None:
        for who in order:
            ready = self.stepper.runnable()
            if not ready:
                return
            self.move(ready[who % len(ready)])

    @rule(who=st.integers(0, 5), moves=st.integers(2, 40))
    def one_goes_on(self, who: int, moves: int) -> None:
        ready = self.stepper.runnable()
        if ready:
            self.move(ready[who % len(ready)], moves)

    def finish(self, *tasks: Task) -> None:
        """Until these, or all, are done, with the writer's help: Invariant 9, every wait ends."""
        for turn in range(PATIENCE):
            left = [task for task in tasks or self.stepper.tasks if not task.done]
            if not left:
                return
            ready = self.stepper.runnable()
            if ready:
                self.move(ready[turn % len(ready)])
                continue
            assert not self.rounds, self.stepper.describe()
            if not self.help() and not self.stepper.runnable():
                break
        raise Deadlock(self.stepper.describe())

    def help(self) -> bool:
        """The writer, woken; then, should that not do, when it finds the disk idle."""
        assert self.watch is not None
        if self.disk.log.failed is not None:
            return False
        for idle in (False, True) if self.pressed else (True,):
            self.pressed = False
            task = self.round(self._background(idle=idle))
            for _ in range(PATIENCE):
                if task.done:
                    break
                ready = self.stepper.runnable()
                if not ready:
                    return False
                self.move(ready[0] if task.waits_for else task)
            if task.done and task.error is None and task.result:
                return True
        return False

    @rule()
    def quiet(self) -> None:
        """Everybody comes to an end."""
        self.finish()

    # ---- the end of a life

    @precondition(lambda self: self.serving and self.disk.log.failed is None)
    @rule()
    def close(self) -> None:
        self.finish()
        if self.disk.log.failed is None:
            self.closing = self.stepper.add(detach(self.disk), "detach")
            assert self.watch is not None
            self.watch.detaching = True
            self.move(self.closing)

    @precondition(lambda self: self.closing is not None and self.closing.done and self.closing.error is None)
    @rule(moves=OPENING_MOVES)
    def open_again(self, moves: int) -> None:
        self.open(moves)

    @precondition(lambda self: not self.lost_outside_the_ring())
    @rule(seed=st.integers(0, 99), moves=OPENING_MOVES)
    def kill(self, seed: int, moves: int) -> None:
        self.sim.kill(Random(seed))
        self.recover(self.sim.copy(), seed)
        self.open(moves)

    def lost_outside_the_ring(self) -> bool:
        """A page that the kernel failed to write and calls clean: nobody who is new can know of it."""
        if self.engine.disk is None:
            return False
        location = self.disk.log.ring.location
        low, high = location.offset // SECTOR, (location.offset + location.length) // SECTOR
        return any(effect.lost and not all(low <= each < high for each in effect.sectors) for effect in self.sim.log)

    @rule(seed=st.integers(0, 999), which=st.integers(0, 15), moves=OPENING_MOVES)
    def cut(self, seed: int, which: int, moves: int) -> None:
        states = list(self.sim.crash_states(16, Random(seed)))
        self.sim = states[which % len(states)]
        self.recover(self.sim.copy(), seed)
        self.open(moves)

    @rule(seed=st.integers(0, 999))
    def look(self, seed: int) -> None:
        """What cuts at this moment would leave: nothing of what is open, all of it, and something between."""
        for state in self.sim.crash_states(5, Random(seed)):
            self.recover(state, seed)

    # ---- a bad disk

    @precondition(lambda self: self.serving and not self.faults)
    @rule(
        fault=st.sampled_from(
            (("sync", EIO), ("write_sync", EIO), ("write", EIO), ("allocate", ENOSPC), ("zero_range", ENOSPC))
        ),
        nth=st.integers(1, 3),
    )  # fmt: skip
    def break_disk(self, fault: tuple[str, int], nth: int) -> None:
        self.faults += 1
        self.sim.fail(fault[0], nth, fault[1])

    def teardown(self) -> None:
        if hasattr(self, "stepper"):
            self.finish_if_well()

    def finish_if_well(self) -> None:
        self.sim.mend()
        if self.opening is not None:
            self.move(self.opening, 1000)
        if self.watch is not None:
            self.finish()
            if self.disk.log.failed is None and self.closing is None:
                self.close()
                self.finish()


def drive(examples: int, steps: int, *, derandomize: bool) -> None:
    phases = [Phase.generate] if os.environ.get(UNSHRUNK) else [Phase.generate, Phase.shrink]
    chosen = settings(
        max_examples=examples, stateful_step_count=steps, deadline=None, derandomize=derandomize, database=None,
        phases=phases, report_multiple_bugs=False, print_blob=not derandomize,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    TOTALS.clear()
    run_state_machine_as_test(Connections, settings=chosen)
    print(f"{examples} runs: {', '.join(f'{count} {what}' for what, count in TOTALS.items())}")
    assert TOTALS["disks recovered"] > examples


def test_whatever_happens_in_whatever_order_nothing_flushed_is_lost_and_nothing_leaks() -> None:
    drive(250, 50, derandomize=True)


@pytest.mark.sweep
def test_whatever_happens_for_a_long_time() -> None:
    drive(scaled(150), 100, derandomize=False)
