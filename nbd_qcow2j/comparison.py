"""Which of two ways costs less, found by going both in turns while the work goes on.

What costs less on one machine costs more on another, and a load may change while it is measured. So the two ways are
gone A B B A, and once more B A A B where that does not tell them apart; medians count, the way in use stays unless
the other is clearly ahead, and the question is asked again later: seldom, while the answer stays the same, and sooner
where the way in use has come to cost twice what it did, or more than the other way cost.
"""

from __future__ import annotations

from statistics import median

_TURNS = (False, True, True, False, True, False, False, True)
"""Whether a turn goes the other way than the one in use."""
_CLEARLY, _AHEAD = 0.95, 0.97
"""How much less each turn of one way must cost than each of the other to end it early; and the median at the end."""
REST, LONGEST_REST = 100, 400
"""Turns between two comparisons: at first, and after many that changed nothing."""
_DEAR, _DEARER, _DEAR_TURNS = 2.0, 1.2, 5
"""A load that is another now, or others on the same CPU: so many times what it cost, or so many and more than the
other way cost, for so many turns in a row."""
_EARLIEST = 5
"""Not before one in so many of the turns of its rest: costs that come and go are no reason to try all the time."""


class Comparison:
    """Told what each turn cost; says which way the next one goes."""

    def __init__(self) -> None:
        self.better = False
        """Which of the two ways is in use between comparisons."""
        self._costs: list[float] = []
        self._pause = REST
        self._resting = 1
        self._dear_from = float("inf")
        """What a turn of the way in use should not come to."""
        self._dear = 0
        """Turns in a row that cost much more."""

    def next(self, cost: float) -> bool:
        """A turn, gone the way that was said last, has cost so much: which way to go now."""
        if self._resting:
            self._resting -= 1
            self._dear = self._dear + 1 if cost > self._dear_from else 0
            if self._dear >= _DEAR_TURNS and self._resting <= self._pause - self._pause // _EARLIEST:
                self._resting = 0
            return self.better
        self._costs.append(cost)
        other = self._is_other_ahead()
        if other is None:
            return self.better is not _TURNS[len(self._costs)]
        # The turns at the same places are those of the way that was chosen.
        chosen, left = (
            median(cost for turn, cost in zip(_TURNS, self._costs, strict=False) if turn is way)
            for way in (other, not other)
        )
        self._dear_from = min(chosen * _DEAR, max(left, chosen * _DEARER))
        self._dear = 0
        self._pause = REST if other else min(2 * self._pause, LONGEST_REST)
        self.better = self.better is not other
        self.abandon()
        self._resting = self._pause
        return self.better

    def abandon(self) -> None:
        """The load is another now: what was measured of a comparison under way says nothing."""
        self._costs.clear()
        self._resting = max(self._resting, 1)

    def settle(self, better: bool) -> bool:
        """One way is out of the question for now: the other one, and no comparison for a while. Returns it."""
        self.better = better
        self.abandon()
        self._resting = self._pause = REST
        self._dear_from = float("inf")
        return better

    def _is_other_ahead(self) -> bool | None:
        """None until it is known."""
        costs: tuple[list[float], list[float]] = ([], [])
        for turn, cost in zip(_TURNS, self._costs, strict=False):
            costs[turn].append(cost)
        ours, others = costs
        if len(self._costs) == len(_TURNS) // 2:
            if max(others) < min(ours) * _CLEARLY:
                return True
            if max(ours) < min(others) * _CLEARLY:
                return False
        if len(self._costs) < len(_TURNS):
            return None
        return median(others) < median(ours) * _AHEAD
