"""Images as qemu-img and qemu-io make them: read alike, written to, closed; qemu-img is the referee."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path
from typing import Any

import pytest

from nbd_qcow2j.driver import open_device
from nbd_qcow2j.errors import ImageError
from nbd_qcow2j.options import parse_options

SIZE = (3 << 20) + 5 * 512
GEOMETRIES = [
    "cluster_size=512",
    "cluster_size=1024",
    "cluster_size=2048,refcount_bits=2",
    "cluster_size=4096,refcount_bits=1",
    "cluster_size=65536",
    "cluster_size=65536,refcount_bits=8",
    "cluster_size=65536,compression_type=zstd",
    "cluster_size=16384,extended_l2=on",
    "cluster_size=131072,extended_l2=on,refcount_bits=32",
    "cluster_size=2M,refcount_bits=64",
]


def qemu(*words: object) -> str:
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
    return done.stdout


def device(path: Path, **options: object) -> Any:
    pairs = [("file", str(path)), ("journal-size", "256K"), *((key, str(value)) for key, value in options.items())]
    return open_device(parse_options(pairs))


def content(path: Path, format_: str = "qcow2") -> bytes:
    raw = path.with_suffix(".raw")
    qemu("qemu-img", "convert", "-f", format_, "-O", "raw", path, raw)
    return raw.read_bytes()


def read(served: Any) -> bytes:
    data = bytearray(served.size)
    for at in range(0, served.size, 1 << 20):
        served.read_into(memoryview(data)[at : at + (1 << 20)], at)
    return bytes(data)


def scribble(path: Path, rng: random.Random) -> None:
    """Some writes, zeros and discards by qemu."""
    words: list[object] = ["qemu-io", "-f", "qcow2"]
    for _ in range(25):
        length = rng.choice((512, 4096, 70000 // 512 * 512, 300000 // 512 * 512))
        offset = rng.randrange(0, (SIZE - length) // 512) * 512
        what = rng.choice((f"write -P {rng.randint(1, 255)}", "write -z", "discard"))
        words += ["-c", f"{what} {offset} {length}"]
    qemu(*words, path)


def rewrite(served: Any, data: bytearray, rng: random.Random) -> None:
    """Some writes, zeros and trims by us, `data` kept in step."""
    for _ in range(60):
        length = rng.choice((1, 512, 3000, 4096, 70000, 300000))
        offset = rng.randrange(0, served.size - length)
        kind = rng.choice(("write", "write", "zero", "flush"))
        if kind == "write":
            new = rng.randbytes(length)
            served.write(new, offset)
            data[offset : offset + length] = new
        elif kind == "zero":
            served.write_zeroes(offset, length, may_trim=rng.random() < 0.5, fast=False, fua=False)
            data[offset : offset + length] = bytes(length)
        else:
            served.flush()


def written_and_closed(path: Path, rng: random.Random) -> None:
    """Write to an image through us; afterwards it is plain, without errors or leaks, and holds what was written."""
    served = device(path)
    served.start()
    data = bytearray(read(served))
    rewrite(served, data, rng)
    assert read(served) == data
    served.close()
    qemu("qemu-img", "check", path)
    assert content(path) == data


@pytest.mark.parametrize("options", GEOMETRIES)
def test_every_geometry_is_read_and_written(options: str, tmp_path: Path) -> None:
    rng = random.Random(options)
    path = tmp_path / "image.qcow2"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, path, SIZE)
    scribble(path, rng)
    expected = content(path)
    served = device(path, **{"read-only": "true"})
    assert read(served) == expected
    served.close()
    info = qemu("qemu-img", "info", "--output=json", path)
    written_and_closed(path, rng)
    for line in info.splitlines():
        if "cluster-size" in line or "compat" in line or "refcount-bits" in line or "extended-l2" in line:
            assert line.strip(" ,") in qemu("qemu-img", "info", "--output=json", path)


@pytest.mark.parametrize("options", GEOMETRIES)
def test_a_compressed_image_is_read_and_written(options: str, tmp_path: Path) -> None:
    rng = random.Random(options)
    raw, path = tmp_path / "source.raw", tmp_path / "image.qcow2"
    raw.write_bytes(b"".join(rng.randbytes(700) + bytes(3396) for _ in range(SIZE // 4096)))
    qemu("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, raw, path)
    served = device(path, **{"read-only": "true"})
    assert read(served) == raw.read_bytes()
    served.close()
    written_and_closed(path, rng)


@pytest.mark.parametrize("options", GEOMETRIES)
def test_an_internal_snapshot_stays_as_it_was(options: str, tmp_path: Path) -> None:
    if "refcount_bits=1" in options:
        pytest.skip("a cluster of such an image cannot be shared")
    rng = random.Random(options)
    path = tmp_path / "image.qcow2"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, path, SIZE)
    scribble(path, rng)
    before = content(path)
    qemu("qemu-img", "snapshot", "-c", "kept", path)
    written_and_closed(path, rng)
    qemu("qemu-img", "snapshot", "-a", "kept", path)
    assert content(path) == before
    qemu("qemu-img", "check", path)


@pytest.mark.parametrize("beneath", ["raw", "qcow2", "chain"])
@pytest.mark.parametrize("options", GEOMETRIES)
def test_an_overlay_is_read_and_written(options: str, beneath: str, tmp_path: Path) -> None:
    rng = random.Random(options + beneath)
    base, path = tmp_path / "base.img", tmp_path / "image.qcow2"
    if beneath == "raw":
        base.write_bytes(rng.randbytes(SIZE // 2))
        format_ = "raw"
    else:
        qemu("qemu-img", "create", "-q", "-f", "qcow2", base, SIZE + (1 << 20))
        scribble(base, rng)
        format_ = "qcow2"
    if beneath == "chain":
        middle = tmp_path / "middle.img"
        qemu("qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.img", "-F", "qcow2", middle, SIZE // 2)
        base = middle
    # A name of ordinary length: 512-byte clusters have little room for it.
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, "-b", base.name, "-F", format_, path, SIZE)
    scribble(path, rng)
    expected = content(path)
    served = device(path, **{"read-only": "true"})
    assert read(served) == expected
    extents = served.extents(0, served.size)
    assert sum(extent.length for extent in extents) == served.size
    at = 0
    for extent in extents:
        assert not extent.zero or not any(expected[at : at + extent.length])
        at += extent.length
    served.close()
    written_and_closed(path, rng)
    assert f'"backing-filename": "{base.name}"' in qemu("qemu-img", "info", "--output=json", path)


def test_an_attached_image_is_refused_by_qemu_with_the_name_of_the_feature(tmp_path: Path) -> None:
    base, path = tmp_path / "base.img", tmp_path / "image.qcow2"
    base.write_bytes(bytes(SIZE))
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.img", "-F", "raw", path)
    before = path.read_bytes()[:65536]
    served = device(path)
    done = subprocess.run(["qemu-img", "info", "-U", path], capture_output=True, text=True, check=False)
    assert "Unsupported qcow2 feature(s): journal (nbd-qcow2j)" in done.stderr
    served.close()
    assert path.read_bytes()[:65536] == before


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (["-o", "compat=0.10"], "compat=1.1"),
        (["-o", "data_file=data.raw"], "external data file"),
        # Not LUKS: making such an image times its key derivation, which fails on a busy machine.
        (["--object", "secret,id=s,data=x", "-o", "encrypt.format=aes,encrypt.key-secret=s"], "encrypted"),
    ],
)
def test_what_is_not_served_is_refused_by_name(make: list[str], says: str, tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *make, path, "1M"], check=True, cwd=tmp_path)
    with pytest.raises(ImageError, match=says):
        device(path)


def test_a_backing_file_is_never_probed(tmp_path: Path) -> None:
    base, path = tmp_path / "base.img", tmp_path / "image.qcow2"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", base, "1M")
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", path)
    data = path.read_bytes().replace((0xE2792ACA).to_bytes(4, "big"), (0x12345678).to_bytes(4, "big"), 1)
    path.write_bytes(data)
    with pytest.raises(ImageError, match="not guessed"):
        device(path)
