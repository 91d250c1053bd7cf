"""Small images of every kind for crash scenarios, made by qemu's programs, as simulated disks.

Every sector holds what `engine.fill` makes of some number, so that the oracle can read it: a pattern image has
-1 - its sector's number, as a backing file of `engine.Pattern` has.
"""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path

from engine import SECTOR, Shape, fill, room_before_journal
from simdisk import SimDisk, SimStorage

BACKING_NAME = "far/" * 150 + "base"


def make(kind: str, shape: Shape, directory: Path) -> SimDisk:
    """An image of this kind: see the comments of each."""
    path = directory / "image.qcow2"
    raw = directory / "pattern.raw"
    raw.write_bytes(b"".join(fill(-sector - 1) for sector in range(shape.size // SECTOR)))
    # A name that goes on in the header's second sector, where there is one.
    backing = ["-u", "-b", "base" if "cluster_size=512" in shape.options else BACKING_NAME, "-F", "raw"]
    if kind in ("compressed", "snapshot", "foreign-l2"):
        words = ["-c"] if kind == "compressed" else []
        _run("qemu-img", "convert", *words, "-f", "raw", "-O", "qcow2", "-o", shape.options, raw, path)
        if kind == "snapshot":
            _run("qemu-img", "snapshot", "-c", "one", path)
    elif kind == "overlay":
        # The header has the name only; what lies beneath reads as the pattern of the harness.
        _run("qemu-img", "create", "-f", "qcow2", "-o", shape.options, *backing, path, shape.size)
    else:
        _run("qemu-img", "create", "-f", "qcow2", "-o", shape.options, path, shape.size)
    if kind == "subclusters":
        # Allocated, zero and unallocated subclusters in one cluster, another one whole.
        commands = ["write -P 1 512 512", "write -z 2k 1k", "write -P 2 16k 16k"]
        _run("qemu-io", "-f", "qcow2", *(word for each in commands for word in ("-c", each)), path)
    disk = SimDisk.from_file(path)
    if kind == "padded":
        # The refcount table has one cluster of 64 entries, each for a block of 64 clusters; the journal will end
        # 8 clusters before what they can count.
        journal = shape.journal + 8192 + room_before_journal(512)
        disk.durable_size = disk.current_size = (64 * 64 - 8) * 512 - journal
    if kind == "foreign-l2":
        # The L1 entries lack the copied flag, as if the tables were shared: each is copied at its first change, and
        # the old one, whose refcount is one, is freed. (A cautious program may leave images so; check tells.)
        offset = struct.unpack(">Q", disk.peek(40, 8))[0]
        count = struct.unpack(">I", disk.peek(36, 4))[0]
        entries = struct.unpack(f">{count}Q", disk.peek(offset, 8 * count))
        storage = SimStorage(disk)
        storage.write(offset, [struct.pack(f">{count}Q", *(each & ~(1 << 63) for each in entries))])
        storage.sync()
    disk.stale_growth = True
    return disk.copy()


def _run(*words: object) -> None:
    subprocess.run([str(word) for word in words], check=True, stdout=subprocess.DEVNULL)
