"""Hostile images and journals: open, read, check, write and recover either work or raise this package's errors.

Method: images of several kinds, one of them with an attached journal, get one to four changes at places that
matter (header, extensions, table entries, refcounts, compressed data, snapshot table, backing name, journal), with
values that tend to hurt; a journal's checksums are made right again, so that what is behind them is reached. Then
everything is done with the image on a simulated disk that knows where it was written. For each image: no error but
`Error`, at most 2 s of CPU time a phase and 256 MiB more memory in all, no wait without an end.
"""

from __future__ import annotations

import re
import signal
import struct
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from conftest import run
from crc32c import crc32c
from damage import Recipe, find_sites, make_image
from engine import Engine, Shape, settle
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scale import scaled
from simdisk import SimDisk, SimStorage

from nbd_qcow2j import changes, checkpoint
from nbd_qcow2j.attaching import detach
from nbd_qcow2j.disk import Disk
from nbd_qcow2j.errors import Error, ImageError
from nbd_qcow2j.format.header import EXTENSION_JOURNAL, parse_header
from nbd_qcow2j.format.journal import ALIGNMENT, SLOTS_LENGTH, decode_head
from nbd_qcow2j.image.backing import open_backing
from nbd_qcow2j.image.check import check_image
from nbd_qcow2j.image.snapshots import read_snapshot_table
from nbd_qcow2j.opening import read_header, read_journal, replayed_header
from nbd_qcow2j.steps import Operation, Wait, run_simply

CPU_SECONDS = 2.0
MEMORY_KIB = 256 << 10
GROWTH = 64 << 20
"""Bytes that attaching, a few writes and closing may write."""
FARTHEST = 1 << 42
"""Where they may be, at the farthest: a refcount block that cannot be used is left out with all that it counts."""

RECIPES = (
    Recipe("plain", "cluster_size=4k", "4M", ("write -P 1 0 64k", "write -z 1M 64k", "write -P 2 2M 4k")),
    Recipe("snapshots", "cluster_size=512,refcount_bits=8", "256k", ("write 0 8k", "snapshot one", "write 4k 8k")),
    Recipe("compressed", "", "4M", ("write -c -P 5 0 64k", "write -c -P 6 64k 64k", "write -P 7 1M 64k")),
    Recipe("zstd", "compression_type=zstd,cluster_size=4k", "1M", ("write -c -P 5 0 4k", "write -c -P 6 4k 4k")),
    Recipe("subclusters", "extended_l2=on,cluster_size=16k", "2M", ("write 0 2k", "write -z 512 1k", "write 64k 40k")),
    Recipe("overlay", "refcount_bits=64", "2M", ("backing", "write 0 4k", "write 1M 4k")),
    Recipe("bitmaps", "", "2M", ("bitmap first", "write 0 64k")),
)
JOURNALS = (
    Shape("cluster_size=512", 64 << 10, journal=1 << 19),
    Shape("cluster_size=4096", 1 << 20, journal=1 << 19),
    Shape("cluster_size=16384,extended_l2=on", 1 << 20, journal=1 << 19),
)

NUMBERS = st.sampled_from(
    (
        0, 1, 2, 3, 7, 8, 9, 21, 22, 255, 511, 512, 4096, 65536, 1 << 20, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 40,
        1 << 55, (1 << 56) - 512, 1 << 56, 1 << 61, 1 << 62, 1 << 63, (1 << 63) - 1, (1 << 64) - 1, 1 << 63 | 512,
    )
) | st.integers(0, (1 << 64) - 1)
"""What to put there; cut to the width of the place."""
HEADER_FIELDS = [
    (4, 4), (8, 8), (16, 4), (20, 4), (24, 8), (32, 4), (36, 4), (40, 8), (48, 8), (56, 4), (60, 4), (64, 8), (72, 8),
    (80, 8), (88, 8), (96, 4), (100, 4), (104, 1),
]  # fmt: skip


@cache
def images() -> dict[str, bytes]:
    """Undamaged images by name."""
    with TemporaryDirectory() as directory:
        found = {recipe.name: make_image(recipe, Path(directory)).read_bytes() for recipe in RECIPES}
        for shape in JOURNALS:
            engine = Engine(shape.make(Path(directory)), shape, Random(1))
            disk = engine.open()
            settle(engine, changes.write(disk, b"d" * (shape.size // 4), 0))
            for at in range(0, shape.size // 2, shape.size // 16):
                settle(engine, changes.write(disk, b"p" * 700, at + 100))
                settle(engine, disk.flush())
            settle(engine, changes.zero(disk, shape.size // 8, shape.size // 8, trim=True, may_trim=True))
            settle(engine, disk.flush())
            path = Path(directory) / "attached.qcow2"
            engine.sim.to_file(path)
            found[f"journal {shape.options}"] = path.read_bytes()
    return found


# ---- changes


def put(data: bytearray, at: int, value: int, width: int) -> None:
    if 0 <= at <= len(data) - width:
        data[at : at + width] = (value & ((1 << 8 * width) - 1)).to_bytes(width, "big")


@cache
def places(name: str) -> dict[str, list[tuple[int, int]]]:
    """(offset, width) of what may be changed, by kind."""
    data = images()[name]
    header, sites = find_sites(data)
    size = header.geometry.cluster_size
    end = max((at for at in (header.backing_offset,) if at), default=104) + 400
    found = {
        "header": HEADER_FIELDS,
        "extensions": [(at, 4) for at in range(104, min(end, size, 1024), 4)],
        "l1": [(header.l1_offset + 8 * index, 8) for index in range(min(header.l1_entries, 64))],
        "l2": [(at, 8) for at in sites.l2] + [(at + 8, 8) for at in sites.l2 if header.geometry.extended_l2],
        "reftable": [(header.refcount_table_offset + 8 * index, 8) for index in range(min(64, size // 8))],
        "refcounts": [(block + at, 2) for block in sites.blocks for at in range(0, 64, 2)],
        "snapshots": [(start + at, 4) for start, length in sites.other for at in range(0, length, 4)],
        "data": [(at, 1) for at in range(size, len(data), 97)],
    }  # fmt: skip
    if header.backing_offset:
        found["backing"] = [(header.backing_offset + at, 1) for at in range(header.backing_offset and 12)]
    return {kind: list_ for kind, list_ in found.items() if list_}


class Drawn(tuple[str, bytes]):
    """An image to try; its bytes would be megabytes of repr."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"<{self[0]}, {len(self[1])} bytes>"


@st.composite
def changed_images(draw: Any) -> tuple[str, bytes]:
    name = draw(st.sampled_from(sorted(images())))
    data = bytearray(images()[name])
    by_kind = places(name)
    size = find_sites(images()[name])[0].geometry.cluster_size
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(sorted(by_kind)))
        at, width = draw(st.sampled_from(by_kind[kind]))
        how = draw(st.sampled_from(("number", "number", "bit", "cluster", "copy")))
        if how == "number":
            put(data, at, draw(NUMBERS), width)
        elif how == "bit":
            old = int.from_bytes(data[at : at + width], "big")
            put(data, at, old ^ 1 << draw(st.integers(0, 8 * width - 1)), width)
        elif how == "cluster":
            flags = draw(st.sampled_from((0, 1 << 63, 1 << 62, 1)))
            put(data, at, flags | draw(st.integers(0, len(data) // size + 2)) * size, width)
        else:
            other, other_width = draw(st.sampled_from(by_kind[kind]))
            put(data, at, int.from_bytes(data[other : other + other_width], "big"), width)
    if draw(st.integers(0, 9)) == 0:
        del data[draw(st.integers(0, len(data))) :]
    return Drawn((name, bytes(data)))


class Journal:
    """An attached journal taken apart: slots and transactions, put together again with right checksums."""

    def __init__(self, data: bytes) -> None:
        self.data = bytearray(data)
        header = parse_header(data[:65536], file_size=len(data), name="image")
        extension = next(each.data for each in header.extensions if each.type == EXTENSION_JOURNAL)
        body = extension[int.from_bytes(extension[:2], "big") :]
        self.offset, self.length = struct.unpack_from(">QQ", body, 8)
        area = self.data[self.offset : self.offset + self.length]
        self.slots = [bytearray(area[at : at + ALIGNMENT]) for at in (0, ALIGNMENT)]
        self.ring = area[SLOTS_LENGTH:]
        newest = max(self.slots, key=lambda each: int.from_bytes(each[40:48], "big"))
        self.tail = int.from_bytes(newest[56:64], "big")
        log = bytes(self.ring[self.tail :] + self.ring[: self.tail])
        self.transactions: list[bytearray] = []
        at = 0
        while (head := decode_head(log[at:])) is not None and len(self.transactions) < 64:
            self.transactions.append(bytearray(log[at : at + head.length]))
            at += head.length
        self.first_crc = int.from_bytes(newest[20:24], "big")

    def together(self, *, sign: bool) -> bytes:
        at, crc = self.tail, int.from_bytes(self.transactions[0][36:40], "big") if self.transactions else 0
        for slot in self.slots:
            if sign:
                slot[80:84] = crc32c(bytes(slot[:80])).to_bytes(4, "big")
        for transaction in self.transactions:
            if sign:
                transaction[36:40] = crc.to_bytes(4, "big")
                transaction[40:44] = bytes(4)
                crc = crc32c(bytes(transaction))
                transaction[40:44] = crc.to_bytes(4, "big")
            for index in range(0, len(transaction), 512):
                place = at % len(self.ring)
                self.ring[place : place + 512] = transaction[index : index + 512]
                at += 512
        self.data[self.offset : self.offset + self.length] = b"".join(self.slots) + self.ring
        return bytes(self.data)


@st.composite
def changed_journals(draw: Any) -> tuple[str, bytes]:
    name = draw(st.sampled_from([name for name in sorted(images()) if name.startswith("journal")]))
    journal = Journal(images()[name])
    assert journal.transactions
    for _ in range(draw(st.integers(1, 3))):
        what = draw(st.sampled_from(("slot", "head", "descriptor", "descriptor", "data", "order")))
        if what == "slot":
            fields = [(8, 4), (12, 4), (16, 4), (20, 4), *((at, 8) for at in range(40, 80, 8))]
            at, width = draw(st.sampled_from(fields))
            put(draw(st.sampled_from(journal.slots)), at, draw(NUMBERS), width)
            continue
        transaction = draw(st.sampled_from(journal.transactions))
        if what == "head":
            put(transaction, draw(st.sampled_from((4, 8, 12, 16, 24, 32))), draw(NUMBERS), 4)
        elif what == "descriptor":
            count = max(1, int.from_bytes(transaction[4:8], "big") % 200)
            base = 64 + 24 * draw(st.integers(0, count))
            at, width = draw(st.sampled_from(((0, 4), (4, 4), (8, 8), (16, 4))))
            value = draw(NUMBERS | st.integers(0, len(journal.data) // 512 + 8).map(lambda each: each * 512))
            put(transaction, base + at, value, width)
        elif what == "data":
            put(transaction, draw(st.integers(64, len(transaction) - 8)), draw(NUMBERS), 8)
        else:
            first, second = draw(st.tuples(*[st.integers(0, len(journal.transactions) - 1)] * 2))
            transactions = journal.transactions
            transactions[first], transactions[second] = transactions[second], transactions[first]
    return Drawn((name, journal.together(sign=draw(st.integers(0, 3)) > 0)))


# ---- what is done with them


@contextmanager
def bounded(what: str, seen: Counter[str]) -> Iterator[None]:
    """Errors of the package are fine; anything else, and more CPU time than is allowed, is not."""

    def stop(*_: object) -> None:
        raise AssertionError(f"{what}: more than {CPU_SECONDS} s of CPU time")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, CPU_SECONDS)
    try:
        yield
    except Error as error:
        assert "\n" not in str(error)
        seen[f"{what}: refused"] += 1
    else:
        seen[f"{what}: done"] += 1
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


class Nothing:
    """What a backing file of zeros would be."""

    name, format, size = "zeros", "raw", 1 << 40

    def read_into(self, view: memoryview, offset: int) -> Iterator[Any]:
        view[:] = bytes(len(view))
        return
        yield

    def extents(self, offset: int, length: int) -> Iterator[Any]:
        from nbd_qcow2j.image.backing import Extent  # noqa: PLC0415

        return [Extent(length, True, False)]
        yield

    def close(self) -> None:
        return


def ranges(size: int) -> list[tuple[int, int]]:
    """What is read of a disk: all of a small one, beginning, end and samples of a large one."""
    if size <= 4 << 20:
        return [(at, min(1 << 18, size - at)) for at in range(0, size, 1 << 18)]
    starts = [0, 1 << 18, size // 3, size // 2, size - (1 << 18)]
    return [(at, 1 << 18) for at in starts]


def read_all(disk: Disk) -> None:
    failed: Error | None = None
    for offset, length in ranges(disk.geometry.size):
        for step in range(0, length, 1 << 16):
            # One bad cluster is an error of its own range.
            try:
                run_simply(disk.read_into(memoryview(bytearray(min(1 << 16, length - step))), offset + step))
            except Error as error:
                failed = error
        run_simply(disk.extents(offset, length))
    if failed is not None:
        raise failed


def drive(disk: Disk, operation: Operation[Any]) -> None:
    """Run an operation; where it waits, the writer has a turn, and it must not wait for ever."""
    result: Any = None
    failure: OSError | None = None
    turns = 0
    while True:
        try:
            step = operation.send(result) if failure is None else operation.throw(failure)
        except StopIteration:
            return
        result, failure = None, None
        if isinstance(step, Wait):
            turns += 1
            assert turns < 300, f"waits for {step.gate.name} without an end"
            try:
                tight = checkpoint.is_tight(disk)
                run_simply(checkpoint.round_(disk, tight=tight, again=tight))
                run_simply(checkpoint.settle(disk))
                run_simply(disk.allocator.release())
            except Error as error:
                # As the writer does.
                disk.log.latch(error, "background work")
            continue
        try:
            result = step.perform()
        except OSError as error:
            failure = error


def exercise(data: bytes, name: str, seen: Counter[str]) -> None:
    shape = Shape("", 0, backed=False)
    sim = SimDisk.of([(0, data)], len(data))
    state = sim.content_digest()
    backing: Any = Nothing() if name == "overlay" else None
    with bounded("read", seen):
        engine = Engine(sim, shape, Random(1), read_only=True)
        engine.backing = backing
        read_all(engine.open())
    with bounded("check", seen):
        storage = SimStorage(sim, "checked", read_only=True)
        header, _ = run_simply(read_header(storage, name="image"))
        plan = run_simply(read_journal(storage, header, name="image"))

        def read(offset: int, length: int) -> bytearray:
            buffer = bytearray(length)
            storage.read_into(buffer, offset)
            return buffer

        overlaid: Callable[[int, int], bytes | bytearray] = plan.overlay(read) if plan else read
        if plan:
            header = replayed_header(header, bytes(overlaid(0, 65536)), file_size=storage.size(), name="image")
        read_snapshot_table(header, overlaid, "image")
        check_image(header, overlaid, file_size=storage.size(), name="image")
    assert sim.content_digest() == state, "reading or checking has written"
    with bounded("write", seen):
        engine = Engine(sim, shape, Random(1))
        engine.backing = backing
        disk = engine.open()
        try:
            size = disk.geometry.size
            for wanted, length in ((0, 65536), (size // 2, 5000), (100, 700), (size - 512, 512)):
                offset = max(0, min(wanted, size - 1))
                data_ = b"w" * min(length, size - offset)
                try:
                    drive(disk, changes.guarded(disk, changes.write(disk, data_, offset), "write"))
                    trim = changes.zero(disk, offset, len(data_), trim=True, may_trim=True)
                    drive(disk, changes.guarded(disk, trim, "trim"))
                except Error:
                    seen["request refused"] += 1
            drive(disk, disk.flush())
        finally:
            drive(disk, detach(disk))
    written = sum(done.length for done in sim.history if done.kind.startswith("write"))
    assert written <= GROWTH
    far = [done for done in sim.history if not 0 <= done.offset <= FARTHEST - done.length]
    assert not far, far
    assert peak_kib() < BASELINE[0] + MEMORY_KIB


BASELINE = [0]


def peak_kib(*, reset: bool = False) -> int:
    """The most memory that this process had since the last reset. Linux: proc(5), clear_refs and VmHWM."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    found = re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())
    assert found
    return int(found[1])


def fuzz(strategy: st.SearchStrategy[tuple[str, bytes]], examples: int, *, derandomize: bool) -> Counter[str]:
    seen: Counter[str] = Counter()
    images()
    BASELINE[0] = peak_kib(reset=True)

    @settings(
        max_examples=examples, deadline=None, derandomize=derandomize, database=None, print_blob=True,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(strategy)
    def one(drawn: tuple[str, bytes]) -> None:
        name, data = drawn
        exercise(data, name, seen)
        seen["images"] += 1

    one()
    print(f"fuzzed: {dict(sorted(seen.items()))}")
    return seen


def test_undamaged_images_pass(tmp_path: Path) -> None:
    seen: Counter[str] = Counter()
    images()
    BASELINE[0] = peak_kib(reset=True)
    for name, data in images().items():
        exercise(data, name, seen)
    assert seen["read: done"] == seen["check: done"] == len(images())
    # Persistent bitmaps are refused for writing.
    assert seen["write: done"] == len(images()) - 1


def test_hostile_images_are_served_or_refused() -> None:
    seen = fuzz(changed_images(), 800, derandomize=True)
    assert seen["read: done"] > 20
    assert seen["read: refused"] > 20


def test_hostile_journals_are_replayed_or_refused() -> None:
    seen = fuzz(changed_journals(), 600, derandomize=True)
    assert seen["read: done"] > 20
    assert seen["read: refused"] > 20


@pytest.mark.sweep
def test_many_hostile_images() -> None:
    fuzz(changed_images(), scaled(1500), derandomize=False)


@pytest.mark.sweep
def test_many_hostile_journals() -> None:
    fuzz(changed_journals(), scaled(1000), derandomize=False)


@pytest.mark.sweep
@pytest.mark.parametrize("what", ["images", "journals"])
def test_fuzzing_that_follows_coverage_finds_nothing(what: str, tmp_path: Path) -> None:
    pytest.importorskip("atheris", reason="there is no atheris for this platform")
    program = Path(__file__).with_name("guided.py")
    options = [f"-runs={scaled(800)}", "-len_control=0", "-max_len=2048", "-seed=1", "-print_final_stats=1"]
    done = run(sys.executable, program, what, *options, check=False, cwd=tmp_path)
    assert done.returncode == 0, f"{done.stderr[-6000:]}\n{list(tmp_path.iterdir())}"
    executed = [line for line in done.stderr.splitlines() if line.startswith("stat::number_of_executed_units")]
    assert executed
    print(f"guided by coverage, {what}: {executed[0].split()[-1]} inputs")


# ---- backing names

NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=40) | st.sampled_from(
    (
        "/etc/passwd", "../../etc/passwd", "nbd:localhost:10809", "json:{}", "file:base.img", "http://x/y", ".", "/",
        "//", "image.qcow2", "./image.qcow2", "base.img/", "a" * 1000, "fd:3", "\u202e", "base.img",
    )
)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(NAMES, st.sampled_from(["raw", "qcow2", None, "vmdk", "file", "RAW"]))
def test_a_backing_name_opens_that_file_in_that_format_or_none(name: str, format_: str | None) -> None:
    # Scenario: whatever the name, at most the file that it names is opened, and its format is never guessed.
    from dataclasses import replace  # noqa: PLC0415

    header = parse_header(images()["plain"][:65536], file_size=1 << 20, name="image")
    header = replace(header, backing_name=name.encode("utf-8", "surrogateescape"), backing_format=format_)
    opened: list[str] = []
    with TemporaryDirectory() as directory:
        path = Path(directory) / "image.qcow2"
        path.write_bytes(images()["plain"])
        # A raw disk into which a guest has written a qcow2 header that names another file.
        (Path(directory) / "base.img").write_bytes(images()["overlay"])

        def opener(asked: str) -> SimStorage:
            opened.append(asked)
            return SimStorage(SimDisk.from_file(asked), asked, read_only=True)

        try:
            layer = open_backing(header, str(path), policy="allow", opener=opener)
        except (Error, OSError) as error:
            assert not isinstance(error, OSError) or opened, f"{name!r}: {error}"
            return
        assert layer is not None
        assert format_ == layer.format
        assert format_ in ("raw", "qcow2")
        if format_ == "raw":
            assert len(opened) == 1, "a raw file names no other"
        with pytest.raises(ImageError, match="backing=deny"):
            open_backing(header, str(path), policy="deny", opener=opener)
