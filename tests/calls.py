"""A client's requests as operations that tell the oracle when they begin and end, and judge what they read."""

from __future__ import annotations

from collections.abc import Iterator

from engine import SECTOR, Oracle, fill, number_of

from nbd_qcow2j import changes
from nbd_qcow2j.disk import Disk
from nbd_qcow2j.steps import Operation


class Calls:
    """Requests of one open disk; places and lengths in sectors. Every write has a number of its own."""

    def __init__(self, disk: Disk, oracle: Oracle, numbers: Iterator[int]) -> None:
        self.disk, self.oracle, self.numbers = disk, oracle, numbers

    def write(self, first: int, length: int, *, fua: bool = False, fast: bool = False) -> Operation[None]:
        """`fast`: as the driver does it, without an operation where that is possible."""
        return self._write(first, length, next(self.numbers), fua=fua, fast=fast)

    def _write(self, first: int, length: int, number: int, *, fua: bool, fast: bool) -> Operation[None]:
        disk = self.disk
        started = self.oracle.begin(first, length, number)
        data = fill(number) * length
        if not (fast and disk.try_write(data, first * SECTOR)):
            disk.log.check()
            yield from changes.guarded(disk, changes.write(disk, data, first * SECTOR), "write")
        self.oracle.end(started)
        if fua:
            yield from self.flush()

    def zero(self, first: int, length: int, *, trim: bool = False, may_trim: bool = True) -> Operation[None]:
        """Write zeroes, or with `trim` trim; of a trim only whole pages may be asked for here."""
        disk = self.disk
        started = self.oracle.begin(first, length, 0)
        disk.log.check()
        operation = changes.zero(disk, first * SECTOR, length * SECTOR, trim=trim, may_trim=trim or may_trim)
        yield from changes.guarded(disk, operation, "zero")
        self.oracle.end(started)

    def trim(self, first: int, length: int) -> Operation[None]:
        return self.zero(first, length, trim=True)

    def read(self, first: int, length: int) -> Operation[list[int]]:
        """What was found, by the numbers of the writes."""
        began = self.oracle.tick()
        data = bytearray(length * SECTOR)
        yield from self.disk.read_into(memoryview(data), first * SECTOR)
        seen = []
        for sector in range(first, first + length):
            at = (sector - first) * SECTOR
            seen.append(number_of(bytes(data[at : at + SECTOR])))
            allowed = self.oracle.allowed(sector, began, self.oracle.now)
            assert seen[-1] in allowed, f"a read of sector {sector} found {seen[-1]}, allowed {sorted(allowed)}"
        return seen

    def flush(self) -> Operation[None]:
        at = self.oracle.tick()
        yield from self.disk.flush()
        self.oracle.flushed = max(self.oracle.flushed, at)

    def commit(self) -> Operation[None]:
        """As the writer does it."""
        log = self.disk.log
        log.check()
        if not log.running.empty:
            yield from log.commit_upto(log.last_number())
