"""The engine on a simulated disk: an image, an oracle for every sector, and what a cut may leave.

The oracle knows of each 512-byte sector all writes with the moments at which they began and returned. After a
cut a sector may hold the version of the last flush, or any whose write had not returned before that version's
write... in short: any that is not older than one that a flush covered.
"""

from __future__ import annotations

import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from random import Random

from refcounts import reference_counts
from simdisk import SimDisk, SimStorage
from stepper import Stepper

from nbd_qcow2j import changes, checkpoint
from nbd_qcow2j.attaching import detach
from nbd_qcow2j.disk import Disk, Settings
from nbd_qcow2j.image.backing import Layer
from nbd_qcow2j.opening import open_disk
from nbd_qcow2j.steps import Gate, Operation, ReadInto, Wait, run_simply

SECTOR = 512
FOREVER = 1 << 60


@dataclass(frozen=True)
class Shape:
    """An image to try: options of `qemu-img create`, sizes in bytes."""

    options: str
    size: int
    journal: int = 1 << 16
    backed: bool = False

    def make(self, directory: Path) -> SimDisk:
        path = directory / "image.qcow2"
        subprocess.run(
            ["qemu-img", "create", "-q", "-f", "qcow2", "-o", self.options, str(path), str(self.size)], check=True
        )
        return SimDisk.from_file(path)


def room_before_journal(cluster_size: int) -> int:
    """Bytes between what was in a file and the journal that is attached behind it."""
    return (max(16, min(1024, (16 << 20) // cluster_size)) + 1) * cluster_size


class Pattern:
    """A backing layer whose sectors are all different."""

    name = "pattern"
    format = "raw"

    def __init__(self, size: int) -> None:
        self.size = size
        self.storage = SimStorage(_pattern(size).copy(), "pattern")

    def read_into(self, view: memoryview, offset: int) -> Operation[None]:
        yield ReadInto(self.storage, offset, view)

    def extents(self, offset: int, length: int) -> Operation[list[object]]:
        raise AssertionError("not asked here")
        yield

    def close(self) -> None:
        self.storage.close()


@cache
def _pattern(size: int) -> SimDisk:
    return SimDisk.of([(at, fill(-at // SECTOR - 1)) for at in range(0, size, SECTOR)], size)


@lru_cache(maxsize=1 << 14)
def fill(number: int) -> bytes:
    """The content that write `number` puts into every sector; 0 is zeros."""
    return bytes(SECTOR) if number == 0 else struct.pack(">q", number) * (SECTOR // 8)


def number_of(content: bytes) -> int:
    """The write that `fill` made this content for; a mixture is none."""
    number: int = struct.unpack_from(">q", content)[0]
    return number if content == fill(number) else FOREVER


class Oracle:
    """What every sector may hold."""

    def __init__(self, contents: list[int]) -> None:
        self.now = 0
        self.flushed = 0
        self.writes = [[[number, 0, 0]] for number in contents]

    def tick(self) -> int:
        self.now += 1
        return self.now

    def begin(self, first: int, count: int, number: int) -> list[list[int]]:
        at = self.tick()
        started = [[number, at, FOREVER] for _ in range(count)]
        for sector, entry in enumerate(started, first):
            self.writes[sector].append(entry)
        return started

    def end(self, started: list[list[int]]) -> None:
        at = self.tick()
        for entry in started:
            entry[2] = at

    def allowed(self, sector: int, covered: int, upto: int = FOREVER) -> set[int]:
        """Versions that may be seen by whoever knows that all writes returned by `covered` are durable."""
        writes = self.writes[sector]
        if len(writes) == 1:
            # Most sectors: the one that has been there from the start, for nothing is newer.
            [[number, begun, _]] = writes
            return {number} if begun <= upto else set()
        newest = max((begun for _, begun, ended in writes if ended <= covered), default=-1)
        return {number for number, begun, ended in writes if ended >= newest and begun <= upto}

    def forget(self, contents: list[int]) -> None:
        """These are the contents now: all that went before is over."""
        at = self.tick()
        self.writes = [[[number, at, at]] for number in contents]
        self.flushed = at

    def check(self, contents: list[int], covered: int | None = None) -> None:
        covered = self.flushed if covered is None else covered
        for sector, number in enumerate(contents):
            allowed = self.allowed(sector, covered)
            assert number in allowed, f"sector {sector} holds {number}, allowed {sorted(allowed)}"


class Engine:
    """One server's life on a simulated disk."""

    def __init__(self, disk: SimDisk, shape: Shape, rng: Random, *, read_only: bool = False) -> None:
        self.sim, self.shape, self.rng = disk, shape, rng
        self.file = SimStorage(disk, "image", read_only=read_only)
        self.background = self.file.reopen()
        self.settings = Settings(journal_size=shape.journal, direct_write=4096, discard=rng.random() < 0.7)
        self.backing: Layer | None = Pattern(shape.size) if shape.backed else None  # type: ignore[assignment]
        self.read_only = read_only
        self.disk: Disk | None = None

    def opening(self) -> Operation[Disk]:
        return open_disk(
            self.file, self.background, settings=self.settings, read_only=self.read_only, backing=self.backing,
            uuid=self.rng.randbytes(16), name="image",
        )  # fmt: skip

    def open(self) -> Disk:
        self.disk = run_simply(self.opening())
        return self.disk

    def contents(self) -> list[int]:
        assert self.disk is not None
        data = bytearray(self.shape.size)
        run_simply(self.disk.read_into(memoryview(data), 0))
        return [number_of(bytes(data[at : at + SECTOR])) for at in range(0, len(data), SECTOR)]


def initial_contents(shape: Shape) -> list[int]:
    return [-sector - 1 if shape.backed else 0 for sector in range(shape.size // SECTOR)]


def client(engine: Engine, oracle: Oracle, rng: Random, count: int, numbers: Iterator[int]) -> Operation[None]:
    """A client that sends requests one after the other and tells the oracle."""
    disk = engine.disk
    assert disk is not None
    sectors = engine.shape.size // SECTOR
    for _ in range(count):
        number = next(numbers)
        first = rng.randrange(sectors)
        length = min(sectors - first, rng.choice((1, 1, 2, 4, 8, 9, 16, 30)))
        if rng.random() < 0.5:
            first -= first % 8
            length = min(sectors - first, max(8, length - length % 8))
        kind = rng.choices(("write", "zero", "trim", "flush", "read"), (8, 1, 1, 3, 2))[0]
        offset, size = first * SECTOR, length * SECTOR
        if kind == "flush":
            at = oracle.tick()
            yield from disk.flush()
            oracle.flushed = max(oracle.flushed, at)
        elif kind == "read":
            began = oracle.tick()
            data = bytearray(size)
            yield from disk.read_into(memoryview(data), offset)
            for sector in range(first, first + length):
                at = (sector - first) * SECTOR
                found = number_of(bytes(data[at : at + SECTOR]))
                allowed = oracle.allowed(sector, began, oracle.now)
                assert found in allowed, f"a read of sector {sector} found {found}, allowed {sorted(allowed)}"
        elif kind == "write":
            started = oracle.begin(first, length, number)
            data = fill(number) * length
            if not (rng.random() < 0.7 and disk.try_write(data, offset)):
                yield from changes.guarded(disk, changes.write(disk, data, offset), "write")
            oracle.end(started)
        else:
            trim = kind == "trim"
            if trim:
                # Whole pages, so that the oracle knows what must be zero.
                page = disk.page_size // SECTOR
                first, length = first - first % page, max(page, length - length % page)
                length = min(length, sectors - first)
                offset, size = first * SECTOR, length * SECTOR
            started = oracle.begin(first, length, 0)
            may_trim = rng.random() < 0.7
            yield from changes.guarded(
                disk, changes.zero(disk, offset, size, trim=trim, may_trim=trim or may_trim), "zero"
            )
            oracle.end(started)


def background(engine: Engine, rng: Random) -> Operation[None]:
    """What the writer's checkpoint and room tasks do, in any order; they never wait for the clock."""
    disk = engine.disk
    assert disk is not None
    while True:
        tight = checkpoint.is_tight(disk)
        choice = rng.randrange(4)
        if tight or choice == 0:
            yield from checkpoint.round_(disk, tight=tight, clusters=rng.choice((1, 4, 64)), again=tight)
        elif choice == 1:
            # As the writer does it: never waiting for ring room, which only this task makes.
            yield from checkpoint.settle(disk)
        elif choice == 2:
            yield from disk.allocator.release()
        yield _turn()


def committer(engine: Engine) -> Operation[None]:
    """The writer's commit task: it may have to wait for the checkpoint, so it is a task of its own."""
    disk = engine.disk
    assert disk is not None
    while True:
        yield from disk.log.commit_upto(disk.log.last_number())
        yield _turn()


def _turn() -> Wait:
    gate = Gate("background turn")
    engine_wakes.append(gate)
    return Wait(gate)


engine_wakes: list[object] = []


def verify(state: SimDisk, shape: Shape, oracle: Oracle, rng: Random) -> list[int]:
    """Recover a state that a cut left: every sector as promised, then a clean close without leaks."""
    engine = Engine(state, shape, rng)
    disk = engine.open()
    contents = engine.contents()
    oracle.check(contents)
    settle(engine, detach(disk))
    reference_counts(state)
    after = Engine(state, shape, rng, read_only=True)
    after.open()
    assert after.contents() == contents, "closing changed what the disk holds"
    return contents


def settle(engine: Engine, operation: Operation[None]) -> None:
    """Run an operation together with the checkpoint, as the writer would."""
    stepper = Stepper(Random(0), whole_steps=True)
    task = stepper.add(operation, "operation")
    stepper.run(task)
    if task.error is not None:
        raise task.error
