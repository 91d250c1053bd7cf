"""Which CPUs the threads that answer requests may use: one for all of them, or any.

Threads that share the interpreter lock gain nothing from a second core, and lose by the lock's travels between two
when requests queue: then all of them are gathered on one. 4 KiB requests a second on two cores, on one CPU against on
any: reads at depth 16 107,000 against 89,000, four clients at depth 4 102,000 against 59,000, cold reads 43,000 against
29,000.

A client that waits for each answer queues nothing, and what it waits for is mostly to be woken: it on its CPU, we on
ours, each of which was halted meanwhile. On virtual machines that is much of a small request, 20 of 48 us of a read.
With client and server on one CPU nobody is halted; but where a client runs is the kernel's to say, and that takes it to
the CPU of the thread that wakes it if nothing else is there than SCHED_IDLE threads. So ours *step aside* when they
have answered: they are SCHED_IDLE from the end of a small read, write or flush to the start of the next callback, where
they send the reply and wait for a request. Nothing of ours runs there and no lock of ours is held, but for the first
and last microseconds of a callback, with the interpreter lock. Where they work they are SCHED_BATCH: nbdkit wakes the
thread that is to receive the next request before the one that has this request answers it, and what is woken would take
the CPU at once.

The client comes with a reply sooner or later, and stays for milliseconds or seconds. Requests a second at depth 1, in
turns on two virtual CPUs, medians of three with `any` and `auto`: sequential writes with a flush every 64 18,600 and
24,000, writes with a flush each 3,810 and 3,900, random reads 21,600 and 20,800, where it came in one round of three
and that one had 32,400. What it costs is paid where others compute on that CPU: a thread that is woken for a request
waits for their time slice, and with a busy loop on either CPU there were 120 writes with a flush each a second instead
of 760. So both ways are tried, in turns, and what one request takes from its start to the next one's decides; how long
the threads were kept from the CPU decides at the next look.

Stepping aside takes the right to come back from SCHED_IDLE, which is CAP_SYS_NICE or a limit (RLIMIT_NICE; LimitNICE=
of systemd), and a kernel that tells how long threads wait. Without it they are gathered, SCHED_BATCH, and that is
compared: on one machine reads at depth 1 20,000 against 28,000 left alone and sequential writes 16,000 against 21,000,
on another, whose processors are virtual as well, 16,000 against 11,700 and 10,600 against 9,300.

What tells the two loads apart is the time from the end of a callback to the start of the next: a client's way round
takes 25 us or more, from a queue comes the next request in 5.

Only threads whose state is kept are known here (thread_state.py): where none is, the answering threads wander.
"""

from __future__ import annotations

import os
import sys
import threading
from _thread import get_ident, get_native_id
from collections.abc import Iterable
from contextlib import suppress
from time import perf_counter_ns

from .comparison import Comparison
from .counters import OperationCounters
from .thread_state import kept, ready

# How long a thread may compute before another gets the interpreter lock. Flushes a second at depth 1, which meet the
# checkpoint: 3,890 with 0.5 ms, 4,060 with 0.1 ms; Python's own 5 ms would be a flush's worst case.
SWITCH_INTERVAL_SECONDS = 0.0001
LOOK_NS = 100_000_000
"""Time between two looks, at least: a change costs a system call for each thread, and a turn of the comparison should
see as much of a checkpoint's round as the next."""
IDLE_LOOKS = 5
"""As many times that, without MANY requests, say nothing of what a request costs."""
CROWDED_NS = 500_000
"""Time that a request had to wait for the CPU, in the mean, above which others compute there: seven times and more
what waiting for the client's own turn came to (16 to 70 us), a fraction of a time slice. Chosen, not measured."""
MOST_ASIDE = 64 << 10
"""Bytes of a request after which a thread steps aside, at most: to send more is work, and so is to receive as much as
was received before."""
_WAITS = "/proc/self/task/{}/schedstat"
"""How long a thread has run, and how long it was kept from the CPU, in nanoseconds."""
QUEUED_NS, ALONE_NS = 10_000, 16_000
"""Mean time between two callbacks below which requests queue, and above which they do not."""


class Cpus:
    """The placing of threads. `cpu`: `auto` as above, `any` to leave them be, or the number of one CPU."""

    def __init__(self, cpu: int | str, operations: Iterable[OperationCounters]) -> None:
        self._operations = list(operations)
        self._looking = threading.Lock()
        self._allowed = os.sched_getaffinity(0)
        # Whoever started the server under another policy wants that one.
        self._ordinary = os.sched_getscheduler(0) == os.SCHED_OTHER
        self._background = threading.local()
        self.gathered = False
        """Whether the threads that answer requests are on one CPU now."""
        self.aside = False
        """Whether a thread that has answered is to step aside."""
        self._cpu = self._for_queue = self._for_one = -1
        """Where they are, if they are; where they go while requests queue, and while they do not."""
        self._may_step_aside = False
        self._working = os.SCHED_OTHER
        """The policy of the threads while they work."""
        self._queued = False
        """Whether requests queued at the last look."""
        self._comparison = Comparison()
        self._waited = 0
        """Nanoseconds that the threads had waited for the CPU when that was asked last."""
        self._seen = (perf_counter_ns(), 0, 0)
        sys.setswitchinterval(SWITCH_INTERVAL_SECONDS)
        if cpu == "any" or len(self._allowed) < 2:
            return
        self._for_queue, self._for_one = _quiet_and_busy(self._allowed) if cpu == "auto" else (int(cpu), int(cpu))
        self._cpu = self._for_queue
        if cpu == "auto":
            tells = os.path.exists(_WAITS.format(get_native_id()))
            self._may_step_aside = self._ordinary and tells and _may_come_back()
            for each in self._operations:
                each.on_many = self._look
        else:
            # This thread, and so all that it starts.
            self._place([0], {self._cpu})
            self.gathered = True
            self._working = os.SCHED_BATCH

    def joined(self, thread: int) -> None:
        """A thread, by its native identifier, answers its first request."""
        seen = False, self._for_queue, os.SCHED_OTHER
        # Looked at again: a look may have passed between what was read and what was set.
        while (found := (self.gathered, self._cpu, self._working)) != seen:
            gathered, cpu, policy = seen = found
            self._place([thread], {cpu} if gathered else self._allowed)
            self._set_policy([thread], policy)

    def step_aside(self) -> None:
        """Called by a thread that has answered: there is nothing left to do than to send the reply."""
        # Whose state is not kept would not be told to step up.
        if get_ident() in ready:
            ready.discard(get_ident())
            self._set_policy([0], os.SCHED_IDLE)

    def step_up(self) -> None:
        """Called by a thread that stepped aside, before it works."""
        while True:
            policy = self._working
            self._set_policy([0], policy)
            # Looked at again: who changes it sets it for all threads, and may have done so before this one.
            if policy == self._working:
                break
        ready.add(get_ident())

    def in_background(self) -> None:
        """Called by a thread that nobody waits for, before it works: where the others are gathered it stays apart.

        Whole threads: to move one for its long steps alone cost 50 us each time; 4 KiB random writes, depth 16, flush
        every 32: longest flush 15 ms so, 6 ms apart.
        """
        avoided = self._cpu if self.gathered else -1
        if getattr(self._background, "avoided", -1) != avoided:
            self._background.avoided = avoided
            self._place([0], self._allowed - {avoided})

    def _look(self) -> None:
        """Called every so many requests, by the thread that answered the last."""
        if not self._looking.acquire(blocking=False):
            return
        try:
            now = perf_counter_ns()
            elapsed = now - self._seen[0]
            if elapsed < LOOK_NS:
                return
            busy = sum(each.sum_ns for each in self._operations)
            count = sum(each.requests for each in self._operations)
            requests = max(1, count - self._seen[2])
            between = (elapsed - (busy - self._seen[1])) // requests
            self._seen = (now, busy, count)
            queued = between < (ALONE_NS if self._queued else QUEUED_NS)
            changed = queued is not self._queued
            if changed:
                self._queued = queued
                self._comparison.abandon()
            gather = queued or self._try(elapsed, requests)
            cpu = self._for_queue if queued else self._for_one
            if gather != self.gathered or (gather and cpu != self._cpu):
                # Order: a thread that joins meanwhile is in `kept` already, or sees these.
                self._cpu, self.gathered = cpu, gather
                self._place(list(kept.values()), {cpu} if gather else self._allowed)
            # Not where requests queue: it gains nothing there, and each request would wait for whoever else computes.
            near = gather and not queued
            working = os.SCHED_BATCH if near else os.SCHED_OTHER
            if working != self._working:
                # Order: before those that are there, as above.
                self._working = working
                self._set_policy(list(kept.values()), working)
                self._waited = _waited(kept.values())
            self.aside = near and self._may_step_aside
        finally:
            self._looking.release()

    def _try(self, elapsed: int, requests: int) -> bool:
        """Whether to gather threads of which one works at a time, after so many nanoseconds and requests."""
        if self._working == os.SCHED_BATCH:
            # Not what they waited for each other while requests queued.
            before, self._waited = self._waited, _waited(kept.values())
            if self._waited - before > requests * CROWDED_NS:
                return self._comparison.settle(False)
        if elapsed > IDLE_LOOKS * LOOK_NS:
            # Most of it the clients had other things to do.
            self._comparison.abandon()
            return self._comparison.better
        return self._comparison.next(elapsed / requests)

    @staticmethod
    def _place(threads: Iterable[int], cpus: set[int]) -> None:
        for thread in threads:
            # It ended meanwhile; or a container's limits forbid it, which is no reason not to serve.
            with suppress(OSError):
                os.sched_setaffinity(thread, cpus)

    def _set_policy(self, threads: Iterable[int], policy: int) -> None:
        for thread in threads if self._ordinary else ():
            with suppress(OSError):
                os.sched_setscheduler(thread, policy, os.sched_param(0))


def _may_come_back() -> bool:
    """Whether a thread that is SCHED_IDLE may be an ordinary one again: tried, in one that ends."""
    found = []

    def there_and_back() -> None:
        with suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
            found.append(True)

    thread = threading.Thread(target=there_and_back, name="tries policies")
    thread.start()
    thread.join()
    return bool(found)


def _waited(threads: Iterable[int]) -> int:
    """Nanoseconds that these threads could have run and had no CPU, all together; 0 where the kernel does not tell."""
    total = 0
    for thread in list(threads):
        with suppress(OSError, ValueError, IndexError), open(_WAITS.format(thread), "rb") as file:
            total += int(file.read().split()[1])
    return total


def _quiet_and_busy(allowed: set[int]) -> tuple[int, int]:
    """One of the half of these CPUs that devices interrupt least, and one of the others; not the same for every server.

    Where requests queue, what a device interrupts is work: cold reads at depth 16 on the CPU that has the disk's
    interrupts 29,000 a second, on the other one 50,000. Where one thread waits for the disk, it is woken there without
    a second CPU: writes with a flush each 4,040 a second on the disk's CPU, 3,800 on the other one.
    """
    counts = dict.fromkeys(sorted(allowed), 0)
    with suppress(OSError, ValueError), open("/proc/interrupts", encoding="ascii", errors="replace") as file:
        columns = [int(word.removeprefix("CPU")) for word in file.readline().split()]
        for line in file:
            name, *words = line.split()
            # The others are no device's: timers, and what one CPU tells another.
            if name.rstrip(":").isdecimal():
                for cpu, count in zip(columns, words, strict=False):
                    if cpu in counts:
                        counts[cpu] += int(count)
    quietest = sorted(counts, key=counts.__getitem__)
    half = len(quietest) // 2
    return quietest[os.getpid() % half], quietest[-1 - os.getpid() % half]
