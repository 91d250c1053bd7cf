"""The running transaction, commits, and what is committed but not home.

Concurrency (each numbered line is one hold of the state lock or one step without it):

    1  running becomes committing, a new one starts; its metadata sectors are copied *as they are now*
    2  if data written directly belongs to it and was not synced since: fdatasync
    3  the transaction goes into the ring, synchronously
    4  committed: records and revokes take effect, waiters wake, freed clusters' epoch retires

    Crash before 3 ends: the transaction is torn or absent; nothing of it was acknowledged.
    Crash after 3: replay finds it; its data was durable in step 2.

One commit at a time; whoever needs one and finds none in progress makes it (the flush that comes first leads,
those that come while it runs share the next).
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from ..errors import DeviceFailed, Error, RequestError
from ..format.journal import JOINED, EncodedTransaction, encode_transaction
from ..geometry import SECTOR, Geometry
from ..steps import Compute, Gate, Operation, Sync, Wait, WriteSync
from .ring import Ring
from .transaction import CommittedTransaction, Transaction

if TYPE_CHECKING:
    from ..image.epochs import Epochs
    from ..image.tables import Table
    from ..pending import Page
    from ..storage import Storage


class _Whole:
    """What `Log.whole_or_latched` returns. No generator: it is entered for each cluster that goes home."""

    __slots__ = ("log", "what")

    def __init__(self, log: Log, what: str) -> None:
        self.log, self.what = log, what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: object) -> None:
        if error is not None and not isinstance(error, DeviceFailed):
            raise self.log.latch(error, self.what) from error


class Log:
    """All that is between a change in memory and its durability."""

    def __init__(self, storage: Storage, ring: Ring, geometry: Geometry, epochs: Epochs) -> None:
        self.storage = storage
        self.ring = ring
        self.geometry = geometry
        self.epochs = epochs
        self.failed: DeviceFailed | None = None
        self.ended = False
        """The image is being closed: everything is home, and the header may name the journal no more."""
        self.running = Transaction(1, geometry.page_size)
        self.committing: Transaction | None = None
        self.committed = 0
        """Number of the last committed transaction."""
        self.home: dict[int, tuple[bytes, int]] = {}
        """Committed metadata that is not home: host offset of a sector -> (content, sequence)."""
        self.records: dict[int, Page] = {}
        """Page index -> the version whose committed record is the newest and not void."""
        self.data_counter = 0
        self.synced_mark = 0
        self.commit_gate = Gate("commit")
        self.room_gate = Gate("ring room")
        self.on_pressure: Callable[[], object] = lambda: None
        """Called when somebody waits for the tail: wake the checkpoint."""
        self.starvations = 0
        """How often the checkpoint could not go on: the host file system has no room, or a read failed."""
        self.starved_of = RequestError(errno.ENOSPC, "no room in the host file system")
        self.on_stale: Callable[[int], object] = lambda host_offset: None
        self.commits = self.commit_bytes = 0
        self.begin_commit: Callable[[], object] = lambda: None
        self.end_commit: Callable[[int], object] = lambda pages: None
        """Told when a commit begins, and when it has written so many pages: whoever times them has a clock."""

    # ---- the latch

    def latch(self, error: BaseException, what: str) -> DeviceFailed:
        """Invariant 7: the first lost write or failed sync ends writing; every waiter is told."""
        if self.failed is None:
            self.failed = DeviceFailed(f"{what}: {error}; the device takes no more writes, reading goes on")
        self.commit_gate.open()
        self.room_gate.open()
        self.on_pressure()
        return self._failure()

    def check(self) -> None:
        """Raises DeviceFailed once the device is latched, or ended."""
        if self.failed is not None:
            raise self._failure()
        if self.ended:
            raise DeviceFailed("the image is being closed")

    def _failure(self) -> DeviceFailed:
        # A new one each time: what is raised keeps the frames that it went through, of each time.
        return DeviceFailed(*self.failed.args) if self.failed is not None else DeviceFailed()

    def whole_or_latched(self, what: str) -> _Whole:
        """Changes that belong together, in one hold: an exception half-way latches the device in that hold.

        Crash: nothing. But a commit on top of half a change would make it durable.
        """
        return _Whole(self, what)

    # ---- credits

    def starve(self, reason: Error) -> None:
        """Nothing can go home, and nothing is lost: who waits for the tail is told."""
        self.starvations += 1
        self.starved_of = reason if isinstance(reason, RequestError) else RequestError(reason.errno, str(reason))
        # It is kept: without the frames that it went through, and all that the round held.
        self.starved_of.__traceback__ = None
        self.room_gate.open()

    def wait_for_room(self, starved: int) -> Operation[None]:
        """Wait until the checkpoint did something; `starved`: `starvations` when the caller began to want it.

        Raises RequestError: what the checkpoint lacks.
        """
        # Every wait ends: this one when the checkpoint has tried since, and could not.
        if self.starvations != starved:
            raise RequestError(self.starved_of.errno, f"what the journal holds cannot go home: {self.starved_of}")
        self.on_pressure()
        yield Wait(self.room_gate)

    def take_credits(self, cost: int, clusters: int = 0) -> Operation[None]:
        """Wait until the ring has room for `cost` bytes more, and take them; `clusters` may become pending.

        Raises DeviceFailed, RequestError.
        """
        ring, starved = self.ring, self.starvations
        while True:
            self.check()
            wanted = self.running.size + ring.outstanding + cost
            if wanted > ring.max_transaction and (self.running.in_ring or ring.outstanding):
                if self.running.in_ring and self.committing is None and self.may_commit():
                    yield from self.commit()
                elif self.committing is not None:
                    yield Wait(self.commit_gate)
                elif self.running.in_ring:
                    yield from self.wait_for_room(starved)
                else:
                    # Only the credits of others are in the way. They end, whatever the checkpoint lacks.
                    yield Wait(self.room_gate)
                continue
            if ring.has_room(running=self.running.size, cost=cost, clusters=clusters):
                ring.outstanding += cost
                ring.coming += clusters
                return
            yield from self.wait_for_room(starved)

    def try_credits(self, cost: int) -> bool:
        ring = self.ring
        wanted = self.running.size + ring.outstanding + cost
        if wanted > ring.max_transaction or not ring.has_room(running=self.running.size, cost=cost):
            return False
        ring.outstanding += cost
        return True

    def return_credits(self, cost: int, clusters: int = 0) -> None:
        self.ring.outstanding -= cost
        self.ring.coming -= clusters
        self.room_gate.open()

    # ---- commit

    def last_number(self) -> int:
        """Number of the newest transaction that holds anything."""
        return self.running.number if not self.running.empty else self.running.number - 1

    def commit_upto(self, number: int | None = None) -> Operation[None]:
        """Return when transaction `number` is committed; None: the newest that holds anything when this begins.

        Raises DeviceFailed, RequestError (ENOSPC).
        """
        starved = self.starvations
        if number is None:
            number = self.last_number()
        while self.committed < number:
            self.check()
            if self.committing is not None:
                yield Wait(self.commit_gate)
            elif self.may_commit():
                yield from self.commit()
            else:
                yield from self.wait_for_room(starved)
        self.check()

    def may_commit(self) -> bool:
        """Room for ordinary commits ends at the reserve; beyond it only what makes the tail passable goes."""
        ring, running = self.ring, self.running
        if not running.in_ring or ring.used + running.size + ring.reserve <= ring.length:
            return True
        return ring.used + running.size <= ring.length and self.frees_tail()

    def frees_tail(self) -> bool:
        """Whether the tail could move once the running transaction is committed."""
        if not self.ring.transactions or not self.ring.transactions[0].live:
            return True
        tail = self.ring.transactions[0]
        revokes = self.running.guest_revokes
        for index in tail.pages:
            page = self.records.get(index)
            if page is None or page.record is not tail or index in self.running.pages:
                continue
            if not any(first <= index < end for first, end in revokes):
                return False
        return True

    def commit(self) -> Operation[None]:
        """Commit the running transaction. Call only while none is committing. Raises DeviceFailed."""
        assert self.committing is None
        self.begin_commit()
        transaction = self.running
        self.committing = transaction
        self.running = Transaction(transaction.number + 1, self.geometry.page_size)
        # Order: the copy is taken in the hold that closes the transaction; a later change is the next one's.
        sectors = [(offset, transaction.sectors[offset].sector_bytes(offset)) for offset in sorted(transaction.sectors)]
        try:
            if transaction.data_mark > self.synced_mark:
                # Order: data before the metadata that names it (invariant 1).
                yield from self.sync_data(self.storage)
            encoded = None
            if transaction.in_ring:
                encoded = yield from self._write(transaction, sectors)
            self.committing = None
            self.check()
            self._committed(transaction, sectors, encoded)
        except DeviceFailed:
            # Latched by another while this was written: who came to wait for it since was not told by the latch.
            self.commit_gate.open()
            raise
        except GeneratorExit:
            raise
        except BaseException as error:
            self.committing = None
            raise self.latch(error, f"commit of transaction {transaction.number}") from error

    def sync_data(self, storage: Storage) -> Operation[None]:
        """fdatasync, noting what it covers: the writes that had *returned* before it began."""
        mark = self.data_counter
        yield Sync(storage)
        self.synced_mark = max(self.synced_mark, mark)

    def _write(
        self, transaction: Transaction, sectors: list[tuple[int, bytes]]
    ) -> Operation[tuple[EncodedTransaction, int, int]]:
        ring = self.ring
        page_size = self.geometry.page_size
        pages = [(index * page_size, page.data) for index, page in sorted(transaction.pages.items())]
        previous = ring.head_crc

        def encode() -> EncodedTransaction:
            return encode_transaction(
                sequence=sequence, uuid=ring.uuid, previous_crc=previous, host_revokes=transaction.host_revokes,
                guest_revokes=[(a * page_size, (b - a) * page_size) for a, b in transaction.guest_revokes],
                sectors=sectors, pages=pages,
            )  # fmt: skip

        sequence = ring.next_sequence
        encoded: EncodedTransaction
        if len(pages) * page_size > JOINED:
            encoded = yield Compute(encode)
        else:
            encoded = encode()
        position, _ = ring.begin(encoded.length)
        ring.head_crc = encoded.crc
        places = ring.place(position, encoded.length)
        if len(places) == 1:
            yield WriteSync(self.storage, places[0][0], encoded.buffers)
        else:
            whole = memoryview(b"".join(encoded.buffers))
            split = places[0][1]
            yield WriteSync(self.storage, places[0][0], [whole[:split]])
            yield WriteSync(self.storage, places[1][0], [whole[split:]])
        return encoded, position, sequence

    def _committed(
        self,
        transaction: Transaction,
        sectors: list[tuple[int, bytes]],
        written: tuple[EncodedTransaction, int, int] | None,
    ) -> None:
        self.committed = transaction.number
        for table in transaction.sectors.values():
            table.uncommitted -= 1
        if written is not None:
            encoded, position, sequence = written
            entry = CommittedTransaction(
                sequence=sequence, start=position, end=position + encoded.length, crc=encoded.crc
            )
            # Order: revokes before records: they void what is older than this transaction, not what it holds.
            self._apply_revokes(transaction)
            for index, page in transaction.pages.items():
                self.set_record(index, page, entry)
            for offset, content in sectors:
                self.home[offset] = (content, sequence)
            self.ring.transactions.append(entry)
            self.commits += 1
            self.commit_bytes += encoded.length
            self.end_commit(len(transaction.pages))
        if transaction.freed:
            self.epochs.retire(transaction.freed)
        self.commit_gate.open()
        self.room_gate.open()

    def set_record(self, index: int, page: Page, entry: CommittedTransaction) -> None:
        """The newest committed version of a page; the one before is superseded."""
        if index in self.records:
            self.void_record(index)
        page.record = entry
        entry.live += 1
        entry.pages.append(index)
        self.records[index] = page

    def void_record(self, index: int) -> None:
        old = self.records.pop(index, None)
        if old is not None and old.record is not None:
            old.record.live -= 1
            old.record = None

    def _apply_revokes(self, transaction: Transaction) -> None:
        for first, end in transaction.guest_revokes:
            if end - first <= len(self.records):
                for index in range(first, end):
                    self.void_record(index)
            else:
                for index in [each for each in self.records if first <= each < end]:
                    self.void_record(index)
        for host_offset, length in transaction.host_revokes:
            for offset in range(host_offset, host_offset + length, SECTOR):
                self.home.pop(offset, None)

    def has_record(self, index: int) -> bool:
        """Whether a record of the page may lie at or after the tail."""
        return index in self.records or (self.committing is not None and index in self.committing.pages)

    # ---- notes of the other parts

    def note_data(self) -> None:
        """A direct or in-place write of the running transaction returned: its commit must sync it."""
        self.data_counter += 1
        self.running.data_mark = self.data_counter
        self.running.holds = True

    def note_entry(self, table: Table, index: int) -> None:
        """An entry of a table changed, in this hold."""
        self.running.note_sector(table.sector_of(index), table)

    def home_written(self, written: Iterable[tuple[int, tuple[bytes, int]]]) -> None:
        """These sectors are durable at home; those that a later commit replaced stay."""
        for offset, entry in written:
            if self.home.get(offset) is entry:
                del self.home[offset]
                self.on_stale(offset)
