"""When may a freed cluster be used again? After everything that began on it earlier has ended.

Whoever reads or writes host clusters without the lock enters the current epoch and leaves it when done. A
commit that frees clusters retires the epoch with them: they are released once that epoch and all before it
are empty. Nothing that begins later can find them: the mapping no longer names them.

    Invariant 2: a freed host cluster is not punched or reused before its freeing transaction is committed
    and everything that began on it earlier has ended.
"""

from __future__ import annotations

from collections import deque


class Epoch:
    """Operations in flight that entered together; `freed` is set when it is retired."""

    __slots__ = ("active", "freed")

    def __init__(self) -> None:
        self.active = 0
        self.freed: list[int] | None = None


class Epochs:
    """The current epoch and the retired ones that still hold somebody."""

    def __init__(self) -> None:
        self.current = Epoch()
        self.retired: deque[Epoch] = deque()
        self.releasable: list[int] = []
        """Host clusters that nobody can reach any more."""

    def enter(self) -> Epoch:
        epoch = self.current
        epoch.active += 1
        return epoch

    def leave(self, epoch: Epoch) -> None:
        epoch.active -= 1
        if not epoch.active and epoch.freed is not None:
            self._reap()

    def retire(self, freed: list[int]) -> None:
        """The transaction that freed these clusters is committed."""
        self.current.freed = freed
        self.retired.append(self.current)
        self.current = Epoch()
        self._reap()

    def _reap(self) -> None:
        # Order: oldest first. A reader of an older epoch may hold a cluster that a later one frees.
        while self.retired and not self.retired[0].active:
            self.releasable += self.retired.popleft().freed or ()
