"""What a power cut may leave of a simulated disk: all of it if that is few, else the telling ones.

Three depths, the first that fits into the limit:

    "sectors"   every open sector on its own: the durable content or any version since, times every length
    "writes"    every subset of the open operations, each whole; then torn ones
    "sampled"   none, all, each alone dropped, each alone kept, each prefix; then at random, torn

States with the same content and length are one state.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from itertools import combinations, product
from math import prod
from random import Random

from simcache import DIGEST_MASK, SECTOR, ZERO, sector_hash
from simdisk import SimDisk

Version = tuple[bytes, int]
"""A sector's content and its share of the digest."""
Plan = tuple[dict[int, Version], int]
"""The sectors that differ from the durable ones, and the length."""

Spoilt = tuple[dict[int, bytes], int]
"""Garbage in sectors that a longer file shows, and what that adds to the digest."""
NOTHING: Spoilt = ({}, 0)

GARBAGE = (bytes(range(0x81, 0x100)) * 5)[:SECTOR]
"""What a torn 4 KiB block holds: no old content, no new, no zeros."""
STALE = 200
"""So many known states in a row end the random search."""


def crash_states(disk: SimDisk, limit: int, rng: Random) -> Iterator[SimDisk]:
    """Distinct disks that a power cut now may leave, at most `limit`; the first two are nothing kept, all kept."""
    return _distinct(_Crash(disk), limit, rng)


def coverage(disk: SimDisk, limit: int) -> tuple[str, int]:
    """How `crash_states` would go about it, and how many open operations there are, for the test's report."""
    crash = _Crash(disk)
    return crash.depth(limit), len(crash.effects)


def _distinct(crash: _Crash, limit: int, rng: Random) -> Iterator[SimDisk]:
    depth = crash.depth(limit)
    if depth == "sectors":
        plans = crash.every_sector()
    else:
        whole = crash.every_write() if depth == "writes" else crash.telling_writes(rng, limit)
        plans = (plan for plans in (whole, crash.torn_writes(rng)) for plan in plans)
    stale = count = 0
    grows = _grows(crash)
    for choice, size, spoilt in crash.with_stale_growth(plans) if grows else ((*plan, NOTHING) for plan in plans):
        state = crash.build(choice, size, spoilt)
        if state is None:
            stale += 1
            if stale > STALE and depth != "sectors" and crash.searching:
                return
            continue
        stale = 0
        yield state
        count += 1
        if count >= limit:
            return


def _grows(crash: _Crash) -> bool:
    """Whether a state may have a length that was not durable, on a disk that shows garbage there."""
    return crash.disk.stale_growth and any(effect.grows_to > crash.durable_size for effect in crash.effects)


@cache
def _garbage_share(sector: int) -> int:
    return sector_hash(sector, GARBAGE)


class _Crash:
    """The open effects of a disk, taken apart once for all its states."""

    def __init__(self, disk: SimDisk) -> None:
        self.disk = disk
        # The disk may go on while the states are looked at, one after the other.
        self.durable, self.durable_size, self.current_size = dict(disk.durable), disk.durable_size, disk.current_size
        self.digest = disk.content_digest()
        self.effects = [
            effect.copy() for effect in disk.log if effect.sectors or effect.grows_to or effect.cut_to is not None
        ]
        self.versions = [
            {sector: (content, sector_hash(sector, content)) for sector, content in effect.sectors.items()}
            for effect in self.effects
        ]
        open_sectors = sorted({sector for effect in self.effects for sector in effect.sectors})
        self.searching = False
        self.blocks: dict[int, list[int]] = {}
        self.garbage: dict[int, Version] = {}
        if disk.physical_sector > SECTOR:
            self._find_blocks(open_sectors)
            open_sectors = sorted({*open_sectors, *self.garbage})
        self.base = {sector: self._base(sector) for sector in open_sectors}
        self.ends: dict[int, int] = {}
        for effect in self.effects:
            for sector in effect.sectors if effect.grows_to else ():
                self.ends[sector] = max(self.ends.get(sector, 0), min((sector + 1) * SECTOR, effect.grows_to))
        self.growth: dict[int, tuple[dict[int, bytes], dict[int, int], int]] = {}
        """By the end of a longer file in sectors: garbage for all that was not durable, what it adds, and in all."""
        self.seen: set[int] = set()

    def with_stale_growth(self, plans: Iterable[Plan]) -> Iterator[tuple[dict[int, Version], int, Spoilt]]:
        """Each plan, and where it is longer than what was durable, again with garbage in what it did not write."""
        for choice, size in plans:
            yield choice, size, NOTHING
            spoilt = self._spoil(choice, size)
            if spoilt[0]:
                yield choice, size, spoilt

    def _spoil(self, choice: dict[int, Version], size: int) -> Spoilt:
        """Garbage in what the choice did not write behind what was durable."""
        first, end = -(-self.durable_size // SECTOR), -(-size // SECTOR)
        if end not in self.growth:
            # Once for all choices: after an fallocate these are thousands.
            shares = {sector: _garbage_share(sector) for sector in range(first, end)}
            for sector in self.durable.keys() & shares.keys():
                shares[sector] -= self._base(sector)[1]
            self.growth[end] = dict.fromkeys(shares, GARBAGE), shares, sum(shares.values())
        every, shares, digest = self.growth[end]
        spoilt = dict(every)
        for sector, version in choice.items():
            if version[1] and sector in spoilt:
                del spoilt[sector]
                digest -= shares[sector]
        return spoilt, digest

    def depth(self, limit: int) -> str:
        limit //= 2 if _grows(self) else 1
        choices = self._choices()
        if prod(map(len, choices.values())) * len(self._sizes()) <= limit:
            return "sectors"
        return "writes" if 1 << len(self.effects) <= limit else "sampled"

    def every_sector(self) -> Iterator[Plan]:
        choices, sizes = self._choices(), self._sizes()
        newest = {sector: version for versions in self.versions for sector, version in versions.items()}
        yield {}, self.durable_size
        yield newest, self.current_size
        for size in sizes:
            for versions in product(*choices.values()):
                yield dict(zip(choices, versions, strict=True)), size

    def every_write(self) -> Iterator[Plan]:
        yield self._keep(range(0))
        yield self._keep(range(len(self.effects)))
        for count in range(1, len(self.effects)):
            for kept in combinations(range(len(self.effects)), count):
                yield self._keep(kept)

    def telling_writes(self, rng: Random, limit: int) -> Iterator[Plan]:
        """None and all; then each single and prefix, in random order should the limit cut them off."""
        total = len(self.effects)
        everything = range(total)
        yield self._keep(range(0))
        yield self._keep(everything)
        others: list[Sequence[int]] = [[index] for index in everything]
        others += [[*everything[:index], *everything[index + 1 :]] for index in everything]
        if len(others) > limit:
            rng.shuffle(others)
        others += [everything[:index] for index in everything]
        for kept in others:
            yield self._keep(kept)

    def torn_writes(self, rng: Random) -> Iterator[Plan]:
        """At random, without an end."""
        self.searching = True
        while self.effects:
            probability = rng.choice((0.1, 0.5, 0.9))
            torn = rng.choice((0.1, 0.5))
            choice: dict[int, Version] = {}
            size = self.durable_size
            for effect, versions in zip(self.effects, self.versions, strict=True):
                if rng.random() < torn and len(versions) > 1:
                    choice.update(_tear(versions, rng))
                    if rng.random() < probability:
                        size = effect.resize(size)
                elif rng.random() < probability:
                    choice.update(versions)
                    size = effect.resize(size)
            if self.garbage and rng.random() < 0.5:
                block = rng.choice(list(self.blocks.values()))
                choice.update((sector, self.garbage[sector]) for sector in block if rng.random() < 0.5)
            yield choice, size

    def build(self, choice: dict[int, Version], size: int, spoilt: Spoilt) -> SimDisk | None:
        """The disk with this choice, where it is not spoilt; None if it was built before."""
        stale, share = spoilt
        digest = self.digest + share
        if size % SECTOR and size // SECTOR in stale:
            size = max(size, self.ends.get(size // SECTOR, 0))
        # Data that was kept beyond the end is not lost with the length: the file system has that order.
        for sector, version in choice.items():
            if sector in stale:
                continue
            digest += version[1] - (self.base.get(sector) or self._base(sector))[1]
            if version[1] and (sector + 1) * SECTOR > size:
                size = max(size, self.ends.get(sector, 0))
        cut: list[tuple[int, bytes]] = []
        if size < self.durable_size:
            cut = self._beyond(choice, size)
            for sector, content in cut:
                old = choice[sector][1] if sector in choice else sector_hash(sector, self.durable.get(sector, ZERO))
                digest += sector_hash(sector, content) - old
        digest &= DIGEST_MASK
        key = digest ^ size << 128
        if key in self.seen:
            return None
        self.seen.add(key)
        durable = dict(self.durable)
        for sector, (content, share) in choice.items():
            if share:
                durable[sector] = content
            else:
                durable.pop(sector, None)
        durable.update(stale)
        state = self.disk.like(size, durable, digest)
        for sector, content in cut:
            if content == ZERO:
                durable.pop(sector, None)
            else:
                durable[sector] = content
        return state

    def _beyond(self, choice: dict[int, Version], size: int) -> list[tuple[int, bytes]]:
        """Durable sectors that a kept truncation cuts off, and what is left of them."""
        found = []
        for sector in sorted(self.durable.keys() | choice.keys()):
            if (sector + 1) * SECTOR <= size:
                continue
            old = choice[sector][0] if sector in choice else self.durable[sector]
            left = old[: max(size - sector * SECTOR, 0)].ljust(SECTOR, b"\0")
            if left != old:
                found.append((sector, left))
        return found

    def _base(self, sector: int) -> Version:
        content = self.durable.get(sector, ZERO)
        return content, sector_hash(sector, content)

    def _keep(self, kept: Iterable[int]) -> Plan:
        choice: dict[int, Version] = {}
        size = self.durable_size
        for index in kept:
            choice.update(self.versions[index])
            size = self.effects[index].resize(size)
        return choice, size

    def _choices(self) -> dict[int, list[Version]]:
        """Every open sector with its distinct versions, the durable one first."""
        choices = {sector: [version] for sector, version in self.base.items()}
        for versions in self.versions:
            for sector, version in versions.items():
                if version not in choices[sector]:
                    choices[sector].append(version)
        for sector, version in self.garbage.items():
            choices[sector].append(version)
        return {sector: versions for sector, versions in choices.items() if len(versions) > 1}

    def _sizes(self) -> list[int]:
        sizes = {self.durable_size, self.current_size}
        size = self.durable_size
        for effect in self.effects:
            sizes.add(effect.resize(self.durable_size))
            size = effect.resize(size)
            sizes.add(size)
        return sorted(sizes)

    def _find_blocks(self, open_sectors: list[int]) -> None:
        """Which sectors a torn 4 KiB block may spoil: those in flight, or all."""
        per_block = self.disk.physical_sector // SECTOR
        for sector in open_sectors:
            block = sector // per_block
            group = self.blocks.setdefault(block, [])
            if self.disk.tear_neighbours:
                end = -(-max(self.durable_size, self.current_size) // SECTOR)
                group[:] = range(block * per_block, min((block + 1) * per_block, max(end, sector + 1)))
            else:
                group.append(sector)
        for group in self.blocks.values():
            for sector in group:
                self.garbage[sector] = (GARBAGE, sector_hash(sector, GARBAGE))


def _tear(versions: dict[int, Version], rng: Random) -> dict[int, Version]:
    """Some sectors of a write: its beginning, its end, or any."""
    sectors = list(versions)
    at = rng.randint(1, len(sectors) - 1)
    kind = rng.randrange(3)
    kept = sectors[:at] if kind == 0 else sectors[at:] if kind == 1 else rng.sample(sectors, at)
    return {sector: versions[sector] for sector in kept}
