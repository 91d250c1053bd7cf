"""Refcounts that are too low: what the tables name is neither handed out nor cut off, and the image is marked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
from conftest import run
from engine import Engine, Shape, settle
from simdisk import SimDisk, SimStorage
from stepper import Stepper

from nbd_qcow2j import changes
from nbd_qcow2j.attaching import detach
from nbd_qcow2j.disk import Disk
from nbd_qcow2j.errors import ImageError, ReadFailed
from nbd_qcow2j.format.header import parse_header
from nbd_qcow2j.image import counted
from nbd_qcow2j.steps import run_simply

CLUSTER = 4096
TABLES = 4
SHAPE = Shape("cluster_size=4096", TABLES * (2 << 20), journal=1 << 18)
MASK = 0x00FF_FFFF_FFFF_FE00


class Image:
    """Two clusters of data below each L2 table, 16-bit refcounts in one block."""

    def __init__(self, sim: SimDisk) -> None:
        self.sim = sim
        self.header = parse_header(self.bytes(0, CLUSTER), file_size=sim.current_size, name="image")
        self.block = self.number(self.header.refcount_table_offset)

    def bytes(self, offset: int, length: int) -> bytes:
        return self.sim.peek(offset, length)

    def number(self, offset: int) -> int:
        return int.from_bytes(self.sim.peek(offset, 8), "big")

    def put(self, offset: int, content: bytes) -> None:
        storage = SimStorage(self.sim, "damaged")
        sector = bytearray(self.bytes(offset // 512 * 512, 512))
        sector[offset % 512 : offset % 512 + len(content)] = content
        storage.write(offset // 512 * 512, [bytes(sector)])
        storage.sync()

    def host_of(self, table: int, cluster: int = 0) -> int:
        """Host cluster of a guest cluster, by the tables."""
        l2 = self.number(self.header.l1_offset + 8 * table) & MASK
        return (self.number(l2 + 8 * cluster) & MASK) // CLUSTER

    def uncount(self, host: int) -> None:
        self.put(self.block + 2 * host, bytes(2))

    def open(self, *, read_only: bool = False) -> tuple[Engine, Disk]:
        engine = Engine(self.sim, SHAPE, Random(1), read_only=read_only)
        return engine, engine.open()

    @property
    def is_marked(self) -> bool:
        return bool(self.bytes(79, 1)[0] & 2)

    def holds(self) -> bool:
        """Whether all data reads as it was written."""
        _, disk = self.open(read_only=True)
        data = bytearray(2 * CLUSTER)
        for table in range(TABLES):
            run_simply(disk.read_into(memoryview(data), table << 21))
            if data != bytes([table + 1]) * len(data):
                return False
        return True


@pytest.fixture
def image(tmp_path: Path) -> Image:
    sim = SHAPE.make(tmp_path)
    engine = Engine(sim, SHAPE, Random(1))
    disk = engine.open()
    for table in range(TABLES):
        settle(engine, changes.write(disk, bytes([table + 1]) * 2 * CLUSTER, table << 21))
    settle(engine, detach(disk))
    return Image(sim)


def ask_for_room(engine: Engine, disk: Disk, times: int = 8) -> None:
    for _ in range(times):
        settle(engine, disk.allocator.ensure(disk.allocator.available + 16))


@pytest.mark.parametrize("table", range(TABLES))
def test_named_data_without_a_refcount_is_not_handed_out(image: Image, table: int) -> None:
    image.uncount(image.host_of(table))
    engine, disk = image.open()
    ask_for_room(engine, disk)
    assert disk.corrupt == f"L1 entry {table} leads to host cluster {image.host_of(table)}, which has no refcount"
    assert image.host_of(table) not in {*disk.allocator.pool, *disk.allocator.found}
    settle(engine, detach(disk))
    assert image.is_marked
    assert image.holds()


@pytest.mark.parametrize("behind", [0, 3])
@pytest.mark.parametrize("table", range(TABLES))
def test_what_is_named_right_behind_the_end_is_not_handed_out(image: Image, table: int, behind: int) -> None:
    # Another program wrote the table, and a cut took the refcount and the data.
    host = -(-image.sim.current_size // CLUSTER) + behind
    l2 = image.number(image.header.l1_offset + 8 * table) & MASK
    image.put(l2 + 8 * 5, (1 << 63 | host * CLUSTER).to_bytes(8, "big"))
    engine, disk = image.open()
    settle(engine, changes.write(disk, b"n" * CLUSTER, 9 * CLUSTER))
    assert disk.corrupt == f"L1 entry {table} leads to host cluster {host}, which has no refcount"
    ask_for_room(engine, disk)
    assert host not in {*disk.allocator.pool, *disk.allocator.found}
    entry, _ = disk.mapping.find(9)
    assert (entry & MASK) // CLUSTER >= disk.allocator.ring_clusters[1]
    settle(engine, detach(disk))
    assert image.is_marked
    assert image.holds()


def test_nothing_is_cut_off_below_what_was_there(image: Image) -> None:
    # The refcount block is gone: by the refcounts alone the file would end behind its header.
    image.put(image.header.refcount_table_offset, bytes(8))
    size = image.sim.current_size
    engine, disk = image.open()
    settle(engine, detach(disk))
    assert image.sim.current_size >= size
    assert image.holds()


def test_what_is_cut_off_without_an_answer_lies_behind_the_old_end(image: Image) -> None:
    # Data at the end of the file without refcounts, and the close does not get round to looking at it.
    last = max(image.host_of(table, cluster) for table in range(TABLES) for cluster in range(2))
    image.uncount(last)
    size = image.sim.current_size
    engine, disk = image.open()
    disk.allocator.counted = None
    settle(engine, detach(disk))
    assert image.sim.current_size >= size
    assert image.holds()


def test_free_clusters_are_used_when_all_tables_were_looked_at(image: Image) -> None:
    engine, disk = image.open()
    settle(engine, changes.zero(disk, 0, 2 * CLUSTER, trim=True, may_trim=True))
    settle(engine, detach(disk))
    free = image.sim.current_size
    engine, disk = image.open()
    asked = disk.allocator.counted
    assert asked is not None
    # A slice at a time: those of the first table, then of the second, and so on.
    for _ in range(TABLES * 512 // counted.SLICE):
        assert not asked.holds
        assert not run_simply(asked.go_on(1))
    assert run_simply(asked.go_on(1))
    ask_for_room(engine, disk, 1)
    assert any(host * CLUSTER < free for host in disk.allocator.pool)
    settle(engine, detach(disk))
    assert not image.is_marked
    assert image.sim.current_size <= free


def test_until_then_the_file_is_lengthened_instead(image: Image, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, disk = image.open()
    settle(engine, changes.zero(disk, 0, 2 * CLUSTER, trim=True, may_trim=True))
    settle(engine, detach(disk))
    monkeypatch.setattr(counted, "AT_ONCE", 1)
    engine, disk = image.open()
    asked = disk.allocator.counted
    assert asked is not None
    monkeypatch.setattr(asked, "go_on", lambda entries=1: type(asked).go_on(asked, 1))
    end = disk.allocator.end
    ask_for_room(engine, disk, 1)
    assert all(host >= end for host in disk.allocator.pool)


def test_a_read_that_fails_leaves_the_question_open_and_it_is_asked_again(image: Image) -> None:
    _, disk = image.open()
    asked = disk.allocator.counted
    assert asked is not None
    operation = asked.go_on()
    step = next(operation)
    with pytest.raises(StopIteration) as stop:
        operation.throw(ReadFailed("the disk"))
    assert type(step).__name__ == "Read"
    assert stop.value.value is False
    assert not asked.finished
    assert run_simply(asked.go_on())


def test_a_table_that_cannot_be_read_as_one_keeps_the_free_clusters(image: Image) -> None:
    image.put(image.header.l1_offset + 8, (1 << 63 | CLUSTER + 512).to_bytes(8, "big"))
    engine, disk = image.open()
    end = disk.allocator.end
    ask_for_room(engine, disk)
    asked = disk.allocator.counted
    assert asked is not None
    assert asked.finished
    assert not asked.holds
    assert all(host >= end for host in disk.allocator.pool)


@pytest.mark.parametrize("what", ["table", "data"])
def test_what_only_a_snapshot_names_is_asked_for_too(tmp_path: Path, what: str) -> None:
    # The active state has clusters of its own, and a table.
    image = snapshot_image(tmp_path / "s.qcow2")
    table = image.number(image.header.snapshots_offset)
    l2 = image.number(table) & MASK
    host = l2 // CLUSTER if what == "table" else (image.number(l2) & MASK) // CLUSTER
    assert host != image.host_of(0)
    kept = image.bytes(host * CLUSTER, CLUSTER)
    image.uncount(host)
    engine, disk = image.open()
    ask_for_room(engine, disk)
    assert f"leads to host cluster {host}, which has no refcount" in disk.corrupt
    assert "of a snapshot" in disk.corrupt
    settle(engine, detach(disk))
    assert image.bytes(host * CLUSTER, CLUSTER) == kept


def test_an_answer_is_not_wrong_while_clusters_are_freed_and_made(image: Image) -> None:
    # Scenario: the question's steps among those of writes, trims and commits, in random orders.
    for seed in range(40):
        rng = Random(seed)
        engine = Engine(image.sim.copy(), SHAPE, Random(1))
        disk = engine.open()
        asked = disk.allocator.counted
        assert asked is not None
        disk.allocator.counted = None
        stepper = Stepper(rng)
        tasks = [stepper.add(asked.go_on(1 << 20), f"asked {number}") for number in range(2)]
        for number in range(8):
            offset = rng.randrange(TABLES) * (2 << 20) + rng.randrange(4) * CLUSTER
            change = (
                changes.write(disk, b"n" * 2 * CLUSTER, offset)
                if number % 2
                else changes.zero(disk, offset, 2 * CLUSTER, trim=True, may_trim=True)
            )
            tasks.append(stepper.add(changes.guarded(disk, change, "change"), f"change {number}"))
            tasks.append(stepper.add(disk.flush(), f"flush {number}"))
        stepper.run(*tasks)
        assert [task.error for task in tasks if task.error] == []
        assert asked.holds, f"seed {seed}: {disk.corrupt}"
        assert not disk.corrupt
        settle(engine, detach(disk))


@pytest.mark.parametrize("cluster", [0, 300])
def test_two_who_ask_at_once_leave_nothing_out(image: Image, cluster: int) -> None:
    # The writer asks once a second, and whoever needs room: entries between two slices, and tables, were passed over.
    engine, disk = image.open()
    settle(engine, changes.write(disk, b"d" * CLUSTER, (2 << 20) + cluster * CLUSTER))
    settle(engine, detach(disk))
    image.uncount(image.host_of(1, cluster))
    for seed in range(40):
        disk = Engine(image.sim.copy(), SHAPE, Random(1)).open()
        asked = disk.allocator.counted
        assert asked is not None
        stepper = Stepper(Random(seed))
        tasks = [stepper.add(asked.go_on(1 << (20 - 7 * number)), f"asked {number}") for number in range(3)]
        stepper.run(*tasks)
        assert [task.error for task in tasks if task.error] == []
        assert not asked.holds, f"seed {seed}"
        assert disk.corrupt


def snapshot_image(path: Path, count: int = 1) -> Image:
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=4096", path, "8M")
    run("qemu-io", "-f", "qcow2", "-c", "write -P 7 0 8k", path)
    for number in range(count):
        run("qemu-img", "snapshot", "-c", str(number), path)
        run("qemu-io", "-f", "qcow2", "-c", f"write -P {8 + number} 0 8k", path)
    return Image(SimDisk.from_file(path))


def test_the_snapshot_table_is_not_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "s.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=4096", path, "8M")
    run("qemu-img", "snapshot", "-c", "one", path)
    image = Image(SimDisk.from_file(path))
    table = image.header.snapshots_offset
    kept = image.bytes(table, 40)
    assert image.sim.current_size <= table + CLUSTER, "it is the last cluster"
    image.uncount(table // CLUSTER)
    engine, disk = image.open()
    settle(engine, detach(disk))
    assert disk.allocator.counted is not None and disk.allocator.counted.holds
    assert any(kept) and image.bytes(table, 40) == kept


def test_two_who_ask_of_snapshots_at_once_are_answered(tmp_path: Path) -> None:
    image = snapshot_image(tmp_path / "s.qcow2", 3)
    for seed in range(40):
        disk = Engine(image.sim.copy(), SHAPE, Random(1)).open()
        asked = disk.allocator.counted
        assert asked is not None
        stepper = Stepper(Random(seed))
        tasks = [stepper.add(asked.go_on(), f"asked {number}") for number in range(3)]
        stepper.run(*tasks)
        assert [task.error for task in tasks if task.error] == []
        assert asked.holds


def test_a_snapshot_that_names_a_refcount_block_keeps_nobody_from_it(tmp_path: Path) -> None:
    image = snapshot_image(tmp_path / "s.qcow2")
    image.put(image.number(image.header.snapshots_offset) + 8, image.block.to_bytes(8, "big"))
    engine, disk = image.open()
    ask_for_room(engine, disk)
    asked = disk.allocator.counted
    assert asked is not None
    assert (asked.finished, asked.holds) == (True, False)
    settle(engine, changes.guarded(disk, changes.write(disk, b"n" * CLUSTER, 1 << 20), "write"))
    settle(engine, disk.flush())
    settle(engine, detach(disk))


def test_snapshots_that_are_not_all_known_keep_the_free_clusters(tmp_path: Path) -> None:
    # The second entry of their table cannot be walked: what it names may be anywhere.
    image = snapshot_image(tmp_path / "s.qcow2", 2)
    at = image.header.snapshots_offset
    length = 40 + 16 + sum(int.from_bytes(image.bytes(at + field, 2), "big") for field in (12, 14))
    image.put(at + -(-length // 8) * 8 + 36, (1 << 20).to_bytes(4, "big"))
    engine, disk = image.open()
    end = disk.allocator.end
    ask_for_room(engine, disk)
    assert all(host >= end for host in disk.allocator.pool)
    settle(engine, detach(disk))


def test_a_table_that_was_copied_while_its_refcount_was_read_is_not_what_is_judged(image: Image) -> None:
    # An L1 entry without COPIED, as an interrupted removal of a snapshot leaves it: whoever comes first copies the
    # table and frees the old one, while others wait for the refcount block to ask about that.
    entry = image.number(image.header.l1_offset)
    image.put(image.header.l1_offset, (entry & ~(1 << 63)).to_bytes(8, "big"))
    for seed in range(100):
        engine = Engine(image.sim.copy(), SHAPE, Random(1))
        disk = engine.open()
        disk.settings = replace(disk.settings, direct_write=CLUSTER)
        disk.allocator.counted = None
        settle(engine, disk.allocator.ensure(16))
        for offset in list(disk.cache.tables):
            disk.cache.forget(offset)
        stepper = Stepper(Random(seed))
        tasks = [
            stepper.add(
                changes.guarded(disk, changes.write(disk, bytes([number]) * CLUSTER, (8 + number) * CLUSTER), "write"),
                f"write {number}",
            )
            for number in range(3)
        ]
        stepper.run(*tasks)
        assert [task.error for task in tasks if task.error] == [], f"seed {seed}"
        assert not disk.corrupt, f"seed {seed}: {disk.corrupt}"


REFUSED: dict[str, Callable[[Image], None]] = {
    "the refcount table lies on the L1 table": lambda image: image.put(48, image.bytes(40, 8)),
    "more L2 tables than the file has clusters": lambda image: [
        image.put(image.header.l1_offset + at, (image.header.l1_offset + CLUSTER | 1 << 63).to_bytes(8, "big") * 64)
        for at in range(0, CLUSTER, 512)
    ]
    and None,
}


@pytest.mark.parametrize("says", REFUSED)
def test_an_image_that_is_refused_is_left_as_it_was(image: Image, says: str) -> None:
    if says.startswith("more"):
        # An L1 table as long as its cluster, for a disk as large as that.
        image.put(24, (512 << 21).to_bytes(8, "big"))
        image.put(36, (512).to_bytes(4, "big"))
    REFUSED[says](image)
    before = image.bytes(0, image.sim.current_size)
    with pytest.raises(ImageError, match=says):
        image.open()
    assert image.bytes(0, image.sim.current_size) == before


def test_the_journal_goes_behind_a_table_that_ends_behind_the_file(tmp_path: Path) -> None:
    # A copy that was cut short in its L1 table: what is missing reads as zeros, and must not read as the journal.
    path = tmp_path / "s.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=512", path, "32M")
    sim = SimDisk.from_file(path)
    header = parse_header(path.read_bytes()[:512], file_size=path.stat().st_size, name="image")
    storage = SimStorage(sim, "cut")
    storage.truncate(header.l1_offset + 1024)
    storage.sync()
    shape = Shape("cluster_size=512", 32 << 20, journal=1 << 20)
    engine = Engine(sim, shape, Random(1))
    disk = engine.open()
    assert disk.log.ring.location.offset >= header.l1_offset + header.l1_entries * 8
    settle(engine, changes.guarded(disk, changes.write(disk, b"d" * 512, 31 << 20), "write"))
    settle(engine, detach(disk))
    disk = Engine(sim, shape, Random(1), read_only=True).open()
    data = bytearray(512)
    run_simply(disk.read_into(memoryview(data), 31 << 20))
    assert bytes(data) == b"d" * 512
