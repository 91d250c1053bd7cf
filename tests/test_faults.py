"""Every storage call of the main scenarios fails once: the operation is refused and the device is well, or latched.

Method: a scenario is played on the simulated disk without a fault, its storage calls (reads included) are counted,
and it is played again for each call and each kind of failure. Whatever a step of it raises, the rest is tried as a
client would. Then, whatever happened:

    reads      show, of each sector, the last write that was answered, or one that was refused since
    well       a write, a flush, a checkpoint and a close work, and nothing has leaked
    latched    a write and a flush fail with EIO without touching the disk; a close is refused
    crash      what a power cut leaves at that moment, and what a killed server leaves, is recovered with all
               that was flushed, and without a leak
"""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from random import Random

import pytest
from engine import (
    Engine,
    Oracle,
    Shape,
    background,
    client,
    engine_wakes,
    fill,
    initial_contents,
    verify,
)  # fmt: skip
from scale import scaled
from simdisk import SimDisk
from stepper import Stepper

from nbd_qcow2j import changes, checkpoint
from nbd_qcow2j.attaching import detach
from nbd_qcow2j.disk import Disk
from nbd_qcow2j.errors import DeviceFailed, Error, RequestError
from nbd_qcow2j.steps import Operation, Wait


@dataclass(frozen=True)
class Failure:
    """How a call fails; `landed`: so many bytes of a write reached the page cache, None for what is usual."""

    name: str
    error: int
    landed: int | None = None


FAILURES = [
    Failure("EIO", errno.EIO),
    Failure("ENOSPC", errno.ENOSPC),
    Failure("EIO after a short write", errno.EIO, 512),
    Failure("ENOSPC after a short write", errno.ENOSPC, 1024),
]


class Play:
    """One server's life, one step after the other; what a step raises is kept."""

    def __init__(self, sim: SimDisk, shape: Shape) -> None:
        self.sim, self.shape = sim, shape
        self.oracle = Oracle(initial_contents(shape))
        self.numbers = count(1)
        self.errors: list[Error | OSError] = []
        self.engine = self.fresh()

    def fresh(self) -> Engine:
        engine = Engine(self.sim, self.shape, Random(0))
        engine.settings = replace(engine.settings, discard=True)
        return engine

    @property
    def disk(self) -> Disk:
        assert self.engine.disk is not None
        return self.engine.disk

    def perform(self, steps: Sequence[Step]) -> None:
        """Each step in turn; nothing can be done with an image that could not be opened."""
        for step in steps:
            try:
                step(self)
            except (Error, OSError) as error:
                self.errors.append(error)
            if self.engine.disk is None:
                return

    def run(self, operation: Operation[object]) -> object:
        stepper = Stepper(Random(0), whole_steps=True)
        task = stepper.add(operation, "operation")
        while not task.done:
            if not task.waits_for:
                stepper.move(task)
                continue
            # It waits for the writer; two rounds, for the second may free what the first has linked.
            for _ in range(2):
                writer = stepper.add(relieve(self.disk), "writer")
                stepper.run(writer)
                if writer.error is not None:
                    self.errors.append(writer.error)
            assert not task.waits_for, f"nobody ends the wait for {task.waits_for}"
        if task.error is not None:
            raise task.error
        return task.result

    # ---- steps

    def open(self) -> None:
        self.engine.disk = None
        self.engine.disk = self.run(self.engine.opening())  # type: ignore[assignment]

    def kill_and_open(self) -> None:
        self.sim.kill()
        self.engine = self.fresh()
        self.open()

    def write(self, first: int, length: int) -> None:
        number = next(self.numbers)
        started = self.oracle.begin(first, length, number)
        data = fill(number) * length
        # As the driver does: also what has nothing to do is refused by a latched device.
        self.disk.log.check()
        self.run(changes.guarded(self.disk, changes.write(self.disk, data, first * 512), "write"))
        self.oracle.end(started)

    def zero(self, first: int, length: int, *, trim: bool = False) -> None:
        started = self.oracle.begin(first, length, 0)
        self.disk.log.check()
        operation = changes.zero(self.disk, first * 512, length * 512, trim=trim, may_trim=trim)
        self.run(changes.guarded(self.disk, operation, "zero"))
        self.oracle.end(started)

    def flush(self) -> None:
        at = self.oracle.tick()
        self.run(self.disk.flush())
        self.oracle.flushed = at

    def round(self) -> None:
        """A round of the checkpoint and what the writer does after it."""
        self.run(relieve(self.disk))

    def release(self) -> None:
        self.run(self.disk.allocator.release())

    def grow(self) -> None:
        allocator = self.disk.allocator
        self.run(allocator.ensure(allocator.available + allocator.grow_step))

    def close(self) -> None:
        self.run(detach(self.disk))


def relieve(disk: Disk) -> Operation[None]:
    """One turn of the writer."""
    tight = checkpoint.is_tight(disk)
    if (yield from checkpoint.round_(disk, tight=tight, again=tight)):
        yield from checkpoint.settle(disk)


Step = Callable[[Play], None]


def write(first: int, length: int) -> Step:
    return lambda play: play.write(first, length)


def zero(first: int, length: int, *, trim: bool = False) -> Step:
    return lambda play: play.zero(first, length, trim=trim)


@dataclass(frozen=True)
class Scenario:
    """`before` is played on a disk that is well, `steps` on one that fails."""

    name: str
    before: Sequence[Step]
    steps: Sequence[Step]


OPEN, FLUSH, ROUND, GROW, RELEASE, CLOSE = Play.open, Play.flush, Play.round, Play.grow, Play.release, Play.close
SOME = [write(0, 8), write(17, 3), write(40, 16), FLUSH]

SCENARIOS = [
    Scenario("attach", [], [OPEN]),
    Scenario("first commit", [OPEN], [*SOME, write(18, 5), FLUSH]),
    Scenario("direct write", [OPEN], [write(0, 24), FLUSH, write(8, 8), write(8, 16), FLUSH]),
    Scenario("checkpoint", [OPEN, *SOME], [ROUND, write(2, 9), FLUSH, ROUND, ROUND]),
    Scenario("trim, release, reuse",
             [OPEN, write(0, 32), *SOME, ROUND, ROUND],
             [zero(0, 24, trim=True), FLUSH, RELEASE, GROW, write(8, 16), FLUSH, ROUND, RELEASE]),
    Scenario("zeroes over pending and direct", [OPEN, write(0, 24), *SOME],
             [zero(0, 13), FLUSH, ROUND, zero(16, 16), FLUSH, ROUND, ROUND]),
    Scenario("detach", [OPEN, write(0, 16), *SOME, ROUND, zero(0, 8, trim=True), write(20, 8)], [CLOSE]),
    # With clusters of 512 bytes the table has no entry left for the 65th block.
    Scenario("refcount blocks, a larger refcount table", [OPEN, *[GROW] * 62, write(0, 24), FLUSH],
             [*[GROW] * 4, write(24, 24), FLUSH, ROUND, ROUND]),
    Scenario("replay", [OPEN, write(0, 16), *SOME, write(24, 8), zero(40, 8, trim=True), FLUSH],
             [Play.kill_and_open, FLUSH, ROUND, write(3, 9), FLUSH, CLOSE]),
]  # fmt: skip
SHAPES = [
    Shape("cluster_size=512", 32 << 10),
    Shape("cluster_size=4096", 64 << 10, backed=True),
]


def calls_of(play: Play, scenario: Scenario) -> int:
    """How many storage calls the steps make when nothing fails."""
    play.perform(scenario.before)
    calls = Counter[str]()
    play.sim.hook = lambda kind, _offset, _length: calls.update([kind])
    play.perform(scenario.steps)
    assert not play.errors, f"without any fault: {play.errors}"
    for uncounted in ("size", "start_writeback", "advise_needed", "drop_cached"):
        del calls[uncounted]
    return calls.total()


def inject(
    image: SimDisk, shape: Shape, scenario: Scenario, nth: int, failure: Failure, *, states: int
) -> Counter[str]:
    """Play the scenario with one fault, and hold it against the promises; what happened, counted."""
    play = Play(image.copy(), shape)
    play.perform(scenario.before)
    assert not play.errors
    play.sim.fail("any", nth, failure.error, landed=failure.landed)
    play.perform(scenario.steps)
    play.sim.mend()
    return judge(play, states=states, seed=nth)


def judge(play: Play, *, states: int, seed: int) -> Counter[str]:
    """The promises of this file's docstring, whatever has happened; consumes the play."""
    sim, shape, oracle = play.sim, play.shape, play.oracle
    seen = Counter[str](faults=1)
    for error in play.errors:
        assert isinstance(error, Error | OSError)
    for state in sim.crash_states(states, Random(seed)):
        verify(state, shape, oracle, Random(seed))
        seen["cut states"] += 1
    killed = sim.copy()
    killed.kill()
    verify(killed, shape, oracle, Random(seed))
    seen["killed"] += 1
    disk = play.engine.disk
    if disk is None:
        # Refused to open: nothing is in the way of the next try.
        seen["not opened"] += 1
        play.engine = play.fresh()
        play.open()
        disk = play.disk
    if play.errors and play.errors[-1:] and is_closed(play):
        seen["closed in spite of it"] += 1
        return seen
    oracle.check(play.engine.contents(), oracle.now)
    if disk.log.failed is not None:
        seen["latched"] += 1
        before = sim.operations
        for step in (write(0, 8), write(0, 24), zero(0, 8), zero(0, 8, trim=True), FLUSH, ROUND, CLOSE):
            with pytest.raises(DeviceFailed) as caught:
                step(play)
            assert caught.value.errno == errno.EIO
        assert sim.operations == before, "a latched device leaves the disk alone"
        oracle.check(play.engine.contents(), oracle.now)
        return seen
    assert_at_rest(disk)
    seen["refused, well" if play.errors else "not noticed"] += 1
    if not is_closed(play):
        for step in (write(1, 9), write(0, 24), FLUSH, ROUND, ROUND, RELEASE, CLOSE):
            step(play)
        oracle.flushed = oracle.tick()
    contents = verify(sim, shape, oracle, Random(seed))
    oracle.check(contents, oracle.now)
    return seen


def assert_at_rest(disk: Disk) -> None:
    """Nobody is at work: what the operations held, those that failed as well, was given back."""
    allocator, log = disk.allocator, disk.log
    assert allocator.tokens == len(disk.cluster_tokens) + len(disk.table_tokens)
    assert not disk.excluded and not disk.merging and not allocator.growing and not disk.cache.loading
    assert log.ring.outstanding == 0 and disk.incoming == 0 and log.committing is None
    assert not any(table.pins for table in disk.cache.tables.values())
    assert not any(epoch.active for epoch in (disk.epochs.current, *disk.epochs.retired))
    free = [*allocator.pool, *allocator.found]
    assert len(free) == len(set(free)), "a free cluster is known twice, and would be handed out twice"
    assert not any(allocator.block(cluster) and allocator.refcount(cluster) for cluster in free)
    # Every sector that is committed and not home has its record between tail and head.
    assert len(log.home) * 512 <= log.ring.used


def is_closed(play: Play) -> bool:
    """Whether the image is a plain one: the bit of the journal is cleared."""
    return not play.sim.peek(72, 1)[0] >> 6 & 1


def every_fault(image: SimDisk, shape: Shape, scenario: Scenario, *, states: int, stride: int = 1) -> Counter[str]:
    total = Counter[str]()
    calls = calls_of(Play(image.copy(), shape), scenario)
    for failure in FAILURES:
        for nth in range(1, calls + 1, stride):
            try:
                total += inject(image, shape, scenario, nth, failure, states=states)
            except BaseException:
                print(f"call {nth} of {calls} fails with {failure.name}: {scenario.name}, {shape}")
                raise
    return total


def report(total: Counter[str]) -> str:
    return ", ".join(f"{number} {what}" for what, number in sorted(total.items()))


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.options)
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_any_call_may_fail_once(scenario: Scenario, shape: Shape, tmp_path: Path) -> None:
    total = every_fault(shape.make(tmp_path), shape, scenario, states=2)
    print(f"{scenario.name}: {report(total)}")
    assert total["faults"] > 20


def test_a_cluster_that_is_released_while_a_scan_reads_is_found_once(tmp_path: Path) -> None:
    # The scan for free clusters waits for a refcount block; meanwhile a trimmed cluster that the block counts as
    # free is released. Found by both, it would be handed out to two guest clusters.
    play = Play(SHAPES[0].make(tmp_path), SHAPES[0])
    play.perform([OPEN, write(0, 24), FLUSH, ROUND, ROUND, CLOSE])
    play.engine = play.fresh()
    play.perform([OPEN, zero(0, 24, trim=True), FLUSH, ROUND, ROUND])
    assert not play.errors
    disk, allocator = play.disk, play.disk.allocator
    assert disk.epochs.releasable
    # What the tables name was looked at.
    allocator.counted = None
    # The table cache has forgotten the block, and nothing found is left.
    allocator.scan_at = 0
    allocator.found.clear()
    for offset in list(disk.cache.tables):
        disk.cache.forget(offset)
    stepper = Stepper(Random(0), whole_steps=False)
    growing = stepper.add(allocator.ensure(allocator.available + 1), "grow")
    stepper.move(growing)
    stepper.move(growing)
    assert growing.trace == [f"Read({disk.allocator.reftable.entries[0]:#x})"]
    releasing = stepper.add(allocator.release(), "release")
    while not releasing.done:
        stepper.move(releasing)
    stepper.run(growing)
    assert growing.error is None
    assert_at_rest(disk)


def test_who_waits_for_a_commit_that_finds_the_device_latched_is_told(tmp_path: Path) -> None:
    # A commit is being written when the checkpoint latches the device. The latch wakes who waits by then; who comes
    # to wait after it is woken by the end of the commit.
    play = Play(SHAPES[0].make(tmp_path), SHAPES[0])
    play.perform([OPEN, write(0, 8)])
    log = play.disk.log
    stepper = Stepper(Random(0))
    commit = stepper.add(play.disk.flush(), "flush")
    while not commit.trace or not commit.trace[-1].startswith("WriteSync"):
        stepper.move(commit)
    log.latch(OSError(errno.EIO, "elsewhere"), "checkpoint")

    def wait() -> Operation[None]:
        yield Wait(log.commit_gate)

    late, settling = stepper.add(wait(), "late"), stepper.add(checkpoint.settle(play.disk), "writer")
    stepper.move(late)
    stepper.run()
    for task in (commit, settling):
        assert isinstance(task.error, DeviceFailed)


# ---- a disk that stays full ---------------------------------------------------------------------------


def fill_up(sim: SimDisk, nth: int) -> None:
    """From the nth storage call on, whatever might need room fails: the ring and syncs do not."""
    left = nth

    def hook(kind: str, _offset: int, _length: int) -> None:
        nonlocal left
        left -= kind not in ("size", "start_writeback", "advise_needed", "drop_cached")
        if left == 0:
            for each in ("write", "allocate", "zero_range", "punch"):
                sim.fail(each, 1, errno.ENOSPC, times=0)

    sim.hook = hook


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.options)
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_a_disk_that_is_full_from_any_call_on_latches_nothing(scenario: Scenario, shape: Shape, tmp_path: Path) -> None:
    # The steps are refused with ENOSPC or done; a close that cannot be done ends. Then room is made, and all goes on.
    image = shape.make(tmp_path)
    calls = calls_of(Play(image.copy(), shape), scenario)
    total = Counter[str]()
    for nth in range(1, calls + 1):
        play = Play(image.copy(), shape)
        play.perform(scenario.before)
        fill_up(play.sim, nth)
        try:
            play.perform(scenario.steps)
            for error in play.errors:
                assert error.errno == errno.ENOSPC or play.engine.disk is None, error
            if play.engine.disk is not None and not is_closed(play):
                with pytest.raises(RequestError) as caught:
                    for _ in range(2):
                        play.write(0, 8)
                        play.flush()
                        play.close()
                assert caught.value.errno == errno.ENOSPC
            play.sim.hook = None
            play.sim.mend()
            total += judge(play, states=2, seed=nth)
        except BaseException:
            print(f"full from call {nth} of {calls}: {scenario.name}, {shape}")
            raise
    print(f"full disk, {scenario.name}: {report(total)}")
    assert not total["latched"]


# ---- faults at random, several clients at work ----------------------------------------------------------

RANDOM_SHAPES = [*SHAPES, Shape("cluster_size=512,refcount_bits=64", 256 << 10), Shape("cluster_size=65536", 256 << 10)]


def play_with_faults(seed: int, image: SimDisk, shape: Shape) -> Counter[str]:
    """Clients and the writer, interleaved at random; one to three calls fail, once or a few times in a row."""
    rng = Random(seed)
    play = Play(image.copy(), shape)
    play.open()
    stepper = Stepper(rng, whole_steps=rng.random() < 0.3)
    numbers = count(1000)
    clients = [
        stepper.add(client(play.engine, play.oracle, rng, rng.randint(4, 16), numbers), f"client {number}")
        for number in range(rng.choice((1, 2, 3)))
    ]
    writer = stepper.add(background(play.engine, rng), "writer", daemon=True)
    for _ in range(rng.choice((1, 1, 2, 3))):
        failure = rng.choice(FAILURES)
        kind = rng.choice(("any", "any", "write", "write_sync", "sync", "read", "zero_range", "allocate"))
        most = 60 if kind in ("any", "write") else 12
        play.sim.fail(
            kind, rng.randint(1, most), failure.error, times=rng.choice((1, 1, 1, 4)), landed=failure.landed
        )
    while not all(each.done for each in clients):
        for gate in engine_wakes:
            gate.open()  # type: ignore[attr-defined]
        engine_wakes.clear()
        if writer.done and play.disk.log.failed is None:
            assert isinstance(writer.error, RequestError), writer.error
            writer = stepper.add(background(play.engine, rng), "writer", daemon=True)
        stepper.run(limit=1)
    # The writer comes to the end of its turn.
    while not writer.done and not writer.waits_for.startswith("background"):
        stepper.move(writer)
    play.sim.mend()
    for task in stepper.tasks:
        if task.error is not None:
            play.errors.append(task.error)
            # A read that failed is told as it is.
            known = (RequestError, DeviceFailed, OSError)
            assert isinstance(task.error, known), f"{task.name}: {task.error!r}"
    return judge(play, states=3, seed=seed)


def random_faults(shape: Shape, directory: Path, seeds: range) -> Counter[str]:
    image = shape.make(directory)
    total = Counter[str]()
    for seed in seeds:
        try:
            total += play_with_faults(seed, image, shape)
        except BaseException:
            print(f"seed {seed}, {shape}")
            raise
    return total


@pytest.mark.parametrize("shape", RANDOM_SHAPES, ids=lambda shape: f"{shape.options},{shape.size >> 10}K")
def test_calls_fail_at_random_under_several_clients(shape: Shape, tmp_path: Path) -> None:
    total = random_faults(shape, tmp_path, range(40))
    print(f"random faults, {shape.options}: {report(total)}")
    assert total["latched"] > 2 and total["refused, well"] + total["not noticed"] > 2


@pytest.mark.sweep
@pytest.mark.parametrize("shape", RANDOM_SHAPES, ids=lambda shape: f"{shape.options},{shape.size >> 10}K")
def test_calls_fail_at_random_under_several_clients_with_many_seeds(shape: Shape, tmp_path: Path) -> None:
    print(f"random faults, {shape.options}: {report(random_faults(shape, tmp_path, range(1000, 1000 + scaled(80))))}")


@pytest.mark.sweep
@pytest.mark.parametrize("shape", [*SHAPES, Shape("cluster_size=65536", 256 << 10)], ids=lambda shape: shape.options)
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_any_call_may_fail_once_with_many_cuts(scenario: Scenario, shape: Shape, tmp_path: Path) -> None:
    total = every_fault(shape.make(tmp_path), shape, scenario, states=4)
    print(f"{scenario.name}: {report(total)}")
