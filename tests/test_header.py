"""The header: fresh images of every geometry are read; what cannot be is refused.

Rewriting it for the journal is `test_header_rewrite.py`.
"""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from conftest import run

from nbd_qcow2j.errors import ImageError
from nbd_qcow2j.format.create import new_image
from nbd_qcow2j.format.header import check_usable, parse_header

CLUSTERS = ("512", "4k", "64k", "2M")
EXTRAS = ("refcount_bits=1", "refcount_bits=64", "extended_l2=on", "compat=0.10")
SIZES = (0, 5000 << 10, 1 << 30)


@pytest.mark.parametrize("cluster_size", CLUSTERS)
def test_fresh_images_of_qemu_are_read(cluster_size: str, tmp_path: Path) -> None:
    # Scenario: an image that was never written to is as short as it can be, its L1 table lies last.
    seen = 0
    for extra in EXTRAS:
        if extra == "extended_l2=on" and cluster_size in ("512", "4k"):
            continue
        for size in SIZES:
            path = tmp_path / f"{seen}.qcow2"
            run("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"cluster_size={cluster_size},{extra}", path, size)
            data = path.read_bytes()
            assert parse_header(data[:65536], file_size=len(data), name="image").size == size
            seen += 1
    assert seen >= 9


@pytest.mark.parametrize("cluster_size", [512, 4096, 65536, 2 << 20])
def test_fresh_images_of_ours_are_read(cluster_size: int) -> None:
    for size in SIZES:
        for width in (1, 16, 64):
            writes, length = new_image(size, cluster_size=cluster_size, refcount_bits=width)
            header = parse_header(writes[0][1].ljust(65536, b"\0"), file_size=length, name="image")
            assert (header.size, header.geometry.refcount_bits) == (size, width)


def fresh(**fields: int) -> bytes:
    data = bytearray(new_image(1 << 30)[0][0][1].ljust(65536, b"\0"))
    for name, value in fields.items():
        offset, form = FIELDS[name]
        struct.pack_into(form, data, offset, value)
    return bytes(data)


FIELDS = {
    "version": (4, ">I"), "backing_offset": (8, ">Q"), "backing_length": (16, ">I"), "cluster_bits": (20, ">I"),
    "size": (24, ">Q"), "l1_entries": (36, ">I"), "l1_offset": (40, ">Q"), "reftable": (48, ">Q"),
    "reftable_clusters": (56, ">I"), "snapshots": (60, ">I"), "snapshots_offset": (64, ">Q"),
    "refcount_order": (96, ">I"), "header_length": (100, ">I"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"version": 4}, "version is not supported"),
        ({"cluster_bits": 8}, "cluster size is impossible"),
        ({"cluster_bits": 22}, "cluster size is impossible"),
        ({"refcount_order": 7}, "refcount width is impossible"),
        ({"header_length": 100}, "header length is impossible"),
        ({"header_length": 105}, "header length is impossible"),
        ({"header_length": 1 << 31}, "header length is impossible"),
        ({"l1_offset": 0}, "names no L1 table"),
        ({"l1_offset": 65537}, "L1 table lies at an impossible offset"),
        ({"l1_offset": 1 << 56}, "L1 table lies at an impossible offset"),
        ({"l1_offset": 1 << 40}, "L1 table lies behind the end of the file"),
        ({"l1_entries": 1}, "L1 table too small"),
        ({"l1_entries": (4 << 20) + 1}, "L1 table too large"),
        ({"size": (1 << 62) + 512}, "disk size is impossible"),
        ({"reftable": 0}, "names no refcount table"),
        ({"reftable_clusters": 0}, "names no refcount table"),
        ({"reftable_clusters": 129}, "refcount table too large"),
        ({"reftable": 1 << 40}, "refcount table lies behind the end of the file"),
        ({"snapshots": 1}, "names no snapshot table"),
        ({"snapshots": 65537, "snapshots_offset": 65536}, "too many snapshots"),
        ({"snapshots": 1, "snapshots_offset": 1 << 40}, "snapshot table lies behind the end of the file"),
        ({"backing_offset": 8, "backing_length": 4}, "backing file name lies at an impossible place"),
        ({"backing_offset": 65530, "backing_length": 7}, "backing file name lies at an impossible place"),
        ({"backing_offset": 1024, "backing_length": 1024}, "backing file name lies at an impossible place"),
    ],
    ids=lambda value: " ".join(f"{name}={number}" for name, number in value.items()) if isinstance(value, dict) else "",
)
def test_an_impossible_header_is_refused(fields: dict[str, int], says: str) -> None:
    with pytest.raises(ImageError, match=says):
        parse_header(fresh(**fields), file_size=1 << 20, name="image")


def test_a_luks_image_is_refused_by_name() -> None:
    data = fresh()
    header = parse_header(data[:32] + (2).to_bytes(4, "big") + data[36:], file_size=1 << 20, name="image")
    with pytest.raises(ImageError, match=r"image is encrypted.*found 2 \(LUKS\)"):
        check_usable(header, write=False, name="image")


def test_a_file_that_is_shorter_than_a_header_is_said_to_be_so() -> None:
    with pytest.raises(ImageError, match="image is shorter than a qcow2 header, expected at least 72 bytes, found 60"):
        parse_header(fresh(), file_size=60, name="image")


def with_extensions(*extensions: tuple[int, bytes], name: bytes = b"base") -> bytes:
    """A header with these extensions and a backing file."""
    data = bytearray(fresh(header_length=104))
    at = 104
    for kind, content in (*extensions, (0, b"")):
        data[at : at + 8 + len(content)] = struct.pack(">II", kind, len(content)) + content
        at += 8 + -(-len(content) // 8) * 8
    struct.pack_into(">QI", data, 8, at, len(name))
    data[at : at + len(name)] = name
    return bytes(data)


@pytest.mark.parametrize(("first", "second"), [(b"raw", b"qcow2"), (b"qcow2", b"raw")])
def test_two_formats_of_the_backing_file_are_refused(first: bytes, second: bytes) -> None:
    # qemu takes the last; who took the first would show other bytes.
    data = with_extensions((0xE2792ACA, first), (0xE2792ACA, second))
    with pytest.raises(ImageError, match="format of the backing file is named more than once"):
        parse_header(data, file_size=1 << 20, name="image")
    same = parse_header(with_extensions((0xE2792ACA, first), (0xE2792ACA, first)), file_size=1 << 20, name="image")
    assert same.backing_format == first.decode()


def test_a_backing_name_with_a_zero_byte_is_refused() -> None:
    with pytest.raises(ImageError, match="backing file name has a zero byte"):
        parse_header(with_extensions(name=b"ba\0se"), file_size=1 << 20, name="image")
