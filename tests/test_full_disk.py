"""A real server on a real, small file system that is filled to the brim and emptied again.

Writers are told ENOSPC; what was answered is kept, goes home and can be flushed; when there is room again the
service goes on without a restart; a close is clean, or says that the image stays attached.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import PROGRAM, Server, free_port, is_attached, poll, run

nbd = pytest.importorskip("nbd", reason="libnbd's Python binding: deploy/setup --test makes it visible")

MIB = 1 << 20
CLUSTER = 64 << 10
PAGE = 4096
SIZE = 64 * MIB


class SmallDisk:
    """A mounted file system, and the file that fills it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.filler = path / "filler"

    def fill(self, *, leave: int) -> None:
        """Take all of its room but about `leave` bytes.

        With nothing left, it stays so: where the server was in the middle of an fallocate that then fails, tmpfs
        gives back the room that this one had taken already.
        """
        before = -1
        # The fsync gives a little back each time.
        while self.free() != before:
            before = self.free()
            self._fill_once(leave)
        looks = 0 if leave == 0 else 10
        while looks < 10:
            time.sleep(0.05)
            before = self.free()
            self._fill_once(leave)
            # ext4 has a few blocks that it counts and does not give.
            looks = looks + 1 if self.free() == before else 0

    def _fill_once(self, leave: int) -> None:
        with self.filler.open("ab", buffering=0) as file:
            # A block of the file system may be smaller than a page, and a page is given whole or not at all.
            for piece in (MIB, PAGE, 512):
                try:
                    while self.free() > leave:
                        written = file.write(b"\xaa" * min(piece, max(512, self.free() - leave)))
                        if not written:
                            break
                except OSError as error:
                    assert error.errno == errno.ENOSPC
            # ext4 reserves more than it takes when it writes at last, and gives that back.
            os.fsync(file.fileno())

    def free(self) -> int:
        status = os.statvfs(self.path)
        return status.f_bfree * status.f_bsize

    def empty(self) -> None:
        self.filler.unlink()


@pytest.fixture(params=["tmpfs", "ext4"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SmallDisk]:
    """A file system of 48 MiB of its own."""
    path = tmp_path / "small"
    path.mkdir()
    if request.param == "tmpfs":
        words = ["mount", "-t", "tmpfs", "-o", "size=48m", "none", str(path)]
    else:
        if shutil.which("mkfs.ext4") is None:
            pytest.skip("mkfs.ext4 is not installed")
        file = tmp_path / "ext4.img"
        with file.open("wb") as new:
            new.truncate(48 * MIB)
        run("mkfs.ext4", "-q", "-m", "0", file)
        words = ["mount", "-o", "loop", str(file), str(path)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"cannot mount a {request.param}: {done.stderr.strip()}")
    yield SmallDisk(path)
    run("umount", path)


@pytest.fixture
def small_image(disk: SmallDisk) -> Path:
    path = disk.path / "disk.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", path, SIZE)
    return path


class Client:
    """A client, and what it knows the disk holds."""

    def __init__(self, server: Server) -> None:
        self.handle = server.connect()
        self.holds = bytearray(SIZE)
        self.number = 0

    def write(self, offset: int, length: int) -> int:
        """Write something new; 0, or the errno it was refused with: then the old content must still be there."""
        self.number += 1
        data = self.number.to_bytes(8, "big") * (length // 8)
        try:
            self.handle.pwrite(data, offset)
        except nbd.Error as error:
            return int(error.errnum)
        self.holds[offset : offset + length] = data
        return 0

    def write_until_full(self) -> int:
        """Whole clusters and single pages in turn, each into a cluster of its own; returns where it was refused."""
        for offset in range(0, SIZE, CLUSTER):
            told = self.write(offset, CLUSTER if offset // CLUSTER % 3 else PAGE)
            if told:
                assert told == errno.ENOSPC
                return offset
        raise AssertionError("the disk was never full")

    def check(self) -> None:
        for at in range(0, SIZE, MIB):
            assert self.handle.pread(MIB, at) == self.holds[at : at + MIB]


def metric(port: int, name: str) -> float:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        for line in answer.read().decode().splitlines():
            if line.startswith(f"{name} "):
                return float(line.split()[1])
    raise AssertionError(f"no metric {name}")


def assert_holds(image: Path, client: Client, directory: Path) -> None:
    """The closed image is plain, without errors and leaks, and holds what was answered."""
    assert not is_attached(image)
    run("qemu-img", "check", "-q", image)
    raw = directory / "content.raw"
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", image, raw)
    assert raw.read_bytes() == bytes(client.holds)


def test_writers_are_told_and_the_service_goes_on(
    disk: SmallDisk, small_image: Path, serve: Callable[..., Server], tmp_path: Path
) -> None:
    port = free_port()
    server = serve(small_image, "--journal-size", "1M", "--checkpoint-interval", "0.1", "--metrics", str(port))
    disk.fill(leave=8 * MIB)
    client = Client(server)
    refused_at = client.write_until_full()
    disk.fill(leave=0)
    client.handle.flush()
    client.check()

    # Full: what has a cluster can be written and flushed, what needs one is refused, again and again.
    for number in range(64):
        assert client.write(number * PAGE, PAGE) == 0
        if number % 8 == 0:
            assert client.write(refused_at, CLUSTER) in (0, errno.ENOSPC)
            client.handle.flush()
    assert client.write(refused_at + 3 * MIB, CLUSTER) == errno.ENOSPC
    poll(lambda: metric(port, "nbd_qcow2j_pending_bytes") == 0, what="everything goes home", seconds=30)
    client.check()

    # There is room again: the same connection goes on at once.
    disk.empty()
    assert client.write(refused_at, CLUSTER) == 0
    for offset in range(refused_at, refused_at + 4 * MIB, CLUSTER):
        assert client.write(offset, CLUSTER) == 0
        assert client.write(offset + 16 * MIB, PAGE) == 0
    client.handle.flush()
    client.check()
    server.stop()
    assert_holds(small_image, client, tmp_path)


def test_a_trim_makes_room_on_a_full_disk(
    disk: SmallDisk, small_image: Path, serve: Callable[..., Server], tmp_path: Path
) -> None:
    server = serve(small_image, "--journal-size", "1M", "--checkpoint-interval", "0.1")
    client = Client(server)
    refused_at = client.write_until_full()
    client.handle.trim(8 * MIB, 0)
    client.holds[: 8 * MIB] = bytes(8 * MIB)
    client.handle.flush()
    poll(lambda: client.write(refused_at, CLUSTER) == 0, what="the trimmed clusters are used again", seconds=30)
    client.handle.flush()
    client.check()
    server.stop()
    assert_holds(small_image, client, tmp_path)


def test_a_disk_that_is_full_at_the_start_is_said_in_one_line(
    disk: SmallDisk, small_image: Path, serve: Callable[..., Server], short_path: Path
) -> None:
    size = small_image.stat().st_size
    disk.fill(leave=MIB)
    free = disk.free()
    done = run(PROGRAM, "serve", small_image, "--socket", short_path / "s", check=False, timeout=60)
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if "no room in the host file system for the journal" in line]
    assert len(lines) == 1 and "journal-size" in lines[0], done.stderr
    assert "Traceback" not in done.stderr
    # It is what it was, and takes no more room than it did.
    assert small_image.stat().st_size == size
    assert disk.free() >= free - 16 * PAGE
    assert not is_attached(small_image)
    run("qemu-img", "check", "-q", small_image)
    disk.empty()
    serve(small_image).stop()


def test_a_disk_that_is_full_at_the_end_does_not_keep_the_image_attached(
    disk: SmallDisk, small_image: Path, serve: Callable[..., Server], tmp_path: Path
) -> None:
    # Much is pending, and not a byte is free: what was accepted has its room.
    server = serve(small_image, "--journal-size", "4M", "--checkpoint-interval", "600")
    client = Client(server)
    for number in range(100):
        assert client.write(number * CLUSTER, PAGE) == 0
    disk.fill(leave=0)
    server.stop()
    assert_holds(small_image, client, tmp_path)


def test_an_image_with_holes_on_a_full_disk_stays_attached_and_says_so(
    disk: SmallDisk, small_image: Path, serve: Callable[..., Server], tmp_path: Path
) -> None:
    # Somebody has dug holes into the image (cp --sparse, fallocate -d): its tables have no room of their own
    # to go home to. Nothing can be done about it while the disk is full, and nothing is lost.
    server = serve(small_image, "--journal-size", "1M")
    client = Client(server)
    assert client.write(0, CLUSTER) == 0
    server.stop()
    run("fallocate", "-d", small_image)
    server = serve(small_image, "--journal-size", "1M", "--checkpoint-interval", "600")
    holds, client = client.holds, Client(server)
    client.holds = holds
    for number in range(8):
        # The other end of the L2 table.
        assert client.write(48 * MIB + number * CLUSTER, PAGE) == 0
    client.handle.flush()
    disk.fill(leave=0)
    server.process.terminate()
    assert server.wait_ended(60) == 1, server.log
    assert "the image stays attached" in server.log
    assert is_attached(small_image)
    server.killed = True

    done = run(PROGRAM, "recover", small_image, check=False, timeout=60)
    assert done.returncode == 1 and "stays attached" in done.stderr and "Traceback" not in done.stderr
    disk.empty()
    run(PROGRAM, "recover", small_image, timeout=60)
    assert_holds(small_image, client, tmp_path)
