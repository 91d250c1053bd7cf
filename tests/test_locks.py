"""qemu and we, and two of us, refuse each other: tried with the real qemu programs."""

from __future__ import annotations

import fcntl
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nbd_qcow2j import locks
from nbd_qcow2j.errors import ImageError, LockedError
from nbd_qcow2j.locks import READER, WRITER, LockUse
from nbd_qcow2j.storage import FileStorage

ROOT = Path(__file__).parent.parent


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, "1M"], check=True)
    return path


@contextmanager
def locked(path: Path, use: LockUse) -> Iterator[FileStorage]:
    with FileStorage.open(path, read_only=use is READER) as storage:
        storage.lock(use)
        yield storage


def qemu(*command: str | Path) -> str:
    """What qemu complains of; empty if it was content."""
    done = subprocess.run([*command], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode != 0) == bool(done.stderr), done
    return done.stderr


def qemu_writes(path: Path) -> str:
    return qemu("qemu-io", "-f", "qcow2", "-c", "write 0 4k", path)


def qemu_reads(path: Path) -> str:
    return qemu("qemu-io", "-r", "-f", "qcow2", "-c", "read 0 4k", path)


@contextmanager
def qemu_holding(path: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """A qemu-io that has the image open, and says so, until the end of the block."""
    process = subprocess.Popen(
        ["qemu-io", *options, "-f", "qcow2", path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=0
    )
    assert process.stdin and process.stdout
    try:
        process.stdin.write("length\n")
        # The prompt comes with the first answer.
        assert "1 MiB" in process.stdout.readline()
        yield process
    finally:
        process.stdin.close()
        process.wait(timeout=60)
        process.stdout.close()


def test_while_we_write_qemu_may_neither_write_nor_read(image: Path) -> None:
    with locked(image, WRITER):
        assert 'Failed to get "write" lock' in qemu_writes(image)
        assert 'Failed to get shared "write" lock' in qemu_reads(image)
        assert "lock" in qemu("qemu-img", "info", image)
        assert "lock" in qemu("qemu-img", "resize", image, "2M")
    assert qemu_writes(image) == ""


def test_while_we_write_who_asks_for_an_unlocked_look_gets_it(image: Path) -> None:
    with locked(image, WRITER):
        assert qemu("qemu-img", "info", "-U", image) == ""
        assert qemu("qemu-io", "-r", "-U", "-f", "qcow2", "-c", "read 0 4k", image) == ""


def test_while_we_read_qemu_may_read_and_not_write(image: Path) -> None:
    with locked(image, READER):
        assert qemu_reads(image) == ""
        assert qemu("qemu-img", "info", image) == ""
        assert 'Failed to get "write" lock' in qemu_writes(image)
    assert qemu_writes(image) == ""


def test_our_backing_file_is_shared_with_qemu_as_its_backing_file_and_not_with_a_writer(
    image: Path, tmp_path: Path
) -> None:
    overlay = tmp_path / "overlay.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", image, "-F", "qcow2", overlay], check=True)
    with locked(image, READER):
        assert qemu_writes(overlay) == ""
        assert "lock" in qemu("qemu-img", "commit", overlay)
        with qemu_holding(overlay), locked(image, READER), pytest.raises(LockedError), locked(image, WRITER):
            pass


def test_while_qemu_writes_we_may_neither_write_nor_read(image: Path) -> None:
    with qemu_holding(image) as process:
        for use, verb in ((WRITER, "write to it"), (READER, "read it")):
            with pytest.raises(LockedError) as caught, locked(image, use):
                pass
            message = str(caught.value)
            assert message.startswith(f"{image} is in use: qemu")
            assert f"writes to it, so we cannot {verb}" in message
            assert f"qemu-io (process {process.pid})" in message
            assert "\n" not in message
    with locked(image, WRITER):
        pass


def test_while_qemu_reads_we_may_read_and_not_write(image: Path) -> None:
    with qemu_holding(image, "-r"):
        with locked(image, READER):
            pass
        with pytest.raises(LockedError, match=r"reads it, so we cannot write to it"), locked(image, WRITER):
            pass


def test_qemu_that_forces_sharing_does_not_stop_us(image: Path) -> None:
    with qemu_holding(image, "-r", "-U"), locked(image, WRITER):
        pass


@pytest.mark.parametrize(
    ("first", "second", "refused"),
    [(WRITER, WRITER, True), (WRITER, READER, True), (READER, WRITER, True), (READER, READER, False)],
)
def test_two_of_us_are_one_writer_or_many_readers(image: Path, first: LockUse, second: LockUse, refused: bool) -> None:
    # Two descriptions in one process exclude each other as two processes do: a chain that meets itself is refused.
    with locked(image, first):
        if refused:
            with pytest.raises(LockedError, match="is in use: another nbd-qcow2j") as caught, locked(image, second):
                pass
            assert f"(process {os.getpid()})" in str(caught.value)
        else:
            with locked(image, second):
                pass
    with locked(image, WRITER):
        pass


def test_who_was_refused_leaves_no_lock_behind(image: Path) -> None:
    with locked(image, READER), FileStorage.open(image, read_only=False) as writer:
        with pytest.raises(LockedError):
            writer.lock(WRITER)
        # Still open, but a third reader does not meet it.
        with locked(image, READER):
            pass


def test_of_two_who_open_at_once_never_both_get_it(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The second takes its locks between the first one's locks and its tests.
    with FileStorage.open(image, read_only=False) as first, FileStorage.open(image, read_only=False) as second:
        real = locks._conflict
        outcome: list[str] = []

        def attempt(storage: FileStorage) -> None:
            try:
                storage.lock(WRITER)
                outcome.append("got it")
            except LockedError:
                outcome.append("refused")

        def between(fd: int, use: LockUse) -> str:
            monkeypatch.setattr(locks, "_conflict", real)
            attempt(second)
            return real(fd, use)

        monkeypatch.setattr(locks, "_conflict", between)
        attempt(first)
        assert outcome == ["refused", "got it"]


def test_a_second_description_neither_needs_nor_drops_the_locks(image: Path) -> None:
    with locked(image, WRITER) as storage:
        with storage.reopen() as second:
            second.write(0, [b"Q"])
        # Closing a descriptor would end a POSIX lock of the process; not this one.
        assert "lock" in qemu_writes(image)


HOLD = """
import os, sys
from nbd_qcow2j.locks import WRITER
from nbd_qcow2j.storage import FileStorage
storage = FileStorage.open(sys.argv[1], read_only=False)
storage.lock(WRITER)
if os.fork():
    os._exit(0)
print(os.getpid(), flush=True)
sys.stdin.read()
"""


@contextmanager
def daemon_holding(path: Path) -> Iterator[Callable[[], None]]:
    """A process that locked, forked, and whose child holds on; yields what kills the child."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, path], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin and process.stdout
        child = int(process.stdout.readline())
        process.wait(timeout=60)
        ended = os.pidfd_open(child)

        def kill() -> None:
            os.kill(child, signal.SIGKILL)
            # Readable once the process has closed its descriptors.
            assert select.select([ended], [], [], 60)[0]

        yield kill
        os.close(ended)
        process.stdin.close()


def test_the_locks_go_with_the_fork_into_the_background_and_die_with_sigkill(image: Path) -> None:
    with daemon_holding(image) as kill:
        with pytest.raises(LockedError, match="another nbd-qcow2j"), locked(image, WRITER):
            pass
        assert 'Failed to get "write" lock' in qemu_writes(image)
        kill()
        with locked(image, WRITER):
            pass


def test_a_holder_that_cannot_be_seen_is_to_be_found_with_lsof(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "holders", lambda fd: [])
    with (
        locked(image, WRITER),
        pytest.raises(LockedError, match=rf"`sudo lsof {image}` shows the processes"),
        locked(image, WRITER),
    ):
        pass


def test_a_file_system_without_locks_is_an_error_that_says_so(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*arguments: object) -> bytes:
        raise OSError(37, "No locks available")

    with FileStorage.open(image, read_only=False) as storage:
        monkeypatch.setattr(fcntl, "fcntl", no_locks)
        with pytest.raises(ImageError, match=r"refuses to lock the image \(No locks available\)") as caught:
            storage.lock(WRITER)
        assert not isinstance(caught.value, LockedError)


def test_an_exclusive_lock_of_a_stranger_is_a_conflict_too(image: Path) -> None:
    # Not qemu's manner, but nothing keeps a program from locking the whole file.
    with FileStorage.open(image, read_only=False) as stranger, FileStorage.open(image, read_only=False) as ours:
        locks._set(stranger.fileno(), locks.USED_BASE, fcntl.F_WRLCK)
        with pytest.raises(LockedError):
            ours.lock(WRITER)
        locks.release(stranger.fileno())
        ours.lock(WRITER)
