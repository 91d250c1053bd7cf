"""What must hold of an open engine between any two moves, and of a disk after any cut.

`Watch` looks at one engine's life: the design's invariants, said of `Disk`, `Log`, `Ring`, `Allocator`, `Epochs` and
`PendingPages` and of what the simulated disk holds durably at that moment. It finds a broken rule where it is broken,
while the oracle finds it only where it has done harm. `recover` is for a disk that a cut or a kill left.

    1  pages   a record of the running transaction is the pending page itself; a pending page has a record in the
               running, the committing or a committed transaction, and the tail has not passed it
    2  space   free, pool, reserved and freed clusters are apart; none is named by the mapping, as it is or as it is
               committed, or by a step in flight; pool clusters read as zeros; nobody is handed the ring
    3  home    a metadata sector that is not in the journal's set is durable at home, as it was committed
    4  tail    what the tail has passed is passed in a header slot that is durable
    5  latch   nothing is committed after the device failed
    6  idle    with nobody in flight, nothing is held: credits, tokens, exclusions, pins, epochs
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterable
from random import Random

from engine import SECTOR, Engine, Oracle, Shape, reference_counts, settle
from simdisk import SimDisk, SimStorage
from stepper import Task

from nbd_qcow2j.attaching import detach
from nbd_qcow2j.disk import Disk
from nbd_qcow2j.format.header import parse_header
from nbd_qcow2j.format.journal import ALIGNMENT, Slot
from nbd_qcow2j.image.check import check_image
from nbd_qcow2j.steps import Punch, Read, ReadInto, Step, Write, ZeroRange

NEVER = 1 << 60
"""For `round_`: so many bytes are not freed, the tail stays."""
OFFSET = 0x00FF_FFFF_FFFF_FE00
COMPRESSED = 1 << 62


class Watch:
    """The invariants of one open engine."""

    def __init__(self, engine: Engine) -> None:
        assert engine.disk is not None
        self.engine, self.disk = engine, engine.disk
        self.shadow: dict[int, bytes] = {}
        """Every metadata sector that was seen committed, and its content."""
        self.committed_when_failed: int | None = None
        self.detaching = False
        self.checks = 0

    def check(self, tasks: Iterable[Task] = ()) -> None:
        """All of it; with no task given that is unfinished, also that nothing is held."""
        unfinished = [task for task in tasks if not task.done]
        self.checks += 1
        self._pages()
        if self.detaching and self.disk.log.running.empty and not self.disk.log.ring.transactions:
            # Everything is home: the ring, the pool and the free tail of the file are being given back.
            return
        self._space([task.step for task in unfinished if task.step is not None])
        self._own_homes()
        self._home()
        self._tail()
        self._latch()
        if not unfinished and self.disk.log.failed is None:
            self._idle()

    # ---- 1

    def _pages(self) -> None:
        disk, log = self.disk, self.disk.log
        for index, page in log.running.pages.items():
            assert disk.pending.get(index) is page, f"page {index}: the running transaction records an older version"
        ring = {id(each) for each in log.ring.transactions}
        noted = log.committing.pages if log.committing is not None else {}
        count = 0
        for pages in disk.pending.clusters.values():
            assert pages, "a cluster without pages is pending"
            for index, page in pages.items():
                count += 1
                noticed = log.running.pages.get(index) is page or noted.get(index) is page
                # A commit that failed took its notes with it; nothing of them was acknowledged.
                assert noticed or log.failed is not None or (page.record is not None and id(page.record) in ring), (
                    f"page {index} is pending, and no transaction after the tail records it"
                )
        assert count == disk.pending.count
        live = Counter(id(page.record) for page in log.records.values())
        for each in log.ring.transactions:
            assert each.live == live.pop(id(each), 0), f"transaction {each.sequence}: live {each.live}"
        assert not live, "a record is in no transaction of the ring"

    # ---- 2

    def _committed(self, offset: int, length: int) -> bytes:
        """Metadata as a replay now would see it."""
        data = bytearray(self.engine.sim.peek(offset, length))
        for at in range(0, length, SECTOR):
            entry = self.disk.log.home.get(offset + at)
            if entry is not None:
                data[at : at + SECTOR] = entry[0]
        return bytes(data)

    def _named(self, *, live: bool) -> set[int]:
        """Host clusters that the active mapping and the refcount table name, as they are or as committed."""
        disk = self.disk
        bits, size = disk.geometry.cluster_bits, disk.geometry.cluster_size
        step = 2 if disk.geometry.extended_l2 else 1
        header = self._committed(0, SECTOR)
        l1_entries, l1_offset, reftable, reftable_clusters = struct.unpack_from(">IQQI", header, 36)
        if live:
            reftable, reftable_clusters = disk.allocator.reftable.host_offset, disk.allocator.reftable.length >> bits
            l1: Iterable[int] = disk.mapping.l1.entries
            blocks: Iterable[int] = disk.allocator.reftable.entries
        else:
            l1 = _words(self._committed(l1_offset, l1_entries * 8))
            blocks = _words(self._committed(reftable, reftable_clusters * size))
        named = {0, *range(l1_offset >> bits, (l1_offset + l1_entries * 8 - 1 >> bits) + 1)}
        named |= set(range(reftable >> bits, (reftable >> bits) + reftable_clusters))
        named |= {block >> bits for block in filter(None, blocks)}
        for table_entry in l1:
            table = table_entry & OFFSET
            if not table:
                continue
            named.add(table >> bits)
            cached = disk.cache.get(table) if live else None
            entries = cached.entries if cached is not None else _words(self._committed(table, size))
            for entry in filter(None, entries[::step]):
                if not entry & COMPRESSED and entry & OFFSET:
                    named.add((entry & OFFSET) >> bits)
                elif entry & COMPRESSED:
                    named.update(disk.mapping.host_clusters(entry))
        return named

    def _space(self, steps: list[Step]) -> None:
        disk, log, allocator = self.disk, self.disk.log, self.disk.allocator
        pool, found = set(allocator.pool), set(allocator.found)
        assert len(pool) == len(allocator.pool) and len(found) == len(allocator.found), "a cluster is free twice"
        freeing = set(log.running.freed) | set(log.committing.freed if log.committing is not None else ())
        freed = {each for epoch in disk.epochs.retired for each in epoch.freed or ()} | set(disk.epochs.releasable)
        assert not pool & found and not (pool | found) & (freeing | freed) and not freeing & freed, (
            "a cluster is free and not free: "
            f"pool {pool}, found {found}, being freed {freeing}, freed and not yet released {freed}"
        )
        assert pool <= allocator.held and freeing | freed <= allocator.held, "a scan would find a cluster that is taken"
        live, committed = self._named(live=True), self._named(live=False)
        free = pool | found
        unused = free | allocator.held | freeing | freed
        assert not unused & live, f"free, freed or reserved, but named: {unused & live}"
        assert not (free | freed) & committed, f"free, but named by committed metadata: {(free | freed) & committed}"
        # What a commit that failed would have freed stays taken, and named.
        reserved = allocator.held - freeing if log.failed is None else set()
        assert not reserved & committed, f"reserved, but named by committed metadata: {reserved & committed}"
        low, high = allocator.ring_clusters
        ring = {each for each in live | committed | free | allocator.held if low <= each < high}
        assert not ring, f"clusters of the ring in use: {ring}"
        for cluster in unused:
            assert not allocator.refcount(cluster), f"cluster {cluster} is not in use and has a refcount"
        size = disk.geometry.cluster_size
        zeros = bytes(size)
        for cluster in pool:
            assert self.engine.sim.peek(cluster * size, size) == zeros, f"pool cluster {cluster} is not zero"
        for step in steps:
            self._in_flight(step, free=free, pool=pool, live=live)

    def _own_homes(self) -> None:
        """Whoever writes in place writes where the cluster lives, and it is nobody else's."""
        disk = self.disk
        for cluster, offset in disk.in_place.homes.items():
            if disk.mapping.in_memory(cluster):
                entry, bitmap = disk.mapping.find(cluster)
                assert disk.is_ours(entry, bitmap) and entry & OFFSET == offset, f"{cluster} is not at {offset:#x}"
            assert disk.allocator.refcount(offset >> disk.geometry.cluster_bits) in (0, 1), f"{offset:#x} is shared"

    def _in_flight(self, step: Step, *, free: set[int], pool: set[int], live: set[int]) -> None:
        """Invariant 2 of the design: nobody is still on a cluster that may be handed out."""
        if getattr(step, "storage", None) not in (self.engine.file, self.engine.background):
            return
        if isinstance(step, ReadInto):
            offset, length = step.offset, len(step.buffer)
        elif isinstance(step, Read | Punch | ZeroRange):
            offset, length = step.offset, step.length
        elif isinstance(step, Write):
            offset, length = step.offset, sum(memoryview(each).nbytes for each in step.buffers)
        else:
            return
        bits = self.disk.geometry.cluster_bits
        clusters = set(range(offset >> bits, (offset + max(1, length) - 1 >> bits) + 1))
        what = type(step).__name__
        if isinstance(step, ZeroRange | Punch):
            assert not clusters & (pool | live), f"{what} of clusters in use: {clusters & (pool | live)}"
        if not isinstance(step, ZeroRange):
            assert not clusters & free, f"{what} in flight on clusters that are free: {clusters & free}"

    # ---- 3, 4

    def _metadata(self) -> set[int]:
        """Clusters that hold committed metadata."""
        disk, bits = self.disk, self.disk.geometry.cluster_bits
        header = self._committed(0, SECTOR)
        l1_entries, l1_offset, reftable, clusters = struct.unpack_from(">IQQI", header, 36)
        l1 = self._committed(l1_offset, l1_entries * 8)
        blocks = self._committed(reftable, clusters << bits)
        found = {0, *range(l1_offset >> bits, (l1_offset + l1_entries * 8 - 1 >> bits) + 1)}
        found |= set(range(reftable >> bits, (reftable >> bits) + clusters))
        del disk
        return found | {(entry & OFFSET) >> bits for entry in filter(None, (*_words(l1), *_words(blocks)))}

    def _home(self) -> None:
        home = self.disk.log.home
        for offset, (content, _) in home.items():
            self.shadow[offset] = content
        if not self.shadow:
            return
        metadata, bits = self._metadata(), self.disk.geometry.cluster_bits
        for offset in [each for each in self.shadow if each not in home]:
            if offset >> bits not in metadata:
                # A table that was freed: its cluster is somebody else's.
                del self.shadow[offset]
                continue
            durable = self.engine.sim.durable.get(offset // SECTOR, bytes(SECTOR))
            assert durable == self.shadow[offset], f"metadata at {offset:#x} left the journal's set and is not at home"

    def _tail(self) -> None:
        ring = self.disk.log.ring
        assert ring.used <= ring.length
        if ring.generation < 2:
            return
        slots = []
        for at in (0, ALIGNMENT):
            block = self.engine.sim.durable.get((ring.location.offset + at) // SECTOR, bytes(SECTOR))
            slot = Slot.from_block(block.ljust(ALIGNMENT, b"\0"), name="watched")
            if slot is not None:
                slots.append(slot)
        newest = max(slots, key=lambda each: each.generation)
        tail = ring.tail_sequence
        if not ring.transactions and ring.used:
            # The only one in the ring is being written.
            tail -= 1
        assert newest.tail_sequence >= tail, "the tail moved before its slot was durable"

    # ---- 5, 6

    def _latch(self) -> None:
        log = self.disk.log
        if log.failed is not None:
            if self.committed_when_failed is None:
                self.committed_when_failed = log.committed
            assert log.committed == self.committed_when_failed, "a commit after the device failed"

    def _idle(self) -> None:
        disk, log, allocator = self.disk, self.disk.log, self.disk.allocator
        assert not disk.incoming, f"room for {disk.incoming} pages was not returned"
        assert not log.ring.outstanding, f"{log.ring.outstanding} bytes of credits were not returned"
        assert not disk.excluded and not disk.merging and not disk.mapping.making and not disk.cache.loading
        assert not allocator.growing and log.committing is None
        assert not disk.epochs.current.active and not disk.epochs.retired, "an epoch was not left"
        assert disk.cluster_tokens <= disk.pending.clusters.keys()
        needing: dict[int, int] = dict.fromkeys(disk.table_tokens, 0)
        for cluster in disk.pending.clusters:
            if cluster // disk.geometry.l2_entries in needing:
                needing[cluster // disk.geometry.l2_entries] += 1
        assert disk.table_tokens == needing and all(needing.values()), "tables are promised that nobody needs"
        assert not disk.owning
        tokens = len(disk.cluster_tokens) + len(disk.table_tokens)
        assert allocator.tokens == tokens, f"{allocator.tokens} tokens, pending pages hold {tokens}"
        pinned = [table.host_offset for table in disk.cache.tables.values() if table.pins]
        assert not pinned, f"tables at {pinned} are still pinned"
        taken = set(allocator.pool) | set(log.running.freed) | set(disk.epochs.releasable)
        assert allocator.held == taken, f"clusters that nobody will give back: {allocator.held ^ taken}"


def _words(data: bytes) -> tuple[int, ...]:
    return struct.unpack(f">{len(data) // 8}Q", data[: len(data) // 8 * 8])


def no_leaks(state: SimDisk, *, plain: bool) -> None:
    """Refcounts equal references in a closed image; `plain`: as the tests count them too, without our code."""
    storage = SimStorage(state.copy(), "checked", read_only=True)

    def read(offset: int, length: int) -> bytearray:
        data = bytearray(length)
        storage.read_into(data, offset)
        return data

    size = storage.size()
    header = parse_header(bytes(read(0, 1 << 16)), file_size=size, name="checked")
    report = check_image(header, read, file_size=size, name="checked")
    assert not report.exit_code, report.messages
    if plain:
        reference_counts(state)


def recover(state: SimDisk, shape: Shape, oracle: Oracle, *, seed: int, plain: bool = True) -> None:
    """Every sector as promised, then a clean close without leaks that changes nothing. Uses `state` up."""
    engine = Engine(state, shape, Random(seed))
    disk = engine.open()
    watch = Watch(engine)
    watch.check()
    contents = engine.contents()
    oracle.check(contents)
    settle(engine, detach(disk))
    no_leaks(state, plain=plain)
    after = Engine(state, shape, Random(seed), read_only=True)
    after.open()
    assert after.contents() == contents, "closing changed what the disk holds"


def squeeze(disk: Disk, *, tables: int = 2, pool: int = 2) -> None:
    """Let a cluster be reused at the next occasion, and a table be forgotten: what is rare where space is plenty."""
    disk.cache.limit = tables
    disk.allocator.grow_step = pool
