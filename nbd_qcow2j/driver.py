"""Runs the engine with real files and real threads: the lock, the I/O, the waits. The only file that does.

One lock guards the state. It is held while an operation runs between two yields and never across I/O. Reads
and pending writes run in the calling thread without a hop; a flush that finds no commit in progress makes it
itself, one that finds one shares the next (group commit). The writer (writer.py) does what nobody waits for.

    Order: a waiter registers with its gate in the hold in which its operation yielded, so no wake-up between
    the look at the condition and the wait is lost.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn, TypeVar

from . import changes, checkpoint
from .attaching import detach
from .counters import BOUNDS_PAGES, Histogram, Statistics
from .disk import Disk, Settings
from .errors import NO_ROOM, Error, ImageError, RequestError
from .image.backing import Extent, open_backing
from .locks import READER, WRITER
from .opening import open_disk, read_header
from .options import Options
from .steps import Buffer, Operation, Pause, Step, Sync, Wait, run_simply
from .storage import FileStorage, Storage
from .writer import Writer

T = TypeVar("T")

SLOW_FROM = 0.75
"""Fill of the ring from which writers are slowed down, little by little, so that none ever stalls."""
SLOWEST_SECONDS = 0.02
PAUSE_SECONDS = 1e-6
"""The kernel makes it some 50 us."""


class Runner:
    """Runs operations over one lock. Waiting threads cost nothing until their gate opens."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.fsyncs = Histogram()

    def run(self, operation: Operation[T]) -> T:
        """Run an operation to its end in this thread. Raises what it raises."""
        lock = self.lock
        result: Any = None
        failure: BaseException | None = None
        lock.acquire()
        try:
            while True:
                try:
                    step = operation.send(result) if failure is None else operation.throw(failure)
                except StopIteration as stop:
                    value: T = stop.value
                    return value
                result, failure = None, None
                if isinstance(step, Wait):
                    latch = threading.Lock()
                    latch.acquire()
                    step.gate.waiters.append(latch.release)
                    lock.release()
                    latch.acquire()
                    lock.acquire()
                    continue
                lock.release()
                try:
                    result = self._perform(step)
                except BaseException as error:
                    # All of them: an operation that is dropped instead would give back what it holds when it is
                    # collected, without the lock, and a commit would leave those who wait for it for ever.
                    failure = error
                finally:
                    lock.acquire()
        finally:
            # Its traceback leads to this frame: a circle that only a collection would break.
            failure = None
            lock.release()

    def _perform(self, step: Step) -> Any:
        if isinstance(step, Sync):
            started = time.perf_counter_ns()
            step.perform()
            self.fsyncs.observe(time.perf_counter_ns() - started)
            return None
        if isinstance(step, Pause):
            # Not zero: a thread that gives the interpreter lock away and takes it at once was never away.
            time.sleep(PAUSE_SECONDS)
            return None
        return step.perform()


class Device:
    """A served image. Every method may be called from several threads at once and blocks until it is done.

    Raises RequestError (the device is well), ImageError (the file is damaged where it was read), DeviceFailed.
    """

    def __init__(self, disk: Disk, options: Options, files: list[Storage]) -> None:
        self.disk = disk
        self.options = options
        self.size = disk.geometry.size
        self.read_only = disk.read_only
        self._refuses = disk.read_only
        """Whether changes are: it is read-only, or being closed."""
        self.description = f"journalled qcow2, clusters of {disk.geometry.cluster_size} bytes" + (
            ", read-only" if disk.read_only else ""
        )
        self._files = files
        self._runner = Runner()
        self._lock = self._runner.lock
        self._writer: Writer | None = None
        self._commit_pages = Histogram(BOUNDS_PAGES, scale=1)
        self._checkpoint_seconds = Histogram()
        self._commit_seconds = Histogram()
        self._commit_started = 0
        disk.log.begin_commit, disk.log.end_commit = self._begin_commit, self._end_commit
        disk.pending.start_clock(time.monotonic)
        self._closed = False
        # From here on a write is followed by a closer look at how full things are.
        self._commit_size = options.commit_size
        ring = disk.log.ring
        self._start_ring = int(max(0, ring.length - ring.reserve_for(disk.pending_most)) * options.checkpoint_start)
        self._start_pending = int(options.pending_limit // disk.page_size * options.checkpoint_start)

    # ---- life

    def start(self, begin: Callable[[], object] = lambda: None) -> None:
        """Start the writer: after the fork, a thread started earlier would be lost.

        `begin` is called by its threads before each thing they do (cpus.py). Raises OSError, RuntimeError; then the
        device can be closed.
        """
        if not self.read_only and self._writer is None:
            self._writer = Writer(
                self.disk, self._runner.run, self.options, self._checkpoint_seconds.observe, begin
            )
            self.disk.log.on_pressure = self._writer.wake_checkpoint
            self._writer.start()

    def close(self) -> None:
        """Send everything home, detach the journal, close the file. May be called again. Raises DeviceFailed."""
        if self._closed:
            return
        # Order: first, or the drain would have no end while clients write.
        self._closed = self._refuses = True
        if self._writer is not None:
            self._writer.stop()
        try:
            if not self.read_only:
                self._runner.run(detach(self.disk))
        finally:
            if self.disk.backing is not None:
                self.disk.backing.close()
            for each in self._files:
                each.close()

    # ---- requests

    def read_into(self, buffer: bytearray | memoryview, offset: int) -> None:
        """Fill `buffer` with what the disk holds at `offset`."""
        length = len(buffer)
        disk = self.disk
        if offset < 0 or offset + length > self.size:
            changes.refuse_out_of_range(disk, offset, length)
        with self._lock:
            host = disk.find_contiguous(offset, length)
            if host >= 0:
                epoch = disk.epochs.current
                epoch.active += 1
        if host < 0:
            self._runner.run(disk.read_into(memoryview(buffer), offset))
            return
        try:
            disk.file.read_into(buffer, host)
        finally:
            with self._lock:
                disk.epochs.leave(epoch)

    def write(self, data: Buffer, offset: int, fua: bool = False) -> None:
        """Write `data`, which is not looked at after this returns; with `fua`, durable when this returns."""
        disk = self.disk
        length = len(data)
        if self._refuses or offset < 0 or offset + length > self.size:
            self._check_writable(offset, length)
        with self._lock:
            home = disk.in_place.begin(offset, length)
            done = home < 0 and disk.try_write(data, offset)
        if home >= 0:
            done = self._write_in_place(data, offset, length, home)
        if not done:
            self._change(lambda: changes.write(disk, data, offset), "write")
        ring, running = disk.log.ring, disk.log.running.size
        if (
            running >= self._commit_size or ring.head - ring.tail + running > self._start_ring
            or disk.pending.count > self._start_pending or disk.allocator.available < disk.allocator.grow_step
        ):  # fmt: skip
            self._after_write()
        if fua:
            self.flush()

    def _write_in_place(self, data: Buffer, offset: int, length: int, home: int) -> bool:
        disk = self.disk
        try:
            disk.file.write(home, (data,))
        except BaseException as error:
            with self._lock:
                disk.in_place.end(offset, length)
                if isinstance(error, OSError) and error.errno in NO_ROOM:
                    # As in changes.guarded: the home lies in a hole of the host file.
                    raise RequestError(errno.ENOSPC, "no room in the host file system") from error
                raise disk.log.latch(error, "write") from error
        with self._lock:
            return disk.in_place.end(offset, length)

    def write_zeroes(self, offset: int, length: int, *, may_trim: bool, fast: bool, fua: bool) -> None:
        """Make a range read as zeros. Never slower than a write of as many bytes, so `fast` is always met."""
        del fast
        self._check_writable(offset, length)
        self._change(lambda: changes.zero(self.disk, offset, length, trim=False, may_trim=may_trim), "write zeroes")
        if fua:
            self.flush()

    def trim(self, offset: int, length: int, *, fua: bool) -> None:
        """The client no longer needs a range: its whole pages read as zeros, its clusters are freed."""
        self._check_writable(offset, length)
        self._change(lambda: changes.zero(self.disk, offset, length, trim=True, may_trim=True), "trim")
        if fua:
            self.flush()

    def flush(self) -> None:
        """Return when everything that completed before is durable."""
        if self._refuses:
            if self.read_only:
                return
            self._refuse_closing()
        self._runner.run(self.disk.flush())

    def cache(self, offset: int, length: int) -> None:
        """Read a range into the host's page cache."""
        changes.refuse_out_of_range(self.disk, offset, length)
        buffer = bytearray(min(length, 1 << 20))
        end = offset + length
        while offset < end:
            part = memoryview(buffer)[: min(len(buffer), end - offset)]
            self._runner.run(self.disk.read_into(part, offset))
            offset += len(part)

    def extents(self, offset: int, length: int, *, one: bool = False) -> list[Extent]:
        """What the beginning of a range holds, with `one` not much more than its first extent."""
        changes.refuse_out_of_range(self.disk, offset, length)
        return self._runner.run(self.disk.extents(offset, length, one=one))

    def block_sizes(self) -> tuple[int, int, int]:
        """(minimum, preferred, maximum) request size in bytes."""
        geometry = self.disk.geometry
        return 1, max(4096, min(geometry.cluster_size, 1 << 16)), 32 << 20

    def statistics(self) -> Statistics:
        """How the device is at this moment."""
        disk, log = self.disk, self.disk.log
        with self._lock:
            state = (
                "read-only" if self.read_only else "failed" if log.failed is not None
                else "corrupt" if disk.corrupt else "serving"
            )  # fmt: skip
            return Statistics(
                state=state, journal_size_bytes=log.ring.length if log.ring.used or not self.read_only else 0,
                journal_used_bytes=log.ring.used, pending_bytes=disk.pending.size_bytes,
                oldest_pending_seconds=disk.pending.oldest_age(),
                commits=log.commits, commit_bytes=log.commit_bytes, commit_seconds=self._commit_seconds.snapshot(),
                commit_pages=self._commit_pages.snapshot(), fsync_seconds=self._runner.fsyncs.snapshot(),
                checkpoints=disk.checkpoints, checkpoint_clusters=disk.checkpoint_clusters,
                checkpoint_bytes=disk.checkpoint_bytes, checkpoint_seconds=self._checkpoint_seconds.snapshot(),
                checkpoint_starvations=log.starvations,
                cow_read_bytes=disk.cow_read_bytes, clusters_allocated=disk.allocator.allocated,
                clusters_freed=disk.allocator.freed, replayed_transactions=disk.replayed_transactions,
                pool_clusters=len(disk.allocator.pool),
            )  # fmt: skip

    # ---- inside

    def _begin_commit(self) -> None:
        # One at a time, and in a hold of the lock at either end.
        self._commit_started = time.perf_counter_ns()

    def _end_commit(self, pages: int) -> None:
        self._commit_seconds.observe(time.perf_counter_ns() - self._commit_started)
        self._commit_pages.observe(pages)

    def _check_writable(self, offset: int, length: int) -> None:
        if self.read_only:
            raise RequestError(errno.EPERM, "the device is read-only")
        if self._refuses:
            self._refuse_closing()
        changes.refuse_out_of_range(self.disk, offset, length)

    def _refuse_closing(self) -> NoReturn:
        raise RequestError(errno.ESHUTDOWN, "the image is being closed")

    def _change(self, make: Callable[[], Operation[None]], what: str) -> None:
        self.disk.log.check()
        self._runner.run(changes.guarded(self.disk, make(), what))

    def _after_write(self) -> None:
        disk, writer = self.disk, self._writer
        if writer is None:
            return
        running = disk.log.running.size
        if running >= self.options.commit_size:
            writer.wake_commit()
        if disk.allocator.available < disk.allocator.grow_step:
            writer.wake_room()
        full = max(checkpoint.fill(disk), disk.pending.size_bytes / self.options.pending_limit)
        if full >= self.options.checkpoint_start:
            writer.wake_checkpoint()
            if full > SLOW_FROM:
                # Pacing: the delay grows with the fill, so that the ring is never found full.
                time.sleep(min(1.0, (full - SLOW_FROM) / (1 - SLOW_FROM)) ** 3 * SLOWEST_SECONDS)


def open_device(options: Options, *, recover: bool = False) -> Device:
    """Open an image as the options say: lock, validate, replay or attach. Raises ImageError, OptionError.

    With `recover`, one whose journal is attached also if it is marked corrupt.
    """
    file = FileStorage.open(options.file, read_only=options.read_only)
    files: list[Storage] = [file]
    backing = None
    try:
        # Order: locked before the header is read, or another server's bytes would be believed.
        file.lock(READER if options.read_only else WRITER)
        header, _ = run_simply(read_header(file, name=options.file))
        backing = open_backing(header, options.file, policy=options.backing, opener=FileStorage.open_backing)
        background = file if options.read_only else file.reopen()
        if background is not file:
            files.append(background)
        settings = Settings(
            journal_size=options.journal_size, direct_write=options.direct_write, l2_cache=options.l2_cache,
            in_place=options.in_place, pending_limit=options.pending_limit, discard=options.discard,
        )  # fmt: skip
        disk = run_simply(
            open_disk(
                file, background, settings=settings, read_only=options.read_only, backing=backing,
                uuid=os.urandom(16), name=options.file, recover=recover,
            )
        )  # fmt: skip
    except BaseException as error:
        if backing is not None:
            with suppress(Error, OSError):
                backing.close()
        for each in files:
            each.close()
        if isinstance(error, OSError):
            raise ImageError(f"{options.file}: {error.strerror}") from error
        raise
    return Device(disk, options, files)
