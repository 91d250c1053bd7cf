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
from typing import TYPE_CHECKING

from .checkpoint import drain
from .disk import Disk, Settings
from .errors import ImageError
from .format.header import INCOMPAT_JOURNAL, Header, check_usable, journal_extension_of, parse_header
from .format.header_rewrite import HeaderPlan, plan_attach, plan_detach
from .format.journal import ALIGNMENT, MIN_RING, SLOTS_LENGTH, Location, Slot
from .format.tables import REFTABLE_OFFSET_MASK, table_from_bytes
from .geometry import SECTOR
from .image.allocator import Allocator, runs_of
from .image.epochs import Epochs
from .image.mapping import Mapping
from .image.tables import HeaderSector, RefcountBlock, Table, TableCache
from .journal.log import Log
from .journal.replay import ReplayPlan, plan_replay
from .journal.ring import Ring
from .journal.transaction import CommittedTransaction
from .pending import Page
from .steps import FileSize, Operation, Punch, Read, Sync, Truncate, Write, WriteSync

if TYPE_CHECKING:
    from .image.backing import Layer
    from .storage import Storage

HEADER_READ = 1 << 16
MAX_L1_BYTES = 32 << 20
MAX_REFTABLE_BYTES = 8 << 20
"""Limits: as in qemu."""


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
    content = yield Read(file, location.offset, location.length)

    def read(offset: int, length: int) -> bytes:
        start = offset - location.offset
        return bytes(content[start : start + length])

    return plan_replay(read, location, header.geometry, name=name)


def open_disk(
    file: Storage,
    background: Storage,
    *,
    settings: Settings,
    read_only: bool,
    backing: Layer | None,
    uuid: bytes,
    name: str,
) -> Operation[Disk]:
    """Open an image: replay or attach its journal. Raises ImageError, OSError."""
    if not read_only:
        yield Sync(file)
    header, data = yield from read_header(file, name=name)
    first_sector = data[:SECTOR]
    check_usable(header, write=not read_only, name=name)
    plan = yield from read_journal(file, header, name=name)
    if plan is not None and 0 in plan.sectors:
        data = plan.sectors[0][0] + data[SECTOR:]
        header = parse_header(data, file_size=(yield FileSize(file)), name=name)
    location = plan.location if plan is not None else None
    if plan is None and not read_only:
        location = yield from _attach(file, header, data, settings, uuid, name=name)
        data = bytes((yield Read(file, 0, HEADER_READ)))
    disk = yield from _build(
        file,
        background,
        header,
        data,
        plan=plan,
        location=location,
        settings=settings,
        read_only=read_only,
        backing=backing,
        uuid=plan.slot.uuid if plan else uuid,
        name=name,
    )
    if plan is not None and not read_only:
        # What a killed server left in the page cache looks committed and may never have reached the disk, and a
        # sync that failed before the kill will not fail again: what was accepted is written again, byte for byte.
        # Crash: with an older slot or without the bit on the disk, the next transactions would overwrite what that
        # slot needs, or nobody would look at them.
        at = 0
        for offset, length in disk.log.ring.place(0, len(plan.log)) if len(plan.log) else ():
            yield WriteSync(file, offset, [plan.log[at : at + length]])
            at += length
        # Order: before anything else changes. Behind the log a commit may lie that the last cut tore; the next one has
        # its place and number, and torn as well could give it the sectors it lacks: an old transaction would come
        # true whose clusters have been used for other things since.
        ring = disk.log.ring
        if ring.used + ALIGNMENT <= ring.length:
            yield WriteSync(file, ring.place(ring.head, ALIGNMENT)[0][0], [bytes(ALIGNMENT)])
        slot_offset = ring.slot_offset(plan.slot.generation)
        yield WriteSync(file, slot_offset, [plan.slot.to_block()])
        yield WriteSync(file, 0, [first_sector])
        yield Sync(file)
    return disk


def _overlay(data: bytearray, offset: int, plan: ReplayPlan | None) -> bytearray:
    if plan is not None:
        for at in range(0, len(data), SECTOR):
            entry = plan.sectors.get(offset + at)
            if entry is not None:
                data[at : at + SECTOR] = entry[0]
    return data


def _build(
    file: Storage,
    background: Storage,
    header: Header,
    data: bytes,
    *,
    plan: ReplayPlan | None,
    location: Location | None,
    settings: Settings,
    read_only: bool,
    backing: Layer | None,
    uuid: bytes,
    name: str,
) -> Operation[Disk]:
    geometry = header.geometry
    l1_bytes = -(-header.l1_entries * 8 // SECTOR) * SECTOR
    table_bytes = header.refcount_table_clusters * geometry.cluster_size
    if header.l1_entries < geometry.l1_entries or l1_bytes > MAX_L1_BYTES:
        raise ImageError("L1 table too small or too large", where=name, found=header.l1_entries)
    if table_bytes > MAX_REFTABLE_BYTES:
        raise ImageError(
            "refcount table too large", where=name, expected=f"at most {MAX_REFTABLE_BYTES}", found=table_bytes
        )
    l1_data = _overlay((yield Read(file, header.l1_offset, l1_bytes)), header.l1_offset, plan)
    l1 = Table(header.l1_offset, table_from_bytes(l1_data))
    ref_data = _overlay(
        (yield Read(file, header.refcount_table_offset, table_bytes)), header.refcount_table_offset, plan
    )
    reftable = Table(header.refcount_table_offset, table_from_bytes(ref_data))
    ring = Ring(location or Location(0, SLOTS_LENGTH + MIN_RING), geometry, uuid=uuid)
    epochs = Epochs()
    log = Log(file, ring, geometry, epochs)
    cache = TableCache(file, table_size=geometry.cluster_size, limit_bytes=settings.l2_cache, home=log.home, name=name)
    log.on_stale = cache.mark_stale
    bits = geometry.cluster_bits
    size = yield FileSize(file)
    last = yield from _last_used(file, header, reftable, plan, name=name)
    ring_clusters = (location.offset >> bits, -(-(location.offset + location.length) >> bits)) if location else (0, 0)
    end = max(last, -(-size >> bits), ring_clusters[1])
    allocator = Allocator(
        background, log, cache, geometry, reftable=reftable, header=HeaderSector(data[:SECTOR]), ring=ring_clusters,
        end=end, discard=settings.discard,
    )  # fmt: skip
    disk = Disk(
        name=name, geometry=geometry, file=file, background=background, mapping=Mapping(geometry, l1, cache, name=name),
        cache=cache, allocator=allocator, log=log, backing=backing, compression_type=header.compression_type,
        settings=settings, read_only=read_only,
    )  # fmt: skip
    if plan is not None:
        _adopt(disk, plan)
    return disk


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


def _last_used(file: Storage, header: Header, reftable: Table, plan: ReplayPlan | None, *, name: str) -> Operation[int]:
    """One past the last host cluster with a refcount."""
    geometry = header.geometry
    entries = reftable.entries
    for index in range(len(entries) - 1, -1, -1):
        offset = entries[index] & REFTABLE_OFFSET_MASK
        if not offset:
            continue
        if offset % geometry.cluster_size:
            raise ImageError("refcount block is not aligned", where=f"{name}, entry {index}", found=offset)
        data = _overlay((yield Read(file, offset, geometry.cluster_size)), offset, plan)
        stripped = len(data.rstrip(b"\0"))
        if stripped:
            block = RefcountBlock(offset, data, geometry.refcount_order)
            per = geometry.refcount_block_entries
            high = min(per, -(-stripped * 8 // geometry.refcount_bits))
            while high and not block.get(high - 1):
                high -= 1
            return index * per + high
    return 1


# ---- attach and detach


def _stages(file: Storage, plan: HeaderPlan) -> Operation[None]:
    for stage in plan.stages:
        for offset, content in stage:
            yield Write(file, offset, [content])
        yield Sync(file)


def _attach(
    file: Storage, header: Header, data: bytes, settings: Settings, uuid: bytes, *, name: str
) -> Operation[Location]:
    """Put an empty journal behind everything that is used, then say so in the header."""
    geometry = header.geometry
    table_bytes = header.refcount_table_clusters * geometry.cluster_size
    if table_bytes > MAX_REFTABLE_BYTES:
        raise ImageError(
            "refcount table too large", where=name, expected=f"at most {MAX_REFTABLE_BYTES}", found=table_bytes
        )
    reftable = Table(
        header.refcount_table_offset, table_from_bytes((yield Read(file, header.refcount_table_offset, table_bytes)))
    )
    last = yield from _last_used(file, header, reftable, None, name=name)
    size = yield FileSize(file)
    unit = max(geometry.cluster_size, ALIGNMENT)
    offset = -(-max(last * geometry.cluster_size, size) // unit) * unit
    length = -(-settings.journal_size // ALIGNMENT) * ALIGNMENT
    location = Location(offset, SLOTS_LENGTH + max(length, MIN_RING))
    header_plan = plan_attach(data[: max(geometry.cluster_size, SECTOR)], location.to_bytes())
    # The ring is written with real zeros: a synchronous write into blocks that the host file system must first
    # allocate or convert would cost a commit of the file system as well.
    zeros = bytes(1 << 20)
    for at in range(location.ring_offset, location.offset + location.length, len(zeros)):
        yield Write(file, at, [zeros[: location.offset + location.length - at]])
    for generation in (0, 1):
        slot = Slot(
            uuid=uuid, page_size=geometry.page_size, generation=generation, ring_length=location.ring_length,
            tail_position=0, tail_sequence=1, previous_crc=0, last_committed=0,
        )  # fmt: skip
        yield Write(file, location.offset + generation % 2 * ALIGNMENT, [slot.to_block()])
    yield Sync(file)
    yield from _stages(file, header_plan)
    return location


def detach(disk: Disk) -> Operation[None]:
    """Send everything home and leave a plain qcow2 file. Raises DeviceFailed when the device is latched."""
    log = disk.log
    log.check()
    yield from drain(disk)
    geometry, file = disk.geometry, disk.file
    location = log.ring.location
    try:
        data = bytes((yield Read(file, 0, max(geometry.cluster_size, SECTOR))))
        yield from _stages(file, plan_detach(data))
        yield from _tidy(disk, location)
        yield Sync(file)
    except OSError as error:
        raise log.latch(error, "detach") from error


def _tidy(disk: Disk, location: Location) -> Operation[None]:
    """Give back the ring, the pool and the free tail of the file; the image is plain already."""
    geometry, file = disk.geometry, disk.file
    size = geometry.cluster_size
    last = 1
    entries = disk.allocator.reftable.entries
    for index in range(len(entries) - 1, -1, -1):
        if not entries[index] & REFTABLE_OFFSET_MASK:
            continue
        block = yield from disk.allocator.load_block(index * geometry.refcount_block_entries)
        if block is None or not any(block.data):
            continue
        high = geometry.refcount_block_entries
        while not block.get(high - 1):
            high -= 1
        last = index * geometry.refcount_block_entries + high
        break
    file_size = yield FileSize(file)
    if last * size < file_size:
        yield Truncate(file, last * size)
    free = sorted(each for each in disk.allocator.pool if each < last)
    try:
        if location.offset < last * size:
            yield Punch(file, location.offset, location.length)
        for first, count in runs_of(free):
            yield Punch(file, first * size, count * size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS):
            raise
