"""Damaged and hostile tables: a write is refused before it does harm, the image is marked corrupt, reading goes on.

What was accepted before the damage was met goes to a new home; what the damaged entry named is left alone.
"""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
from conftest import PROGRAM, Server, run
from damage import find_sites
from engine import Engine, Shape, room_before_journal, settle
from simdisk import SimDisk, SimStorage

from nbd_qcow2j import changes
from nbd_qcow2j.attaching import detach
from nbd_qcow2j.errors import ImageError, RequestError
from nbd_qcow2j.format.header import INCOMPAT_CORRUPT, INCOMPAT_JOURNAL, parse_header
from nbd_qcow2j.geometry import Geometry
from nbd_qcow2j.image.overlap import Overlaps
from nbd_qcow2j.image.snapshots import read_snapshot_table
from nbd_qcow2j.opening import open_disk
from nbd_qcow2j.steps import run_simply

CLUSTER = 4096
PER_TABLE = 2 << 20
SHAPE = Shape("cluster_size=4096", 8 << 20)
COPIED = 1 << 63
MASK = 0x00FF_FFFF_FFFF_FE00
COMPRESSED = 1 << 62


class Image:
    """An image with data at the beginning of three L2 tables, and where its metadata lies."""

    def __init__(self, directory: Path) -> None:
        self.sim = SHAPE.make(directory)
        engine = Engine(self.sim, SHAPE, Random(1))
        disk = engine.open()
        for at in (0, PER_TABLE, 2 * PER_TABLE):
            settle(engine, changes.write(disk, bytes([1 + at // PER_TABLE]) * 2 * CLUSTER, at))
        settle(engine, detach(disk))
        header = self.header()
        self.l1, self.reftable = header.l1_offset, header.refcount_table_offset
        self.tables = [self.number(self.l1 + 8 * index) & MASK for index in range(3)]
        self.block = self.number(self.reftable)
        self.size = self.sim.current_size

    def bytes(self, offset: int, length: int) -> bytes:
        data = bytearray(length)
        SimStorage(self.sim, "looked at", read_only=True).read_into(data, offset)
        return bytes(data)

    def number(self, offset: int) -> int:
        return int.from_bytes(self.bytes(offset, 8), "big")

    def put(self, offset: int, value: int, width: int = 8) -> None:
        storage = SimStorage(self.sim, "damaged")
        sector = bytearray(self.bytes(offset // 512 * 512, 512))
        sector[offset % 512 : offset % 512 + width] = value.to_bytes(width, "big")
        storage.write(offset // 512 * 512, [bytes(sector)])
        storage.sync()

    def header(self):  # type: ignore[no-untyped-def]
        return parse_header(self.bytes(0, CLUSTER), file_size=self.sim.current_size, name="image")

    @property
    def is_corrupt(self) -> bool:
        return bool(self.header().incompatible & INCOMPAT_CORRUPT)

    def metadata(self) -> dict[str, bytes]:
        """What no write may touch, whatever a damaged entry says."""
        return {
            "header": self.bytes(0, 72), "refcount table": self.bytes(self.reftable, CLUSTER),
            "second L2 table": self.bytes(self.tables[1], CLUSTER),
        }  # fmt: skip


@pytest.fixture
def image(tmp_path: Path) -> Image:
    return Image(tmp_path)


# What an entry may name, and what the log says of it.
TARGETS: dict[str, tuple[Callable[[Image], int], str]] = {
    "refcount table": (lambda image: image.reftable, "the refcount table"),
    "refcount block": (lambda image: image.block, "a refcount block"),
    "L1 table": (lambda image: image.l1, "the active L1 table"),
    "another L2 table": (lambda image: image.tables[1], "an(other)? L2 table|another L2 table"),
}
FREE = {"free cluster": (lambda image: image.size - (image.size % CLUSTER) + (1 << 24), "has no refcount")}


def refused(engine: Engine, operation, says: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises((RequestError, ImageError), match=says) as caught:
        settle(engine, changes.guarded(engine.disk, operation, "write"))
    assert caught.value.errno == errno.EIO


def write_page(engine: Engine, offset: int, content: bytes) -> None:
    """A write that is answered as soon as it is pending."""
    disk = engine.disk
    assert disk is not None
    disk.settings = replace(disk.settings, direct_write=1 << 16)
    settle(engine, changes.guarded(disk, changes.write(disk, content, offset), "write"))
    assert offset // CLUSTER in disk.pending.clusters
    disk.settings = replace(disk.settings, direct_write=CLUSTER)


DATA = {**TARGETS, **FREE}
"""An entry without an offset is an unallocated cluster, whatever its flags: the header cannot be named."""


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("what", ["write", "zero", "trim"])
def test_a_data_entry_on_metadata_is_neither_written_nor_freed(image: Image, name: str, what: str) -> None:
    target, says = DATA[name]
    image.put(image.tables[0], COPIED | target(image))
    before = image.metadata()
    engine = Engine(image.sim, SHAPE, Random(2))
    disk = engine.open()
    operation = {
        "write": lambda: changes.write(disk, b"x" * 2 * CLUSTER, 0),
        "zero": lambda: changes.zero(disk, 0, CLUSTER, trim=False, may_trim=True),
        "trim": lambda: changes.zero(disk, 0, CLUSTER, trim=True, may_trim=True),
    }[what]
    refused(engine, operation(), says)
    # Everything else is refused from then on, wherever it goes; reading goes on.
    refused(engine, changes.write(disk, b"y" * CLUSTER, 4 << 20), "marked corrupt")
    assert not disk.try_write(b"y" * CLUSTER, 4 << 20)
    data = bytearray(CLUSTER)
    run_simply(disk.read_into(memoryview(data), PER_TABLE + CLUSTER))
    assert bytes(data) == b"\2" * CLUSTER
    settle(engine, disk.flush())
    settle(engine, detach(disk))
    assert image.is_corrupt
    assert not image.header().incompatible & INCOMPAT_JOURNAL
    assert {key: value[:72] for key, value in image.metadata().items()} == {
        key: value[:72] for key, value in before.items()
    }
    with pytest.raises(ImageError, match="marked corrupt: nbd-qcow2j check"):
        Engine(image.sim, SHAPE, Random(3)).open()
    Engine(image.sim, SHAPE, Random(3), read_only=True).open()


@pytest.mark.parametrize("name", DATA)
def test_an_accepted_page_goes_to_a_new_home_instead(image: Image, name: str) -> None:
    # Scenario: a small write is acknowledged before anybody looks at the entry; the checkpoint must not lose it.
    target, _ = DATA[name]
    image.put(image.tables[0], COPIED | target(image))
    kept = image.bytes(target(image), CLUSTER) if name != "refcount block" else b""
    before = image.metadata()
    engine = Engine(image.sim, SHAPE, Random(2))
    engine.settings = replace(engine.settings, in_place=False)
    disk = engine.open()
    write_page(engine, 0, b"p" * CLUSTER)
    settle(engine, disk.flush())
    settle(engine, detach(disk))
    assert image.is_corrupt
    assert image.number(image.tables[0]) & MASK != target(image)
    assert image.bytes(image.number(image.tables[0]) & MASK, CLUSTER) == b"p" * CLUSTER
    assert {key: value for key, value in image.metadata().items() if key != "header"} == {
        key: value for key, value in before.items() if key != "header"
    }
    if kept and name != "L1 table":
        assert image.bytes(target(image), CLUSTER) == kept
    after = Engine(image.sim, SHAPE, Random(3), read_only=True).open()
    data = bytearray(CLUSTER)
    run_simply(after.read_into(memoryview(data), 0))
    assert bytes(data) == b"p" * CLUSTER


@pytest.mark.parametrize("name", [name for name in DATA if name not in FREE])
def test_an_l1_entry_on_metadata_is_not_changed(image: Image, name: str) -> None:
    target, says = DATA[name]
    image.put(image.l1, COPIED | target(image))
    kept = image.bytes(target(image), CLUSTER)
    engine = Engine(image.sim, SHAPE, Random(2))
    disk = engine.open()
    # Where the entries of what is read as a table are impossible, that is what is said.
    refused(engine, changes.write(disk, b"x" * 8 * CLUSTER, 1 << 20), says)
    settle(engine, detach(disk))
    assert image.is_corrupt
    if name not in ("refcount block", "L1 table"):
        assert image.bytes(target(image), CLUSTER) == kept


def test_two_l1_entries_with_one_table_are_not_changed(image: Image) -> None:
    image.put(image.l1 + 8, COPIED | image.tables[0])
    kept = image.bytes(image.tables[0], CLUSTER)
    engine = Engine(image.sim, SHAPE, Random(2))
    disk = engine.open()
    refused(engine, changes.write(disk, b"x" * CLUSTER, PER_TABLE + (1 << 20)), "another L2 table")
    settle(engine, detach(disk))
    assert image.bytes(image.tables[0], CLUSTER) == kept


def test_a_page_below_a_table_that_two_entries_name_gets_a_table_of_its_own(image: Image) -> None:
    image.put(image.l1 + 8, COPIED | image.tables[0])
    kept = image.bytes(image.tables[0], CLUSTER)
    engine = Engine(image.sim, SHAPE, Random(2))
    engine.settings = replace(engine.settings, in_place=False)
    disk = engine.open()
    write_page(engine, PER_TABLE + (1 << 20), b"q" * CLUSTER)
    settle(engine, detach(disk))
    assert image.bytes(image.tables[0], CLUSTER) == kept
    assert image.number(image.l1) & MASK == image.tables[0]
    assert image.number(image.l1 + 8) & MASK not in (0, *image.tables[:2])
    assert image.is_corrupt


@pytest.mark.parametrize("name", ["L1 table", "refcount table", "another L2 table"])
def test_a_refcount_block_on_metadata_is_not_changed(image: Image, name: str) -> None:
    # Scenario: the only block lies on something else: nothing has a refcount, so nothing may be freed or reused.
    target, _ = TARGETS[name]
    image.put(image.reftable, target(image))
    kept = image.bytes(target(image), CLUSTER)
    engine = Engine(image.sim, SHAPE, Random(2))
    disk = engine.open()
    refused(engine, changes.write(disk, b"x" * CLUSTER, 0), "no refcount")
    settle(engine, detach(disk))
    # A new block, for clusters that the bad one does not count, gets the next entry of the refcount table.
    length = 8 if name == "refcount table" else CLUSTER
    assert image.bytes(target(image), length) == kept[:length]
    assert image.sim.current_size >= image.size, "cut off what has no refcount"


def test_a_refcount_block_behind_the_end_of_the_file_is_not_written(image: Image) -> None:
    # Scenario: it would read as zeros, as if all that it counts were free, and go home there.
    far = 1 << 48
    image.put(image.reftable, far)
    engine = Engine(image.sim, SHAPE, Random(2))
    disk = engine.open()
    refused(engine, changes.write(disk, b"x" * CLUSTER, 0), "no refcount")
    disk.corrupt = ""
    write_page(engine, 3 * PER_TABLE, b"q" * CLUSTER)
    settle(engine, detach(disk))
    assert disk.allocator.allocated
    assert all(each.offset < far for each in image.sim.history)


def test_a_guest_never_reads_the_journal(image: Image) -> None:
    # Scenario: an entry names the place behind the file where the ring is put; its UUID must not be seen.
    ring = -(-image.size // CLUSTER) * CLUSTER + room_before_journal(CLUSTER)
    sectors = 8
    for index, entry in enumerate((COPIED | ring, COMPRESSED | (sectors - 1) << 58 | ring)):
        image.put(image.tables[0] + 8 * index, entry)
    engine = Engine(image.sim, SHAPE, Random(2))
    disk = engine.open()
    assert disk.log.ring.location.offset == ring
    for at in (0, CLUSTER):
        with pytest.raises(ImageError, match="names the journal"):
            run_simply(disk.read_into(memoryview(bytearray(CLUSTER)), at))
    assert disk.find_contiguous(0, CLUSTER) == -1, "the short way leaves it to the long one"
    refused(engine, changes.write(disk, b"x" * 2 * CLUSTER, 0), "names the journal")
    settle(engine, detach(disk))


def test_free_clusters_that_hold_metadata_are_not_handed_out(image: Image) -> None:
    # Scenario: the refcounts of the L1 table, the refcount block, a table and the refcount table say: free.
    for offset in (image.l1, image.block, image.tables[1], image.reftable):
        image.put(image.block + 2 * (offset // CLUSTER), 0, 2)
    kept = image.metadata()
    engine = Engine(image.sim, SHAPE, Random(2))
    disk = engine.open()
    for at in range(0, 1 << 20, 16 * CLUSTER):
        settle(engine, changes.write(disk, b"x" * 16 * CLUSTER, (4 << 20) + (1 << 19) + at))
    settle(engine, detach(disk))
    after = image.metadata()
    assert after["second L2 table"] == kept["second L2 table"]
    assert after["refcount table"][:8] == kept["refcount table"][:8]
    data = bytearray(CLUSTER)
    run_simply(Engine(image.sim, SHAPE, Random(3), read_only=True).open().read_into(memoryview(data), PER_TABLE))
    assert bytes(data) == b"\2" * CLUSTER


def test_the_mark_goes_through_the_journal_and_recovery_keeps_it(image: Image) -> None:
    # Scenario: a page is accepted and flushed; another write meets the damage; flush, SIGKILL. Serving is refused,
    # recovering sends the page home and leaves the image plain and marked.
    image.put(image.tables[0], COPIED | image.l1)
    engine = Engine(image.sim, SHAPE, Random(2))
    disk = engine.open()
    write_page(engine, PER_TABLE + 8 * CLUSTER, b"k" * CLUSTER)
    refused(engine, changes.write(disk, b"x" * CLUSTER, 0), "the active L1 table")
    settle(engine, disk.flush())
    image.sim.kill(Random(4))
    with pytest.raises(ImageError, match=r"marked corrupt: nbd-qcow2j recover .* qemu-img check -r all"):
        Engine(image.sim, SHAPE, Random(5)).open()
    again = Engine(image.sim, SHAPE, Random(6))
    recovered = run_simply(
        open_disk(
            again.file, again.background, settings=again.settings, read_only=False, backing=None, uuid=b"u" * 16,
            name="image", recover=True,
        )
    )  # fmt: skip
    again.disk = recovered
    refused(again, changes.write(recovered, b"y" * CLUSTER, 4 << 20), "marked so earlier")
    settle(again, detach(recovered))
    header = image.header()
    assert header.incompatible & INCOMPAT_CORRUPT
    assert not header.incompatible & INCOMPAT_JOURNAL
    data = bytearray(CLUSTER)
    after = Engine(image.sim, SHAPE, Random(3), read_only=True).open()
    run_simply(after.read_into(memoryview(data), PER_TABLE + 8 * CLUSTER))
    assert bytes(data) == b"k" * CLUSTER


def test_tables_that_lie_on_each_other_are_refused_at_once(image: Image) -> None:
    image.put(40, image.reftable)
    with pytest.raises(ImageError, match="the refcount table lies on the L1 table"):
        Engine(image.sim, SHAPE, Random(2)).open()


@pytest.mark.parametrize("entry", [1 << 57 | 1 << 20, COPIED | (1 << 20) + 512, COPIED | 1 << 55, MASK])
def test_an_impossible_entry_is_an_error_of_that_cluster_alone(image: Image, entry: int) -> None:
    image.put(image.tables[0], entry)
    engine = Engine(image.sim, SHAPE, Random(2))
    disk = engine.open()
    data = bytearray(CLUSTER)
    try:
        run_simply(disk.read_into(memoryview(data), 0))
    except ImageError as error:
        assert "L2 entry is impossible" in str(error)
    else:
        # Behind the end of the file are zeros.
        assert not any(data)
    run_simply(disk.read_into(memoryview(data), CLUSTER))
    assert bytes(data) == b"\1" * CLUSTER
    settle(engine, changes.guarded(disk, changes.write(disk, b"z" * CLUSTER, 4 << 20), "write"))
    settle(engine, detach(disk))


def test_qemu_mends_what_we_marked(image: Image, tmp_path: Path) -> None:
    image.put(image.tables[0], COPIED | image.reftable)
    engine = Engine(image.sim, SHAPE, Random(2))
    disk = engine.open()
    write_page(engine, CLUSTER * 3, b"k" * CLUSTER)
    refused(engine, changes.write(disk, b"x" * CLUSTER, 0), "the refcount table")
    settle(engine, detach(disk))
    path = tmp_path / "marked.qcow2"
    image.sim.to_file(path)
    assert "corrupt: true" in run("qemu-img", "info", path).stdout
    run("qemu-img", "check", "-r", "all", path, check=False)
    assert "corrupt: false" in run("qemu-img", "info", path).stdout
    run("qemu-img", "check", path)


def test_a_table_without_a_refcount_is_not_changed(image: Image) -> None:
    # Scenario: an L1 entry names a place far behind the end of the file, where zeros would be read as a table.
    image.put(image.l1, COPIED | 1 << 42)
    engine = Engine(image.sim, SHAPE, Random(2))
    disk = engine.open()
    refused(engine, changes.write(disk, b"x" * CLUSTER, 0), "which has no refcount")
    settle(engine, detach(disk))
    assert image.sim.current_size < 1 << 30
    assert image.is_corrupt


def test_a_client_is_told_eio_and_the_log_says_why(
    make_image: Callable[..., Path], serve: Callable[..., Server]
) -> None:
    import nbd  # noqa: PLC0415 -- only here

    path = make_image()
    run("qemu-io", "-f", "qcow2", "-c", "write -P 7 0 256k", path)
    data = bytearray(path.read_bytes())
    header, sites = find_sites(bytes(data))
    data[sites.l2[0] : sites.l2[0] + 8] = (COPIED | header.l1_offset).to_bytes(8, "big")
    path.write_bytes(data)
    server = serve(path)
    handle = server.connect()
    for at in (0, 1 << 20):
        with pytest.raises(nbd.Error) as caught:
            handle.pwrite(b"x" * (64 << 10), at)
        assert caught.value.errno == "EIO"
    assert bytes(handle.pread(65536, 65536)) == b"\7" * 65536
    handle.shutdown()
    server.stop()
    assert "guest cluster 0 names host cluster" in server.log
    assert "which is the active L1 table" in server.log
    assert "Traceback" not in server.log
    assert "corrupt: true" in run("qemu-img", "info", path).stdout
    done = run(PROGRAM, "serve", path, "--socket", path.with_suffix(".sock"), check=False)
    assert done.returncode != 0
    assert "marked corrupt" in done.stderr
    assert done.stderr.count("\n") == 1
    server = serve(path, "--read-only")
    assert bytes(server.connect().pread(65536, 65536)) == b"\7" * 65536


@pytest.mark.parametrize("name", ["L1 table", "refcount table", "free cluster"])
def test_marking_and_closing_can_be_cut_anywhere(image: Image, name: str) -> None:
    # Scenario: two pages are accepted and flushed, one of them below the damaged entry; a direct write meets the
    # damage, the mark is committed, the image is closed. Cut before each operation, recover, look at everything.
    image.put(image.tables[0], COPIED | DATA[name][0](image))
    second_table = image.bytes(image.tables[1], CLUSTER)
    engine, rng = Engine(image.sim, SHAPE, Random(2)), Random(3)
    engine.settings = replace(engine.settings, in_place=False)
    disk = engine.open()
    # Or it would be met as soon as room is asked for.
    disk.allocator.counted = None
    write_page(engine, 0, b"p" * CLUSTER)
    write_page(engine, 4 << 20, b"q" * CLUSTER)
    settle(engine, disk.flush())
    seen: Counter[str] = Counter()
    operations = -1

    def look(kind: str, offset: int, length: int) -> None:
        nonlocal operations
        if image.sim.operations == operations:
            return
        operations = image.sim.operations
        for state in image.sim.crash_states(10, rng):
            again = Engine(state, SHAPE, Random(4))
            opening = open_disk(
                again.file, again.background, settings=again.settings, read_only=False, backing=None, uuid=b"u" * 16,
                name="image", recover=True,
            )  # fmt: skip
            try:
                again.disk = run_simply(opening)
            except ImageError as error:
                # Closed and marked.
                assert "is marked corrupt: nbd-qcow2j check" in str(error)
                seen["closed"] += 1
            else:
                seen["marked" if again.disk.corrupt else "not marked"] += 1
                settle(again, detach(again.disk))
            after = Engine(state, SHAPE, Random(5), read_only=True).open()
            for at, content in ((0, b"p"), (4 << 20, b"q"), (PER_TABLE, b"\2"), (2 * PER_TABLE + CLUSTER, b"\3")):
                data = bytearray(CLUSTER)
                run_simply(after.read_into(memoryview(data), at))
                assert bytes(data) == content * CLUSTER, at
            table = bytearray(CLUSTER)
            SimStorage(state, "after", read_only=True).read_into(table, image.tables[1])
            assert bytes(table) == second_table

    image.sim.hook = look
    refused(engine, changes.write(disk, b"x" * CLUSTER, 0), DATA[name][1])
    settle(engine, disk.flush())
    settle(engine, detach(disk))
    image.sim.hook = None
    print(f"{sum(seen.values())} cut states: {dict(seen)}")
    assert min(seen[each] for each in ("closed", "marked", "not marked")) > 0
    assert image.is_corrupt


@pytest.mark.parametrize("what", ["the snapshot table", "the L1 table of a snapshot"])
def test_an_entry_on_what_a_snapshot_needs_is_not_written(tmp_path: Path, what: str) -> None:
    path = tmp_path / "image.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=4096", path, "8M")
    run("qemu-io", "-f", "qcow2", "-c", "write -P 1 0 64k", path)
    run("qemu-img", "snapshot", "-c", "kept", path)
    run("qemu-io", "-f", "qcow2", "-c", "write -P 2 0 64k", path)
    data = bytearray(path.read_bytes())
    header, sites = find_sites(bytes(data))
    (snapshot,) = read_snapshot_table(header, lambda at, length: bytes(data[at : at + length]), "image")
    target = {"the snapshot table": header.snapshots_offset, "the L1 table of a snapshot": snapshot.l1_offset}[what]
    data[sites.l2[0] : sites.l2[0] + 8] = (COPIED | target).to_bytes(8, "big")
    path.write_bytes(data)
    engine = Engine(SimDisk.from_file(path), SHAPE, Random(2))
    disk = engine.open()
    refused(engine, changes.write(disk, b"x" * CLUSTER, 0), what)
    settle(engine, detach(disk))
    engine.sim.to_file(path)
    assert path.read_bytes()[target : target + 40] == data[target : target + 40]


def test_snapshots_are_in_nobodys_way(tmp_path: Path) -> None:
    # Scenario: shared clusters and tables are copied as ever; nothing of an honest image is called corrupt.
    path = tmp_path / "image.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=4096", path, "8M")
    run("qemu-io", "-f", "qcow2", "-c", "write -P 1 0 256k", path)
    for name in ("one", "two"):
        run("qemu-img", "snapshot", "-c", name, path)
    engine = Engine(SimDisk.from_file(path), SHAPE, Random(2))
    disk = engine.open()
    for at in range(0, 64 << 10, CLUSTER):
        settle(engine, changes.guarded(disk, changes.write(disk, b"x" * CLUSTER, at), "write"))
    settle(engine, changes.guarded(disk, changes.zero(disk, 128 << 10, 64 << 10, trim=True, may_trim=True), "trim"))
    settle(engine, detach(disk))
    assert not disk.corrupt
    engine.sim.to_file(path)
    run("qemu-img", "check", path)


def test_snapshots_that_name_one_table_are_looked_at_no_more_than_as_many() -> None:
    overlaps = Overlaps(Geometry(9, 4, 1 << 20), ring=(0, 0), l1=(1, 2), name="image")
    for _ in range(1000):
        overlaps.keep(1 << 20, 32 << 20, "the L1 table of a snapshot")
    assert len(overlaps.kept) == (32 << 20) // 512
    overlaps.keep(1 << 40, 512, "the L1 table of a snapshot")
    assert not overlaps.what((1 << 40) // 512)
    # What is not kept in mind is not asked about: nothing is free by its refcount alone.
    assert not overlaps.snapshots_known


def test_a_bitmap_that_contradicts_its_entry_is_not_followed(tmp_path: Path, serve: Callable[..., Server]) -> None:
    # No cluster, but subclusters that are allocated: what lies at host offset 0 is the header, and not the guest's.
    path = tmp_path / "e.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "extended_l2=on,cluster_size=65536", path, "8M")
    run("qemu-io", "-f", "qcow2", "-c", "write -P 7 0 192k", path)
    content = bytearray(path.read_bytes())
    header = parse_header(bytes(content[:65536]), file_size=len(content), name="image")
    l2 = int.from_bytes(content[header.l1_offset : header.l1_offset + 8], "big") & MASK
    content[l2 : l2 + 16] = bytes(12) + b"\xff" * 4
    content[l2 + 24 : l2 + 32] = b"\0\0\0\1\0\0\0\1"
    content[l2 + 32 : l2 + 48] = (COMPRESSED | int.from_bytes(content[l2 + 32 : l2 + 40], "big") & MASK).to_bytes(
        8, "big"
    ) + b"\0\0\0\0\0\0\0\1"
    path.write_bytes(content)
    server = serve(path, "--read-only")
    for cluster in range(3):
        with pytest.raises(Exception, match="Input/output error"):
            server.connect().pread(512, cluster << 16)
    server.stop()
    assert server.log.count("subcluster bitmap is impossible") == 3
    overlay = tmp_path / "overlay.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", path.name, "-F", "qcow2", overlay)
    with pytest.raises(Exception, match="Input/output error"):
        serve(overlay).connect().pread(512, 0)
