"""From a plain image to one with an empty journal, and back.

Crash while attaching, before bit 62: a plain image; the ring was never refcounted, so nothing leaks.
Crash after it: an empty journal is replayed.
Crash while detaching, before the bit is cleared and synced: an empty journal is replayed. After it: a
plain image whose header still holds our extension, which means nothing without the bit.
"""

from __future__ import annotations

import errno
from itertools import compress
from typing import TYPE_CHECKING

from .checkpoint import drain
from .errors import NO_ROOM, Error, ImageError, RequestError
from .format.header_rewrite import plan_attach, plan_detach
from .format.journal import ALIGNMENT, MIN_RING, SLOTS_LENGTH, Location, Slot
from .format.tables import REFTABLE_OFFSET_MASK
from .geometry import SECTOR, Geometry
from .image.allocator import grow_step, runs_of
from .image.tables import RefcountBlock, Table
from .steps import DataRuns, FileSize, Operation, Punch, Read, Sync, Truncate, Write

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .disk import Disk
    from .format.header import Header
    from .format.header_rewrite import Stage
    from .storage import Storage

COUNTED_AT_CLOSE = 1 << 16
"""L2 entries that are looked at when the image is closed: 0.1 s, and all of a disk of 4 GiB."""
FAR_BEHIND = 1 << 30
"""The journal goes behind all that is used: damaged refcounts must not send it to where no file reaches."""


def room_before(geometry: Geometry) -> int:
    """Clusters between what was there and the journal: one growth of the pool, with a refcount block."""
    return grow_step(geometry) + 1


def place_journal(
    header: Header, *, last: int, size: int, journal_size: int, name: str
) -> tuple[Location, int]:
    """Behind all clusters below `last` and behind a file of `size` bytes; and the first free cluster there.

    Between the two is room for what the pool takes at first: a session that allocates no more leaves nothing behind
    the journal, and the file ends where that room began, or a little later. With the journal first each such session
    would make the file longer by it.

    Raises ImageError.
    """
    geometry = header.geometry
    used = last * geometry.cluster_size
    if used > 2 * size + FAR_BEHIND:
        raise ImageError(
            "refcounts say that clusters far behind the end of the file are in use; qemu-img check -r all mends them",
            where=name, expected=f"at most about {size} bytes", found=used,
        )  # fmt: skip
    # A table may end behind the end of the file, where it reads as zeros.
    end = max(
        used, size, header.l1_offset + header.l1_entries * 8,
        header.refcount_table_offset + header.refcount_table_clusters * geometry.cluster_size,
    )  # fmt: skip
    first = -(-end // geometry.cluster_size)
    begin = (first + room_before(geometry)) * geometry.cluster_size
    unit = max(geometry.cluster_size, ALIGNMENT)
    length = -(-journal_size // ALIGNMENT) * ALIGNMENT
    return Location(-(-begin // unit) * unit, SLOTS_LENGTH + max(length, MIN_RING)), first


def attach(
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
    yield from _stages(file, header_plan.stages)


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
    # Order: in the hold in which the last of it is home. A flush that was answered from here on would be of a journal
    # that the header does not name.
    log.ended = True
    geometry, file = disk.geometry, disk.file
    location = log.ring.location
    try:
        try:
            data = bytes((yield Read(file, 0, max(geometry.cluster_size, SECTOR))))
            stages = plan_detach(data).stages
            yield from _stages(file, stages[:1])
        except Error:
            # The header still names the journal.
            log.ended = False
            raise
        yield from _stages(file, stages[1:])
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
    last = yield from last_used(
        file, geometry, disk.allocator.reftable, disk.log.home, file_size=file_size, name=disk.name
    )
    last = max(
        last, overlaps.l1[1], overlaps.reftable[1], max(overlaps.tables, default=0) + 1,
        max(overlaps.blocks, default=0) + 1, max(overlaps.kept, default=0) + 1,
    )  # fmt: skip
    unused: list[tuple[int, int]] = []
    if counted is None or not counted.holds:
        end, unused = yield from _before(disk, location.offset // size)
        last = max(last, end)
    if last * size < file_size:
        yield Truncate(file, last * size)
    free = sorted(each for each in disk.allocator.pool if each < last)
    try:
        if location.offset < last * size:
            yield Punch(file, location.offset, location.length)
        for first, count in runs_of(free):
            yield Punch(file, first * size, count * size)
        for offset, length in unused:
            if offset < last * size:
                # It reads as zeros before and after: a killed server's pool took space for it.
                yield Punch(file, offset, length)
    except OSError as error:
        # A file system may need room to give some back; what stays is free in the image all the same.
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS) and error.errno not in NO_ROOM:
            raise


def _before(disk: Disk, ring: int) -> Operation[tuple[int, list[tuple[int, int]]]]:
    """One past the last cluster before the journal, which begins at cluster `ring`, that is not to be cut off.

    And (offset, length) of the pieces before it, bytes, that hold no data.
    """
    if disk.allocator.scan_end <= ring:
        # Attached in this session: what lies between is ours.
        return disk.allocator.scan_end, []
    # A killed server attached it. As far as a journal has room before it that is ours, too; but one of an earlier
    # version has none, so nothing is cut off that holds data.
    size = disk.geometry.cluster_size
    first = max(0, ring - room_before(disk.geometry))
    end = position = first * size
    unused = []
    for length, data in (yield DataRuns(disk.file, position, ring * size - position)):
        if data:
            end = position + length
        else:
            unused.append((position, length))
        position += length
    return -(-end // size), unused


def _stages(file: Storage, stages: Sequence[Stage]) -> Operation[None]:
    """Raises OSError; RequestError (ENOSPC) where the header lies in a hole of the host file: nothing is lost."""
    for stage in stages:
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


def last_used(
    file: Storage, geometry: Geometry, reftable: Table, sectors: dict[int, tuple[bytes, int]], *, file_size: int,
    name: str,
) -> Operation[int]:  # fmt: skip
    """One past the last host cluster with a refcount; `sectors` is what is not home yet."""
    size = geometry.cluster_size
    entries = reftable.entries
    empty: set[int] = set()
    # Tables of large clusters are nearly empty: a loop over 262,144 zeros would be what opening takes longest over.
    for index in compress(range(len(entries) - 1, -1, -1), reversed(entries)):
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
        data = overlay((yield Read(file, offset, size)), offset, sectors)
        stripped = len(data.rstrip(b"\0"))
        if stripped:
            block = RefcountBlock(offset, data, geometry.refcount_order)
            high = min(geometry.refcount_block_entries, -(-stripped * 8 // geometry.refcount_bits))
            while high and not block.get(high - 1):
                high -= 1
            return index * geometry.refcount_block_entries + high
        empty.add(offset)
    return 1


def overlay(data: bytearray, offset: int, sectors: dict[int, tuple[bytes, int]]) -> bytearray:
    """Lay what is not home yet over what was read at `offset`."""
    for at in range(0, len(data), SECTOR) if sectors else ():
        if (entry := sectors.get(offset + at)) is not None:
            data[at : at + SECTOR] = entry[0]
    return data
