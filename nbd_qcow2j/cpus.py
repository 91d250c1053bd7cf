"""Which CPUs the threads that answer requests may use: one for all of them, or any.

Threads that share the interpreter lock gain nothing from a second core, and lose by the lock's travels between two
when requests queue: then all of them are gathered on one. 4 KiB requests a second on two cores, on one CPU against on
any: reads at depth 16 107,000 against 89,000, four clients at depth 4 102,000 against 59,000, cold reads 43,000 against
29,000.

A client that waits for each answer queues nothing, and what is better then depends on what it costs to wake another
CPU: on one machine reads at depth 1 20,000 against 28,000 and sequential writes 16,000 against 21,000, on another,
whose processors are virtual as well, 16,000 against 11,700 and 10,600 against 9,300. So both are tried, in turns, and
what one request takes from its start to the next one's decides.

Where one works at a time, the threads are SCHED_BATCH as well. nbdkit wakes the thread that is to receive the next
request before the one that has this request answers it, and what is woken takes the CPU at once: twice from one thread
to another for each request. A SCHED_BATCH thread waits until the CPU is left to it, and by then the first one receives
the next request itself, as with a single thread. Requests a second at depth 1, without and with it: on a shared CPU
reads 13,500 and 14,000, sequential writes 9,500 and 9,900; in a busier hour, with the background under that policy as
well, 8,100 and 10,500, 8,100 and 9,100. On any CPU writes with a flush each 2,610 and 2,840, wherever the choice below
puts them sequential ones 11,500 and 13,100. Its price: they wait longer where others compute on that CPU (two busy
loops on two CPUs: 5,900 and 5,300 reads on a shared one, 15,500 and 15,000 on any).

What tells the two loads apart is the time from the end of a callback to the start of the next: a client's way round
takes 25 us or more, from a queue comes the next request in 5.

Only threads whose state is kept are known here (thread_state.py): where none is, the answering threads wander.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterable
from contextlib import suppress
from time import perf_counter_ns

from .comparison import Comparison
from .counters import OperationCounters
from .thread_state import kept

# How long a thread may compute before another gets the interpreter lock. Flushes a second at depth 1, which meet the
# checkpoint: 3,890 with 0.5 ms, 4,060 with 0.1 ms; Python's own 5 ms would be a flush's worst case.
SWITCH_INTERVAL_SECONDS = 0.0001
LOOK_NS = 100_000_000
"""Time between two looks, at least: a change costs a system call for each thread, and a turn of the comparison should
see as much of a checkpoint's round as the next."""
IDLE_LOOKS = 5
"""As many times that, without MANY requests, say nothing of what a request costs."""
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
        self._shared: set[int] = set()
        self._apart: set[int] = set()
        self._background = threading.local()
        self.gathered = False
        """Whether the threads that answer requests are on one CPU now."""
        self._queued = False
        """Whether requests queued at the last look."""
        self._comparison = Comparison()
        self._seen = (perf_counter_ns(), 0, 0)
        sys.setswitchinterval(SWITCH_INTERVAL_SECONDS)
        if cpu == "any" or len(self._allowed) < 2:
            return
        self._shared = {cpu if isinstance(cpu, int) else _quiet(self._allowed)}
        self._apart = self._allowed - self._shared
        if cpu == "auto":
            for each in self._operations:
                each.on_many = self._look
        else:
            # This thread, and so all that it starts.
            self._place([0], self._shared)
            self.gathered = True

    def joined(self, thread: int) -> None:
        """A thread, by its native identifier, answers its first request."""
        if self.gathered:
            self._place([thread], self._shared)
        if self._shared and not self._queued:
            self._set_policy([thread], os.SCHED_BATCH)

    def in_background(self) -> None:
        """Called by a thread that nobody waits for, before it works: where the others are gathered it stays apart.

        Whole threads: to move one for its long steps alone cost 50 us each time; 4 KiB random writes, depth 16, flush
        every 32: longest flush 15 ms so, 6 ms apart.
        """
        if getattr(self._background, "apart", False) != self.gathered:
            self._background.apart = self.gathered
            self._place([0], self._apart if self.gathered else self._allowed)

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
            if gather != self.gathered:
                self.gathered = gather
                # Order: a thread that joins meanwhile is in `kept` already, or sees `gathered`.
                self._place(list(kept.values()), self._shared if gather else self._allowed)
            # Not where requests queue: it gains nothing there, and each request would wait for whoever else computes.
            if changed:
                self._set_policy(list(kept.values()), os.SCHED_OTHER if queued else os.SCHED_BATCH)
        finally:
            self._looking.release()

    def _try(self, elapsed: int, requests: int) -> bool:
        """Whether to gather threads of which one works at a time: as the last so many nanoseconds were, or not."""
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


def _quiet(allowed: set[int]) -> int:
    """One of the half of these CPUs that devices interrupt least; not the same one for every server.

    Cold reads at depth 16 on the CPU that has the disk's interrupts: 29,000 a second, on the other one 50,000.
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
    quiet = sorted(counts, key=counts.__getitem__)[: max(1, len(counts) // 2)]
    return quiet[os.getpid() % len(quiet)]
