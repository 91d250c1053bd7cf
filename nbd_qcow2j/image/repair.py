"""What a check may mend without losing anything: refcounts that references contradict, and COPIED flags.

    leaks   refcounts higher than the references come down, if every reference could be read: where an entry is
            impossible, the cluster that nobody names may be the one it should name, and is kept
    all     refcounts lower than the references come up, COPIED flags follow the refcounts; when nothing is left
            to find, the dirty and corrupt bits go

Entries themselves are never changed but for that flag: what they should say is not known. Where a refcount block
is missing or lies on something else, nothing is made up: `qemu-img check -r all` builds such tables anew.

A plan only; the caller keeps the old bytes, then writes step after step with a sync after each.

    Crash: up: refcounts are raised first, so that at no moment a cluster in use may be handed out; flags next;
    down: leaks last. A cut leaves what was there before, mended in part; the same repair goes on from there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache

from ..errors import ImageError
from ..format.header import INCOMPAT_CORRUPT, INCOMPAT_DIRTY, Header
from ..format.header_rewrite import with_incompatible
from ..format.tables import OFFSET_MASK, OFLAG_COMPRESSED, OFLAG_COPIED, REFTABLE_OFFSET_MASK, table_from_bytes
from ..geometry import SECTOR
from .check import References, counted_references
from .findings import Incomplete
from .snapshots import Reader
from .tables import RefcountBlock, Table

BLOCKS_KEPT = 8
"""Refcount blocks that did not change and are in memory."""


@dataclass
class Repair:
    """Steps of (host offset, new bytes) in whole sectors, a sync after each step; and what stays as it is."""

    steps: list[list[tuple[int, bytes]]] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

    def ranges(self) -> list[tuple[int, int]]:
        """(offset, length) of all that changes, each once, in order."""
        return sorted({(offset, len(data)) for step in self.steps for offset, data in step})


def plan_repair(header: Header, read: Reader, *, file_size: int, name: str, everything: bool) -> Repair:
    """How to mend a plain image. Raises ImageError where it cannot be looked at, or tables would have to be made."""
    try:
        check = counted_references(header, read, file_size=file_size, name=name)
    except Incomplete as reason:
        raise ImageError(f"{reason}: nothing is mended; qemu-img check -r all may help", where=name) from None
    impossible = check.report.corruptions
    plan = Repair()
    if impossible and not everything:
        plan.left.append(f"{impossible} entries are impossible; leaks are kept: one may be what they should name")
        return plan
    blocks = [entry & REFTABLE_OFFSET_MASK for entry in check.reftable]
    _refuse_bad_blocks(check, name)
    raised: list[tuple[int, bytes]] = []
    lowered: list[tuple[int, bytes]] = []
    geometry = header.geometry
    per, size = geometry.refcount_block_entries, geometry.cluster_size
    final: dict[int, RefcountBlock] = {}
    """Blocks that change, as they will be."""
    references = check.references

    @lru_cache(maxsize=BLOCKS_KEPT)
    def load(index: int) -> RefcountBlock:
        return RefcountBlock(blocks[index], bytearray(read(blocks[index], size)), geometry.refcount_order)

    for index, offset in enumerate(blocks):
        first = index * per
        # One that counts nothing but what lies behind all that is named has nothing to say.
        if not offset or first >= check.clusters:
            continue
        block = load(index)
        before = bytes(block.data)
        lower: list[tuple[int, int]] = []
        for at in range(min(per, check.clusters - first)):
            refcount, wanted = block.get(at), min(references.get(first + at), geometry.max_refcount)
            if refcount < wanted and everything:
                block.set(at, wanted)
            elif refcount > wanted and not impossible:
                lower.append((at, wanted))
        middle = bytes(block.data)
        raised += _changed_sectors(offset, before, middle)
        for at, wanted in lower:
            block.set(at, wanted)
        after = bytes(block.data)
        lowered += _changed_sectors(offset, middle, after)
        if after != before:
            final[index] = block

    def has_block(index: int) -> bool:
        return index < len(blocks) and bool(blocks[index])

    missing = sum(
        1
        for chunk in references.chunks
        for cluster in range(chunk * 256, chunk * 256 + 256)
        if not has_block(cluster // per) and references.get(cluster)
    )
    if missing:
        plan.left.append(f"{missing} clusters in use have no refcount block: qemu-img check -r all makes one")
    if impossible:
        plan.left.append(f"{impossible} entries are impossible and stay as they are; leaks are kept for their sake")

    def refcount_of(cluster: int) -> int:
        index = cluster // per
        block = final.get(index) or (load(index) if has_block(index) else None)
        return block.get(cluster % per) if block is not None else 0

    flags = _flags(check, refcount_of, read) if everything else []
    plan.steps = [step for step in (raised, flags, lowered) if step]
    return plan


def without_marks(sector: bytes) -> bytes:
    """Sector 0 without the dirty and the corrupt bit: for an image in which nothing was found."""
    bits = int.from_bytes(sector[72:80], "big")
    return with_incompatible(sector, bits & ~(INCOMPAT_DIRTY | INCOMPAT_CORRUPT))


def _refuse_bad_blocks(check: References, name: str) -> None:
    size = check.size
    for index, entry in enumerate(check.reftable):
        if not entry:
            continue
        offset = entry & REFTABLE_OFFSET_MASK
        # Named once means: it is nothing else, no table and nobody's data.
        if entry != offset or offset % size or check.references.get(offset // size) != 1:
            raise ImageError(
                "a refcount block lies on something else or at an impossible place, which is not mended here: "
                "qemu-img check -r all builds them anew", where=f"{name}, entry {index}", found=hex(entry),
            )  # fmt: skip


def _changed_sectors(offset: int, before: bytes, after: bytes) -> Iterator[tuple[int, bytes]]:
    if before == after:
        return
    for at in range(0, len(after), SECTOR):
        if before[at : at + SECTOR] != after[at : at + SECTOR]:
            yield offset + at, after[at : at + SECTOR]


def _flags(check: References, refcount_of: Callable[[int], int], read: Reader) -> list[tuple[int, bytes]]:
    """COPIED where the refcount is one, and nowhere else, in the active tables that are nothing but tables."""
    header, size = check.header, check.size
    found: list[tuple[int, bytes]] = []

    def mend(offset: int, length: int, *, every: int, compressed: bool) -> list[int]:
        data = bytes(read(offset, -(-length // SECTOR) * SECTOR))
        table = Table(offset, table_from_bytes(data))
        named = []
        for index in range(0, length // 8, every):
            entry = table.entries[index]
            if compressed and entry & OFLAG_COMPRESSED:
                table.entries[index] = entry & ~OFLAG_COPIED
                continue
            host = entry & OFFSET_MASK
            if not host or host % size or host >= check.file_size:
                continue
            named.append(host)
            one = refcount_of(host // size) == 1
            table.entries[index] = entry | OFLAG_COPIED if one else entry & ~OFLAG_COPIED
        found.extend(_changed_sectors(offset, data, table.to_bytes()))
        return named

    length = header.l1_entries * 8
    clusters = range(header.l1_offset // size, -(-(header.l1_offset + length) // size))
    if any(check.references.get(cluster) != 1 for cluster in clusters):
        return []
    for offset in sorted(set(mend(header.l1_offset, length, every=1, compressed=False))):
        if check.references.get(offset // size) == check.tables[offset]:
            mend(offset, size, every=2 if check.geometry.extended_l2 else 1, compressed=True)
    return found
