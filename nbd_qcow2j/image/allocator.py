"""Refcounts, and host clusters that may be handed out. Spec: "Host cluster management".

A host cluster is
    used       its refcount is not zero
    reserved   taken from the pool by an operation; no refcount on disk or in the journal until it is linked
    pool       free, has space in the host file, *reads as zeros*, and its refcount block exists
    freed      refcount zero in memory; not yet released (epochs.py)
    free       anything else with refcount zero

`grow_pool` makes pool clusters of free ones; it alone creates refcount blocks and moves the refcount table, so
that raising a refcount never needs space. Tokens promise pool clusters to accepted writes.

    Invariant: a pool or reserved cluster has refcount zero, so a cut leaks nothing.
"""

from __future__ import annotations

import errno
from array import array
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from ..errors import NO_ROOM, ImageError, RequestError
from ..format.header_rewrite import set_refcount_table
from ..format.tables import REFTABLE_OFFSET_MASK
from ..geometry import Geometry
from ..steps import Allocate, Gate, Operation, Punch, Wait, Write, ZeroRange
from .counted import BEFORE_GROWTH, Counted
from .overlap import Overlaps
from .tables import HeaderSector, RefcountBlock, Table, TableCache

if TYPE_CHECKING:
    from ..journal.log import Log
    from ..storage import Storage

MAX_REFTABLE_BYTES = 8 << 20
"""Limit: as in qemu."""
SCAN_CLUSTERS = 1024


class Allocator:
    """Refcount table, pool and tokens."""

    def __init__(
        self, storage: Storage, log: Log, cache: TableCache, geometry: Geometry, *,
        reftable: Table, header: HeaderSector, ring: tuple[int, int], end: int, discard: bool, overlaps: Overlaps,
    ) -> None:  # fmt: skip
        self.overlaps = overlaps
        self.on_corrupt: Callable[[str], object] = lambda reason: None
        self.storage, self.log, self.cache, self.geometry = storage, log, cache, geometry
        self.reftable = reftable
        self.header = header
        self.ring_clusters = ring
        """Half-open range of clusters that the ring covers: not refcounted, not ours to hand out."""
        self.end = end
        """First cluster that was never looked at: it and all after it are free, but for the ring."""
        self.scan_at = 0
        self.scan_end = end
        """And what lies below was there before this session, or since one that was killed."""
        self.counted: Counted | None = None
        """Whether what lies below `end` without a refcount is free indeed; None: nobody asks."""
        self.discard = discard
        self.pool: deque[int] = deque()
        self.tokens = 0
        self.found: deque[int] = deque()
        """Free clusters below `end`, not yet made pool clusters."""
        self.held: set[int] = set()
        """Clusters that a scan must not find: pool, reserved, freed."""
        self.growing = False
        self.grow_gate = Gate("pool")
        self.grow_step = grow_step(geometry)
        self.allocated = self.freed = 0

    # ---- refcounts

    def _block_offset(self, index: int) -> int:
        entries = self.reftable.entries
        offset = entries[index] & REFTABLE_OFFSET_MASK if index < len(entries) else 0
        # A block on other metadata is taken as not there: what it would count is neither freed nor handed out.
        return 0 if offset >> self.geometry.cluster_bits in self.overlaps.bad_blocks else offset

    def has_block(self, index: int) -> bool:
        """Whether there is a refcount block of this index; where there is none, what it would count is free."""
        return bool(self._block_offset(index))

    def _make_block(self, host_offset: int, data: bytearray) -> Table:
        return RefcountBlock(host_offset, data, self.geometry.refcount_order)

    def load_block(self, cluster: int) -> Operation[RefcountBlock | None]:
        """The refcount block that counts `cluster`, or None where there is none (refcount zero)."""
        while offset := self._block_offset(cluster // self.geometry.refcount_block_entries):
            block = yield from self.cache.load(offset, self._make_block, what="refcount block")
            # The table may have moved while the block was read.
            if offset == self._block_offset(cluster // self.geometry.refcount_block_entries):
                if not isinstance(block, RefcountBlock):
                    raise ImageError("a refcount block is named as a table too", where=self.cache.name, found=offset)
                return block
        return None

    def block(self, cluster: int) -> RefcountBlock | None:
        """As `load_block`, where it is in memory; pinned ones are."""
        offset = self._block_offset(cluster // self.geometry.refcount_block_entries)
        block = self.cache.get(offset)
        return block if isinstance(block, RefcountBlock) else None

    def refcount(self, cluster: int) -> int:
        """Refcount of a cluster whose block was loaded."""
        block = self.block(cluster)
        return block.get(cluster % self.geometry.refcount_block_entries) if block else 0

    def why_bad(self, cluster: int) -> str:
        """Why what an L2 entry names must not be written or freed; empty where it may. Its block is loaded."""
        what = self.overlaps.what(cluster)
        return f"which is {what}" if what else "" if self.refcount(cluster) else "which has no refcount"

    def why_bad_table(self, host_offset: int) -> Operation[str]:
        """Why an L2 table must not be changed, nor what it names be written; empty where it may."""
        if what := self.overlaps.what_else(host_offset):
            return f"which is {what}"
        host = host_offset >> self.geometry.cluster_bits
        if host_offset and host not in self.overlaps.counted:
            yield from self.load_block(host)
            if not self.refcount(host):
                return "which has no refcount"
            self.overlaps.counted.add(host)
        return ""

    def set_refcount(self, cluster: int, value: int) -> None:
        """Change a refcount and note it, in this hold. Its block was loaded and pinned."""
        block = self.block(cluster)
        if block is None or not 0 <= value <= self.geometry.max_refcount:
            raise ImageError("refcount cannot be set", where=f"host cluster {cluster}", found=value)
        index = cluster % self.geometry.refcount_block_entries
        block.set(index, value)
        self.log.note_entry(block, index)

    def raise_new(self, cluster: int) -> None:
        """A reserved cluster is linked for the first time."""
        self.set_refcount(cluster, 1)
        self.held.discard(cluster)
        self.allocated += 1

    def drop(self, cluster: int) -> bool:
        """One reference less; True when that was the last. The cluster is freed, not yet free."""
        value = self.refcount(cluster)
        if not value:
            # In the middle of a change: what is half done is finished, the cluster left alone.
            self.on_corrupt(f"host cluster {cluster} is freed, but has no refcount")
            return False
        self.set_refcount(cluster, value - 1)
        if value > 1:
            return False
        # Invariant 2: not reused before the freeing transaction is committed and earlier readers are gone.
        self.held.add(cluster)
        self.log.running.freed.append(cluster)
        self.freed += 1
        return True

    # ---- the pool

    @property
    def available(self) -> int:
        return len(self.pool) - self.tokens

    def take_tokens(self, count: int) -> Operation[None]:
        """Promise `count` pool clusters. Raises RequestError (ENOSPC) when the host file system is full."""
        while self.available < count:
            yield from self.ensure(count)
        self.tokens += count

    def ensure(self, count: int) -> Operation[None]:
        """Grow the pool until `count` clusters are available; single flight.

        Raises RequestError (ENOSPC); DeviceFailed: what a change that was left half-way gave back may be named.
        """
        self.log.check()
        if self.growing:
            yield Wait(self.grow_gate)
            return
        self.growing = True
        try:
            while True:
                needed = count - self.available
                try:
                    yield from self.grow_pool(max(self.grow_step, needed))
                except OSError as error:
                    if error.errno not in NO_ROOM:
                        raise
                    if self.log.epochs.releasable:
                        # What was freed is only waiting to be given back.
                        yield from self.release()
                        continue
                    if self.scan_at < self.scan_end and self.counted is not None and not self.counted.finished:
                        # There may be room in the file itself, if all of it may be asked for.
                        yield from self.counted.go_on(self.geometry.clusters)
                        if self.counted.holds:
                            continue
                    # Nearly full: there may be room for what is asked, if not for a stock.
                    if needed >= self.grow_step:
                        raise
                    if self.available < count:
                        yield from self.grow_pool(count - self.available)
                break
        except OSError as error:
            if error.errno in NO_ROOM:
                raise RequestError(errno.ENOSPC, f"no room in the host file system: {error.strerror}") from error
            raise self.log.latch(error, "allocating space in the image file") from error
        finally:
            self.growing = False
            self.grow_gate.open()

    def reserve(self, *, token: bool) -> int:
        """Take a cluster out of the pool: with a token, or one that is not promised. ENOSPC if there is none."""
        if not self.pool or (not token and self.available <= 0):
            raise RequestError(errno.ENOSPC, "no room in the host file system")
        if token:
            self.tokens -= 1
        return self.pool.popleft()

    def give_back(self, cluster: int) -> None:
        """A reserved cluster was not used. It may hold data, so it is not a pool cluster any more."""
        self.held.discard(cluster)
        self.found.append(cluster)

    def release(self) -> Operation[None]:
        """Give freed clusters that nobody can reach back: first to the host file system, then to the allocator.

        Raises DeviceFailed.
        """
        clusters = sorted(self.log.epochs.releasable)
        self.log.epochs.releasable.clear()
        size = self.geometry.cluster_size
        if self.discard:
            for first, count in runs_of(clusters):
                # Order: punch, then allocate again; the other way round would punch somebody's data.
                self.log.check()
                try:
                    yield Punch(self.storage, first * size, count * size)
                except OSError:
                    # Nothing is lost: space that could not be given back (a file system may need room for
                    # that) is made zero before it is used again.
                    continue
        self.held.difference_update(clusters)
        self.found.extend(clusters)

    def grow_pool(self, count: int) -> Operation[None]:
        """Make about `count` free clusters pool clusters. Raises OSError."""
        chosen: list[int] = []
        try:
            while len(chosen) < count:
                if self.found:
                    chosen.append(self.found.popleft())
                    self.held.add(chosen[-1])
                # Order: asked before the first look, for what is found is made zero.
                elif self.scan_at < self.scan_end and (self.counted is None or (yield from self.counted.go_on())):
                    yield from self._scan()
                else:
                    break
            yield from self._make_zero(chosen)
        except BaseException as error:
            for cluster in chosen:
                self.give_back(cluster)
            if not isinstance(error, OSError) or error.errno not in NO_ROOM:
                raise
            # No room where they lie. An fallocate at the end of the file that failed half-way may have it: ext4
            # leaves it what it got by then, and only a growth at the end comes by that again.
            # Crash: the file is longer, and no refcount says so; what was found is free, as it was.
            chosen.clear()
        self.pool.extend(chosen)
        if len(chosen) < count:
            yield from self._extend(count - len(chosen))

    def _make_zero(self, clusters: list[int]) -> Operation[None]:
        size = self.geometry.cluster_size
        for first, count in runs_of(sorted(clusters)):
            self.log.check()
            yield ZeroRange(self.storage, first * size, count * size)

    def _scan(self) -> Operation[None]:
        """Look for free clusters in a piece of a refcount block, short enough for one hold.

        Blocks that do not exist lie before `end` only in holes.
        """
        per_block = self.geometry.refcount_block_entries
        first = self.scan_at
        end = min(self.scan_end, first - first % per_block + per_block, first - first % SCAN_CLUSTERS + SCAN_CLUSTERS)
        block = yield from self.load_block(first)
        self.scan_at = end
        if block is None:
            return
        # What was released or given back while the block was read is free, and found already: twice found
        # would be handed out twice.
        known = set(self.found)
        base = first - first % per_block
        for start, stop in block.zero_runs(first - base, end - base):
            for cluster in range(base + start, base + stop):
                if cluster not in self.held and cluster not in known and not self.overlaps.what(cluster):
                    self.found.append(cluster)

    def _extend(self, count: int) -> Operation[None]:
        """Lengthen the file, with the refcount blocks that the new clusters need."""
        per_block = self.geometry.refcount_block_entries
        ring, behind = self.ring_clusters
        entries = self.reftable.entries
        while True:
            index = self.end // per_block
            if ring <= self.end < behind or (self.end < ring and index >= len(entries)):
                # A larger refcount table, and what it leads to, has no place before the ring.
                self.end = behind
            elif self.end < ring and (yield from self._in_doubt()):
                # Order: asked before the first of them is taken, for it has a refcount from then on.
                self.end = behind
            elif index < len(entries) and entries[index] & REFTABLE_OFFSET_MASK != self._block_offset(index):
                # What a bad block counts is not ours to hand out.
                self.end = (index + 1) * per_block
            else:
                break
        first = self.end
        # One block at a time, so that a region never needs a second new block.
        count = min(count + 1, per_block - first % per_block)
        if first < ring:
            count = min(count, ring - first)
        size = self.geometry.cluster_size
        if index >= len(self.reftable.entries):
            yield from self._move_table(index)
            return
        yield Allocate(self.storage, first * size, count * size)
        self.end = first + count
        clusters = [each for each in range(first, first + count) if not self.overlaps.what(each)]
        if not clusters:
            return
        self.held.update(clusters)
        if not self._block_offset(index):
            try:
                yield from self._new_block(index, clusters[0])
            except BaseException:
                # As if it had not been allocated: the next try finds the same place, whose first cluster becomes the
                # block, and is written whole. Crash: the file is longer, and nothing names what is behind its end.
                self.held.difference_update(clusters)
                self.end = first
                raise
            del clusters[0]
        self.pool.extend(clusters)

    def _in_doubt(self) -> Operation[bool]:
        """Whether what lies right behind the old end may be named already. A table that was cut off names that."""
        if self.counted is None:
            return False
        yield from self.counted.go_on(BEFORE_GROWTH)
        return self.counted.finished and not self.counted.holds

    def _new_block(self, index: int, cluster: int) -> Operation[None]:
        """Create a refcount block in a cluster that it counts itself."""
        block = RefcountBlock(
            cluster * self.geometry.cluster_size, bytearray(self.geometry.cluster_size), self.geometry.refcount_order
        )
        block.set(cluster % self.geometry.refcount_block_entries, 1)
        log = self.log
        # Order: a new table is written whole before the transaction that links it; only its later changes
        # are journalled sector by sector, else a reused cluster's old bytes would be read as entries.
        yield Write(self.storage, block.host_offset, [block.to_bytes()])
        # No credits are waited for here: the checkpoint may need the pool. The ring's slack covers the sectors.
        log.note_data()
        self.reftable.entries[index] = block.host_offset
        self.overlaps.blocks.add(cluster)
        log.note_entry(self.reftable, index)
        self.cache.install(block)
        self.held.discard(cluster)

    def _move_table(self, index: int) -> Operation[None]:
        """Move the refcount table to a larger place at the end, which counts itself."""
        geometry, log = self.geometry, self.log
        size, per_block = geometry.cluster_size, geometry.refcount_block_entries
        old = self.reftable
        first = -(-self.end // per_block) * per_block
        per_cluster = size // 8
        table_clusters = -(-max(index + 1, first // per_block + 2) * 3 // 2 // per_cluster)
        while True:
            blocks = -(-(table_clusters + table_clusters // per_block + 2) // per_block) + 1
            if first // per_block + blocks <= table_clusters * per_cluster:
                break
            table_clusters += 1
        if table_clusters * size > MAX_REFTABLE_BYTES:
            raise OSError(errno.EFBIG, "the refcount table would pass 8 MiB")
        total = table_clusters + blocks
        if any(self.overlaps.what(each) for each in range(first, first + total)):
            raise OSError(errno.EFBIG, "something behind the end of the file is named already")
        yield Allocate(self.storage, first * size, total * size)
        old_clusters = range(old.host_offset // size, (old.host_offset + old.length) // size)
        pinned: list[Table] = []
        old_end = self.end
        try:
            for cluster in old_clusters:
                counting = yield from self.load_block(cluster)
                if counting is not None:
                    counting.pins += 1
                    pinned.append(counting)
            new_blocks = []
            for number in range(blocks):
                block = RefcountBlock(
                    (first + table_clusters + number) * size, bytearray(size), geometry.refcount_order
                )
                base = first + number * per_block
                for cluster in range(base, min(base + per_block, first + total)):
                    block.set(cluster - base, 1)
                new_blocks.append(block)
                yield Write(self.storage, block.host_offset, [block.to_bytes()])
            # One hold from the copy of the table to its write's start is not enough: a change of the old table
            # while the new one is written would be lost. Only this operation changes it (single flight).
            table = Table(first * size, array("Q", old.entries) + array("Q", bytes(table_clusters * size - old.length)))
            for number, block in enumerate(new_blocks):
                table.entries[first // per_block + number] = block.host_offset
            yield Write(self.storage, table.host_offset, [table.to_bytes()])
            log.note_data()
            for block in new_blocks:
                self.cache.install(block)
            self.reftable = table
            self.overlaps.blocks.update(block.host_offset // size for block in new_blocks)
            self.overlaps.reftable = (first, first + table_clusters)
            self.header.data = set_refcount_table(self.header.data, table.host_offset, table_clusters)
            log.running.note_sector(0, self.header)
            log.running.forget_sectors(old.host_offset, old.length)
            log.running.note_host_revoke(old.host_offset, old.length)
            for cluster in old_clusters:
                self.drop(cluster)
            self.end = first + total
            if self._block_offset(old_end // per_block):
                # What aligning the new table left is free, and its block exists.
                self.found.extend(range(old_end, first))
        finally:
            for each in pinned:
                each.pins -= 1


def grow_step(geometry: Geometry) -> int:
    """Clusters that are made pool clusters together: 16 MiB, where these are neither a handful nor thousands."""
    return max(16, min(1024, (16 << 20) >> geometry.cluster_bits))


def runs_of(clusters: list[int]) -> list[tuple[int, int]]:
    """(first, count) runs of ascending clusters."""
    runs: list[tuple[int, int]] = []
    for cluster in clusters:
        if runs and cluster == runs[-1][0] + runs[-1][1]:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((cluster, 1))
    return runs
