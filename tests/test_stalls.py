"""A device with real threads over a real file whose calls are held up, or fail, when the test says so.

A disk that stalls holds up those who need it and nobody else; a background task that dies tells everybody who
waits; every wait ends. Nothing here waits for a clock: a call is held by an event, and a test goes on when what
it waits for has happened.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import PROGRAM, is_attached, poll, run

from nbd_qcow2j import checkpoint
from nbd_qcow2j.disk import Settings
from nbd_qcow2j.driver import Device
from nbd_qcow2j.errors import DeviceFailed, Error, RequestError
from nbd_qcow2j.opening import open_disk
from nbd_qcow2j.options import Options, parse_options
from nbd_qcow2j.steps import Buffer, run_simply
from nbd_qcow2j.storage import FileStorage

PAGE = 4096
PATIENCE = 60.0
"""How long a test waits for what must happen before it fails; nothing is that slow."""


class Hold:
    """Calls of some kinds stand still while it is closed."""

    def __init__(self) -> None:
        self.kinds: frozenset[str] = frozenset()
        self.go = threading.Event()
        self.held = threading.Semaphore(0)
        self.fail: Callable[[str], None] = lambda kind: None

    def close(self, *kinds: str) -> None:
        self.go.clear()
        self.kinds = frozenset(kinds)

    def open(self) -> None:
        self.kinds = frozenset()
        self.go.set()

    def wait_held(self) -> None:
        """Return when one call more stands still."""
        assert self.held.acquire(timeout=PATIENCE), "no call came to the disk"

    def pass_by(self, kind: str) -> None:
        if kind in self.kinds:
            self.held.release()
            assert self.go.wait(PATIENCE)
        self.fail(kind)


class HeldStorage:
    """A FileStorage behind a Hold."""

    def __init__(self, file: FileStorage, hold: Hold) -> None:
        self.file, self.hold = file, hold
        self.name = file.name

    @property
    def can_punch(self) -> bool:
        return self.file.can_punch

    def read_into(self, buffer: bytearray | memoryview, offset: int) -> None:
        self.hold.pass_by("read")
        self.file.read_into(buffer, offset)

    def write(self, offset: int, buffers: Sequence[Buffer]) -> None:
        self.hold.pass_by("write")
        self.file.write(offset, buffers)

    def write_sync(self, offset: int, buffers: Sequence[Buffer]) -> None:
        self.hold.pass_by("write_sync")
        self.file.write_sync(offset, buffers)

    def __getattr__(self, name: str) -> Any:
        if name not in ("sync", "allocate", "punch", "zero_range", "truncate", "size", "close"):
            return getattr(self.file, name)

        def call(*arguments: int) -> Any:
            self.hold.pass_by(name)
            return getattr(self.file, name)(*arguments)

        return call


def open_held(path: Path, hold: Hold, *pairs: tuple[str, str], journal: int | None = None) -> Device:
    """As driver.open_device, on held storage. `journal`: also smaller than the options allow."""
    options: Options = parse_options([("file", str(path)), *pairs])
    file = FileStorage.open(path, read_only=False)
    storages: list[Any] = [HeldStorage(file, hold), HeldStorage(file.reopen(), hold)]
    settings = Settings(
        journal_size=journal or options.journal_size, direct_write=options.direct_write,
        pending_limit=options.pending_limit,
    )  # fmt: skip
    disk = run_simply(
        open_disk(*storages, settings=settings, read_only=False, backing=None, uuid=os.urandom(16), name=str(path))
    )
    return Device(disk, options, storages)


@contextmanager
def opened(path: Path, *pairs: tuple[str, str], journal: int | None = None) -> Iterator[tuple[Device, Hold]]:
    hold = Hold()
    device = open_held(path, hold, *pairs, journal=journal)
    device.start()
    try:
        yield device, hold
    finally:
        hold.open()
        hold.fail = lambda kind: None
        try:
            device.close()
        except Error:
            assert device.disk.log.failed is not None, "only a latched device may refuse to close here"


class Caller(threading.Thread):
    """A request in a thread of its own, as nbdkit would make it."""

    def __init__(self, request: Callable[[], object]) -> None:
        super().__init__(daemon=True)
        self.request = request
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self.request()
        except BaseException as error:
            self.error = error

    def wait(self) -> None:
        self.join(PATIENCE)
        assert not self.is_alive(), "a request that never ends"
        if self.error is not None:
            raise self.error


def read(device: Device, offset: int, length: int = PAGE) -> bytes:
    buffer = bytearray(length)
    device.read_into(buffer, offset)
    return bytes(buffer)


def page(number: int) -> bytes:
    return number.to_bytes(4, "big") * (PAGE // 4)


def assert_plain(path: Path) -> None:
    assert not is_attached(path)
    run("qemu-img", "check", "-q", path)


# ---- a disk that stalls


def test_while_the_disk_stands_still_what_needs_no_disk_goes_on(image: Path) -> None:
    # The ring's write and every sync stand still: a flush waits; reads of pending pages, of zeros and of cached
    # clusters and pending writes go on. Then the disk comes back, and so does everything.
    with opened(image) as (device, hold):
        device.write(bytes(range(256)) * 256, 0)
        device.flush()
        hold.close("write_sync", "sync")
        device.write(page(1), 1 << 20)
        flush = Caller(device.flush)
        hold.wait_held()

        for number in range(2, 200):
            Caller(lambda number=number: device.write(page(number), (1 << 20) + number * PAGE)).wait()  # type: ignore[misc]
            Caller(lambda: read(device, 32 << 20)).wait()
            assert read(device, (1 << 20) + number * PAGE) == page(number)
        assert read(device, 0, 512) == bytes(range(256)) * 2
        second = Caller(device.flush)
        assert flush.is_alive() and second.is_alive()
        assert device.statistics().state == "serving"

        hold.open()
        flush.wait()
        second.wait()
        device.write(page(7), 0)
        device.flush()
        assert device.statistics().state == "serving"
    assert_plain(image)


def test_a_stalled_checkpoint_holds_up_no_flush(image: Path) -> None:
    # Only what the checkpoint does stands still: its home write. Flushes and writes go on beside it.
    with opened(image, ("pending-limit", "1M"), ("checkpoint-interval", "0.1")) as (device, hold):
        hold.close("write")
        for number in range(150):
            device.write(page(number), number * PAGE)
        hold.wait_held()
        for number in range(20):
            device.write(page(number + 1000), number * PAGE)
            Caller(device.flush).wait()
            assert read(device, number * PAGE) == page(number + 1000)
        hold.open()
    assert_plain(image)


def test_the_pending_table_never_passes_its_bound(image: Path) -> None:
    # The checkpoint stands still: writers come to the bound and wait there, however many they are. Then it goes on.
    limit = (1 << 20) // PAGE
    seen = 0
    with opened(image, ("pending-limit", "1M"), ("checkpoint-interval", "0.1")) as (device, hold):
        disk, pending = device.disk, device.disk.pending
        put = pending.put

        def counted(*arguments: Any) -> None:
            nonlocal seen
            put(*arguments)
            seen = max(seen, pending.count)

        pending.put = counted  # type: ignore[method-assign]
        hold.close("sync")

        def write_much(first: int) -> None:
            for number in range(first, 2 * limit, 8):
                if number % 3:
                    device.write(page(number), number * 2 * PAGE)
                elif number % 2:
                    device.write(page(number) * 9, number * 2 * PAGE)
                else:
                    device.write(page(number)[:600], number * 2 * PAGE + 100)

        callers = [Caller(lambda first=first: write_much(first)) for first in range(8)]  # type: ignore[misc]
        # Nothing can go home, so that many pages come to stay.
        poll(
            lambda: disk.log.room_gate.waiters and pending.count > limit - 10, what="the bound", seconds=PATIENCE
        )
        assert pending.count <= limit
        assert read(device, 2 * PAGE) == page(1), "reads go on"
        hold.open()
        for each in callers:
            each.wait()
        device.flush()
        assert limit - 10 < seen <= limit
        assert disk.incoming == 0
    assert_plain(image)


# ---- whatever dies, everybody is told


def fail_with(error: BaseException, *kinds: str) -> Callable[[str], None]:
    def fail(kind: str) -> None:
        if kind in kinds:
            raise error

    return fail


@pytest.mark.parametrize("error", [OSError(errno.EIO, "bad"), MemoryError("none left"), AssertionError("a bug")])
def test_whatever_a_commit_dies_of_every_flush_is_told(image: Path, error: BaseException) -> None:
    with opened(image) as (device, hold):
        hold.close("write_sync")
        device.write(page(1), 0)
        leader = Caller(device.flush)
        hold.wait_held()
        followers = [Caller(device.flush) for _ in range(4)]
        hold.fail = fail_with(error, "write_sync")
        hold.open()
        for each in (leader, *followers):
            with pytest.raises(DeviceFailed):
                each.wait()
        with pytest.raises(DeviceFailed):
            device.write(page(2), PAGE)
        assert read(device, 0) == page(1), "reads go on"
    assert is_attached(image)


@pytest.mark.parametrize("what", ["round_", "settle", "is_tight"])
def test_whatever_the_checkpoint_dies_of_who_waits_for_room_is_told(
    image: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A full ring: writers wait for the checkpoint, and that has a bug. The commit task waits for nobody.
    with opened(image, ("commit-interval", "0.05"), journal=1 << 16) as (device, hold):

        def broken(*_: object, **__: object) -> Any:
            raise ZeroDivisionError("a bug in the checkpoint")

        monkeypatch.setattr(checkpoint, what, broken)
        del hold

        def write_for_ever() -> None:
            for number in range(10_000):
                device.write(page(number), number % 1000 * PAGE)

        callers = [Caller(write_for_ever) for _ in range(3)]
        for each in callers:
            with pytest.raises(DeviceFailed):
                each.wait()
        with pytest.raises(DeviceFailed):
            device.flush()
    assert is_attached(image)


def test_who_waits_for_the_tail_is_told_when_the_disk_is_full_and_served_when_it_is_not(image: Path) -> None:
    with opened(image, ("commit-interval", "0.05"), journal=1 << 16) as (device, hold):
        full = fail_with(OSError(errno.ENOSPC, "full"), "write", "allocate", "zero_range")
        hold.fail = full
        with pytest.raises(RequestError) as caught:
            for number in range(10_000):
                device.write(page(number), number % 1000 * PAGE)
        assert caught.value.errno == errno.ENOSPC
        kept = {number: read(device, number * PAGE) for number in range(40)}
        hold.fail = lambda kind: None
        device.write(page(5), 999 * PAGE)
        device.flush()
        assert {number: read(device, number * PAGE) for number in range(40)} == kept
    assert_plain(image)


def test_closing_on_a_full_disk_ends_and_keeps_everything(image: Path) -> None:
    hold = Hold()
    device = open_held(image, hold)
    device.start()
    for number in range(40):
        device.write(page(number), number * 10 * PAGE)
    device.flush()
    hold.fail = fail_with(OSError(errno.ENOSPC, "full"), "write", "allocate", "zero_range")
    with pytest.raises(RequestError, match="stays attached"):
        device.close()
    assert is_attached(image)
    assert "40 transactions" not in run(PROGRAM, "recover", image).stdout
    assert_plain(image)
    with opened(image) as (device, _):
        for number in range(40):
            assert read(device, number * 10 * PAGE) == page(number)


def test_a_damaged_compressed_cluster_fails_its_reader_and_leaves_nothing_held(image: Path) -> None:
    # An error of a computation is thrown into the operation like one of the disk: its epoch is left under the lock.
    source = image.with_name("source.raw")
    source.write_bytes(bytes(range(256)) * 512)
    image.unlink()
    run("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", source, image)
    with opened(image) as (device, _):
        entry, _bitmap = find(device, 0)
        with image.open("r+b") as file:
            file.seek(entry & ((1 << 54) - 1))
            file.write(b"\xff" * 16)
        for _ in range(3):
            with pytest.raises(Error):
                read(device, 0)
        assert device.disk.epochs.current.active == 0
        device.write(page(1), PAGE * 20)
        device.flush()


def find(device: Device, cluster: int) -> tuple[int, int]:
    device._runner.run(device.disk.mapping.load_l2(cluster))
    return device.disk.mapping.find(cluster)
