"""From a file to a `Disk` and back: open, attach, replay, detach.

Crash while attaching, before bit 62: a plain image; the ring was never refcounted, so nothing leaks.
Crash after it: an empty journal is replayed.
Crash while detaching, before the bit is cleared and synced: an empty journal is replayed. After it: a
plain image whose header still holds our extension, which means nothing without the bit.

Order: every opening for writing begins with a sync, bit or no bit: a server killed between clearing the
bit and its sync leaves a page cache that says *plain* and a disk that says *attached*.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from .checkpoint import drain
from .disk import Disk, Settings
from .errors import NO_ROOM, ImageError, RequestError
from .format.header import (
    INCOMPAT_CORRUPT,
    INCOMPAT_JOURNAL,
    Header,
    check_usable,
    journal_extension_of,
    parse_header,
)
from .format.header_rewrite import HeaderPlan, plan_attach, plan_detach, used_end
from .format.journal import ALIGNMENT, MIN_RING, SLOTS_LENGTH, Location, Slot
from .format.tables import MAX_HOST_OFFSET, REFTABLE_OFFSET_MASK, table_from_bytes
from .geometry import SECTOR, Geometry
from .image.allocator import Allocator, runs_of
from .image.counted import Counted
from .image.epochs import Epochs
from .image.mapping import Mapping
from .image.overlap import Overlaps
from .image.snapshots import read_snapshot_table
from .image.tables import HeaderSector, RefcountBlock, Table, TableCache
from .journal.log import Log
from .journal.replay import ReplayPlan, plan_replay
from .journal.ring import Ring
from .journal.transaction import CommittedTransaction
from .pending import Page
from .steps import DataRuns, DropCached, FileSize, Operation, Punch, Read, Sync, Truncate, Write, WriteSync

if TYPE_CHECKING:
    from .image.backing import Layer
    from .storage import Storage

HEADER_READ = 1 << 16
SNAPSHOTS_READ = 1 << 20
"""Limit: what is looked at of the snapshot table: some thousands of snapshots."""
MAX_L1_BYTES = 32 << 20
MAX_REFTABLE_BYTES = 8 << 20
"""Limits: as in qemu."""
COUNTED_AT_CLOSE = 1 << 16
"""L2 entries that are looked at when the image is closed: 0.1 s, and all of a disk of 4 GiB."""
FAR_BEHIND = 1 << 30
"""The journal goes behind all that is used: damaged refcounts must not send it to where no file reaches."""


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
    if plan is None and not read_only:
        location = _place_journal(header, tables, settings, name=name)
    # Order: before the journal is attached: an image that is refused is left as it was.
    overlaps = yield from _find_overlaps(file, header, tables, location, read_only=read_only, name=name)
    if plan is None and location is not None:
        yield from _attach(file, header, data, location, size=tables.file_size, uuid=uuid, name=name)
        data = bytes((yield Read(file, 0, HEADER_READ)))
    disk = _build(
        file,
        background,
        header,
        data,
        tables=tables,
        overlaps=overlaps,
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


def _overlay(data: bytearray, offset: int, sectors: dict[int, tuple[bytes, int]]) -> bytearray:
    """Lay what is not home yet over what was read at `offset`."""
    for at in range(0, len(data), SECTOR) if sectors else ():
        if (entry := sectors.get(offset + at)) is not None:
            data[at : at + SECTOR] = entry[0]
    return data


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
    l1_data = _overlay((yield Read(file, header.l1_offset, l1_bytes)), header.l1_offset, sectors)
    ref_data = _overlay(
        (yield Read(file, header.refcount_table_offset, table_bytes)), header.refcount_table_offset, sectors
    )
    reftable = Table(header.refcount_table_offset, table_from_bytes(ref_data))
    file_size = yield FileSize(file)
    # Reading needs no refcounts, and none of what may be wrong with them is in its way.
    last = 1
    if not read_only:
        last = yield from _last_used(file, geometry, reftable, sectors, file_size=file_size, name=name)
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
    plan: ReplayPlan | None,
    location: Location | None,
    settings: Settings,
    read_only: bool,
    backing: Layer | None,
    uuid: bytes,
    name: str,
) -> Disk:
    geometry = header.geometry
    ring = Ring(location or Location(0, SLOTS_LENGTH + MIN_RING), geometry, uuid=uuid)
    epochs = Epochs()
    log = Log(file, ring, geometry, epochs)
    cache = TableCache(file, table_size=geometry.cluster_size, limit_bytes=settings.l2_cache, home=log.home, name=name)
    log.on_stale = cache.mark_stale
    allocator = Allocator(
        background, log, cache, geometry, reftable=tables.reftable, header=HeaderSector(data[:SECTOR]),
        ring=overlaps.ring, end=max(tables.last, -(-tables.file_size >> geometry.cluster_bits), overlaps.ring[1]),
        discard=settings.discard, overlaps=overlaps,
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


def _last_used(
    file: Storage, geometry: Geometry, reftable: Table, sectors: dict[int, tuple[bytes, int]], *, file_size: int,
    name: str,
) -> Operation[int]:  # fmt: skip
    """One past the last host cluster with a refcount; `sectors` is what is not home yet."""
    size = geometry.cluster_size
    entries = reftable.entries
    empty: set[int] = set()
    for index in range(len(entries) - 1, -1, -1):
        offset = entries[index] & REFTABLE_OFFSET_MASK
        # One behind the end of the file is taken as not there (overlap.py).
        if not offset or offset in empty or offset >= file_size:
            continue
        if offset % size:
            raise ImageError("refcount block is not aligned", where=f"{name}, entry {index}", found=offset)
        if not sectors or not any(at in sectors for at in range(offset, offset + size, SECTOR)):
            # A table of blocks in a hole, each of them megabytes of nothing, would take for ever to read.
            runs = yield DataRuns(file, offset, size)
            if not any(data for _, data in runs):
                empty.add(offset)
                continue
        data = _overlay((yield Read(file, offset, size)), offset, sectors)
        stripped = len(data.rstrip(b"\0"))
        if stripped:
            block = RefcountBlock(offset, data, geometry.refcount_order)
            high = min(geometry.refcount_block_entries, -(-stripped * 8 // geometry.refcount_bits))
            while high and not block.get(high - 1):
                high -= 1
            return index * geometry.refcount_block_entries + high
        empty.add(offset)
    return 1


# ---- attach and detach


def _stages(file: Storage, plan: HeaderPlan) -> Operation[None]:
    """Raises OSError; RequestError (ENOSPC) where the header lies in a hole of the host file: nothing is lost."""
    for stage in plan.stages:
        for offset, content in stage:
            try:
                yield Write(file, offset, [content])
            except OSError as error:
                if error.errno in NO_ROOM:
                    raise RequestError(
                        errno.ENOSPC,
                        "no room in the host file system for the image's header: it says what it said, and nothing is "
                        "lost; make room, then serve the image again or run nbd-qcow2j recover",
                    ) from error
                raise
        yield Sync(file)


def _place_journal(header: Header, tables: _Tables, settings: Settings, *, name: str) -> Location:
    """Behind everything that is used, and behind the file. Raises ImageError."""
    geometry, size = header.geometry, tables.file_size
    used = tables.last * geometry.cluster_size
    if used > 2 * size + FAR_BEHIND:
        raise ImageError(
            "refcounts say that clusters far behind the end of the file are in use; qemu-img check -r all mends them",
            where=name, expected=f"at most about {size} bytes", found=used,
        )  # fmt: skip
    # A table may end behind the end of the file, where it reads as zeros.
    end = max(
        used, size, header.l1_offset + header.l1_entries * 8, tables.reftable.host_offset + tables.reftable.length
    )
    unit = max(geometry.cluster_size, ALIGNMENT)
    length = -(-settings.journal_size // ALIGNMENT) * ALIGNMENT
    return Location(-(-end // unit) * unit, SLOTS_LENGTH + max(length, MIN_RING))


def _attach(
    file: Storage, header: Header, data: bytes, location: Location, *, size: int, uuid: bytes, name: str
) -> Operation[None]:
    """Put an empty journal behind a file of `size` bytes, then say so in the header."""
    geometry = header.geometry
    header_plan = plan_attach(data[: max(geometry.cluster_size, SECTOR)], location.to_bytes())
    # The ring is written with real zeros: a synchronous write into blocks that the host file system must first
    # allocate or convert would cost a commit of the file system as well.
    zeros = bytes(1 << 20)
    try:
        for at in range(location.ring_offset, location.offset + location.length, len(zeros)):
            yield Write(file, at, [zeros[: location.offset + location.length - at]])
        for generation in (0, 1):
            slot = Slot(
                uuid=uuid, page_size=geometry.page_size, generation=generation, ring_length=location.ring_length,
                tail_position=0, tail_sequence=1, previous_crc=0, last_committed=0,
            )  # fmt: skip
            yield Write(file, location.offset + generation % 2 * ALIGNMENT, [slot.to_block()])
        yield Sync(file)
    except OSError as error:
        # The image is the plain one that it was; what was begun behind it must not keep the disk full.
        yield Truncate(file, size)
        if error.errno in NO_ROOM:
            raise ImageError(
                f"{name}: no room in the host file system for the journal of {location.length} bytes that serving for "
                f"writing needs: make room, choose a smaller journal-size, or serve it with read-only=true"
            ) from error
        raise
    yield from _stages(file, header_plan)


def detach(disk: Disk) -> Operation[None]:
    """Send everything home and leave a plain qcow2 file.

    Raises DeviceFailed when the device is latched, RequestError (ENOSPC) when the host file system has no room
    for what must go home: the image stays attached, and nothing is lost.
    """
    log = disk.log
    log.check()
    if disk.allocator.counted is not None:
        # Order: before the drain, which makes durable what this may find.
        yield from disk.allocator.counted.go_on(COUNTED_AT_CLOSE)
    yield from drain(disk)
    geometry, file = disk.geometry, disk.file
    location = log.ring.location
    try:
        data = bytes((yield Read(file, 0, max(geometry.cluster_size, SECTOR))))
        yield from _stages(file, plan_detach(data))
        yield from _tidy(disk, location)
        yield Sync(file)
    except OSError as error:
        raise log.latch(
            error, "detach (everything is home; serve the image again or run nbd-qcow2j recover)"
        ) from error


def _tidy(disk: Disk, location: Location) -> Operation[None]:
    """Give back the ring, the pool and the free tail of the file; the image is plain already.

    What was there before the journal was attached is cut off only where all that the tables name has a refcount.
    """
    geometry, file = disk.geometry, disk.file
    size = geometry.cluster_size
    if disk.corrupt:
        # Refcounts that may be wrong say nothing of what may be cut off.
        return
    overlaps, counted = disk.allocator.overlaps, disk.allocator.counted
    file_size = yield FileSize(file)
    last = yield from _last_used(
        file, geometry, disk.allocator.reftable, disk.log.home, file_size=file_size, name=disk.name
    )
    last = max(
        last, overlaps.l1[1], overlaps.reftable[1], max(overlaps.tables, default=0) + 1,
        max(overlaps.blocks, default=0) + 1,
    )  # fmt: skip
    if counted is None or not counted.holds:
        last = max(last, location.offset // size)
    if last * size < file_size:
        yield Truncate(file, last * size)
    free = sorted(each for each in disk.allocator.pool if each < last)
    try:
        if location.offset < last * size:
            yield Punch(file, location.offset, location.length)
        for first, count in runs_of(free):
            yield Punch(file, first * size, count * size)
    except OSError as error:
        # A file system may need room to give some back; what stays is free in the image all the same.
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS) and error.errno not in NO_ROOM:
            raise
