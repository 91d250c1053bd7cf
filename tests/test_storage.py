"""FileStorage on a real file: every call, its fall-backs, and what it refuses to open."""

from __future__ import annotations

import ctypes
import errno
import os
import random
import stat
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from nbd_qcow2j import storage as storage_module
from nbd_qcow2j.errors import ImageError
from nbd_qcow2j.storage import FileStorage, Storage

MIB = 1 << 20


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "disk.qcow2"


@pytest.fixture
def file(path: Path) -> Iterator[FileStorage]:
    with FileStorage.open(path, read_only=False, create=True) as opened:
        yield opened


def read(file: Storage, offset: int, length: int) -> bytes:
    # The buffer is dirty, so that a zero that was not written shows.
    buffer = bytearray(b"\xee" * length)
    file.read_into(buffer, offset)
    return bytes(buffer)


def test_bytes_come_back_from_any_offset_in_any_split(file: FileStorage) -> None:
    rng = random.Random(1)
    model = bytearray(50_000)
    for _ in range(200):
        offset = rng.randrange(40_000)
        buffers = [rng.randbytes(rng.choice([0, 1, 7, 512, 3000])) for _ in range(rng.randrange(4))]
        data = b"".join(buffers)
        [file.write, file.write_sync][rng.randrange(2)](offset, [memoryview(part) for part in buffers])
        model[offset : offset + len(data)] = data
    assert read(file, 0, len(model)) == model


def test_reads_past_the_end_are_zeros(file: FileStorage) -> None:
    file.write(0, [b"abc"])
    assert read(file, 1, 6) == b"bc\0\0\0\0"
    assert read(file, 1 << 40, 5) == bytes(5)
    file.read_into(bytearray(), 0)


def test_a_view_of_wider_items_is_filled_and_written_by_bytes(file: FileStorage) -> None:
    # An L2 table is an array of 64-bit integers: its length in items is not its length in bytes.
    table = array("Q", range(3000))
    file.write(8, [memoryview(table), b"end"])
    assert read(file, 8, 24_003) == table.tobytes() + b"end"
    back = array("Q", bytes(24_000))
    file.read_into(memoryview(back), 8)
    assert back == table


class ShortKernel:
    """pwritev and preadv that do what the kernel may do: take at most `most` bytes, count the buffers."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.calls: list[tuple[int, int]] = []
        self.real_pwritev, self.real_preadv = os.pwritev, os.preadv

    def pwritev(self, fd: int, buffers: Sequence[Any], offset: int, flags: int = 0) -> int:
        assert 0 < len(buffers) <= 1024
        self.calls.append((len(buffers), flags))
        data = b"".join(bytes(memoryview(buffer).cast("B")) for buffer in buffers)
        return self.real_pwritev(fd, [data[: self.most]], offset, flags)

    def preadv(self, fd: int, buffers: Sequence[Any], offset: int) -> int:
        return self.real_preadv(fd, [memoryview(buffers[0])[: self.most]], offset)


@pytest.mark.parametrize("most", [1, 513, 1 << 20])
def test_short_reads_and_writes_go_on_where_they_stopped(
    file: FileStorage, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    kernel = ShortKernel(most)
    monkeypatch.setattr(os, "pwritev", kernel.pwritev)
    monkeypatch.setattr(os, "preadv", kernel.preadv)
    buffers = [bytes([n % 251 + 1]) * (n % 3) for n in range(2500)]
    file.write_sync(3, buffers)
    assert read(file, 3, 2600) == b"".join(buffers) + bytes(2600 - sum(map(len, buffers)))
    # Every piece of a synchronous write is synchronous.
    assert {flags for _, flags in kernel.calls} == {os.RWF_DSYNC}
    if most > 5000:
        assert [count for count, _ in kernel.calls] == [1024, sum(1 for b in buffers if b) - 1024]


def test_a_write_that_writes_nothing_is_an_error_and_no_loop(
    file: FileStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "pwritev", lambda *_: 0)
    with pytest.raises(OSError) as caught:
        file.write(0, [b"x"])
    assert caught.value.errno == errno.EIO


def test_without_dsync_support_a_synchronous_write_is_followed_by_fdatasync(
    file: FileStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, done = os.pwritev, []

    def pwritev(fd: int, buffers: Sequence[Any], offset: int, flags: int = 0) -> int:
        if flags:
            raise OSError(errno.EOPNOTSUPP, "not supported")
        done.append("write")
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "pwritev", pwritev)
    monkeypatch.setattr(os, "fdatasync", lambda fd: done.append("sync"))
    file.write_sync(0, [b"x"])
    file.write_sync(0, [b"y"])
    assert done == ["write", "sync", "write", "sync"]


@pytest.mark.parametrize("call", ["sync", "write_sync", "write"])
def test_an_error_is_raised_once_and_nothing_is_tried_again(
    file: FileStorage, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    calls = []

    def fail(*arguments: object) -> None:
        calls.append(arguments)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fdatasync", fail)
    monkeypatch.setattr(os, "pwritev", fail)
    with pytest.raises(OSError) as caught:
        file.sync() if call == "sync" else getattr(file, call)(0, [b"x"])
    assert caught.value.errno == errno.EIO
    assert len(calls) == 1


def test_punch_gives_space_back_and_keeps_the_length(file: FileStorage, path: Path) -> None:
    file.write(0, [b"x" * MIB])
    file.sync()
    before = path.stat().st_blocks
    file.punch(4096, MIB - 4096)
    assert file.can_punch
    assert path.stat().st_blocks < before
    assert file.size() == MIB
    assert read(file, 0, MIB) == b"x" * 4096 + bytes(MIB - 4096)


def test_allocate_grows_the_file_takes_space_and_keeps_content(file: FileStorage, path: Path) -> None:
    file.write(0, [b"abc"])
    file.allocate(0, MIB)
    assert file.size() == MIB
    assert path.stat().st_blocks * 512 >= MIB
    assert read(file, 0, 5) == b"abc\0\0"
    file.allocate(0, 4096)
    assert file.size() == MIB


def test_zero_range_reads_as_zeros_and_grows_the_file(file: FileStorage) -> None:
    file.write(0, [b"x" * 10_000])
    file.zero_range(100, 20_000)
    assert file.size() == 20_100
    assert read(file, 0, 20_100) == b"x" * 100 + bytes(20_000)


class LibC:
    """libc whose fallocate knows only some modes; the rest is the real one."""

    def __init__(self, modes: set[int], number: int) -> None:
        self.modes, self.number = modes, number
        self.real = storage_module._libc

    def fallocate(self, fd: int, mode: int, offset: int, length: int) -> int:
        if mode in self.modes:
            return int(self.real.fallocate(fd, mode, offset, length))
        ctypes.set_errno(self.number)
        return -1

    def sync_file_range(self, fd: int, offset: int, length: int, flags: int) -> int:
        ctypes.set_errno(self.number)
        return -1


@pytest.mark.parametrize(
    "modes", [set(), {0}, {3}, {0, 3}, {0, 3, 0x10}], ids=["none", "allocate", "punch", "allocate-punch", "all"]
)
def test_fall_backs_give_the_same_content_and_length(
    file: FileStorage, monkeypatch: pytest.MonkeyPatch, modes: set[int]
) -> None:
    # Scenario: what tmpfs, NFS and btrfs lack. Zeroing is always exact; a punch may be left out, and says so.
    monkeypatch.setattr(storage_module, "_libc", LibC(modes, errno.EOPNOTSUPP))
    file.write(0, [b"x" * 5000])
    file.allocate(4000, 4 * MIB)
    assert file.size() == 4000 + 4 * MIB
    assert read(file, 0, 6000) == b"x" * 5000 + bytes(1000)
    file.zero_range(1000, 3 * MIB)
    file.zero_range(3 * MIB, 2 * MIB)
    assert file.size() == 5 * MIB
    assert read(file, 0, 5 * MIB) == b"x" * 1000 + bytes(5 * MIB - 1000)
    file.write(0, [b"y" * 8192])
    file.punch(4096, 4096)
    assert file.can_punch == (3 in modes)
    assert read(file, 4096, 4096) == (bytes(4096) if file.can_punch else b"y" * 4096)
    assert file.size() == 5 * MIB


def test_allocate_without_support_never_shortens_the_file(file: FileStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_module, "_libc", LibC(set(), errno.EOPNOTSUPP))
    file.write(9000, [b"z"])
    file.allocate(0, 4096)
    assert file.size() == 9001
    assert read(file, 9000, 1) == b"z"


def test_no_space_is_an_error_for_the_caller(file: FileStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_module, "_libc", LibC(set(), errno.ENOSPC))
    for call in (file.allocate, file.punch, file.zero_range, file.start_writeback):
        with pytest.raises(OSError) as caught:
            call(0, 4096)
        assert caught.value.errno == errno.ENOSPC
    assert file.can_punch


def test_an_interrupted_fallocate_is_done_again(file: FileStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = storage_module._libc, []

    class Interrupted:
        def fallocate(self, fd: int, mode: int, offset: int, length: int) -> int:
            calls.append(mode)
            if len(calls) < 3:
                ctypes.set_errno(errno.EINTR)
                return -1
            return int(real.fallocate(fd, mode, offset, length))

    monkeypatch.setattr(storage_module, "_libc", Interrupted())
    file.allocate(0, 8192)
    assert len(calls) == 3
    assert file.size() == 8192


def test_hints_work_on_a_real_file_and_truncate_sets_the_length(file: FileStorage) -> None:
    file.write(0, [b"x" * 8192])
    file.start_writeback(0, 8192)
    file.start_writeback(0, 0)
    file.advise_needed(0, 8192)
    file.truncate(100)
    file.truncate(200)
    assert file.size() == 200
    assert read(file, 0, 200) == b"x" * 100 + bytes(100)


def test_holes_are_told_from_data_and_the_pieces_add_up(file: FileStorage) -> None:
    file.truncate(8 * MIB)
    file.write(MIB, [b"x" * MIB])
    file.write(5 * MIB, [b"x" * 4096])
    for offset, length in ((0, 8 * MIB), (MIB + 100, 2 * MIB), (7 * MIB, 4 * MIB), (9 * MIB, MIB), (3 * MIB, 1)):
        at = offset
        for piece, data in file.data_runs(offset, length):
            assert data or not any(read(file, at, piece)), (offset, length, at)
            at += piece
        assert at == offset + length
    assert file.data_runs(MIB + 100, 1000) == [(1000, True)]
    assert file.data_runs(2 * MIB, MIB) == [(MIB, False)], "or the file system knows no holes"
    assert file.data_runs(6 * MIB, 10 * MIB) == [(10 * MIB, False)]


def test_a_range_of_very_many_holes_ends_as_data(file: FileStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    # A reply of millions of pieces helps nobody; a file system without SEEK_DATA has one piece.
    monkeypatch.setattr(storage_module, "MOST_RUNS", 4)
    for number in range(20):
        file.write(number * MIB, [b"x"])
    runs = file.data_runs(0, 20 * MIB)
    assert sum(length for length, _ in runs) == 20 * MIB
    assert len(runs) <= 6
    assert runs[-1][1] is True

    def unsupported(fd: int, offset: int, whence: int) -> int:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(storage_module.os, "lseek", unsupported)
    assert file.data_runs(5, 100) == [(100, True)]


def test_advise_never_fails_even_closed(file: FileStorage) -> None:
    file.close()
    file.close()
    file.advise_needed(0, 1)
    with pytest.raises(OSError):
        file.write(0, [b"x"])


def test_reopen_is_another_description_of_the_same_file_even_when_renamed(file: FileStorage, path: Path) -> None:
    path.rename(path.with_name("moved"))
    second = file.reopen()
    assert os.path.sameopenfile(file.fileno(), second.fileno())
    file.write(0, [b"abc"])
    file.close()
    assert read(second, 0, 3) == b"abc"
    second.write(0, [b"x"])
    assert not os.get_inheritable(second.fileno())
    second.close()


def test_read_only_refuses_writes_and_reopens_read_only(path: Path) -> None:
    path.write_bytes(b"abc")
    path.chmod(0o444)
    with FileStorage.open(path, read_only=True) as file, file.reopen() as second:
        for each in (file, second):
            assert read(each, 0, 3) == b"abc"
            assert not each.can_punch
            with pytest.raises(OSError):
                each.write(0, [b"x"])
        assert not os.get_inheritable(file.fileno())
    assert path.read_bytes() == b"abc"


def test_create_refuses_a_file_that_is_there(path: Path) -> None:
    path.write_bytes(b"precious")
    with pytest.raises(ImageError, match=r"File exists; it was left as it is"):
        FileStorage.open(path, read_only=False, create=True)
    assert path.read_bytes() == b"precious"


def test_what_is_no_file_is_refused_with_its_path_and_kind(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for path, message in (
        (tmp_path, "is a directory"),
        (fifo, "is not a regular file"),
        (Path("/dev/null"), "is not a regular file"),
        (tmp_path / "none", "No such file or directory; `nbd-qcow2j create`"),
        (tmp_path / "none" / "x", "No such file"),
    ):
        for read_only in (False, True):
            with pytest.raises(ImageError, match=message) as caught:
                FileStorage.open(path, read_only=read_only)
            assert str(path) in str(caught.value)


def test_a_block_device_is_refused_for_writing_only(tmp_path: Path) -> None:
    node = tmp_path / "node"
    try:
        os.mknod(node, stat.S_IFBLK | 0o600, os.makedev(4000, 200))
    except PermissionError:
        pytest.skip("only root can make a block device node")
    with pytest.raises(ImageError, match=r"block device cannot be served for writing.*read-only=true"):
        FileStorage.open(node, read_only=False)
    # No device is behind the node: read-only gets as far as the kernel's answer.
    with pytest.raises(ImageError, match="No such device"):
        FileStorage.open(node, read_only=True)
