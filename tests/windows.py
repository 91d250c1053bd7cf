"""Every moment of a scenario at which the power may fail, every disk that this may leave, recovered and checked.

Method: a scenario is run once, by one caller, on a simulated disk that is watched. At every moment of it, after
each storage operation and in the middle of it (begun, not returned),

  1. every disk that a power cut may leave (simcrash.py) is recovered: opened, read, detached. Each sector must
     be one that the oracle allows; refcounts equal references, nothing leaks, the header is that of a plain
     image, closing changes no content;
  2. the server is killed instead and started again on the page cache; each moment of that start is cut likewise.

A recovery is a scenario of its own: it is cut at each of its moments, and the recovery of *that* again. Since a
recovery writes nothing new, whatever is left must recover to the very content its parent recovers to.

Disks with the same content are one *state*, recovered once. The first level is exhaustive within `Effort.subsets`;
deeper ones are, up to so many distinct states, and sampled beyond, with a seed that is printed.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

from engine import SECTOR, Oracle, Pattern, Shape, fill, number_of
from refcounts import reference_counts
from scale import scaled
from simdisk import SimDisk, SimStorage

from nbd_qcow2j import changes, checkpoint
from nbd_qcow2j.attaching import detach
from nbd_qcow2j.disk import Disk, Settings
from nbd_qcow2j.errors import Error
from nbd_qcow2j.image.backing import Layer
from nbd_qcow2j.opening import open_disk
from nbd_qcow2j.steps import Operation, Wait

UUID = b"uuid of a window"


def run(operation: Operation[Any], disk: Disk | None = None) -> Any:
    """Run an operation alone; while it waits, the checkpoint of `disk` has a turn, as the writer would give it."""
    result: Any = None
    failure: OSError | Error | None = None
    turns = 0
    while True:
        try:
            step = operation.send(result) if failure is None else operation.throw(failure)
        except StopIteration as stop:
            return stop.value
        result, failure = None, None
        if isinstance(step, Wait):
            turns += 1
            assert disk is not None and turns < 200, f"nobody opens the gate: {step.gate.name}"
            tight = checkpoint.is_tight(disk)
            if not run(checkpoint.round_(disk, tight=tight, again=tight)):
                run(checkpoint.settle(disk))
            continue
        try:
            result = step.perform()
        except (OSError, Error) as error:
            failure = error


class Life:
    """One server and its only client, on a simulated disk; the oracle is told of everything."""

    def __init__(self, sim: SimDisk, shape: Shape, oracle: Oracle, *, discard: bool = True, uuid: bytes = UUID) -> None:
        self.sim, self.shape, self.oracle, self.uuid = sim, shape, oracle, uuid
        self.settings = Settings(journal_size=shape.journal, direct_write=4096, discard=discard)
        self.watcher: Callable[[bool], None] | None = None
        self.number = 0
        self.disk: Disk

    def open(self, *, read_only: bool = False) -> Disk:
        file = SimStorage(self.sim, "image", read_only=read_only)
        backing: Layer | None = Pattern(self.shape.size) if self.shape.backed else None  # type: ignore[assignment]
        self.disk = run(
            open_disk(
                file, file.reopen(), settings=self.settings, read_only=read_only, backing=backing, uuid=self.uuid,
                name="image",
            )
        )  # fmt: skip
        # Small steps: the pool grows often, and a cut there has few sectors to choose from.
        self.disk.allocator.grow_step = min(16, max(2, (1 << 15) // self.disk.geometry.cluster_size))
        return self.disk

    @contextmanager
    def window(self) -> Iterator[None]:
        """What happens inside is cut at every moment."""
        self.sim.watch = self.watcher
        if self.watcher:
            self.watcher(False)
        try:
            yield
        finally:
            self.sim.watch = None

    # -- what clients do; sizes and places in sectors

    def write(self, first: int, count: int = 1, *, pending: bool = False, in_place: bool = False) -> int:
        """Write sectors, each with the number of this write; returns it. From 8 sectors on, whole clusters directly.

        `in_place`: less than that may go to where the cluster is; it becomes pending otherwise.
        """
        self.number += 1
        direct = count >= 8 and not pending
        self.disk.settings = replace(self.settings, direct_write=SECTOR if direct else 1 << 30, in_place=in_place)
        started = self.oracle.begin(first, count, self.number)
        data = fill(self.number) * count
        if not self.disk.try_write(data, first * SECTOR):
            run(changes.guarded(self.disk, changes.write(self.disk, data, first * SECTOR), "write"), self.disk)
        self.oracle.end(started)
        return self.number

    def zero(self, first: int, count: int, *, trim: bool = False, may_trim: bool = True) -> None:
        started = self.oracle.begin(first, count, 0)
        operation = changes.zero(self.disk, first * SECTOR, count * SECTOR, trim=trim, may_trim=trim or may_trim)
        run(changes.guarded(self.disk, operation, "zero"), self.disk)
        self.oracle.end(started)

    def trim(self, first: int, count: int) -> None:
        self.zero(first, count, trim=True)

    def flush(self) -> None:
        at = self.oracle.tick()
        run(self.disk.flush(), self.disk)
        self.oracle.flushed = max(self.oracle.flushed, at)

    def contents(self) -> bytes:
        data = bytearray(self.shape.size)
        run(self.disk.read_into(memoryview(data), 0))
        return bytes(data)

    # -- what the writer does

    def checkpoint(self, *, clusters: int = 64, tight: bool | None = None) -> bool:
        done = run(
            checkpoint.round_(
                self.disk, tight=checkpoint.is_tight(self.disk) if tight is None else tight, clusters=clusters
            )
        )
        return bool(done)

    def commit(self) -> None:
        """A commit that no flush asked for: what it makes durable was promised to nobody."""
        run(self.disk.log.commit_upto(self.disk.log.last_number()), self.disk)

    def release(self) -> None:
        run(self.disk.allocator.release())

    def go_home(self) -> None:
        """Everything home, the tail at the head."""
        run(checkpoint.drain(self.disk))

    def close(self) -> None:
        run(detach(self.disk))

    def reborn(self) -> None:
        """The server is killed and started again."""
        self.sim.kill()
        self.open()

    def be_tight(self) -> None:
        """Let the pool hold no more than what is needed, so that a freed cluster is soon used again."""
        self.disk.allocator.grow_step = 1

    def exhaust(self) -> None:
        """Somebody takes every free cluster that is known: what is freed next is the next one used."""
        allocator = self.disk.allocator
        self.be_tight()
        while allocator.available > 0:
            allocator.reserve(token=False)
        allocator.scan_at = allocator.scan_end
        allocator.found.clear()


def skip_room_before_journal(disk: Disk) -> None:
    """As if what lies between what was there and the journal had been used: the file is lengthened behind it."""
    disk.allocator.end = max(disk.allocator.end, disk.allocator.ring_clusters[1])


def numbers(contents: bytes) -> list[int]:
    return [number_of(contents[at : at + SECTOR]) for at in range(0, len(contents), SECTOR)]


def plain_header(sim: SimDisk) -> bytes:
    """The header cluster, without what may rightly change: place of the refcount table, autoclear bits."""
    size = 1 << struct.unpack(">I", sim.peek(20, 4))[0]
    header = bytearray(sim.peek(0, size))
    header[48:60] = bytes(12)
    header[88:96] = bytes(8)
    return bytes(header)


@dataclass(frozen=True)
class Effort:
    """How many states: `subsets` of each cut, of each cut of a restart and of a recovery; distinct deeper ones."""

    subsets: int
    restart: int
    deeper: int
    second: int
    third: int
    sampled: int


    judged: int
    """States that qemu-img is shown."""


QUICK = Effort(subsets=24, restart=8, deeper=4, second=100, third=30, sampled=10, judged=2)
THOROUGH = Effort(
    subsets=320, restart=16, deeper=4, second=scaled(100), third=scaled(40), sampled=scaled(20), judged=10
)  # fmt: skip


@dataclass
class Counts:
    """What was done, for the report."""

    moments: int = 0
    first: int = 0
    restarts: int = 0
    second: int = 0
    third: int = 0
    sampled: int = 0

    @property
    def states(self) -> int:
        return self.first + self.second + self.third

    def __str__(self) -> str:
        return (
            f"{self.moments} moments, {self.first} states, {self.restarts} restarts on a page cache; "
            f"cut in recovery {self.second}, in its recovery {self.third}, {self.sampled} of these sampled"
        )


@dataclass
class Explorer:
    """Recovers states, each once, and remembers what they held."""

    image: SimDisk
    shape: Shape
    effort: Effort
    seed: int = 0
    counts: Counts = field(default_factory=Counts)

    def __post_init__(self) -> None:
        self.rng = Random(self.seed)
        self.header = plain_header(self.image)
        try:
            self.copied_flags = bool(reference_counts(self.image))
        except AssertionError:
            self.copied_flags = not reference_counts(self.image, copied_flags=False)
        self.known: dict[int, bytes] = {}
        self.restarted: dict[int, set[bytes]] = {}
        self.levels: list[list[SimDisk]] = [[], [], []]

    def recover(self, sim: SimDisk, *, watch: Callable[[bool], None] | None = None, whole: bool = True) -> bytes:
        """Open, read, close: what the image holds. Changes `sim`. `watch` sees it all, or the opening alone."""
        life = Life(sim, self.shape, Oracle([]), uuid=b"after a recovery")
        sim.watch = watch
        life.open()
        if not whole:
            sim.watch = None
        contents = life.contents()
        life.close()
        sim.watch = None
        assert not sim.log, "a closed image has something that is not durable"
        counts = reference_counts(sim, copied_flags=self.copied_flags)
        size = 1 << struct.unpack(">I", sim.peek(20, 4))[0]
        assert sim.durable_size <= (max(counts) + 1) * size, "the free tail of the file is still there"
        assert plain_header(sim) == self.header, "the header is not that of the plain image"
        again = Life(sim, self.shape, Oracle([]))
        again.open(read_only=True)
        assert again.contents() == contents, "closing changed what the disk holds"
        return contents

    def recovered(self, state: SimDisk, level: int) -> bytes:
        """As `recover`, once for each state; `state` stays as it is."""
        key = state.digest()
        contents = self.known.get(key)
        if contents is None:
            contents = self.known[key] = self.recover(state.copy())
            self.levels[level].append(state)
        return contents

    def moment(self, sim: SimDisk, oracle: Oracle) -> None:
        """The power fails now; or the server is killed, started, and then the power fails."""
        self.counts.moments += 1
        for state in sim.crash_states(self.effort.subsets, self.rng):
            oracle.check(numbers(self.recovered(state, 0)))
        if sim.log:
            # A write in flight goes on to its end, or stops anywhere.
            for torn in (None, self.rng) if any(not effect.done for effect in sim.log) else (None,):
                killed = sim.copy()
                killed.kill(torn)
                for contents in self.restart(killed):
                    oracle.check(numbers(contents))

    def restart(self, killed: SimDisk) -> set[bytes]:
        """What may be found after the server was killed, started on its page cache, and the power was cut."""
        key = killed.digest()
        if key not in self.restarted:
            self.counts.restarts += 1
            found = self.restarted[key] = set()

            def watch(_: bool) -> None:
                for state in killed.crash_states(self.effort.restart, self.rng):
                    found.add(self.recovered(state, 0))

            found.add(self.recover(killed, watch=watch, whole=False))
        return self.restarted[key]

    def closed(self, count: int) -> Iterator[SimDisk]:
        """Some of the states, recovered and closed: plain images for another program to judge."""
        for state in self.rng.sample(self.levels[0], min(count, len(self.levels[0]))):
            sim = state.copy()
            self.recover(sim)
            yield sim

    def deepen(self) -> None:
        """Cut the recoveries of the states that were found, and the recoveries of what that leaves."""
        self.counts.first = len(self.levels[0])
        self.counts.second = self._deepen(0, self.effort.second)
        self.counts.third = self._deepen(1, self.effort.third)

    def _deepen(self, level: int, budget: int) -> int:
        parents, children = self.levels[level], self.levels[level + 1]
        order = list(range(len(parents)))
        self.rng.shuffle(order)
        sampled = 0
        for index in order:
            if sampled >= self.effort.sampled:
                break
            exhaustive = len(children) < budget
            chosen = None if exhaustive else self.rng.randrange(60)
            sampled += not exhaustive
            self._cut_recovery(parents[index], level + 1, chosen)
        self.counts.sampled += sampled
        return len(children)

    def _cut_recovery(self, parent: SimDisk, level: int, chosen: int | None) -> None:
        """Cut the recovery of `parent` at every moment, or at the one that was chosen."""
        expected = self.known[parent.digest()]
        sim = parent.copy()
        moments = 0

        def watch(_: bool) -> None:
            nonlocal moments
            moments += 1
            if chosen is None or moments == chosen:
                for state in sim.crash_states(self.effort.deeper, self.rng):
                    found = self.recovered(state, level)
                    if found != expected:
                        pairs = enumerate(zip(numbers(expected), numbers(found), strict=True))
                        differ = {sector: pair for sector, pair in pairs if pair[0] != pair[1]}
                        raise AssertionError(
                            f"cut at moment {moments} of a recovery, in {sim.history[-1]}: (expected, found) {differ}"
                        )

        self.recover(sim, watch=watch)


def explore(
    script: Callable[[Life], None], image: SimDisk, shape: Shape, effort: Effort, *, seed: int = 0,
    discard: bool = True,
) -> Explorer:  # fmt: skip
    """Run a scenario on a copy of `image` and cut it everywhere; returns who did that, with what was counted."""
    explorer = Explorer(image, shape, effort, seed)
    reader = Life(image.copy(), shape, Oracle([]))
    reader.open(read_only=True)
    sim = image.copy()
    life = Life(sim, shape, Oracle(numbers(reader.contents())), discard=discard)
    life.watcher = lambda _: explorer.moment(sim, life.oracle)
    try:
        script(life)
        explorer.deepen()
    except BaseException:
        print(f"seed {seed}, {shape}, moment {explorer.counts.moments}: {explorer.counts}")
        raise
    return explorer
