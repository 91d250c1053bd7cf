"""Which of two ways costs less, found by going both in turns while the work goes on.

What costs less on one machine costs more on another, and a load may change while it is measured. So the two ways are
gone A B B A, and once more B A A B where that does not tell them apart; medians count, the way in use stays unless
the other is clearly ahead, and the question is asked again later: seldom, while the answer stays the same.
"""

from __future__ import annotations

from statistics import median

_TURNS = (False, True, True, False, True, False, False, True)
"""Whether a turn goes the other way than the one in use."""
_CLEARLY, _AHEAD = 0.95, 0.97
"""How much less each turn of one way must cost than each of the other to end it early; and the median at the end."""
REST, LONGEST_REST = 100, 400
"""Turns between two comparisons: at first, and after many that changed nothing."""


class Comparison:
    """Told what each turn cost; says which way the next one goes."""

    def __init__(self) -> None:
        self.better = False
        """Which of the two ways is in use between comparisons."""
        self._costs: list[float] = []
        self._pause = REST
        self._resting = 1

    def next(self, cost: float) -> bool:
        """A turn, gone the way that was said last, has cost so much: which way to go now."""
        if self._resting:
            self._resting -= 1
            return self.better
        self._costs.append(cost)
        other = self._is_other_ahead()
        if other is None:
            return self.better is not _TURNS[len(self._costs)]
        self._pause = REST if other else min(2 * self._pause, LONGEST_REST)
        self.better = self.better is not other
        self.abandon()
        self._resting = self._pause
        return self.better

    def abandon(self) -> None:
        """The load is another now: what was measured of a comparison under way says nothing."""
        self._costs.clear()
        self._resting = max(self._resting, 1)

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
