"""From a file to a `Disk`: open, attach or replay (attaching.py has the way back).

Order: every opening for writing begins with a sync, bit or no bit: a server killed between clearing the
bit and its sync leaves a page cache that says *plain* and a disk that says *attached*.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from .attaching import attach, last_used, overlay, place_journal
from .disk import Disk, Settings
from .errors import ImageError
from .format.header import (
    INCOMPAT_CORRUPT,
    INCOMPAT_JOURNAL,
    Header,
    check_usable,
    journal_extension_of,
    parse_header,
)
from .format.header_rewrite import used_end
from .format.journal import ALIGNMENT, MIN_RING, SLOTS_LENGTH, Location
from .format.tables import MAX_HOST_OFFSET, table_from_bytes
from .geometry import SECTOR
from .image.allocator import MAX_REFTABLE_BYTES, Allocator
from .image.counted import Counted
from .image.epochs import Epochs
from .image.mapping import Mapping
from .image.overlap import Overlaps
from .image.snapshots import read_snapshot_table
from .image.tables import HeaderSector, Table, TableCache
from .journal.log import Log
from .journal.replay import ReplayPlan, plan_replay
from .journal.ring import Ring
from .journal.transaction import CommittedTransaction
from .pending import Page
from .steps import DropCached, FileSize, Operation, Read, Sync, WriteSync

if TYPE_CHECKING:
    from .geometry import Geometry
    from .image.backing import Layer
    from .storage import Storage

HEADER_READ = 1 << 16
SNAPSHOTS_READ = 1 << 20
"""Limit: what is looked at of the snapshot table: some thousands of snapshots."""
MAX_L1_BYTES = 32 << 20
"""Limit: as in qemu."""


def read_header(file: Storage, *, name: str) -> Operation[tuple[Header, bytes]]:
    """The header and the bytes it came from, as they are on disk. Raises ImageError."""
    size = yield FileSize(file)
    data = bytes((yield Read(file, 0, HEADER_READ)))
    return parse_header(data, file_size=size, name=name), data


def read_journal(file: Storage, header: Header, *, name: str) -> Operation[ReplayPlan | None]:
    """The replay plan of an image whose journal was not detached; None for a plain one. Raises ImageError."""
    if not header.incompatible & INCOMPAT_JOURNAL:
        return None
    extension = journal_extension_of(header)
    if extension is None:
        raise ImageError("the journal bit is set, but there is no journal extension", where=f"header of {name}")
    location = Location.from_bytes(extension, cluster_size=header.geometry.cluster_size, name=name)
    size = yield FileSize(file)
    return (yield from plan_replay(file, location, header.geometry, file_size=size, name=name))


def replayed_header(header: Header, data: bytes, *, file_size: int, name: str) -> Header:
    """The header with a journalled sector 0, which may move the refcount table and set the corrupt bit.

    Raises ImageError where it does anything else.
    """
    found = parse_header(data, file_size=file_size, name=name)
    if replace(header, incompatible=header.incompatible | INCOMPAT_CORRUPT) != replace(
        found, refcount_table_offset=header.refcount_table_offset,
        refcount_table_clusters=header.refcount_table_clusters, incompatible=found.incompatible | INCOMPAT_CORRUPT,
    ):  # fmt: skip
        raise ImageError(
            "the journalled header differs in more than the refcount table and the corrupt bit",
            where=f"journal of {name}",
        )  # fmt: skip
    return found


def open_disk(
    file: Storage,
    background: Storage,
    *,
    settings: Settings,
    read_only: bool,
    backing: Layer | None,
    uuid: bytes,
    name: str,
    recover: bool = False,
) -> Operation[Disk]:
    """Open an image: replay or attach its journal. Raises ImageError, OSError.

    With `recover`, an image that is marked corrupt is opened as well if its journal is attached: what was
    accepted is sent home, nothing new is taken.
    """
    if not read_only:
        yield Sync(file)
    header, data = yield from read_header(file, name=name)
    if not read_only and header.incompatible & INCOMPAT_JOURNAL:
        # Crash: pages whose sync failed under an earlier server are clean in the page cache and not on the disk;
        # what is served must be what a cut would leave.
        yield DropCached(file)
        header, data = yield from read_header(file, name=name)
    _check_usable(header, write=not read_only, recover=recover, name=name)
    found = data
    plan = yield from read_journal(file, header, name=name)
    if plan is not None and 0 in plan.sectors:
        data = plan.sectors[0][0] + data[SECTOR:]
        header = replayed_header(header, data, file_size=(yield FileSize(file)), name=name)
        _check_usable(header, write=not read_only, recover=recover, name=name)
    tables = yield from _read_tables(file, header, plan, read_only=read_only, name=name)
    location = plan.location if plan is not None else None
    end = -(-tables.file_size >> header.geometry.cluster_bits)
    if plan is None and not read_only:
        location, end = place_journal(
            header, last=tables.last, size=tables.file_size, journal_size=settings.journal_size, name=name
        )
    # Order: before the journal is attached: an image that is refused is left as it was.
    overlaps = yield from _find_overlaps(file, header, tables, location, read_only=read_only, name=name)
    if plan is None and location is not None:
        yield from attach(file, header, data, location, size=tables.file_size, uuid=uuid, name=name)
        data = bytes((yield Read(file, 0, HEADER_READ)))
    disk = _build(
        file,
        background,
        header,
        data,
        tables=tables,
        overlaps=overlaps,
        end=end,
        plan=plan,
        location=location,
        settings=settings,
        read_only=read_only,
        backing=backing,
        uuid=plan.slot.uuid if plan else uuid,
        name=name,
    )
    if plan is not None and not read_only:
        yield from _write_again(disk, plan, header, found)
    return disk


def _write_again(disk: Disk, plan: ReplayPlan, header: Header, found: bytes) -> Operation[None]:
    """Write what was believed, byte for byte: the log, the slot, the header as it was `found`; wipe what was not.

    Crash: none of it changes anything, torn or not. Without it: what a killed server left in the page cache looks
    committed and may never have reached the disk, and a sync that failed before the kill will not fail again.
    """
    file, at = disk.file, 0
    for offset, length in disk.log.ring.place(0, len(plan.log)) if len(plan.log) else ():
        yield WriteSync(file, offset, [plan.log[at : at + length]])
        at += length
    # Order: before anything else changes. Behind the log a commit may lie that the last cut tore; the next one has
    # its place and number, and torn as well could give it the sectors it lacks: an old transaction would come true
    # whose clusters have been used for other things since. Its head alone: zeros torn into the rest could be what
    # was lacking.
    ring = disk.log.ring
    if ring.used + ALIGNMENT <= ring.length:
        yield WriteSync(file, ring.place(ring.head, SECTOR)[0][0], [bytes(SECTOR)])
    # The tail that the slot names is believed from here on, and what lies before it is written over.
    yield WriteSync(file, disk.log.ring.slot_offset(plan.slot.generation), [plan.slot.to_block()])
    # Order: sector 0 last, as when the journal was attached: it points at what lies behind it.
    if (end := used_end(header)) > SECTOR:
        yield WriteSync(file, SECTOR, [found[SECTOR:end]])
    yield WriteSync(file, 0, [found[:SECTOR]])
    yield Sync(file)


def _check_usable(header: Header, *, write: bool, recover: bool, name: str) -> None:
    if recover and header.incompatible & INCOMPAT_JOURNAL:
        header = replace(header, incompatible=header.incompatible & ~INCOMPAT_CORRUPT)
    check_usable(header, write=write, name=name)


@dataclass(frozen=True, slots=True)
class _Tables:
    """What everything hangs on, with the journal's sectors laid over it."""

    l1: Table
    """As far as the disk needs it."""
    reftable: Table
    last: int
    """One past the last host cluster with a refcount; 1 where nobody will write."""
    file_size: int


def _read_tables(
    file: Storage, header: Header, plan: ReplayPlan | None, *, read_only: bool, name: str
) -> Operation[_Tables]:
    geometry = header.geometry
    l1_bytes = -(-geometry.l1_entries * 8 // SECTOR) * SECTOR
    table_bytes = header.refcount_table_clusters * geometry.cluster_size
    if header.l1_entries < geometry.l1_entries or l1_bytes > MAX_L1_BYTES:
        raise ImageError("L1 table too small or too large", where=name, found=header.l1_entries)
    if table_bytes > MAX_REFTABLE_BYTES:
        raise ImageError(
            "refcount table too large", where=name, expected=f"at most {MAX_REFTABLE_BYTES}", found=table_bytes
        )
    sectors = plan.sectors if plan is not None else {}
    l1_data = overlay((yield Read(file, header.l1_offset, l1_bytes)), header.l1_offset, sectors)
    ref_data = overlay(
        (yield Read(file, header.refcount_table_offset, table_bytes)), header.refcount_table_offset, sectors
    )
    reftable = Table(header.refcount_table_offset, table_from_bytes(ref_data))
    file_size = yield FileSize(file)
    # Reading needs no refcounts, and none of what may be wrong with them is in its way.
    last = 1
    if not read_only:
        last = yield from last_used(file, geometry, reftable, sectors, file_size=file_size, name=name)
    return _Tables(Table(header.l1_offset, table_from_bytes(l1_data)), reftable, last, file_size)


def _find_overlaps(
    file: Storage, header: Header, tables: _Tables, location: Location | None, *, read_only: bool, name: str
) -> Operation[Overlaps]:
    """What metadata lies where. Raises ImageError where that cannot be."""
    geometry, bits = header.geometry, header.geometry.cluster_bits
    ring = (location.offset >> bits, -(-(location.offset + location.length) >> bits)) if location else (0, 0)
    l1 = (header.l1_offset >> bits, (header.l1_offset + header.l1_entries * 8 - 1 >> bits) + 1)
    overlaps = Overlaps(geometry, ring=ring, l1=l1 if header.l1_entries else (0, 0), name=name)
    if not read_only:
        table = header.refcount_table_offset >> bits
        overlaps.read(
            (table, table + header.refcount_table_clusters), tables.reftable.entries,
            tables.l1.entries[: geometry.l1_entries], end=-(-tables.file_size >> bits),
        )  # fmt: skip
        if header.snapshot_count:
            begin = header.snapshots_offset
            _keep_snapshots(overlaps, header, bytes((yield Read(file, begin, SNAPSHOTS_READ))), name=name)
    return overlaps


def _build(
    file: Storage,
    background: Storage,
    header: Header,
    data: bytes,
    *,
    tables: _Tables,
    overlaps: Overlaps,
    end: int,
    plan: ReplayPlan | None,
    location: Location | None,
    settings: Settings,
    read_only: bool,
    backing: Layer | None,
    uuid: bytes,
    name: str,
) -> Disk:
    geometry = header.geometry
    ring = Ring(
        location or Location(0, SLOTS_LENGTH + MIN_RING), geometry, uuid=uuid,
        largest_reftable=_largest_reftable(
            geometry, end=max(tables.last, end, overlaps.ring[1]), now=tables.reftable.length
        ),
    )  # fmt: skip
    epochs = Epochs()
    log = Log(file, ring, geometry, epochs)
    cache = TableCache(file, table_size=geometry.cluster_size, limit_bytes=settings.l2_cache, home=log.home, name=name)
    log.on_stale = cache.mark_stale
    allocator = Allocator(
        background, log, cache, geometry, reftable=tables.reftable, header=HeaderSector(data[:SECTOR]),
        ring=overlaps.ring, end=max(tables.last, end), discard=settings.discard, overlaps=overlaps,
    )  # fmt: skip
    mapping = Mapping(
        geometry, tables.l1, cache, name=name,
        ring=(location.offset, location.offset + location.length) if location else (0, 0),
    )  # fmt: skip
    if not read_only:
        allocator.counted = Counted(
            mapping, allocator, file, list(overlaps.snapshots) if overlaps.snapshots_known else None
        )
    disk = Disk(
        name=name, geometry=geometry, file=file, background=background, mapping=mapping, cache=cache,
        allocator=allocator, log=log, backing=backing, compression_type=header.compression_type, settings=settings,
        read_only=read_only,
    )  # fmt: skip
    if plan is not None:
        _adopt(disk, plan)
    if header.incompatible & INCOMPAT_CORRUPT:
        disk.corrupt = "it was marked so earlier"
    return disk


def _largest_reftable(geometry: Geometry, *, end: int, now: int) -> int:
    """Clusters of the largest refcount table that a session may free.

    The file has `end` clusters, its table `now` bytes. All that the disk can be is allocated once more at most, for
    what is freed comes first; tables and blocks are counted generously.
    """
    entries = -(-(end + 2 * (geometry.clusters + geometry.l1_entries)) // geometry.refcount_block_entries)
    # A table that moves gets half as much again (Allocator), and the next move frees that.
    return min(MAX_REFTABLE_BYTES, max(now, entries * 8 * 3 // 2)) // geometry.cluster_size


def _keep_snapshots(overlaps: Overlaps, header: Header, table: bytes, *, name: str) -> None:
    """Let nobody write on the snapshot table and the snapshots' L1 tables, as far as `table` shows them."""

    def read(offset: int, length: int) -> bytes:
        start = offset - header.snapshots_offset
        return table[start : start + length].ljust(length, b"\0")

    overlaps.keep(header.snapshots_offset, 1, "the snapshot table")
    try:
        snapshots = read_snapshot_table(header, read, name)
    except ImageError:
        # Serving needs nothing of it; `check` says what is wrong.
        overlaps.snapshots_known = False
        return
    length = snapshots[-1].end - header.snapshots_offset
    overlaps.keep(header.snapshots_offset, length, "the snapshot table")
    if length > SNAPSHOTS_READ:
        overlaps.snapshots_known = False
    for each in snapshots:
        if not 0 <= each.l1_offset < MAX_HOST_OFFSET or each.l1_entries * 8 > MAX_L1_BYTES:
            overlaps.snapshots_known = False
        if 0 < each.l1_offset < MAX_HOST_OFFSET and each.l1_entries:
            length = min(each.l1_entries * 8, MAX_L1_BYTES)
            overlaps.keep(each.l1_offset, length, "the L1 table of a snapshot")
            overlaps.snapshots.add((each.l1_offset, length // 8))


def _adopt(disk: Disk, plan: ReplayPlan) -> None:
    """Make the journal's content the state in memory; it goes home by the ordinary checkpoint."""
    log, ring = disk.log, disk.log.ring
    slot = plan.slot
    ring.origin, ring.generation = slot.tail_position, slot.generation
    ring.next_sequence, ring.tail_crc, ring.head_crc = slot.tail_sequence, slot.previous_crc, slot.previous_crc
    entries: dict[int, CommittedTransaction] = {}
    for found in plan.transactions:
        entry = CommittedTransaction(
            sequence=found.sequence, start=found.start, end=found.start + found.length, crc=found.crc
        )
        entries[found.sequence] = entry
        ring.transactions.append(entry)
        ring.head, ring.head_crc, ring.next_sequence = entry.end, entry.crc, entry.sequence + 1
    log.home.update(plan.sectors)
    for index, (content, sequence) in plan.pages.items():
        page = Page(content)
        cluster = index // disk.geometry.pages_per_cluster
        if not disk.read_only and cluster not in disk.pending.clusters:
            disk.take_tokens(cluster)
        disk.pending.put(index, page)
        log.set_record(index, page, entries[sequence])
    disk.replayed_transactions = len(plan.transactions)
