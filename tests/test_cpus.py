"""cpus.py: threads share a CPU while requests queue, and where that is found to be better."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from _thread import get_ident, get_native_id
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nbd_qcow2j import cpus, thread_state
from nbd_qcow2j.comparison import Comparison
from nbd_qcow2j.counters import MANY, OperationCounters
from nbd_qcow2j.cpus import ALONE_NS, CROWDED_NS, LOOK_NS, QUEUED_NS, Cpus

ALL = {0, 1, 2, 3}
THREADS = {1001: 1, 1002: 2}


class Machine:
    """Four CPUs, a clock, where each thread was put, and a comparison that is told what it finds."""

    def __init__(self) -> None:
        self.now = 0
        self.placed: dict[int, set[int]] = {}
        self.policy = os.SCHED_OTHER
        self.policies: dict[int, int] = {}
        self.calls = 0
        self.better = False
        self.costs: list[float] = []
        self.abandoned = 0

        self.may_come_back = True
        self.waited = 0
        self.while_set: Callable[[], object] = lambda: None

    def next(self, cost: float) -> bool:
        self.costs.append(cost)
        return self.better

    def settle(self, better: bool) -> bool:
        self.better = better
        return better

    def abandon(self) -> None:
        self.abandoned += 1

    def setaffinity(self, thread: int, allowed: set[int]) -> None:
        self.calls += 1
        if thread == 2:
            raise ProcessLookupError(3, "No such process")
        self.placed[thread] = set(allowed)

    def setscheduler(self, thread: int, policy: int, param: os.sched_param) -> None:
        if thread == 2:
            raise ProcessLookupError(3, "No such process")
        assert param.sched_priority == 0
        self.policies[thread] = policy
        self.while_set()


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    it = Machine()
    monkeypatch.setattr(cpus, "perf_counter_ns", lambda: it.now)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(ALL))
    monkeypatch.setattr(os, "sched_setaffinity", it.setaffinity)
    monkeypatch.setattr(os, "sched_getscheduler", lambda _: it.policy)
    monkeypatch.setattr(os, "sched_setscheduler", it.setscheduler)
    monkeypatch.setattr(os, "getpid", lambda: 0)
    monkeypatch.setattr(cpus.sys, "setswitchinterval", lambda _: None)
    monkeypatch.setattr(cpus, "_quiet_and_busy", lambda allowed: (2, 3))
    monkeypatch.setattr(cpus, "_may_come_back", lambda: it.may_come_back)
    monkeypatch.setattr(cpus, "_waited", lambda threads: it.waited)
    monkeypatch.setattr(cpus, "Comparison", lambda: it)
    monkeypatch.setattr(thread_state, "kept", THREADS)
    monkeypatch.setattr(cpus, "kept", THREADS)
    monkeypatch.setattr(cpus, "ready", set())
    return it


def load(machine: Machine, counters: OperationCounters, *, busy: int, between: int, looks: int = 1) -> None:
    """Requests that take `busy` ns each, and `between` from the end of one to the start of the next."""
    for _ in range(looks * (LOOK_NS // ((busy + between) * MANY) + 1) * MANY):
        machine.now += busy + between
        counters.observe(4096, busy)


def test_threads_gather_while_requests_queue_and_part_when_they_do_not(machine: Machine) -> None:
    reads, writes = OperationCounters(), OperationCounters()
    it = Cpus("auto", [reads, writes])
    load(machine, reads, busy=5_000, between=QUEUED_NS - 1_000)
    assert it.gathered and machine.placed == {1: {2}}, "a thread that has ended is no error"
    # Between the bounds nothing changes: no thread is moved at every look.
    calls = machine.calls
    load(machine, writes, busy=5_000, between=(QUEUED_NS + ALONE_NS) // 2, looks=3)
    assert it.gathered and machine.calls == calls
    load(machine, writes, busy=5_000, between=ALONE_NS + 1_000, looks=2)
    assert not it.gathered and machine.placed == {1: ALL}
    load(machine, reads, busy=5_000, between=(QUEUED_NS + ALONE_NS) // 2, looks=3)
    assert not it.gathered and machine.placed == {1: ALL}


def test_calls_that_overlap_are_a_queue_however_long_they_are(machine: Machine) -> None:
    reads = OperationCounters()
    it = Cpus("auto", [reads])
    for _ in range(2 * LOOK_NS // 200_000):
        machine.now += 200_000
        reads.observe(4096, 700_000)
    assert it.gathered


def test_a_long_flush_of_one_client_is_no_queue(machine: Machine) -> None:
    flushes = OperationCounters()
    it = Cpus("auto", [flushes])
    load(machine, flushes, busy=200_000, between=25_000, looks=3)
    assert not it.gathered


def test_where_nothing_queues_a_comparison_decides_of_the_time_from_one_request_to_the_next(machine: Machine) -> None:
    flushes = OperationCounters()
    it = Cpus("auto", [flushes])
    machine.better = True
    load(machine, flushes, busy=200_000, between=25_000)
    assert machine.costs == [225_000] and it.gathered and machine.placed == {1: {3}}
    # Gathered, the same client's way round may be as short as a queue's is at most: it is no queue for that.
    load(machine, flushes, busy=5_000, between=(QUEUED_NS + ALONE_NS) // 2)
    assert machine.costs == [225_000, 5_000 + (QUEUED_NS + ALONE_NS) // 2]
    machine.better = False
    load(machine, flushes, busy=200_000, between=25_000)
    assert len(machine.costs) == 3 and not it.gathered and machine.placed == {1: ALL}


def test_a_comparison_sees_neither_a_queue_nor_an_idle_client(machine: Machine) -> None:
    reads = OperationCounters()
    it = Cpus("auto", [reads])
    load(machine, reads, busy=5_000, between=30_000)
    assert len(machine.costs) == 1
    load(machine, reads, busy=5_000, between=0, looks=3)
    assert it.gathered and len(machine.costs) == 1 and machine.abandoned == 1
    load(machine, reads, busy=5_000, between=30_000)
    assert len(machine.costs) == 2 and machine.abandoned == 2
    load(machine, reads, busy=5_000, between=6 * LOOK_NS // MANY)
    assert not it.gathered and len(machine.costs) == 2 and machine.abandoned == 3


def test_the_cheaper_placing_is_found(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpus, "Comparison", Comparison)
    reads = OperationCounters()
    it = Cpus("auto", [reads])
    for _ in range(20):
        load(machine, reads, busy=15_000, between=35_000 if it.gathered else 65_000)
    assert it.gathered and machine.placed == {1: {3}}


def near(machine: Machine) -> tuple[Cpus, OperationCounters]:
    """Threads that are gathered and step aside; this one is ready."""
    machine.better = True
    reads = OperationCounters()
    it = Cpus("auto", [reads])
    cpus.ready.add(get_ident())
    load(machine, reads, busy=15_000, between=35_000, looks=2)
    assert it.gathered and it.aside
    return it, reads


def test_gathered_threads_of_which_one_works_at_a_time_wait_for_the_cpu(machine: Machine) -> None:
    reads = OperationCounters()
    it = Cpus("auto", [reads])
    it.joined(7)
    assert not machine.policies, "left alone until something else is found to be better"
    load(machine, reads, busy=5_000, between=0)
    assert it.gathered and not it.aside and not machine.policies, "a queue's threads take the CPU when they wake"
    machine.better = True
    load(machine, reads, busy=15_000, between=35_000, looks=2)
    assert it.gathered and it.aside and machine.policies == {1: os.SCHED_BATCH} and machine.placed == {1: {3}}
    machine.policies.clear()
    it.joined(9)
    assert machine.policies == {9: os.SCHED_BATCH}
    load(machine, reads, busy=15_000, between=35_000, looks=2)
    assert machine.policies == {9: os.SCHED_BATCH}, "no system call where nothing changes"
    load(machine, reads, busy=5_000, between=0)
    assert it.gathered and not it.aside and machine.policies[1] == os.SCHED_OTHER and machine.placed[1] == {2}
    machine.better = False
    load(machine, reads, busy=15_000, between=35_000, looks=2)
    assert not it.gathered and not it.aside and machine.policies[1] == os.SCHED_OTHER


def test_a_thread_steps_aside_and_up_again(machine: Machine) -> None:
    it, _ = near(machine)
    it.step_aside()
    assert machine.policies[0] == os.SCHED_IDLE and not cpus.ready
    it.step_up()
    assert machine.policies[0] == os.SCHED_BATCH and cpus.ready == {get_ident()}
    cpus.ready.clear()
    it.step_aside()
    assert machine.policies[0] == os.SCHED_BATCH, "who is not known would never step up again"


def test_a_policy_that_changes_while_a_thread_steps_up_is_the_one_it_gets(machine: Machine) -> None:
    it, reads = near(machine)
    it.step_aside()

    def queue_begins() -> None:
        machine.while_set = lambda: None
        load(machine, reads, busy=5_000, between=0, looks=2)

    machine.while_set = queue_begins
    it.step_up()
    assert machine.policies == {0: os.SCHED_OTHER, 1: os.SCHED_OTHER}


@pytest.mark.parametrize("why", ["no right to come back", "another policy", "one CPU", "nobody tells who waits"])
def test_who_may_not_come_back_does_not_step_aside(
    machine: Machine, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if why == "nobody tells who waits":
        monkeypatch.setattr(cpus, "_WAITS", "/nowhere/{}")
    machine.better, machine.may_come_back = True, why != "no right to come back"
    machine.policy = os.SCHED_FIFO if why == "another policy" else os.SCHED_OTHER
    reads = OperationCounters()
    it = Cpus(1 if why == "one CPU" else "auto", [reads])
    load(machine, reads, busy=15_000, between=35_000, looks=2)
    assert it.gathered and not it.aside


@pytest.mark.parametrize(("waits", "gathered"), [(CROWDED_NS // 2, True), (CROWDED_NS * 2, False)])
@pytest.mark.parametrize("between", [35_000, 6 * LOOK_NS // MANY])
def test_where_others_compute_the_threads_part_at_once(
    machine: Machine, waits: int, gathered: bool, between: int
) -> None:
    it, reads = near(machine)
    # Also where it makes requests so slow that a comparison would take them for an idle client's.
    seen = len(machine.costs)
    end = machine.now + 2 * LOOK_NS + MANY * between
    while machine.now < end:
        machine.waited += waits
        machine.now += 15_000 + between
        reads.observe(4096, 15_000)
    assert it.gathered is gathered
    assert (len(machine.costs) > seen) is (gathered and between == 35_000)


def test_what_threads_waited_for_each_other_in_a_queue_is_no_crowd(machine: Machine) -> None:
    machine.better = True
    reads = OperationCounters()
    it = Cpus("auto", [reads])
    for _ in range(2):
        load(machine, reads, busy=5_000, between=0, looks=5)
        machine.waited += 1_000_000_000_000
        load(machine, reads, busy=15_000, between=35_000, looks=2)
        assert it.gathered and it.aside


def test_a_look_that_passes_while_a_thread_joins_is_not_lost(machine: Machine) -> None:
    it, reads = near(machine)

    def parted() -> None:
        machine.while_set, machine.better = lambda: None, False
        load(machine, reads, busy=15_000, between=35_000, looks=2)

    machine.while_set = parted
    it.joined(7)
    assert not it.gathered and machine.placed[7] == ALL and machine.policies[7] == os.SCHED_OTHER


COME_BACK = """
import os, resource, sys
from nbd_qcow2j.cpus import _may_come_back
limit = int(sys.argv[1])
if os.geteuid() == 0:
    try:
        resource.setrlimit(resource.RLIMIT_NICE, (limit, limit))
    except ValueError:
        sys.exit(77)
    os.setuid(65534)
print(_may_come_back(), os.sched_getscheduler(0) == os.SCHED_OTHER)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can set the limit")
@pytest.mark.parametrize("limit", [0, 20])
def test_the_right_to_come_back_is_found_by_trying(limit: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", COME_BACK, str(limit)], capture_output=True, text=True, timeout=60, check=False,
        cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    if done.returncode == 77:
        pytest.skip("this root may not raise limits")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(limit == 20), "True"]


def test_what_a_thread_waited_is_the_kernels_word() -> None:
    thread = get_native_id()
    found = cpus._waited([thread, 1 << 30])
    expected = int(Path(f"/proc/self/task/{thread}/schedstat").read_text().split()[1])
    assert 0 <= found <= expected


def test_a_policy_that_the_server_was_started_with_stays(machine: Machine) -> None:
    machine.policy, machine.better = os.SCHED_FIFO, True
    reads = OperationCounters()
    it = Cpus("auto", [reads])
    load(machine, reads, busy=15_000, between=35_000, looks=2)
    it.joined(7)
    assert it.gathered and not machine.policies


def test_a_thread_that_joins_is_put_where_the_others_are(machine: Machine) -> None:
    reads = OperationCounters()
    it = Cpus("auto", [reads])
    it.joined(7)
    assert 7 not in machine.placed
    load(machine, reads, busy=5_000, between=0)
    it.joined(7)
    assert machine.placed[7] == {2}


def test_the_background_is_where_the_others_are_not(machine: Machine) -> None:
    reads = OperationCounters()
    it = Cpus("auto", [reads])
    it.in_background()
    assert not machine.calls
    load(machine, reads, busy=5_000, between=0)
    for _ in range(3):
        it.in_background()
    assert machine.placed[0] == {0, 1, 3}
    # Two threads of those that answer, one of which is gone, and this one.
    assert machine.calls == 3
    load(machine, reads, busy=5_000, between=30_000, looks=2)
    it.in_background()
    assert machine.placed[0] == ALL


@pytest.mark.parametrize(("cpu", "placed", "background"), [("any", {}, {}), (1, {0: {1}}, {0: {0, 2, 3}})])
def test_what_is_asked_for_is_done_once(machine: Machine, cpu: int | str, placed: Any, background: Any) -> None:
    reads = OperationCounters()
    it = Cpus(cpu, [reads])
    load(machine, reads, busy=5_000, between=0, looks=3)
    assert machine.placed == placed
    it.joined(7)
    assert machine.policies == ({7: os.SCHED_BATCH} if placed else {})
    machine.placed.pop(7, None)
    it.in_background()
    assert machine.placed == background


INTERRUPTS = """           CPU0       CPU2       CPU5
  1:        900          0          0   IO-APIC   1-edge      i8042
 36:          0        100   27224455   PCI-MSIX-0000:00:02.0   1-edge      virtio1-req.0
LOC:          0   99999999          0   Local timer interrupts
"""


@pytest.mark.parametrize(
    ("allowed", "text", "chosen"),
    [
        ({0, 2, 5}, INTERRUPTS, (2, 5)),
        ({0, 5}, INTERRUPTS, (0, 5)),
        ({0, 2}, INTERRUPTS, (2, 0)),
        ({0, 5}, "", (0, 5)),
        ({0, 5}, "nonsense\n1: x\n", (0, 5)),
    ],
)
def test_the_quiet_cpu_and_the_busy_one(
    monkeypatch: pytest.MonkeyPatch, allowed: set[int], text: str, chosen: tuple[int, int]
) -> None:
    opened: Callable[..., Any] = lambda *_, **__: io.StringIO(text)  # noqa: E731
    monkeypatch.setattr("builtins.open", opened)
    assert cpus._quiet_and_busy(allowed) == chosen


def test_servers_share_the_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "CPU0 CPU1 CPU2 CPU3\n1: 9 1 2 8 chip\n"
    monkeypatch.setattr("builtins.open", lambda *_, **__: io.StringIO(text))
    found = set()
    for pid in range(10):
        monkeypatch.setattr(os, "getpid", lambda pid=pid: pid)
        found.add(cpus._quiet_and_busy(ALL))
    assert {quiet for quiet, _ in found} == {1, 2} and {busy for _, busy in found} == {0, 3}
