"""The writer: one trio thread that commits, checkpoints, fills the pool and releases, so that flushes find
little to do. Requests never hop into it; they only wake it.

    commit      when `commit_interval` passed, or the running transaction has `commit_size`
    checkpoint  while the ring is fuller than `checkpoint_start`; when idle for `checkpoint_interval`; at once if tight
    room        while the pool is low; when freed clusters may be given back; once a second, a look at some tables more

Each step is an operation of the engine, run in a worker thread by the driver: an fdatasync must not keep the
other tasks waiting. A task that fails, in whatever way, latches the device at once and under the lock: waiting
requests, and the steps of the other tasks, are woken by that. No step waits for ring room: only the checkpoint
makes it, and a step that waited would keep `stop` waiting.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import trio

from . import checkpoint
from .disk import Disk
from .errors import DeviceFailed, RequestError
from .steps import Operation

ROUNDS_AT_ONCE = 16
RETRY_SECONDS = 0.2
"""How long to wait before trying again where the host file system has no room."""

IDLE_LOOKS = 4
"""In an interval of the checkpoint: that the disk is idle is seen a quarter of it late at most."""


class Settings(Protocol):
    """What the writer needs of the options; sizes in bytes, times in seconds."""

    @property
    def commit_interval(self) -> float: ...
    @property
    def checkpoint_interval(self) -> float: ...
    @property
    def checkpoint_start(self) -> float: ...
    @property
    def pending_limit(self) -> int: ...


class _Bell:
    """Wakes one task from any thread; rings that nobody has answered yet are one ring."""

    def __init__(self) -> None:
        self.event = trio.Event()
        self.token: trio.lowlevel.TrioToken | None = None
        self.rung = False

    def ring(self) -> None:
        if not self.rung and self.token is not None:
            self.rung = True
            try:
                self.token.run_sync_soon(self._set)
            except trio.RunFinishedError:
                return

    def _set(self) -> None:
        self.event.set()

    async def wait(self, seconds: float) -> bool:
        """Return when rung, or after `seconds`; True when rung."""
        with trio.move_on_after(seconds):
            await self.event.wait()
        rung, self.rung = self.event.is_set(), False
        self.event = trio.Event()
        return rung


def _latch(disk: Disk, error: BaseException) -> Operation[None]:
    disk.log.latch(error, "background work")
    return
    yield


class Writer:
    """The background half of a device. `run` runs an operation in the calling thread (driver.Runner)."""

    def __init__(
        self, disk: Disk, run: Callable[[Operation[Any]], Any], settings: Settings, observe: Callable[[int], object],
        begin: Callable[[], object] = lambda: None,
    ) -> None:  # fmt: skip
        self.disk, self.run, self.settings = disk, run, settings
        self.observe = observe
        """Told the nanoseconds of each round of the checkpoint."""
        self.begin = begin
        """Called in a worker thread before it works."""
        self._commit, self._checkpoint, self._room = _Bell(), _Bell(), _Bell()
        self._started = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._main, name="writer", daemon=True)
        self._scope: trio.CancelScope | None = None
        self._token: trio.lowlevel.TrioToken | None = None
        self._failure: BaseException | None = None

    def start(self) -> None:
        """Return when the tasks run. Raises OSError, RuntimeError where there is no descriptor or thread for them."""
        self._thread.start()
        self._started.wait()
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """End the tasks and wait for the step that runs. Called when no request is in flight."""
        if self._token is not None and self._thread.is_alive():
            self._stopping = True
            try:
                self._token.run_sync_soon(self._cancel)
            except trio.RunFinishedError:
                return
            self._thread.join()

    def wake_commit(self) -> None:
        self._commit.ring()

    def wake_checkpoint(self) -> None:
        self._checkpoint.ring()

    def wake_room(self) -> None:
        self._room.ring()

    # ---- inside the trio thread

    def _cancel(self) -> None:
        assert self._scope is not None
        self._scope.cancel()

    def _main(self) -> None:
        try:
            trio.run(self._tasks)
        except BaseException as error:
            if self._token is None:
                # Nothing has begun: who starts us is told, and can still close.
                self._failure = error
            else:
                self.run(_latch(self.disk, error))
        finally:
            self._started.set()

    async def _tasks(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        for bell in (self._commit, self._checkpoint, self._room):
            bell.token = self._token
        with trio.CancelScope() as self._scope:
            async with trio.open_nursery() as nursery:
                for task in (self._commit_task, self._checkpoint_task, self._room_task):
                    nursery.start_soon(self._guard, task)
                self._started.set()

    async def _guard(self, task: Callable[[], Awaitable[None]]) -> None:
        try:
            await task()
        except DeviceFailed:
            # Latched: requests have been told; reading goes on without a writer.
            return
        except trio.Cancelled:
            raise
        except BaseException as error:
            # Order: before the other tasks are cancelled: a step of theirs may wait for what only this task does,
            # and the nursery waits for it.
            self.run(_latch(self.disk, error))

    async def _step(self, operation: Operation[Any]) -> Any:
        # Not abandoned on cancel: what a step has begun on the disk must end before the journal is detached.
        return await trio.to_thread.run_sync(self._in_thread, operation)

    def _in_thread(self, operation: Operation[Any]) -> Any:
        self.begin()
        return self.run(operation)

    async def _commit_task(self) -> None:
        log = self.disk.log
        while True:
            await self._commit.wait(self.settings.commit_interval)
            log.check()
            if not log.running.empty:
                await self._step(checkpoint.settle(self.disk))
                if not log.may_commit():
                    self._checkpoint.ring()

    def _full(self) -> float:
        return max(checkpoint.fill(self.disk), self.disk.pending.size_bytes / self.settings.pending_limit)

    async def _checkpoint_task(self) -> None:
        disk, log = self.disk, self.disk.log
        interval = self.settings.checkpoint_interval
        seen, since = -1, trio.current_time()
        while True:
            rung = await self._checkpoint.wait(interval / IDLE_LOOKS)
            log.check()
            if log.running.number != seen:
                seen, since = log.running.number, trio.current_time()
            idle = not rung and trio.current_time() - since >= interval
            while not self._stopping and self._has_work(idle):
                starved = log.starvations
                done = await trio.to_thread.run_sync(self._rounds, idle)
                self._room.ring()
                if not done:
                    since = trio.current_time()
                    tight = checkpoint.is_tight(disk)
                    await trio.sleep(RETRY_SECONDS if tight or log.starvations != starved else 0.01)
                    break
                if idle:
                    seen = log.running.number

    def _has_work(self, idle: bool) -> bool:
        disk = self.disk
        return (
            checkpoint.is_tight(disk)
            or self._full() >= self.settings.checkpoint_start
            or bool(idle and (disk.pending.clusters or disk.log.ring.transactions))
        )

    def _rounds(self, idle: bool) -> bool:
        """Some rounds, in a worker thread: to come back to trio after each costs as much as half a round.

        False when one found nothing that it could do.
        """
        disk = self.disk
        self.begin()
        for _ in range(ROUNDS_AT_ONCE):
            if self._stopping or not self._has_work(idle):
                break
            tight = checkpoint.is_tight(disk)
            started = time.perf_counter_ns()
            least = 0 if idle or tight else disk.log.ring.length // 8
            done = self.run(checkpoint.round_(disk, tight=tight, least_bytes=least, again=tight))
            self.observe(time.perf_counter_ns() - started)
            if not done:
                return False
            # The links of this round are what lets the next one move the tail.
            self.run(checkpoint.settle(disk))
        return True

    async def _room_task(self) -> None:
        disk = self.disk
        allocator = disk.allocator
        while True:
            disk.log.check()
            if disk.epochs.releasable:
                await self._step(allocator.release())
            if allocator.available < allocator.grow_step:
                try:
                    await self._step(allocator.ensure(allocator.grow_step))
                except RequestError:
                    # A synchronous ENOSPC loses nothing: requests that need room are told, we try again.
                    await trio.sleep(RETRY_SECONDS)
            if allocator.counted is not None and not allocator.counted.finished:
                await self._step(allocator.counted.go_on())
            await self._room.wait(1.0)
