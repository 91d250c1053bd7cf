"""A disk that lies as disks do: the engine's storage, simulated, for crash tests.

`SimDisk` is one file on one disk; any number of `SimStorage`s (open file descriptions) share it. Rules, in
sectors of 512 bytes:

  * What was written since the last sync may be kept or dropped by a power cut, in any subset and so in
    any order, torn at every sector. That goes for zeros as well: a punch, a zero_range or a truncation
    that is not durable leaves the old content or zeros; for the length of the file likewise.
  * `write_sync` makes its own sectors durable, and the length that is needed to read them; what had been
    written to *these* sectors before is superseded. `sync` makes durable all that returned before it.
  * Space that was never written reads as zeros; a reused cluster reads what it held. With `stale_growth`,
    space beyond the old end is zeros only once that length is durable: a length that was kept without having
    been synced may show garbage where nothing of the file's own was kept.
  * A write or sync *in flight* (begun, not finished: `begin_write`, `begin_sync`) is open like one that
    was never synced, and is not covered by a sync that began before it ended.
  * A write-back that fails marks its pages clean: what they held is read back, may or may not be on the
    disk, and no later sync makes it durable. The error is reported once by each description; a description
    that was opened after somebody had been told is never told. (Linux: errseq_t.)
  * `kill` ends the process and keeps the page cache: all that was open stays open. `crash_states` gives the
    disks that a power cut may leave; each is new and quiet.

Every random choice comes from a `Random` that the test gives, so that its seed replays it.

Limit: a real kernel writes whole pages, and its file system orders some changes, so that fewer states are
possible there than here. A read is never torn, and is as old or new as the moment it is done.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import NamedTuple, NoReturn

from simcache import SECTOR, ZERO, CachedFile, Effect

from nbd_qcow2j.locks import LockUse
from nbd_qcow2j.steps import Buffer


class PowerCut(BaseException):
    """The moment that `cut_at` asked for. No `except Exception` of the engine may catch it."""


class Performed(NamedTuple):
    """One operation that changes or settles what is on the disk."""

    number: int
    kind: str
    offset: int
    length: int


@dataclass(slots=True)
class Fault:
    """An error to come: see `SimDisk.fail`."""

    kind: str
    countdown: int
    error: int
    times: int
    landed: int | None


class SimDisk(CachedFile):
    """One file on a simulated disk."""

    def __init__(
        self, size: int = 0, *, physical_sector: int = SECTOR, tear_neighbours: bool = False, stale_growth: bool = False
    ) -> None:
        """A durable file of `size` bytes, all zero.

        With `physical_sector=4096`, a 4 KiB block that was being written may also come back with garbage in
        the sectors that were open; with `tear_neighbours`, in any sector of that block.
        """
        super().__init__(size)
        self.physical_sector = physical_sector
        self.tear_neighbours = tear_neighbours
        self.stale_growth = stale_growth
        self.keeps_cache = False
        """`drop_cached`, a hint, does nothing."""
        self.operations = 0
        """How many operations were performed (begun), reads and hints not counted; `history` names them."""
        self.history: list[Performed] = []
        self.hook: Callable[[str, int, int], None] | None = None
        """Called before every call of a storage, reads and hints included, without a lock: (kind, offset, length)."""
        self.watch: Callable[[bool], None] | None = None
        """Called at every moment at which a cut may be asked for: True while an operation is in flight."""
        self.process = 0
        self.lock = threading.RLock()
        self._off = False
        self._cut: tuple[int, bool] | None = None
        self._faults: list[Fault] = []
        self._errors = 0
        self._error = 0
        self._error_seen = True

    # -- making and keeping ----------------------------------------------------------------------------

    @classmethod
    def of(cls, writes: Iterable[tuple[int, bytes]], size: int = 0) -> SimDisk:
        """A disk with this durable content, given as (offset, bytes), and at least this length."""
        disk = cls(size)
        for offset, data in writes:
            disk.land(0, "write", offset, data)
        disk.settle(disk.log)
        disk._cache.clear()
        return disk

    @classmethod
    def from_file(cls, path: str | Path) -> SimDisk:
        """A disk with the content of a real file, holes skipped."""
        disk = cls()
        with open(path, "rb", buffering=0) as file:
            disk.durable_size = disk.current_size = end = file.seek(0, os.SEEK_END)
            position = 0
            while position < end:
                try:
                    start = os.lseek(file.fileno(), position, os.SEEK_DATA) // SECTOR * SECTOR
                except OSError:
                    break  # ENXIO: a hole up to the end
                position = min(os.lseek(file.fileno(), start, os.SEEK_HOLE), start + (1 << 22))
                data = os.pread(file.fileno(), position - start, start)
                for at in range(0, len(data), SECTOR):
                    content = data[at : at + SECTOR].ljust(SECTOR, b"\0")
                    if content != ZERO:
                        disk.durable[(start + at) // SECTOR] = content
        disk._digest = None
        return disk

    def to_file(self, path: str | Path) -> None:
        """Write what a reader sees now to a real, sparse file, for qemu-img to judge."""
        with open(path, "wb") as file:
            file.truncate(self.current_size)
            for sector, content in sorted(self.view().items()):
                file.seek(sector * SECTOR)
                file.write(content[: self.current_size - sector * SECTOR])

    def like(self, size: int, durable: dict[int, bytes], digest: int | None) -> SimDisk:
        """A quiet disk of the same kind with other content; takes over the dict."""
        other = SimDisk(
            size, physical_sector=self.physical_sector, tear_neighbours=self.tear_neighbours,
            stale_growth=self.stale_growth,
        )  # fmt: skip
        other.durable, other._digest = durable, digest
        return other

    def copy(self) -> SimDisk:
        """The same disk again, with what is open; no process has it open, no cut or fault is planned."""
        other = self.like(self.durable_size, dict(self.durable), self._digest)
        other.log = [effect.copy() for effect in self.log]
        other._cache, other.current_size = dict(self._cache), self.current_size
        other.keeps_cache = self.keeps_cache
        other._errors, other._error, other._error_seen = self._errors, self._error, self._error_seen
        return other

    # -- what a test does to it ------------------------------------------------------------------------

    def crash_states(self, limit: int, rng: Random) -> Iterator[SimDisk]:
        """Distinct disks that a power cut now may leave, at most `limit`: see simcrash.py."""
        from simcrash import crash_states  # noqa: PLC0415, it builds on this module

        return crash_states(self, limit, rng)

    def cut_after(self, number: int) -> None:
        """Raise PowerCut when operation `number` (from 1, as `operations` counts) has been performed."""
        self._cut = (number, False)

    def cut_during(self, number: int) -> None:
        """Raise PowerCut while operation `number` is in flight: all of it is open."""
        self._cut = (number, True)

    def fail(
        self, kind: str, nth: int = 1, error: int = errno.EIO, *, times: int = 1, landed: int | None = None
    ) -> None:
        """Let the nth call of this kind from now on fail, and `times` - 1 after it (0: all until `mend`).

        Kinds: read, write, write_sync, sync, allocate, punch, zero_range, truncate, any. `landed`: bytes of
        the write that reached the page cache; by default none, but all for a write_sync that fails with EIO.
        """
        self._faults.append(Fault(kind, nth, error, times or 1 << 60, landed))

    def mend(self) -> None:
        """Drop the faults that are still to come."""
        self._faults.clear()

    def fail_writeback(self, error: int = errno.EIO) -> None:
        """The kernel writes out what is open, on its own, and fails: nobody is told before the next sync."""
        with self.lock:
            self.lose([effect for effect in self.log if effect.done], error)

    def kill(self, rng: Random | None = None) -> None:
        """SIGKILL: the storages of this process are dead, the page cache stays, a planned cut is forgotten.

        Writes in flight go on to their end, or with `rng` to any sector.
        """
        with self.lock:
            for effect in self.log:
                if not effect.done and rng:
                    sectors = sorted(effect.sectors)
                    self.undo(effect, sectors[rng.randint(0, len(sectors)) :])
                effect.done = True
            self.process += 1
            self._off, self._cut = False, None

    def drop_caches(self, rng: Random) -> None:
        """Clean pages leave the page cache: what a failed write-back lost is seen to be there, or not."""
        with self.lock:
            lost = [effect for effect in self.log if effect.lost]
            for effect in lost:
                self.undo(effect, [sector for sector in sorted(effect.sectors) if rng.random() < 0.5])
            self.settle(lost)

    # -- what a storage does to it ---------------------------------------------------------------------

    def begin(self, kind: str, offset: int, length: int) -> tuple[int, Fault | None]:
        """Count an operation, and take the fault that is due for it."""
        self.operations += 1
        self.history.append(Performed(self.operations, kind, offset, length))
        return self.operations, self.take_fault(kind)

    def take_fault(self, kind: str) -> Fault | None:
        """Every planned fault of the kind comes one call nearer; the one that is due, if any."""
        due: Fault | None = None
        for fault in [fault for fault in self._faults if fault.kind in (kind, "any")]:
            fault.countdown -= 1
            if fault.countdown <= 0:
                due = fault
                fault.times -= 1
                if fault.times <= 0:
                    self._faults.remove(fault)
        return due

    def passed(self, number: int, *, during: bool) -> None:
        """Raise PowerCut if this is the moment that was asked for."""
        if self.watch:
            self.watch(during)
        if self._cut == (number, during):
            self._off = True
            raise PowerCut(f"{'during' if during else 'after'} operation {number}")

    def lose(self, effects: Iterable[Effect], error: int) -> None:
        """A write-back of the effects failed: their pages are clean, and may or may not be on the disk."""
        for effect in effects:
            effect.lost = True
        self._errors += 1
        self._error, self._error_seen = error, False

    def sample_error(self) -> int:
        """What a description that is opened now takes as told already (errseq_sample)."""
        return self._errors if self._error_seen else self._errors - 1

    def unseen_error(self, sample: int) -> tuple[int, int]:
        """(errno or 0, new sample): an error that the description has not been told yet (errseq_check)."""
        if sample == self._errors:
            return 0, sample
        self._error_seen = True
        return self._error, self._errors

    def check_alive(self, process: int) -> None:
        """Raise PowerCut in whoever goes on after the cut or the kill."""
        if self._off or self.process != process:
            raise PowerCut("the power is off, or the process is dead")


class SimStorage:
    """A `Storage` on one open file description of a SimDisk."""

    def __init__(self, disk: SimDisk, name: str = "sim.qcow2", *, read_only: bool = False) -> None:
        self.disk, self.name, self.read_only = disk, name, read_only
        self.can_punch = not read_only
        self.closed = False
        self._process = disk.process
        self._told = disk.sample_error()

    def reopen(self) -> SimStorage:
        return SimStorage(self.disk, self.name, read_only=self.read_only)

    def lock(self, use: LockUse) -> None:
        """Locks have tests of their own, on real files."""

    def fileno(self) -> int:
        return -1

    def close(self) -> None:
        self.closed = True

    def read_into(self, buffer: bytearray | memoryview, offset: int) -> None:
        view = memoryview(buffer).cast("B")
        self._enter("read", offset, len(view))
        with self.disk.lock:
            if fault := self.disk.take_fault("read"):
                _fail(fault.error)
            view[:] = self.disk.peek(offset, len(view))

    def size(self) -> int:
        self._enter("size", 0, 0)
        return self.disk.current_size

    def data_runs(self, offset: int, length: int) -> list[tuple[int, bool]]:
        self._enter("data_runs", offset, length)
        return [(length, True)]

    def start_writeback(self, offset: int, length: int) -> None:
        self._enter("start_writeback", offset, length)

    def advise_needed(self, offset: int, length: int) -> None:
        self._enter("advise_needed", offset, length)

    def drop_cached(self) -> None:
        self._enter("drop_cached", 0, 0)
        if not self.disk.keeps_cache:
            self.disk.drop_caches(Random(self.disk.operations))

    def write(self, offset: int, buffers: Sequence[Buffer]) -> None:
        self.finish_write(self.begin_write(offset, buffers))

    def write_sync(self, offset: int, buffers: Sequence[Buffer]) -> None:
        self.finish_write(self.begin_write(offset, buffers, kind="write_sync"))

    def sync(self) -> None:
        self.finish_sync(self.begin_sync())

    def allocate(self, offset: int, length: int) -> None:
        self._change("allocate", offset, length)

    def punch(self, offset: int, length: int) -> None:
        self._change("punch", offset, length)

    def zero_range(self, offset: int, length: int) -> None:
        self._change("zero_range", offset, length)

    def truncate(self, size: int) -> None:
        self._change("truncate", size, 0)

    # -- in two halves, for `stepper.py`: another operation may come between ---------------------------

    def begin_write(self, offset: int, buffers: Sequence[Buffer], *, kind: str = "write") -> Effect:
        """The bytes come into the page cache; the call has not returned."""
        data = b"".join(buffers)
        self._enter(kind, offset, len(data), change=True)
        with self.disk.lock:
            number, fault = self.disk.begin(kind, offset, len(data))
            lost = fault is not None and kind == "write_sync" and fault.error == errno.EIO
            if fault:
                data = data[: (len(data) if lost else 0) if fault.landed is None else fault.landed]
            effect = self.disk.land(number, kind, offset, data)
            self.disk.passed(number, during=True)
            if fault:
                effect.done = True
                self.disk.passed(number, during=False)
                if lost:
                    self.disk.lose([effect], fault.error)
                    self._report()
                _fail(fault.error)
            return effect

    def finish_write(self, effect: Effect) -> None:
        """The call returns; a synchronous write is durable."""
        self._enter("", 0, 0)
        with self.disk.lock:
            effect.done = True
            if effect.kind == "write_sync":
                self.disk.settle([effect])
                self._report()
            self.disk.passed(effect.number, during=False)

    def begin_sync(self) -> tuple[int, list[Effect]]:
        """The sync looks at what has returned by now, and will cover that."""
        self._enter("sync", 0, 0, change=True)
        with self.disk.lock:
            number, fault = self.disk.begin("sync", 0, 0)
            covered = [effect for effect in self.disk.log if effect.done and not effect.lost]
            self.disk.passed(number, during=True)
            if fault:
                self.disk.passed(number, during=False)
                self.disk.lose(covered, fault.error)
                self._report()
            return number, covered

    def finish_sync(self, begun: tuple[int, list[Effect]]) -> None:
        """The sync returns; a write-back that failed meanwhile took its pages with it."""
        self._enter("", 0, 0)
        with self.disk.lock:
            self.disk.settle([effect for effect in begun[1] if not effect.lost])
            self._report()
            self.disk.passed(begun[0], during=False)

    def _change(self, kind: str, offset: int, length: int) -> None:
        self._enter(kind, offset, length, change=True)
        if not length and kind != "truncate":
            return  # as FileStorage has it
        with self.disk.lock:
            number, fault = self.disk.begin(kind, offset, length)
            if fault:
                self.disk.passed(number, during=True)
                self.disk.passed(number, during=False)
                _fail(fault.error)
            if kind == "allocate":
                effect = self.disk.land_size(number, kind, offset + length, shrink=False)
            elif kind == "truncate":
                effect = self.disk.land_size(number, kind, offset, shrink=True)
            else:
                effect = self.disk.land_zeros(number, kind, offset, length, keep_size=kind == "punch")
            self.disk.passed(number, during=True)
            effect.done = True
            self.disk.passed(number, during=False)

    def _report(self) -> None:
        error, self._told = self.disk.unseen_error(self._told)
        if error:
            _fail(error)

    def _enter(self, kind: str, offset: int, length: int, *, change: bool = False) -> None:
        if self.disk.hook and kind:
            self.disk.hook(kind, offset, length)
        self.disk.check_alive(self._process)
        if self.closed or (change and self.read_only):
            _fail(errno.EBADF)


def _fail(error: int) -> NoReturn:
    raise OSError(error, os.strerror(error))
