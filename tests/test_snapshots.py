"""The snapshot table: what qemu-img wrote is read, what cannot be walked is refused."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import run

from nbd_qcow2j.errors import ImageError
from nbd_qcow2j.format.header import Header, parse_header
from nbd_qcow2j.image.snapshots import MAX_SNAPSHOTS, read_snapshot_table

Reader = Callable[[int, int], bytes]


def opened(path: Path) -> tuple[Header, Reader]:
    data = path.read_bytes()
    header = parse_header(data[:65536], file_size=len(data), name=path.name)
    return header, lambda offset, length: data[offset : offset + length].ljust(length, b"\0")


@pytest.fixture
def with_snapshots(make_image: Callable[..., Path]) -> Path:
    path = make_image("1G")
    for name in ("first", "zweiter Stand \u00fc", "x" * 200):
        run("qemu-img", "snapshot", "-c", name, path)
    return path


def test_snapshots_of_qemu_are_read(with_snapshots: Path) -> None:
    header, read = opened(with_snapshots)
    found = read_snapshot_table(header, read, "image")
    expected = json.loads(run("qemu-img", "info", "--output=json", with_snapshots).stdout)["snapshots"]
    assert [(each.id, each.name, each.seconds, each.nanoseconds, each.vm_state_size) for each in found] == [
        (each["id"], each["name"], each["date-sec"], each["date-nsec"], each["vm-state-size"]) for each in expected
    ]
    assert {(each.disk_size, each.l1_entries) for each in found} == {(1 << 30, header.l1_entries)}
    assert all(each.l1_offset % 65536 == 0 for each in found)
    assert found[-1].end <= with_snapshots.stat().st_size


def test_an_image_without_snapshots_has_none(make_image: Callable[..., Path]) -> None:
    header, read = opened(make_image())
    assert read_snapshot_table(header, read, "image") == []


def entry(*, extra: bytes = b"", name: bytes = b"n", l1_entries: int = 1) -> bytes:
    fixed = struct.pack(">QIHHIIQII", 65536, l1_entries, 1, len(name), 5, 6, 7, 8, len(extra))
    return fixed + extra + b"1" + name


def read_entries(make_image: Callable[..., Path], *entries: bytes, count: int | None = None) -> list[object]:
    header, _ = opened(make_image())
    table = b""
    for each in entries:
        table = table.ljust(-(-len(table) // 8) * 8, b"\0") + each
    header = replace(header, snapshot_count=len(entries) if count is None else count, snapshots_offset=1 << 20)
    return list(
        read_snapshot_table(
            header, lambda at, length: table[at - (1 << 20) :][:length].ljust(length, b"\0"), "image"
        )
    )  # fmt: skip


def test_entries_of_older_writers_have_no_extra_data(make_image: Callable[..., Path]) -> None:
    old, new = read_entries(make_image, entry(), entry(extra=struct.pack(">QQ", 1 << 40, 3 << 20) + b"more"))
    assert (old.vm_state_size, old.disk_size, old.extra_length) == (8, 64 << 20, 0)  # type: ignore[attr-defined]
    assert (new.vm_state_size, new.disk_size, new.name) == (1 << 40, 3 << 20, "n")  # type: ignore[attr-defined]


def test_names_that_are_not_utf_8_are_read(make_image: Callable[..., Path]) -> None:
    (found,) = read_entries(make_image, entry(name=b"\xff\xfe"))
    assert found.name == "\ufffd\ufffd"  # type: ignore[attr-defined]


def test_too_much_extra_data_is_refused(make_image: Callable[..., Path]) -> None:
    with pytest.raises(ImageError, match="too much extra data, at entry 0 of the snapshot table of image"):
        read_entries(make_image, entry(extra=bytes(1025)))


def test_too_many_snapshots_are_refused(make_image: Callable[..., Path]) -> None:
    with pytest.raises(ImageError, match="too many snapshots"):
        read_entries(make_image, count=MAX_SNAPSHOTS + 1)


def test_a_table_that_grows_without_end_is_refused(make_image: Callable[..., Path]) -> None:
    # Scenario: every entry claims names of 128 KiB; 65,536 of them would be 8 GiB.
    header, _ = opened(make_image())
    header = replace(header, snapshot_count=MAX_SNAPSHOTS, snapshots_offset=1 << 20)
    fixed = struct.pack(">QIHHIIQII", 65536, 1, 0xFFFF, 0xFFFF, 0, 0, 0, 0, 0)
    with pytest.raises(ImageError, match="too long"):
        read_snapshot_table(header, lambda at, length: fixed if length == len(fixed) else bytes(length), "image")


def test_a_count_without_a_table_is_refused(make_image: Callable[..., Path]) -> None:
    header, read = opened(make_image())
    with pytest.raises(ImageError, match="no table of them"):
        read_snapshot_table(replace(header, snapshot_count=1, snapshots_offset=0), read, "image")
