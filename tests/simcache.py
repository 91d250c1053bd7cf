"""A file behind a page cache: what is durable, and in order everything done since that is not.

The ground under `simdisk.py`, which has the rules of the disk; here is the bookkeeping alone. Content is
kept by sectors of 512 bytes, and a sector of zeros is not kept. An `Effect` is what one operation did, as far
as that is *open*: a later durable change of one of its sectors takes the sector from it.

    Invariant: no sector beyond `durable_size` is in `durable`; none beyond `current_size` is seen non-zero.
    Invariant: a reader sees the newest version in `log` of a sector, else the durable one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from functools import lru_cache
from hashlib import blake2b
from itertools import repeat

SECTOR = 512
ZERO = bytes(SECTOR)
DIGEST_MASK = (1 << 128) - 1


class Effect:
    """New content of sectors, and of the length: at least `grows_to`, or exactly `cut_to` if that is set."""

    __slots__ = ("cut_to", "done", "grows_to", "kind", "lost", "number", "sectors")

    def __init__(self, number: int, kind: str, sectors: dict[int, bytes], grows_to: int, cut_to: int | None) -> None:
        self.number, self.kind, self.sectors, self.grows_to, self.cut_to = number, kind, sectors, grows_to, cut_to
        self.done = False
        """The operation has returned: a sync that begins now covers it."""
        self.lost = False
        """A write-back failed: clean in the page cache, no sync will make it durable."""

    def resize(self, size: int) -> int:
        """The length of the file after this, `size` being that before."""
        return max(size, self.grows_to) if self.cut_to is None else self.cut_to

    def copy(self) -> Effect:
        other = Effect(self.number, self.kind, dict(self.sectors), self.grows_to, self.cut_to)
        other.done, other.lost = self.done, self.lost
        return other


@lru_cache(maxsize=1 << 16)
def sector_hash(sector: int, content: bytes) -> int:
    """A sector's share of the digest; zeros have none. The same in every process, so that counts replay."""
    if content == ZERO:
        return 0
    return int.from_bytes(blake2b(content, digest_size=16, salt=sector.to_bytes(8, "little")).digest(), "little")


class CachedFile:
    """Durable sectors, open effects in the order of the page cache, and the view that a reader has."""

    def __init__(self, size: int = 0) -> None:
        self.durable: dict[int, bytes] = {}
        self.durable_size = size
        self.current_size = size
        self.log: list[Effect] = []
        self._cache: dict[int, bytes] = {}
        self._digest: int | None = 0

    def peek(self, offset: int, length: int) -> bytes:
        """What a reader sees now."""
        first, last = offset // SECTOR, -(-(offset + length) // SECTOR)
        sectors = range(first, last)
        # As _see, with nothing for each that Python would run: a twelfth of the time of some sweeps was spent here.
        data = b"".join(map(self._cache.get, sectors, map(self.durable.get, sectors, repeat(ZERO))))
        start = offset - first * SECTOR
        return data[start : start + length]

    def view(self) -> dict[int, bytes]:
        """All the sectors that a reader sees and that are not zero."""
        seen = {**self.durable, **self._cache}
        return {sector: content for sector, content in seen.items() if content != ZERO}

    def content_digest(self) -> int:
        """Digest of the durable sectors alone, kept up to date from the first time it is asked for."""
        if self._digest is None:
            self._digest = sum(sector_hash(*item) for item in self.durable.items()) & DIGEST_MASK
        return self._digest

    def digest(self) -> int:
        """Equal for files that no reader and no power cut can tell apart (open effects included)."""
        value = self.content_digest() ^ self.durable_size << 128
        if not self.log:
            return value
        effects = [
            (sorted(effect.sectors.items()), effect.grows_to, effect.cut_to, effect.done, effect.lost)
            for effect in self.log
        ]
        text = repr((value, self.current_size, effects)).encode()
        return int.from_bytes(blake2b(text, digest_size=24).digest(), "little")

    def put(self, changes: Iterable[tuple[int, bytes]]) -> None:
        """Durable content, at once."""
        durable, digest = self.durable, self._digest
        for sector, content in changes:
            old = durable.get(sector, ZERO)
            if content == old:
                continue
            if digest is not None:
                digest += sector_hash(sector, content) - sector_hash(sector, old)
            if content == ZERO:
                del durable[sector]
            else:
                durable[sector] = content
        self._digest = None if digest is None else digest & DIGEST_MASK

    # -- what an operation does to the page cache ------------------------------------------------------

    def land(self, number: int, kind: str, offset: int, data: bytes) -> Effect:
        """Bring a write into the page cache."""
        if not data:
            return self._add(Effect(number, kind, {}, 0, None))
        end = offset + len(data)
        first, last = offset // SECTOR, (end - 1) // SECTOR
        before, after = offset - first * SECTOR, (last + 1) * SECTOR - end
        if before or after:
            data = self._see(first)[:before] + data + self._see(last)[SECTOR - after :][:after]
        sectors = {first + at // SECTOR: data[at : at + SECTOR] for at in range(0, len(data), SECTOR)}
        return self._add(Effect(number, kind, sectors, end, None))

    def land_zeros(self, number: int, kind: str, offset: int, length: int, *, keep_size: bool) -> Effect:
        """Zero a range; the sectors that are zero in every state are not worth an effect."""
        end = min(offset + length, self.current_size) if keep_size else offset + length
        sectors: dict[int, bytes] = {}
        for sector in self._known(offset // SECTOR, -(-end // SECTOR)) if end > offset else ():
            start, stop = max(offset - sector * SECTOR, 0), min(end - sector * SECTOR, SECTOR)
            old = self._see(sector)
            sectors[sector] = old[:start] + bytes(stop - start) + old[stop:]
        return self._add(Effect(number, kind, sectors, 0 if keep_size else end, None))

    def land_size(self, number: int, kind: str, size: int, *, shrink: bool) -> Effect:
        """Set the length; what is cut off is zero should the file grow again."""
        if not shrink or size >= self.current_size:
            return self._add(Effect(number, kind, {}, size, None))
        sectors = dict.fromkeys(self._known(-(-size // SECTOR), None), ZERO)
        if size % SECTOR:
            edge = size // SECTOR
            sectors[edge] = self._see(edge)[: size % SECTOR].ljust(SECTOR, b"\0")
        return self._add(Effect(number, kind, sectors, 0, size))

    def undo(self, effect: Effect, sectors: Collection[int]) -> None:
        """Take sectors out of an effect: they did not happen."""
        for sector in sectors:
            del effect.sectors[sector]
            newest = [other.sectors[sector] for other in self.log if sector in other.sectors]
            self._cache[sector] = newest[-1] if newest else self.durable.get(sector, ZERO)

    def settle(self, effects: Iterable[Effect]) -> None:
        """Make the effects durable; what went into the same sectors before them is superseded."""
        chosen = {id(effect) for effect in effects}
        for effect in self.log:
            if id(effect) in chosen:
                self.durable_size = effect.resize(self.durable_size)
        covered: dict[int, bytes] = {}
        end, limit = 0, None
        left: list[Effect] = []
        for effect in reversed(self.log):
            if id(effect) in chosen:
                for sector, content in effect.sectors.items():
                    covered.setdefault(sector, content)
                if effect.cut_to is not None:
                    limit = effect.cut_to if limit is None else min(limit, effect.cut_to)
                end = max(end, effect.grows_to)
                continue
            for sector in effect.sectors.keys() & covered.keys():
                del effect.sectors[sector]
            # A later, durable change of the length supersedes this one as far as they contradict each other.
            if effect.cut_to is not None:
                effect.cut_to = max(effect.cut_to, end)
            elif limit is not None:
                effect.grows_to = min(effect.grows_to, max(limit, end))
            if effect.sectors or effect.cut_to is not None or effect.grows_to > self.durable_size or not effect.done:
                left.append(effect)
        self.log = left[::-1]
        self.put(covered.items())

    def _see(self, sector: int) -> bytes:
        content = self._cache.get(sector)
        return self.durable.get(sector, ZERO) if content is None else content

    def _known(self, first: int, end: int | None) -> list[int]:
        """Sectors of the range that hold, or may after a cut hold, anything but zeros."""
        known = self.durable.keys() | self._cache.keys()
        return sorted(sector for sector in known if sector >= first and (end is None or sector < end))

    def _add(self, effect: Effect) -> Effect:
        self.log.append(effect)
        self._cache.update(effect.sectors)
        self.current_size = effect.resize(self.current_size)
        return effect
