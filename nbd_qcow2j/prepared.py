"""What an operation holds while its I/O runs: exclusions, pins, reserved clusters, promises, credits.

Who prepares takes from here and changes nothing; who links in the last hold says what is used; `undo` gives back the
rest, whatever went wrong.

    Invariant 8: a token that a pending cluster gave up to go home is its own again if it does not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .format.tables import OFLAG_COPIED
from .steps import Operation

if TYPE_CHECKING:
    from .disk import Disk
    from .image.tables import Table


class Prepared:
    """What an operation holds while its I/O runs; `undo` gives everything back that was not linked."""

    def __init__(self, disk: Disk, cost: int, *, relocate: bool = False) -> None:
        self.disk, self.cost = disk, cost
        self.relocate = relocate
        """Whether what was accepted already goes to a new home where its old one cannot be written (checkpoint)."""
        self.excluded: list[int] = []
        self.pinned: list[Table] = []
        self.reserved: set[int] = set()
        self.tokens = 0
        self.promised: set[int] = set()
        """Pending clusters whose token is among these: theirs again if they do not go home now (invariant 8)."""
        self.epoch = disk.epochs.enter()

    def pin_block(self, host_cluster: int) -> Operation[None]:
        block = yield from self.disk.allocator.load_block(host_cluster)
        if block is not None:
            block.pins += 1
            self.pinned.append(block)

    def found_corrupt(self, reason: str) -> None:
        """Mark the image corrupt; a request is refused, before it has changed anything. Raises RequestError."""
        self.disk.mark_corrupt(reason)
        if not self.relocate:
            self.disk.refuse_corrupt()

    def is_bad(self, cluster: int, entry: int) -> bool:
        """Whether what an L2 entry names must neither be written nor freed. Blocks are pinned. Raises RequestError."""
        disk = self.disk
        for host in disk.mapping.host_clusters(entry):
            if reason := disk.allocator.why_bad(host):
                self.found_corrupt(f"guest cluster {cluster} names host cluster {host}, {reason}")
                return True
        return False

    def own_l2(self, cluster: int) -> Operation[Table]:
        """The L2 table of a cluster, ours and pinned; takes its token, or one of this operation's."""
        disk = self.disk
        index = cluster // disk.geometry.l2_entries
        while True:
            offset = disk.mapping.l2_offset(cluster)
            what = yield from disk.allocator.why_bad_table(offset)
            # Somebody may have copied the table while its refcount was read: then it says nothing of the new one.
            if offset == disk.mapping.l2_offset(cluster):
                break
        if what:
            self.found_corrupt(f"L1 entry {index} names host offset {offset}, {what}")
        promised = index in disk.table_tokens
        if not promised and not self.tokens and (what or not disk.mapping.l1.entries[index] & OFLAG_COPIED):
            # Without a promise the pool may be empty: wait for room as any writer. A table that is ours needs none.
            yield from disk.allocator.take_tokens(1)
            self.tokens += 1
        # Order: in the hold that saw the promise. The last page that needs the table may vanish while it is made.
        disk.owning.append(index)
        try:
            table, used = yield from disk.mapping.own_l2(
                cluster, disk.background, disk.log, disk.allocator, token=promised or self.tokens > 0, bad=bool(what)
            )
            self.pinned.append(table)
            if used and not promised:
                self.tokens -= 1
            # The table is ours: the promise is used, or not needed any more. It may have been made meanwhile.
            if disk.table_tokens.pop(index, None) is not None and not (used and promised):
                disk.allocator.tokens -= 1
            return table
        finally:
            disk.owning.remove(index)
            disk.return_table_token(index)

    def reserve(self) -> Operation[int]:
        """A pool cluster, its refcount block pinned: for a token of this operation, or for one that it gets now."""
        if not self.tokens:
            yield from self.disk.allocator.take_tokens(1)
            self.tokens += 1
        while not self.disk.allocator.pool:
            # After a replay more may be promised than the pool holds yet.
            yield from self.disk.allocator.ensure(self.disk.allocator.available + 1)
        host = self.disk.allocator.reserve(token=True)
        self.tokens -= 1
        self.reserved.add(host)
        yield from self.pin_block(host)
        return host

    def linked(self, cluster: int, host: int | None) -> None:
        """A guest cluster is linked to its new home: its reservation and its token are used."""
        self.promised.discard(cluster)
        if host is not None:
            self.reserved.discard(host)

    def abandon(self, cluster: int) -> None:
        """A pending cluster cannot go home now: the token that it gave to this operation is its own again."""
        if cluster in self.promised:
            self.promised.discard(cluster)
            self.disk.cluster_tokens.add(cluster)
            if self.tokens:
                self.tokens -= 1
            else:
                # Its reserved cluster goes back, not into the pool.
                self.disk.allocator.tokens += 1

    def spend(self, cost: int) -> None:
        """Give credits back before the end."""
        cost = min(cost, self.cost)
        self.cost -= cost
        self.disk.log.return_credits(cost)

    def undo(self) -> None:
        disk = self.disk
        for table in self.pinned:
            table.pins -= 1
        for host in self.reserved:
            disk.allocator.give_back(host)
        for cluster in self.promised:
            if cluster in disk.pending.clusters and cluster not in disk.cluster_tokens:
                disk.cluster_tokens.add(cluster)
                disk.allocator.tokens += 1
        disk.allocator.tokens -= self.tokens
        disk.admit(self.excluded)
        disk.epochs.leave(self.epoch)
        disk.log.return_credits(self.cost)
