"""The stepper finds what threads would do once in a million runs, and says how to do it again."""

from __future__ import annotations

import errno
from collections.abc import Callable
from random import Random
from typing import Any

import pytest
from simdisk import PowerCut, SimDisk, SimStorage
from stepper import Deadlock, Order, Stepper, every_order

from nbd_qcow2j.errors import RequestError
from nbd_qcow2j.steps import (
    Batch,
    Compute,
    FileSize,
    Gate,
    Operation,
    Punch,
    Read,
    Sync,
    Truncate,
    Wait,
    Write,
    WriteSync,
    run_simply,
)


class Counter:
    """A number on the disk, and two ways to add one to it."""

    def __init__(self, *, exclusive: bool) -> None:
        self.storage = SimStorage(SimDisk(512))
        self.exclusive = exclusive
        self.busy = False
        self.gate = Gate("counter")

    def add(self) -> Operation[int]:
        while self.exclusive and self.busy:
            yield Wait(self.gate)
        self.busy = True
        data: bytearray = yield Read(self.storage, 0, 1)
        yield Write(self.storage, 0, [bytes([data[0] + 1])])
        self.busy = False
        self.gate.open()
        return data[0] + 1

    @property
    def value(self) -> int:
        return self.storage.disk.peek(0, 1)[0]


def outcomes(scenario: Callable[[Stepper], Any], limit: int = 10_000) -> list[tuple[Any, Order]]:
    found = []
    for order in every_order(limit):
        found.append((scenario(Stepper(order)), order))
    assert len(found) < limit
    return found


def test_every_order_finds_the_lost_update_and_its_order_replays_it() -> None:
    def scenario(stepper: Stepper) -> int:
        counter = Counter(exclusive=False)
        stepper.add(counter.add())
        stepper.add(counter.add())
        assert stepper.run()
        return counter.value

    found = outcomes(scenario)
    assert {value for value, _ in found} == {1, 2}
    assert len({repr(order) for _, order in found}) == len(found)
    # Two tasks of five moves each.
    assert len(found) == 252
    lost = next(order for value, order in found if value == 1)
    again = Order([choice for choice, _ in lost.made])
    assert scenario(Stepper(again)) == 1


def test_whole_steps_are_fewer_orders_and_still_find_it() -> None:
    values = []
    for order in every_order(1000):
        counter = Counter(exclusive=False)
        stepper = Stepper(order, whole_steps=True)
        stepper.add(counter.add())
        stepper.add(counter.add())
        assert stepper.run()
        values.append(counter.value)
    assert set(values) == {1, 2}
    assert len(values) == 20


def test_who_waits_for_a_gate_goes_on_only_when_it_was_opened() -> None:
    def scenario(stepper: Stepper) -> tuple[int, list[int]]:
        counter = Counter(exclusive=True)
        tasks = [stepper.add(counter.add()) for _ in range(3)]
        assert stepper.run()
        return counter.value, sorted(task.result for task in tasks)

    assert {str(outcome) for outcome, _ in outcomes(scenario)} == {"(3, [1, 2, 3])"}


def test_a_deadlock_names_who_waits_for_what() -> None:
    first, second = Gate("cluster 7"), Gate("ring space")

    def waits(gate: Gate) -> Operation[None]:
        yield Compute(lambda: None)
        yield Wait(gate)

    stepper = Stepper(Random(1))
    stepper.add(waits(first), "write")
    stepper.add(waits(second), "checkpoint")
    with pytest.raises(Deadlock, match=r"(?s)write waits for cluster 7; did Compute.*checkpoint waits for ring space"):
        stepper.run()


def test_a_daemon_need_not_finish_and_a_busy_loop_is_no_progress() -> None:
    gate = Gate("work")

    def idle() -> Operation[None]:
        while True:
            yield Wait(gate)

    def busy() -> Operation[None]:
        while True:
            yield Compute(lambda: None)

    stepper = Stepper(Random(1))
    stepper.add(idle(), "writer", daemon=True)
    counter = Counter(exclusive=False)
    task = stepper.add(counter.add())
    assert stepper.run()
    assert task.done
    stepper.add(busy(), "busy")
    with pytest.raises(Deadlock, match="busy can move"):
        stepper.run(patience=1000)


def test_run_for_one_task_leaves_the_others_where_they_are() -> None:
    counter = Counter(exclusive=False)
    stepper = Stepper(Random(4))
    first, second = stepper.add(counter.add(), "first"), stepper.add(counter.add(), "second")
    assert not stepper.run(first, limit=2)
    assert stepper.run(first)
    assert first.done
    assert stepper.moves == len(stepper.history)
    assert stepper.run()
    assert second.done


def test_an_error_goes_into_the_operation_as_it_would_with_a_driver() -> None:
    disk = SimDisk(512)
    storage = SimStorage(disk)

    def careful() -> Operation[str]:
        try:
            yield Batch([Write(storage, 0, [b"x"]), Sync(storage), Write(storage, 0, [b"y"])])
        except OSError as error:
            return f"saw {errno.errorcode[error.errno or 0]}"
        return "saw nothing"

    def careless() -> Operation[None]:
        yield Sync(storage)

    def refuses() -> Operation[None]:
        raise RequestError(errno.EINVAL, "no")
        yield

    disk.fail("sync", times=2)
    stepper = Stepper(Random(1))
    one = stepper.add(careful())
    assert stepper.run()
    assert one.result == "saw EIO"
    assert disk.peek(0, 1) == b"x"
    two, three = stepper.add(careless()), stepper.add(refuses())
    assert stepper.run()
    assert isinstance(two.error, OSError)
    assert isinstance(three.error, RequestError)


def every_step(storage: SimStorage) -> Operation[list[Any]]:
    """Uses each kind of step, and batches in batches."""
    results = [(yield Write(storage, 0, [b"abc", b"def"]))]
    results.append((yield Batch([
        Read(storage, 0, 4),
        Batch([WriteSync(storage, 4, [b"XY"]), Read(storage, 0, 6), Batch([])]),
        FileSize(storage),
        Compute(lambda: "computed"),
    ])))  # fmt: skip
    results.append((yield Batch([Punch(storage, 0, 2), Truncate(storage, 100), Sync(storage)])))
    results.append((yield Read(storage, 0, 8)))
    return results


def test_results_are_those_of_running_the_steps_simply() -> None:
    simply, stepped = SimStorage(SimDisk()), SimStorage(SimDisk())
    expected = run_simply(every_step(simply))
    assert expected[1] == [bytearray(b"abcd"), [None, bytearray(b"abcdXY"), []], 6, "computed"]
    for whole_steps in (False, True):
        stepped = SimStorage(SimDisk())
        stepper = Stepper(Random(1), whole_steps=whole_steps)
        task = stepper.add(every_step(stepped))
        assert stepper.run()
        assert task.result == expected
        assert stepped.disk.digest() == simply.disk.digest()
        assert stepped.disk.history == simply.disk.history


def test_a_cut_at_every_move_shows_the_steps_in_flight_open() -> None:
    # Scenario: data, sync, then the synchronous write of a record that names the data. At no cut may the
    # record be there without the data; without the sync it may, and the stepper must find it.
    def commit(storage: SimStorage, *, careful: bool) -> Operation[None]:
        yield Write(storage, 512, [b"d" * 512])
        if careful:
            yield Sync(storage)
        yield WriteSync(storage, 0, [b"r" * 512])

    def cut_states(*, careful: bool) -> set[bytes]:
        states = set()
        moves = 0
        done = False
        while not done:
            disk = SimDisk(1024)
            stepper = Stepper(Random(0))
            stepper.add(commit(SimStorage(disk), careful=careful))
            done = stepper.run(limit=moves)
            states |= {state.peek(0, 1) + state.peek(512, 1) for state in disk.crash_states(100, Random(0))}
            moves += 1
        return states

    assert cut_states(careful=True) == {b"\0\0", b"\0d", b"rd"}
    assert cut_states(careful=False) == {b"\0\0", b"\0d", b"r\0", b"rd"}


def test_a_sync_covers_a_write_only_if_the_write_returned_before_the_sync_began() -> None:
    def scenario(stepper: Stepper) -> tuple[bool, bool]:
        disk = SimDisk(512)
        write = stepper.add((step for step in [Write(SimStorage(disk), 0, [b"x" * 512])]), "write")
        sync = stepper.add((step for step in [Sync(SimStorage(disk))]), "sync")
        assert stepper.run()
        # Moves of a task: start, begin, return.
        history = stepper.history
        returned = [at for at, name in enumerate(history) if name == "write"][2]
        began = [at for at, name in enumerate(history) if name == "sync"][1]
        assert write.done and sync.done
        return returned < began, not disk.log

    found = outcomes(scenario)
    assert len(found) == 20
    assert all(before == durable for (before, durable), _ in found)
    assert {durable for (_, durable), _ in found} == {True, False}


def test_a_power_cut_planned_on_the_disk_stops_the_run() -> None:
    disk = SimDisk()
    disk.cut_during(2)
    stepper = Stepper(Random(0))
    stepper.add(every_step(SimStorage(disk)))
    with pytest.raises(PowerCut):
        stepper.run()
    assert [performed.kind for performed in disk.history] == ["write", "write_sync"]


def test_a_seed_replays_the_run() -> None:
    def run(seed: int) -> list[str]:
        counter = Counter(exclusive=True)
        stepper = Stepper(Random(seed))
        for name in "abc":
            stepper.add(counter.add(), name)
        assert stepper.run()
        return stepper.history

    assert run(5) == run(5)
    assert len({tuple(run(seed)) for seed in range(20)}) > 10
