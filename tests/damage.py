"""Images of every geometry made by qemu's programs, and copies of them with random damage to their metadata.

`make_images(directory)` makes one image for each row of `IMAGES`. `damaged(data, seed)` is a copy of an
image's bytes with one to three places changed; the seed says which, and replays it.
"""

from __future__ import annotations

import random
import subprocess
from dataclasses import dataclass
from pathlib import Path

from nbd_qcow2j.format.header import EXTENSION_BITMAPS, Header, parse_header
from nbd_qcow2j.format.tables import OFFSET_MASK, OFLAG_COMPRESSED, OFLAG_COPIED, OFLAG_ZERO


@dataclass(frozen=True)
class Recipe:
    """How an image is made: options of `qemu-img create`, its size, then steps."""

    name: str
    options: str
    size: str
    steps: tuple[str, ...]
    """Commands of qemu-io, or "snapshot NAME", "bitmap NAME", "backing" (before all others)."""


_WRITES = ("write -P 1 0 256k", "write -P 2 1M 64k", "write -z 2M 128k", "write -P 3 3000k 36k", "write -P 4 6M 1")
_COMPRESSED = ("write -c -P 5 4M 64k", "write -c -P 6 4160k 64k", "write -c -P 7 5M 64k")
_SNAPSHOTS = ("snapshot one", "write -P 8 64k 128k", "snapshot two", "write -P 9 1M 32k", "write -z 2M 64k")
_BITMAPS = ("bitmap first", "bitmap second", "write -P 10 512k 64k")

IMAGES = (
    *(Recipe(f"width-{1 << order}", f"refcount_bits={1 << order}", "16M", _WRITES) for order in range(7)),
    *(
        Recipe(f"width-{bits}-snapshots", f"refcount_bits={bits},cluster_size=4k", "8M", _WRITES + _SNAPSHOTS)
        for bits in (2, 4, 8, 16, 32, 64)
    ),
    Recipe("clusters-512", "cluster_size=512", "8M", _WRITES),
    Recipe("clusters-512-snapshots", "cluster_size=512", "8M", _WRITES + _SNAPSHOTS),
    Recipe("clusters-1k-width-64", "cluster_size=1k,refcount_bits=64", "8M", _WRITES),
    Recipe("clusters-2M", "cluster_size=2M", "64M", (*_WRITES, "write -P 1 40M 5M", *_SNAPSHOTS)),
    Recipe("compressed", "", "16M", (*_WRITES, *_COMPRESSED)),
    Recipe("compressed-snapshots", "", "16M", (*_WRITES, *_COMPRESSED, *_SNAPSHOTS, "write -c -P 11 7M 64k")),
    Recipe("zstd", "compression_type=zstd", "16M", (*_WRITES, *_COMPRESSED)),
    Recipe("subclusters", "extended_l2=on,cluster_size=16k", "16M", (*_WRITES, "write 5M 2k", "write -z 5130k 2k")),
    Recipe("subclusters-snapshots", "extended_l2=on", "16M", (*_WRITES, *_COMPRESSED, *_SNAPSHOTS)),
    Recipe("bitmaps", "", "16M", (*_WRITES, *_BITMAPS)),
    Recipe("bitmaps-4k", "cluster_size=4k", "16M", (*_BITMAPS, *_WRITES, *_SNAPSHOTS)),
    Recipe("version-2", "compat=0.10", "16M", ("write 0 256k", "write 1M 64k", "snapshot one", "write 64k 64k")),
    Recipe("lazy", "lazy_refcounts=on", "16M", _WRITES),
    Recipe("preallocated", "preallocation=metadata", "16M", ("write 1M 1M",)),
    Recipe("overlay", "", "16M", ("backing", "write 100k 8k", "write -z 1M 64k")),
    Recipe("odd-size", "", "5000k", ("write 4990k 10k", "write 0 64k")),
    Recipe("empty", "", "1G", ()),
    Recipe("wide", "", "64G", ("write 0 64k", "write 20G 64k", "write 63G 64k", *_SNAPSHOTS)),
)


def _run(*words: object) -> None:
    subprocess.run([str(word) for word in words], check=True, capture_output=True)


def make_image(recipe: Recipe, directory: Path) -> Path:
    """Make one image."""
    path = directory / f"{recipe.name}.qcow2"
    backing: list[str] = []
    if "backing" in recipe.steps:
        _run("qemu-img", "create", "-q", "-f", "raw", directory / f"{recipe.name}.raw", recipe.size)
        backing = ["-b", f"{recipe.name}.raw", "-F", "raw"]
    options = ["-o", recipe.options] if recipe.options else []
    _run("qemu-img", "create", "-q", "-f", "qcow2", *options, *backing, path, recipe.size)
    batch: list[str] = []

    def flush() -> None:
        if batch:
            _run("qemu-io", "-f", "qcow2", *(word for step in batch for word in ("-c", step)), path)
            batch.clear()

    for step in recipe.steps:
        verb, _, name = step.partition(" ")
        if verb in ("snapshot", "bitmap"):
            flush()
            _run("qemu-img", *(("snapshot", "-c", name, path) if verb == "snapshot" else (verb, "--add", path, name)))
        elif verb == "write":
            batch.append(step)
    flush()
    return path


def make_images(directory: Path) -> dict[str, Path]:
    """Make all images of `IMAGES`; their paths by name."""
    return {recipe.name: make_image(recipe, directory) for recipe in IMAGES}


# ---- damage


def _number(data: bytes | bytearray, at: int, length: int = 8) -> int:
    return int.from_bytes(data[at : at + length], "big")


@dataclass(frozen=True)
class Sites:
    """Where the metadata lies: offsets of entries that are in use."""

    l1: list[int]
    l2: list[int]
    reftable: list[int]
    blocks: list[int]
    other: list[tuple[int, int]]
    """(offset, length) of snapshot table and bitmap directory."""


def find_sites(data: bytes) -> tuple[Header, Sites]:
    """Walk an undamaged image."""
    header = parse_header(data[:65536], file_size=len(data), name="image")
    size, step = header.geometry.cluster_size, header.geometry.l2_entry_size
    l1 = [header.l1_offset + 8 * index for index in range(header.l1_entries)]
    tables = [_number(data, at) & OFFSET_MASK for at in l1]
    l2 = [at for table in tables if table for at in range(table, table + size, step) if any(data[at : at + step])]
    reftable = [
        header.refcount_table_offset + 8 * index
        for index in range(header.refcount_table_clusters * size // 8)
        if _number(data, header.refcount_table_offset + 8 * index)
    ]
    other = []
    if header.snapshot_count:
        other.append((header.snapshots_offset, 100))
    other += [
        (_number(each.data, 16), _number(each.data, 8)) for each in header.extensions if each.type == EXTENSION_BITMAPS
    ]
    return header, Sites([at for at, table in zip(l1, tables, strict=True) if table], l2, reftable,
                         [_number(data, at) for at in reftable], other)  # fmt: skip


def damaged(data: bytes, seed: int) -> tuple[bytes, str]:
    """A damaged copy, and what was done to it."""
    chance = random.Random(seed)
    header, sites = find_sites(data)
    copy = bytearray(data)
    done = [_damage(copy, header, sites, chance) for _ in range(chance.choice((1, 1, 2, 3)))]
    return bytes(copy), "; ".join(done)


def _damage(data: bytearray, header: Header, sites: Sites, chance: random.Random) -> str:
    size = header.geometry.cluster_size
    clusters = len(data) // size
    kind = chance.choice(("entry", "entry", "entry", "refcount", "refcount", "reftable", "other", "truncate"))
    if kind == "entry":
        places = chance.choice((sites.l1, sites.l2)) or sites.l1
        if places:
            at = chance.choice(places)
            old = _number(data, at)
            new = chance.choice(
                (
                    old ^ OFLAG_COPIED, old ^ OFLAG_COMPRESSED, old ^ OFLAG_ZERO, 0, old ^ 1 << chance.randrange(64),
                    old & ~OFFSET_MASK | chance.randrange(clusters + 2) * size, old ^ 512, old | 1 << 60,
                    _number(data, chance.choice(places)), old & ~OFFSET_MASK | (1 << 40), chance.getrandbits(64),
                )
            )  # fmt: skip
            data[at : at + 8] = new.to_bytes(8, "big")
            if header.geometry.extended_l2 and places is sites.l2 and chance.random() < 0.4:
                data[at + 8 : at + 16] = chance.getrandbits(64).to_bytes(8, "big")
            return f"entry at {at:#x}: {old:#x} becomes {new:#x}"
    if kind == "reftable" and sites.reftable:
        at = chance.choice(sites.reftable)
        old = _number(data, at)
        new = chance.choice(
            (0, old | 1 << chance.randrange(9), old ^ 512, old + (1 << 40), chance.randrange(clusters) * size)
        )
        data[at : at + 8] = new.to_bytes(8, "big")
        return f"refcount table at {at:#x}: {old:#x} becomes {new:#x}"
    if kind == "other" and sites.other:
        start, length = chance.choice(sites.other)
        at = start + chance.randrange(length)
        if at < len(data):
            data[at] ^= 1 << chance.randrange(8)
            return f"byte at {at:#x} changed"
    if kind == "truncate":
        length = chance.randrange(min(size * 4, len(data)), len(data) + 1)
        del data[length:]
        return f"file cut to {length} bytes"
    block = chance.choice(sites.blocks)
    used = max(1, min(clusters + 3, header.geometry.refcount_block_entries) * header.geometry.refcount_bits // 8)
    at = block + chance.randrange(used)
    if at < len(data):
        data[at] = chance.choice((0, data[at] ^ 1 << chance.randrange(8), 0xFF, chance.randrange(256)))
    return f"refcount byte at {at:#x} changed"
