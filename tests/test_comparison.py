"""comparison.py: the cheaper way is found while the work goes on, and little of it goes the other way."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbd_qcow2j.comparison import LONGEST_REST, REST, Comparison

TURNS = 8
"""Of one comparison at most."""


def go(it: Comparison, turns: int, cost: Callable[[int, bool], float], way: bool = False) -> list[bool]:
    """The way of each turn, the first of which goes `way`."""
    ways = []
    for turn in range(turns):
        ways.append(way)
        way = it.next(cost(turn, way))
    return ways


def test_a_way_that_is_clearly_cheaper_is_found_in_four_turns() -> None:
    it = Comparison()
    ways = go(it, 40, lambda turn, way: 60 if way else 100)
    # The first turn has the start in it.
    assert ways[:5] == [False, False, True, True, False] and all(ways[5:])


def test_a_way_that_is_clearly_dearer_is_gone_twice_and_then_left_alone_for_long() -> None:
    it = Comparison()
    ways = go(it, 5 + 2 * REST, lambda turn, way: 140 if way else 100)
    assert [turn for turn, way in enumerate(ways) if way] == [2, 3]
    assert not it.better


def test_a_little_is_enough_where_it_shows_in_more_turns() -> None:
    noise = [0, 7, -2, 9, -6, 1, 3, -9, 5, -1]
    it = Comparison()
    go(it, 1 + TURNS, lambda turn, way: (93 if way else 100) + noise[turn % len(noise)] / 4)
    assert it.better


def test_ways_that_cost_the_same_are_asked_for_less_and_less_often() -> None:
    it = Comparison()
    ways = go(it, 40 * REST, lambda turn, way: 100)
    starts = [turn for turn, way in enumerate(ways) if way and not any(ways[max(0, turn - TURNS) : turn])]
    gaps = [b - a for a, b in pairwise(starts)]
    assert not it.better
    assert gaps == sorted(gaps) and gaps[-1] <= LONGEST_REST + TURNS and len(starts) < 13


def test_what_has_become_cheaper_is_found_by_and_by() -> None:
    it = Comparison()
    go(it, 5 + 2 * REST, lambda turn, way: 140 if way else 100)
    go(it, 10 * REST, lambda turn, way: 60 if way else 100)
    assert it.better


def test_where_the_way_in_use_has_become_dear_the_question_is_asked_soon() -> None:
    # Asked again and again, and always answered the same: the rest is at its longest.
    it = Comparison()
    go(it, 20 * REST, lambda turn, way: 140 if way else 100)
    while it.next(100) is it.better:
        pass
    go(it, TURNS, lambda turn, way: 140 if way else 100)
    ways = go(it, LONGEST_REST, lambda turn, way: 140 if way else 300)
    assert ways.index(True) <= LONGEST_REST // 5 + TURNS and it.better


def test_a_dearness_that_both_ways_share_is_asked_about_once() -> None:
    it = Comparison()
    go(it, 5 + REST // 2, lambda turn, way: 140 if way else 100)
    ways = go(it, LONGEST_REST // 2, lambda turn, way: 500 if way else 300)
    assert 2 <= ways.count(True) <= TURNS // 2 and not it.better


def test_a_way_that_has_come_to_cost_more_than_the_other_did_is_asked_about() -> None:
    # Found cheaper, 60 to 100, and now a little dearer than the other way: far from twice what it did.
    it = Comparison()
    assert go(it, 5, lambda turn, way: 60 if way else 100)[-1] is False and it.better
    ways = go(it, REST, lambda turn, way: 110 if way else 100, way=True)
    assert REST // 5 <= ways.index(False) <= REST // 5 + TURNS and not it.better


def test_what_is_in_the_noise_of_the_other_way_is_not_dear() -> None:
    it = Comparison()
    go(it, 1 + TURNS, lambda turn, way: 92 if way else 100)
    assert it.better
    assert all(go(it, REST // 2, lambda turn, way: 109 if way else 100, way=True))


def test_what_is_out_of_the_question_is_not_asked_about_for_a_rest() -> None:
    it = Comparison()
    way = go(it, 20, lambda turn, way: 60 if way else 100)[-1]
    assert way is it.better is True
    assert it.settle(False) is it.better is False
    # Not even where it has become dear: to what it was it does not compare.
    ways = go(it, 3 * REST, lambda turn, way: 60 if way else 1000)
    assert not any(ways[:REST]) and it.better


@pytest.mark.parametrize("dear", [1, 4])
def test_what_was_dear_for_a_moment_is_no_reason_to_ask(dear: int) -> None:
    it = Comparison()
    go(it, 5, lambda turn, way: 140 if way else 100)
    ways = go(it, REST - 1, lambda turn, way: 1000 if turn % 5 < dear else 100)
    assert not any(ways)


def test_one_turn_that_was_disturbed_decides_nothing() -> None:
    for disturbed in range(1 + TURNS):
        it = Comparison()
        go(it, 1 + TURNS, lambda turn, way, at=disturbed: 10_000 if turn == at else 100)  # type: ignore[misc]
        assert not it.better, disturbed


@pytest.mark.parametrize("turns", range(1, TURNS + 1))
def test_what_was_measured_before_the_load_changed_is_not_used(turns: int) -> None:
    # Until then the other way costs more, and from then on less: compared with each other they would mislead.
    it = Comparison()
    way = go(it, turns, lambda turn, way: 1)[-1]
    it.abandon()
    ways = go(it, 2 + TURNS, lambda turn, way: 60 if way else 100, way=way)
    assert it.better and ways[-1]


@given(st.binary(min_size=400, max_size=400))
def test_whatever_turns_cost_most_go_the_way_in_use(costs: bytes) -> None:
    it = Comparison()
    way, strayed, changes = False, 0, 0
    for cost in costs:
        before = it.better
        way = it.next(cost)
        strayed += way is not it.better
        changes += before is not it.better
    # The worst costs are asked about after a fifth of each rest.
    comparisons = len(costs) // (REST // 5 + TURNS // 2) + 1
    assert strayed <= comparisons * TURNS // 2
    assert changes <= comparisons
