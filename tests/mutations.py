"""Breakages that the tests must notice: each removes one rule of the engine.

A mutation is a piece of one source file, which occurs there exactly once, and what takes its place. `apply` makes a
copy of the package with one of them; `test_mutations.py` runs the tests on the copy.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "nbd_qcow2j"


@dataclass(frozen=True)
class Mutation:
    """`old` in `file` becomes `new`; `rule` is what no longer holds. `first`: a file of tests to run before others."""

    name: str
    rule: str
    file: str
    old: str
    new: str
    first: str = ""


def apply(mutation: Mutation, directory: Path) -> Path:
    """A copy of the package below `directory` with this mutation; returns the directory to import from."""
    copy = directory / "nbd_qcow2j"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    path = copy / mutation.file
    text = path.read_text()
    found = text.count(mutation.old)
    assert found == 1, f"{mutation.name}: its text occurs {found} times in {mutation.file}"
    path.write_text(text.replace(mutation.old, mutation.new))
    compile(path.read_text(), mutation.file, "exec")
    return directory


MUTATIONS = [
    # ---- what cannot be read
    Mutation(
        "nothing is recorded again", "a page over what cannot be read does not stop the tail for ever",
        "checkpoint.py", "if tight and again and left.errno", "if False and left.errno",
    ),
    Mutation(
        "what is recorded again is not recorded", "the tail passes a record when a newer one is committed",
        "record_again.py", "        log.running.note_page(index, page)\n", "        pass\n",
    ),
    # ---- commit
    Mutation(
        "data is synced after the journal names it", "data before the metadata that names it", "journal/log.py",
        """                yield from self.sync_data(self.storage)
            encoded = None
            if transaction.in_ring:
                encoded = yield from self._write(transaction, sectors)
""",
        """                pass
            encoded = None
            if transaction.in_ring:
                encoded = yield from self._write(transaction, sectors)
            if transaction.data_mark > self.synced_mark:
                yield from self.sync_data(self.storage)
""",
    ),
    Mutation(
        "a commit does not sync data", "data before the metadata that names it", "journal/log.py",
        "if transaction.data_mark > self.synced_mark:", "if False:",
    ),
    Mutation(
        "a sync is believed to cover what came while it ran", "a sync covers what had returned before it",
        "journal/log.py",
        """        mark = self.data_counter
        yield Sync(storage)
""",
        """        yield Sync(storage)
        mark = self.data_counter
""",
    ),
    Mutation(
        "sectors are copied when they are written", "the copy is taken in the hold that closes the transaction",
        "journal/log.py",
        """            encoded = None
            if transaction.in_ring:
""",
        """            encoded = None
            sectors = [(at, transaction.sectors[at].sector_bytes(at)) for at in sorted(transaction.sectors)]
            if transaction.in_ring:
""",
    ),
    Mutation(
        "the journal is not written synchronously", "a commit is durable when it is acknowledged", "journal/log.py",
        "            yield WriteSync(self.storage, places[0][0], encoded.buffers)",
        "            yield WriteSync.__base__(self.storage, places[0][0], encoded.buffers)",
    ),
    Mutation(
        "a flush does not wait for the running transaction", "a flush covers all that was answered before it",
        "journal/log.py",
        "            number = self.last_number()\n", "            number = self.last_number() - 1\n",
    ),
    Mutation(
        "a failed sync is tried again", "a failed sync is never tried again and believed", "journal/log.py",
        """        yield Sync(storage)
        self.synced_mark""",
        """        try:
            yield Sync(storage)
        except OSError:
            yield Sync(storage)
        self.synced_mark""",
    ),
    Mutation(
        "any commit may use the reserve", "the reserve belongs to what frees the tail", "journal/log.py",
        "return ring.used + running.size <= ring.length and self.frees_tail()",
        "return ring.used + running.size <= ring.length",
    ),
    Mutation(
        "direct data is not noted", "what was written directly is synced by its commit", "changes.py",
        "            disk.log.note_data()\n", "",
    ),
    Mutation(
        "a new table's content is not noted", "a table is durable before what links it", "image/mapping.py",
        "                log.note_data()\n", "",
    ),
    Mutation(
        "a new table is not written whole", "a new table is written whole to its home", "image/mapping.py",
        "yield Write(storage, table.host_offset, [table.to_bytes()])", "pass",
    ),
    Mutation(
        "a refcount joins a later transaction", "refcount and link share a transaction", "image/allocator.py",
        """        block.set(index, value)
        self.log.note_entry(block, index)
""",
        """        block.set(index, value)
        late = self.log.__dict__.setdefault("late", [])
        for each in late:
            self.log.note_entry(*each)
        late[:] = [(block, index)]
""",
    ),
    # ---- metadata goes home
    Mutation(
        "what lies between two sectors goes home whatever it is", "only what is committed goes home", "checkpoint.py",
        "if table is not None and uncommitted.isdisjoint(range(end, offset, SECTOR)):", "if table is not None:",
    ),
    Mutation(
        "what a failed commit held goes home", "only what is committed goes home", "checkpoint.py",
        """            log.check()
            # What is not committed is in memory""",
        """            # What is not committed is in memory""",
    ),
    Mutation(
        "what is being committed goes home", "only what is committed goes home", "checkpoint.py",
        "{*log.running.sectors, *(log.committing.sectors if log.committing is not None else ())}",
        "set(log.running.sectors)",
    ),
    # ---- home elsewhere
    Mutation(
        "no host revoke of a moved refcount table", "freed metadata is revoked", "image/allocator.py",
        "            log.running.note_host_revoke(old.host_offset, old.length)\n", "",
    ),
    Mutation(
        "sectors of a moved refcount table are still recorded", "freed metadata leaves the running transaction",
        "image/allocator.py",
        "            log.running.forget_sectors(old.host_offset, old.length)\n", "",
    ),
    Mutation(
        "no guest revoke when pages are home elsewhere", "a record of the range is void", "disk.py",
        "            running.note_guest_revoke(first, end)\n", "            pass\n",
    ),
    Mutation(
        "no guest revoke at the checkpoint's link", "a record of the page is void", "going.py",
        "        running.note_guest_revoke(first, end)\n", "        pass\n",
    ),
    Mutation(
        "a dropped page stays in the running transaction", "record and revoke of a version never share a transaction",
        "disk.py",
        "            running.forget_page(index)\n", "",
    ),
    Mutation(
        "a page that went home stays in the running transaction",
        "record and revoke of a version never share a transaction", "going.py",
        "            running.forget_page(index)\n", "            pass\n",
    ),
    Mutation(
        "records that are being committed need no revoke", "a revoke goes wherever a record may lie after the tail",
        "journal/log.py",
        "return index in self.records or (self.committing is not None and index in self.committing.pages)",
        "return index in self.records",
    ),
    Mutation(
        "a page that was replaced goes home", "only the page that was written is home", "going.py",
        "        if disk.pending.get(index) is not page:\n", "        if disk.pending.get(index) is None:\n",
    ),
    Mutation(
        "pages leave before they are linked", "link before removal", "checkpoint.py",
        "            yield from _write_home(disk, going, home, gaps)\n",
        """            for each in going:
                for index in each.pages:
                    disk.pending.drop(index)
            yield from _write_home(disk, going, home, gaps)
""",
    ),
    Mutation(
        "a put changes the page that is there", "a page is immutable", "disk.py",
        "        page = Page(data)\n",
        """        page = self.pending.get(index) or Page(data)
        page.data = data
""",
    ),
    # ---- exclusion and merging
    Mutation(
        "a direct write excludes nobody", "one at a time changes where a cluster lives", "changes.py",
        "        yield from disk.exclude(cluster, cluster + count, held.excluded)\n", "",
    ),
    Mutation(
        "a merge ignores the write that came between", "two sub-page writes into one page both survive", "changes.py",
        """            page = disk.pending.get(index)
            if page is not None:
                base = page.data
            elif""",
        """            if False:
                pass
            elif""",
    ),
    Mutation(
        "a home is believed that was seen before its refcount was read", "what is remembered is so in that hold",
        "in_place.py",
        "if not disk.mapping.in_memory(cluster) or disk.mapping.find(cluster) != (entry, bitmap):", "if False:",
    ),
    Mutation(
        "a merge ignores what changed beneath", "a merge looks again", "changes.py",
        "            elif flag[0]:\n", "            elif False:\n",
    ),
    Mutation(
        "a trim over a backing file leaves nothing", "the backing data must not come back", "changes.py",
        "needs_flag = disk.has_backing(cluster) or (not may_trim and",
        "needs_flag = (not may_trim and",
    ),
    # ---- space
    Mutation(
        "a freed cluster is free before the commit", "not reused before the freeing transaction is committed",
        "image/allocator.py",
        "        self.log.running.freed.append(cluster)\n", "        self.found.append(cluster)\n",
    ),
    Mutation(
        "a cluster is released under its readers", "not reused before everything that began on it has ended",
        "image/epochs.py",
        "while self.retired and not self.retired[0].active:", "while self.retired:",
    ),
    Mutation(
        "a cluster is free before it is punched", "punch, then hand out", "image/allocator.py",
        """        if self.discard:
            for first, count in runs_of(clusters):
""",
        """        self.held.difference_update(clusters)
        self.found.extend(clusters)
        if self.discard:
            for first, count in runs_of(clusters):
""",
    ),
    Mutation(
        "the allocator finds the ring", "the allocator keeps off the ring", "image/allocator.py",
        "if cluster not in self.held and cluster not in known and not self.overlaps.what(cluster):",
        "if cluster not in self.held and cluster not in known:", "test_file_length.py",
    ),
    Mutation(
        "a token is kept when the last page went home", "tokens are what pending pages need", "going.py",
        "            disk.return_token(cluster)\n", "            pass\n",
    ),
    # ---- checkpoint and tail
    Mutation(
        "the tail moves before the metadata is durable", "metadata is durable at home before the tail passes it",
        "checkpoint.py",
        "        if going or home:\n", "        if going:\n",
    ),
    Mutation(
        "the tail's slot is not durable", "the slot is durable before its space is used again", "checkpoint.py",
        "yield WriteSync(disk.background, ring.slot_offset(slot.generation), [slot.to_block()])",
        "yield Write(disk.background, ring.slot_offset(slot.generation), [slot.to_block()])",
    ),
    Mutation(
        "the tail passes pages that have no home", "the tail passes only what is home, revoked or superseded",
        "journal/ring.py",
        "            if transaction.live:\n", "            if False:\n",
    ),
    Mutation(
        "the live table goes home", "the committed copy goes home, never the live table", "checkpoint.py",
        "    writes += [(offset, entry[0]) for offset, entry in home.items()]\n",
        """    for offset, entry in home.items():
        tables = [each for each in disk.cache.tables.values() if 0 <= offset - each.host_offset < each.length]
        writes.append((offset, tables[0].sector_bytes(offset) if tables else entry[0]))
""",
    ),
    Mutation(
        "a sector leaves the set though a newer one was committed", "the set holds what is not at home",
        "journal/log.py",
        "            if self.home.get(offset) is entry:\n", "            if offset in self.home:\n",
    ),
    Mutation(
        "a failed sync of the checkpoint is passed over", "the first failed sync latches the device", "checkpoint.py",
        """                # Whatever its errno, a failed sync is a lost write: it is never tried again and believed.
                raise _Synchronous(*error.args) from error
""",
        """                del error
""",
    ),
    Mutation(
        "a load installs what went home meanwhile", "a late read never installs a stale table", "image/tables.py",
        "            if load.stale or host_offset in self.tables:\n", "            if host_offset in self.tables:\n",
    ),
    # ---- opening and replay
    Mutation(
        "opening does not begin with a sync", "every opening for writing begins with a sync", "opening.py",
        """    if not read_only:
        yield Sync(file)
    header""",
        """    header""",
    ),
    Mutation(
        "the accepted log is not written again", "what looks committed is made so before serving", "opening.py",
        "        yield WriteSync(file, offset, [plan.log[at : at + length]])\n",
        "        yield Sync(file)\n",
    ),
    Mutation(
        "the accepted slot is not written again", "what looks committed is made so before serving", "opening.py",
        "    yield WriteSync(file, disk.log.ring.slot_offset(plan.slot.generation), [plan.slot.to_block()])\n",
        "",
    ),
    Mutation(
        "the header's stages are not synced", "each stage of attach and detach is durable before the next",
        "attaching.py",
        """                raise
        yield Sync(file)


def last_used(""",
        """                raise


def last_used(""",
    ),
    Mutation(
        "replay ignores the UUID", "nothing from another history follows", "journal/replay.py",
        "if head is None or (head.sequence, head.uuid, head.previous_crc) != (sequence, slot.uuid, crc):",
        "if head is None or (head.sequence, head.previous_crc) != (sequence, crc):",
    ),
    Mutation(
        "the guest's data can look like a lost transaction", "the guest cannot forge a transaction",
        "journal/replay.py",
        "if head is None or head.uuid != slot.uuid or head.sequence < sequence:",
        "if head is None or head.sequence < sequence:",
    ),
    Mutation(
        "replay ignores the chain", "a transaction follows the one before it", "journal/replay.py",
        "if head is None or (head.sequence, head.uuid, head.previous_crc) != (sequence, slot.uuid, crc):",
        "if head is None or (head.sequence, head.uuid) != (sequence, slot.uuid):",
    ),
    Mutation(
        "replay ignores a transaction's own CRC", "a torn transaction is not replayed", "journal/replay.py",
        "        if at + head.length > ring.length or not (yield from ring.holds(at, head)):\n",
        "        if at + head.length > ring.length:\n",
    ),
    Mutation(
        "a guest revoke voids records of its own transaction", "a record in the revoke's transaction is replayed",
        "journal/replay.py",
        "if guest.newest(record.offset + at) <= sequence:", "if guest.newest(record.offset + at) < sequence:",
    ),
    Mutation(
        "a lost end of the journal looks like an empty one", "an end below the slot's last committed is damage",
        "journal/replay.py",
        "    if sequence - 1 < slot.last_committed:\n", "    if False:\n",
    ),
    # ---- damaged images, small clusters
    Mutation(
        "the reserve does not grow with what is pending", "a full ring drains", "journal/ring.py",
        "        return self._fixed_reserve + linked * self.home_cost + clusters * self._growth\n",
        "        return min(self._fixed_reserve + self.most_linked * self.home_cost, self.length * 3 // 4)\n",
        "test_small_clusters.py",
    ),
    Mutation(
        "a refcount table that moves takes more than the reserve", "what growing notes without credits is reserved",
        "journal/ring.py", "max(GROWTH_SECTORS, moved) * SECTOR_COST", "GROWTH_SECTORS * SECTOR_COST",
        "test_small_clusters.py",
    ),
    Mutation(
        "commits go on while the image is detached", "a flush that was answered is in a journal that the header names",
        "attaching.py", "    log.ended = True\n", "", "test_closing.py",
    ),
    Mutation(
        "sector 0 is one record with its neighbour", "of the header cluster only sector 0 is journalled",
        "format/journal.py", " and (start or kind == GUEST_DATA)", "", "test_small_clusters.py",
    ),
    Mutation(
        "free clusters are used before all tables were looked at", "what a table names is not handed out",
        "image/allocator.py",
        "elif self.scan_at < self.scan_end and (self.counted is None or (yield from self.counted.go_on())):",
        "elif self.scan_at < self.scan_end:", "test_counted.py",
    ),
    Mutation(
        "the first growth does not ask what is named behind the end", "what a table names is not handed out",
        "image/allocator.py", "            elif self.end < ring and (yield from self._in_doubt()):\n",
        "            elif False:\n", "test_counted.py",
    ),
    Mutation(
        "a snapshot table without a refcount is cut off",
        "what was there before is cut off only where all has a refcount", "attaching.py",
        "        max(overlaps.blocks, default=0) + 1, max(overlaps.kept, default=0) + 1,\n",
        "        max(overlaps.blocks, default=0) + 1,\n", "test_counted.py",
    ),
    Mutation(
        "two ask at once what the tables name", "what a table names is not handed out", "image/counted.py",
        "        while self._busy:\n", "        while False:\n", "test_counted.py",
    ),
    Mutation(
        "a file is cut off by its refcounts alone", "what was there before is cut off only where all has a refcount",
        "attaching.py", "    if counted is None or not counted.holds:\n", "    if False:\n", "test_counted.py",
    ),
    Mutation(
        "an image is refused after its journal was attached", "an image that is refused is left as it was",
        "opening.py",
        """    overlaps = yield from _find_overlaps(file, header, tables, location, read_only=read_only, name=name)
    if plan is None and location is not None:
        yield from attach(file, header, data, location, size=tables.file_size, uuid=uuid, name=name)
        data = bytes((yield Read(file, 0, HEADER_READ)))
""",
        """    if plan is None and location is not None:
        yield from attach(file, header, data, location, size=tables.file_size, uuid=uuid, name=name)
        data = bytes((yield Read(file, 0, HEADER_READ)))
    overlaps = yield from _find_overlaps(file, header, tables, location, read_only=read_only, name=name)
""",
        "test_counted.py",
    ),
    Mutation(
        "clean sectors of a table that lies on another go home", "what is written between sectors is what was there",
        "checkpoint.py", "            if overlaps.what_else(offset - offset % size):\n", "            if False:\n",
        "test_home.py",
    ),
    Mutation(
        "a small write in place does not ask about its table", "damaged tables are met before a write does harm",
        "in_place.py", "        reason = yield from disk.allocator.why_bad_table(offset)\n",
        "        reason = ''\n", "test_in_place.py",
    ),
]  # fmt: skip
