"""What a device with real threads did to a real file, recorded at the storage seam and replayed to power cuts.

Method: several threads send requests to a `driver.Device` over a real file, its writer at work. Every call that
changes or settles the file is noted when it begins and when it has returned, in one order with the requests. Any
prefix of that record is a moment at which the power may fail: it is played onto the simulated disk, calls without
a return in flight, and each state that a cut leaves there is recovered and compared with what was flushed by then.

What is real here and nowhere else: the threads, the driver's lock and waits, the writer's own order of work.
"""

from __future__ import annotations

import os
import random
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import run
from engine import Oracle, Shape, fill, verify
from scale import scaled
from simdisk import SimDisk, SimStorage

from nbd_qcow2j.disk import Settings
from nbd_qcow2j.driver import Device
from nbd_qcow2j.opening import open_disk
from nbd_qcow2j.options import parse_options
from nbd_qcow2j.steps import Buffer, run_simply
from nbd_qcow2j.storage import FileStorage

SECTOR = 512
Event = tuple[str, int, str, int, Any]
"""("begin" or "end", number of the call, kind, offset, data or length), or ("mark", …) of the oracle."""


class Record:
    """Everything in the order in which it was noted."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.lock = threading.Lock()

    def note(self, what: str, call: int = 0, kind: str = "", offset: int = 0, data: Any = None) -> int:
        with self.lock:
            self.events.append((what, call or len(self.events) + 1, kind, offset, data))
            return len(self.events)


class RecordedStorage:
    """A FileStorage that notes what is done to it."""

    def __init__(self, file: FileStorage, record: Record) -> None:
        self.file, self.record, self.name = file, record, file.name

    @property
    def can_punch(self) -> bool:
        return self.file.can_punch

    def _write(self, kind: str, offset: int, buffers: Sequence[Buffer]) -> None:
        data = b"".join(buffers)
        call = self.record.note("begin", 0, kind, offset, data)
        getattr(self.file, kind)(offset, [data])
        self.record.note("end", call)

    def write(self, offset: int, buffers: Sequence[Buffer]) -> None:
        self._write("write", offset, buffers)

    def write_sync(self, offset: int, buffers: Sequence[Buffer]) -> None:
        self._write("write_sync", offset, buffers)

    def __getattr__(self, name: str) -> Any:
        function = getattr(self.file, name)
        if name not in ("sync", "allocate", "punch", "zero_range", "truncate"):
            return function

        def call(offset: int = 0, length: int = 0) -> None:
            number = self.record.note("begin", 0, name, offset, length)
            function(*() if name == "sync" else (offset,) if name == "truncate" else (offset, length))
            self.record.note("end", number)

        return call


class RecordedOracle(Oracle):
    """Its clock is the record; it keeps every flush, for each prefix has seen other ones."""

    def __init__(self, contents: list[int], record: Record) -> None:
        super().__init__(contents)
        self.record = record
        self.flushes: list[tuple[int, int]] = [(0, 0)]

    def tick(self) -> int:
        self.now = self.record.note("mark")
        return self.now


class Moment:
    """The oracle as it was after `upto` events, as `engine.verify` asks it."""

    def __init__(self, oracle: RecordedOracle, upto: int) -> None:
        self.oracle, self.upto = oracle, upto
        self.covered = max(began for began, ended in oracle.flushes if ended <= upto)

    def check(self, contents: list[int]) -> None:
        for sector, number in enumerate(contents):
            allowed = self.oracle.allowed(sector, self.covered, self.upto)
            assert number in allowed, f"sector {sector} holds {number}, allowed {sorted(allowed)}"


class Workload(threading.Thread):
    """One client: requests without a pause."""

    def __init__(self, device: Device, oracle: RecordedOracle, lock: threading.Lock, *, seed: int, count: int) -> None:
        super().__init__(daemon=True)
        self.device, self.oracle, self.lock, self.count = device, oracle, lock, count
        self.rng = random.Random(seed)
        self.first_number = (seed + 1) << 20
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            for number in range(self.count):
                self.request(self.first_number + number)
        except BaseException as error:
            self.error = error

    def request(self, number: int) -> None:
        rng, oracle, device = self.rng, self.oracle, self.device
        sectors = device.size // SECTOR
        first = rng.randrange(sectors)
        length = min(sectors - first, rng.choice((1, 3, 8, 8, 16, 40)))
        if rng.random() < 0.5:
            first -= first % 8
            length = min(max(8, length - length % 8), sectors - first)
        kind = rng.choices(("write", "zero", "trim", "flush"), (10, 1, 1, 3))[0]
        if kind == "flush":
            with self.lock:
                began = oracle.tick()
            device.flush()
            with self.lock:
                oracle.flushes.append((began, oracle.tick()))
            return
        if kind == "trim":
            first, length = first - first % 8, max(8, length - length % 8)
        with self.lock:
            started = oracle.begin(first, length, number if kind == "write" else 0)
        offset, size = first * SECTOR, length * SECTOR
        if kind == "write":
            device.write(fill(number) * length, offset)
        elif kind == "zero":
            device.write_zeroes(offset, size, may_trim=rng.random() < 0.5, fast=False, fua=False)
        else:
            device.trim(offset, size, fua=False)
        with self.lock:
            oracle.end(started)


def record_run(path: Path, shape: Shape, *, seed: int, clients: int, requests: int) -> tuple[Record, RecordedOracle]:
    """A whole life of a device, from its attach to its close."""
    record = Record()
    oracle = RecordedOracle([0] * (shape.size // SECTOR), record)
    options = parse_options([("file", str(path)), ("checkpoint-interval", "0.1"), ("commit-interval", "0.05")])
    file = FileStorage.open(path, read_only=False)
    storages: list[Any] = [RecordedStorage(file, record), RecordedStorage(file.reopen(), record)]
    settings = Settings(journal_size=shape.journal, direct_write=8192)
    disk = run_simply(
        open_disk(*storages, settings=settings, read_only=False, backing=None, uuid=os.urandom(16), name=str(path))
    )
    device = Device(disk, options, storages)
    device.start()
    lock = threading.Lock()
    threads = [
        Workload(device, oracle, lock, seed=seed * 100 + number, count=requests) for number in range(clients)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
        assert not thread.is_alive(), "a request that never ends"
        assert thread.error is None, repr(thread.error)
    began = oracle.tick()
    device.close()
    oracle.flushes.append((began, oracle.tick()))
    return record, oracle


class Replay:
    """The record, played onto a simulated disk one event at a time."""

    def __init__(self, sim: SimDisk, events: list[Event]) -> None:
        self.sim, self.events, self.at = sim, events, 0
        self.storage = SimStorage(sim, "recorded")
        self.flight: dict[int, tuple[str, Any]] = {}

    def advance(self, upto: int) -> None:
        while self.at < upto:
            what, call, kind, offset, data = self.events[self.at]
            self.at += 1
            if what == "begin":
                self.flight[call] = (kind, self.begin(kind, offset, data))
            elif what == "end":
                kind, begun = self.flight.pop(call)
                if kind == "sync":
                    self.storage.finish_sync(begun)
                elif kind in ("write", "write_sync"):
                    self.storage.finish_write(begun)
                else:
                    begun.done = True

    def begin(self, kind: str, offset: int, data: Any) -> Any:
        if kind == "sync":
            return self.storage.begin_sync()
        if kind in ("write", "write_sync"):
            return self.storage.begin_write(offset, [data], kind=kind)
        number, _ = self.sim.begin(kind, offset, data)
        if kind == "allocate":
            return self.sim.land_size(number, kind, offset + data, shrink=False)
        if kind == "truncate":
            return self.sim.land_size(number, kind, offset, shrink=True)
        return self.sim.land_zeros(number, kind, offset, data, keep_size=kind == "punch")


SHAPES = [
    Shape("cluster_size=4096", 256 << 10),
    Shape("cluster_size=512", 128 << 10),
    Shape("cluster_size=65536", 1 << 20, journal=1 << 17),
    Shape("cluster_size=16384,extended_l2=on", 512 << 10),
]


def cut_and_recover(directory: Path, shape: Shape, *, seed: int, requests: int, moments: int, states: int) -> str:
    path = directory / "image.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", shape.options, path, shape.size)
    before = directory / "before.qcow2"
    shutil.copyfile(path, before)
    record, oracle = record_run(path, shape, seed=seed, clients=3, requests=requests)
    events = record.events
    replay = Replay(SimDisk.from_file(before), events)
    rng = random.Random(seed)
    changes = [number for number, event in enumerate(events, 1) if event[0] != "mark"]
    count = 0
    for upto in [*sorted(rng.sample(changes, min(moments, len(changes)))), len(events)]:
        replay.advance(upto)
        moment = Moment(oracle, upto)
        for state in replay.sim.crash_states(states, rng):
            try:
                verify(state, shape, moment, random.Random(upto))  # type: ignore[arg-type]
            except BaseException:
                print(f"seed {seed}, cut after event {upto} of {len(events)}, covered {moment.covered}, {shape}")
                raise
            count += 1
    # The replay ends where the real file ended: what was recorded is what was done.
    size = path.stat().st_size
    assert replay.sim.peek(0, size) == path.read_bytes() and replay.sim.current_size == size
    return f"{len(events)} events recorded, {count} states of {moments} cuts recovered, {len(oracle.flushes)} flushes"


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.options)
def test_what_real_threads_did_can_be_cut_anywhere(shape: Shape, tmp_path: Path) -> None:
    print(cut_and_recover(tmp_path, shape, seed=1, requests=100, moments=40, states=3))


@pytest.mark.sweep
@pytest.mark.parametrize("seed", range(2, 2 + scaled(3)))
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.options)
def test_what_real_threads_did_can_be_cut_anywhere_long(shape: Shape, seed: int, tmp_path: Path) -> None:
    print(cut_and_recover(tmp_path, shape, seed=seed, requests=400, moments=150, states=4))
