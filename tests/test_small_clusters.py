"""Clusters of 512 bytes and 1 KiB: a page's links take more of the ring than its record, and sectors are clusters."""

from __future__ import annotations

import struct
from random import Random

import pytest
from engine import Engine, Shape, settle
from hypothesis import given
from hypothesis import strategies as st
from simdisk import SimDisk

from nbd_qcow2j import changes, checkpoint
from nbd_qcow2j.attaching import detach
from nbd_qcow2j.disk import Disk
from nbd_qcow2j.format.create import new_image
from nbd_qcow2j.format.journal import (
    ALIGNMENT,
    SLOTS_LENGTH,
    Location,
    decode_head,
    decode_transaction,
    encode_transaction,
)
from nbd_qcow2j.geometry import Geometry
from nbd_qcow2j.image.allocator import MAX_REFTABLE_BYTES
from nbd_qcow2j.journal.ring import HOME_SECTORS, Ring
from nbd_qcow2j.journal.transaction import BASE_COST, SECTOR_COST
from nbd_qcow2j.steps import run_simply

PIECES = 400
"""Guest clusters with data, each below an L1 sector of its own."""


def scattered(cluster: int) -> tuple[SimDisk, int]:
    """An image with one snapshot, none of whose clusters have a sector of metadata in common, and its disk's size.

    To send one page home changes seven sectors: the most there can be.
    """
    per_l2, per_block = cluster // 8, cluster * 8 // 16
    piece = 64 * per_l2 * cluster
    size = PIECES * piece
    l1_entries = size // (per_l2 * cluster)
    l1_clusters = -(-l1_entries * 8 // cluster)
    blocks = 2 * PIECES + 2 * l1_clusters // (per_block - 1) + 20
    table_clusters = -(-blocks * 8 // cluster)
    first_block = 1 + table_clusters
    l1 = first_block + blocks
    snapshot_l1 = l1 + l1_clusters
    snapshots = snapshot_l1 + l1_clusters
    counts = dict.fromkeys(range(snapshots + 1), 1)
    writes: list[tuple[int, bytes]] = []
    table = [0] * (l1_clusters * cluster // 8)
    start = -(-(snapshots + 1) // per_block)
    for index in range(PIECES):
        l2, data = (start + 2 * index) * per_block + 5, (start + 2 * index + 1) * per_block + 5
        counts[l2] = counts[data] = 2
        table[index * 64] = l2 * cluster
        writes.append((l2 * cluster, struct.pack(">Q", data * cluster).ljust(cluster, b"\0")))
        writes.append((data * cluster, bytes([1 + index % 250]) * cluster))
    block_data = [bytearray(cluster) for _ in range(max(counts) // per_block + 1)]
    for host, count in counts.items():
        struct.pack_into(">H", block_data[host // per_block], host % per_block * 2, count)
    assert len(block_data) <= blocks
    writes += [((first_block + index) * cluster, bytes(data)) for index, data in enumerate(block_data)]
    named = b"".join(struct.pack(">Q", (first_block + index) * cluster) for index in range(len(block_data)))
    entries = b"".join(struct.pack(">Q", each) for each in table)
    snapshot = struct.pack(">QIHHIIQIIQQ", snapshot_l1 * cluster, l1_entries, 1, 1, 0, 0, 0, 0, 16, 0, size) + b"1s"
    header = bytearray(new_image(512, cluster_size=cluster)[0][0][1].ljust(cluster, b"\0"))
    struct.pack_into(">Q", header, 24, size)
    struct.pack_into(">IQQIIQ", header, 36, l1_entries, l1 * cluster, cluster, table_clusters, 1, snapshots * cluster)
    writes += [
        (cluster, named), (l1 * cluster, entries), (snapshot_l1 * cluster, entries),
        (snapshots * cluster, snapshot.ljust(-(-len(snapshot) // 8) * 8, b"\0")), (0, bytes(header)),
    ]  # fmt: skip
    return SimDisk.of(writes, (max(counts) + 1) * cluster), size


def fill_ring(disk: Disk, cluster: int, *, flush_every: int) -> int:
    """Small writes, each to where no metadata is shared, until the ring is tight; returns how many."""
    piece = 64 * (cluster // 8) * cluster
    count = 0
    while count < PIECES and not checkpoint.is_tight(disk):
        data = b"N" * cluster
        if not disk.try_write(data, count * piece):
            run_simply(changes.guarded(disk, changes.write(disk, data, count * piece), "write"))
        count += 1
        if not count % flush_every:
            run_simply(disk.flush())
    run_simply(disk.flush())
    return count


@pytest.mark.parametrize("flush_every", [1, 2, 7, 16, 400])
@pytest.mark.parametrize("cluster", [512, 1024, 2048, 4096])
def test_a_full_ring_drains_whatever_the_links_take(cluster: int, flush_every: int) -> None:
    sim, size = scattered(cluster)
    shape = Shape("", size, journal=1 << 18)
    engine = Engine(sim, shape, Random(1))
    disk = engine.open()
    count = fill_ring(disk, cluster, flush_every=flush_every)
    assert checkpoint.is_tight(disk)
    again = Engine(next(sim.crash_states(1, Random(0))), shape, Random(2))
    for served, opened in ((engine, disk), (again, again.open())):
        settle(served, detach(opened))
        assert opened.log.starvations == 0
        reader = Engine(served.sim, shape, Random(3), read_only=True).open()
        data = bytearray(cluster)
        for index in range(count):
            run_simply(reader.read_into(memoryview(data), index * 64 * (cluster // 8) * cluster))
            assert data == b"N" * cluster


def ring_of(cluster_bits: int, length: int, largest_reftable: int = 0, refcount_order: int = 4) -> Ring:
    location, geometry = Location(1 << 20, SLOTS_LENGTH + length), Geometry(cluster_bits, refcount_order, 1 << 30)
    return Ring(location, geometry, uuid=bytes(16), largest_reftable=largest_reftable)


@given(
    cluster_bits=st.integers(9, 16), units=st.sampled_from([16, 17, 24, 32, 64, 100, 256]),
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=60),
)  # fmt: skip
def test_what_was_admitted_can_be_linked_in_the_worst_order(cluster_bits: int, units: int, sizes: list[int]) -> None:
    # A model of the ring: transactions of so many pages of a cluster each are admitted one after the other; then each
    # is linked, oldest first, with seven sectors and a revoke for each cluster, before the tail passes it.
    ring = ring_of(cluster_bits, units * ALIGNMENT)
    page_cost = ring.page_size + 24
    waiting: set[int] = set()
    ring.waiting = waiting
    admitted: list[tuple[int, int]] = []
    for size in sizes:
        pages = 0
        while (
            pages < size
            and BASE_COST + (pages + 1) * page_cost <= ring.max_transaction
            and ring.has_room(running=BASE_COST + pages * page_cost, cost=page_cost, clusters=1)
        ):
            pages += 1
            waiting.add(len(waiting))
        if not pages:
            break
        blocks = -(-(64 + 24) // 512)
        length = -(-(blocks * 512 + pages * ring.page_size) // ALIGNMENT) * ALIGNMENT
        admitted.append((pages, length))
        ring.head += length
    for pages, length in admitted:
        blocks = -(-(64 + 24 * (HOME_SECTORS + 1) * pages) // 512)
        ring.head += -(-(blocks * 512 + HOME_SECTORS * pages * 512) // ALIGNMENT) * ALIGNMENT
        assert ring.used <= ring.length
        ring.tail += length


@pytest.mark.parametrize("cluster_bits", [9, 10, 12, 16, 21])
@pytest.mark.parametrize("units", [16, 64, 8192])
def test_an_empty_ring_takes_the_largest_operation(cluster_bits: int, units: int) -> None:
    ring = ring_of(cluster_bits, units * ALIGNMENT, MAX_REFTABLE_BYTES >> cluster_bits, 6)
    assert ring.pages_at_once >= 1
    assert ring.has_room(running=BASE_COST, cost=ring.most_cost, clusters=ring.pages_at_once)
    assert ring.home_cost == HOME_SECTORS * SECTOR_COST + 24


def long_image(table_clusters: int, *, size: int, journal: int) -> SimDisk:
    """Clusters of 512 bytes, refcounts of 64 bits, and a file so long that little more needs a larger table of them."""
    per_block, l1_clusters = 64, -(-size // (64 * 512 * 64))
    blocks = 1
    while (total := 1 + table_clusters + blocks + l1_clusters) > blocks * per_block:
        blocks += 1
    first_block, l1 = 1 + table_clusters, 1 + table_clusters + blocks
    head = bytearray(new_image(512, cluster_size=512, refcount_bits=64)[0][0][1].ljust(512, b"\0"))
    struct.pack_into(">Q", head, 24, size)
    struct.pack_into(">IQQI", head, 36, size // (64 * 512), l1 * 512, 512, table_clusters)
    writes = [
        (0, bytes(head)), (512, b"".join(struct.pack(">Q", (first_block + each) * 512) for each in range(blocks))),
        (first_block * 512, struct.pack(">Q", 1) * total),
    ]  # fmt: skip
    # Behind it lies the journal, with room for a growth before it.
    return SimDisk.of(writes, table_clusters * 64 * per_block * 512 - (1 << 20) - journal)


@pytest.mark.parametrize("table_clusters", [100, 1000, 10000])
def test_the_reserve_covers_what_a_larger_refcount_table_notes(table_clusters: int) -> None:
    shape = Shape("", 1 << 20, journal=1 << 18)
    sim = long_image(table_clusters, size=shape.size, journal=shape.journal)
    engine = Engine(sim, shape, Random(1))
    disk = engine.open()
    allocator, ring = disk.allocator, disk.log.ring
    table = allocator.reftable
    for cluster in range(0, 512, 64):
        run_simply(changes.write(disk, b"N" * 512, cluster * 512))
    while not checkpoint.is_tight(disk):
        run_simply(changes.write(disk, b"n" * 512, 0))
        run_simply(disk.flush())
    # What others have been promised, and the credits that they have taken: all that is left but the reserve.
    promised = 0
    ring.outstanding = ring.length - ring.used - disk.log.running.size - ring.reserve
    while allocator.reftable is table:
        promised += allocator.available
        allocator.tokens += allocator.available
        run_simply(allocator.ensure(1))
    assert len(disk.log.running.sectors) > table_clusters // 64
    # Nothing but the slack was taken of what belongs to those who free the tail.
    assert ring.used + disk.log.running.size + ring.outstanding + ring.reserve - ring.slack <= ring.length
    allocator.tokens -= promised
    ring.outstanding = 0
    settle(engine, detach(disk))
    assert disk.log.starvations == 0


def test_sector_0_is_a_record_of_its_own() -> None:
    # Clusters of 512 bytes: the table behind the header changes in the transaction that changes the header.
    sectors = [(0, b"h" * 512), (512, b"t" * 512), (1024, b"u" * 512)]
    encoded = encode_transaction(
        sequence=1, uuid=bytes(16), previous_crc=0, host_revokes=[], guest_revokes=[], sectors=sectors,
        pages=[(0, b"p" * 512), (512, b"q" * 512)],
    )  # fmt: skip
    data = b"".join(encoded.buffers)
    head = decode_head(data)
    assert head is not None
    found = decode_transaction(head, memoryview(data), page_size=512, where="here")
    assert [(each.type, each.offset, each.length) for each in found] == [(1, 0, 512), (1, 512, 1024), (6, 0, 1024)]


def test_a_moved_refcount_table_and_the_table_behind_the_header_are_replayed() -> None:
    # One transaction: the refcount table at 512 names a new block, and the header gets the corrupt mark.
    shape = Shape("cluster_size=512,refcount_bits=64", 1 << 20, journal=1 << 20)
    sim = SimDisk.of(*new_image(shape.size, cluster_size=512, refcount_bits=64))
    disk = Engine(sim, shape, Random(1)).open()
    allocator = disk.allocator
    assert allocator.reftable.host_offset == 512
    run_simply(changes.write(disk, b"x" * 512, 0))
    run_simply(disk.flush())
    before = sum(map(bool, allocator.reftable.entries))
    while sum(map(bool, allocator.reftable.entries)) == before:
        run_simply(allocator.ensure(allocator.available + 1))
    disk.mark_corrupt("for the test")
    assert {0, 512} <= disk.log.running.sectors.keys()
    run_simply(disk.flush())
    for state in sim.crash_states(4, Random(2)):
        after = Engine(state, shape, Random(3), read_only=True).open()
        assert after.corrupt
        data = bytearray(512)
        run_simply(after.read_into(memoryview(data), 0))
        assert data == b"x" * 512
