"""Who goes on: by hand, and what has to hold whatever is known."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exporter.tune.front import dominates
from exporter.tune.survivors import Standing, survivors

FAST_AND_BAD, GOOD, FAST_AND_GOOD, BEST = (
    Standing(10, 100, 12.0), Standing(60, 100, 1.0), Standing(40, 100, 3.0), Standing(90, 100, 0.0),
)  # fmt: skip
FOUND = [FAST_AND_BAD, GOOD, FAST_AND_GOOD, BEST]

figures = st.floats(0, 100, allow_nan=False)
standings = st.lists(st.builds(Standing, figures, figures, st.floats(-20, 60)), min_size=1, max_size=14)
budgets = st.none() | st.floats(0, 30)
checked = settings(max_examples=150, derandomize=True, database=None, deadline=None)


def within(standing: Standing, most: float | None) -> bool:
    return most is None or standing.drop <= most


@pytest.mark.parametrize(
    ("most", "count", "on"),
    [
        (5.0, 1, [FAST_AND_GOOD]),  # the fastest within it
        (5.0, 2, [FAST_AND_BAD, FAST_AND_GOOD]),  # and what is farthest from that: the interval may still allow it
        (5.0, 3, [GOOD, FAST_AND_GOOD, FAST_AND_BAD]),
        (0.5, 1, [BEST]),
        (-1.0, 1, [BEST]),  # none is within it as things stand: the nearest
        (None, 1, [BEST]),
        (None, 2, [FAST_AND_BAD, BEST]),
        (20.0, 1, [FAST_AND_BAD]),
    ],
)
def test_by_hand(most: float | None, count: int, on: list[Standing]) -> None:
    assert sorted(survivors(FOUND, most, count)) == sorted(map(FOUND.index, on))


def test_what_cannot_win_takes_no_place_from_what_can() -> None:
    """Of four places three are for those that would win; a front of the fast and bad does not push them out."""
    hopeless = [Standing(float(i), 100, 30.0 - i) for i in range(8)]
    able = [Standing(50.0, 100, 4.0), Standing(51.0, 100, 3.5)]
    assert {8, 9} <= set(survivors([*hopeless, *able], 5.0, 4))


@checked
@given(standings, budgets, st.integers(0, 16))
def test_as_many_as_asked_each_once(found: list[Standing], most: float | None, count: int) -> None:
    on = survivors(found, most, count)
    assert on == sorted(set(on)) and len(on) == min(count, len(found))


@checked
@given(standings, budgets, st.integers(1, 14), figures, figures)
def test_who_is_certain_to_win_goes_on(
    found: list[Standing], most: float | None, count: int, error: float, memory: float
) -> None:
    """Within the budget with its whole interval and faster than all others; without a budget, better than all with their intervals."""
    drop = min(s.drop for s in found) - 2 * error - 1 if most is None else most - error
    time = 200.0 if most is None else min(s.time for s in found) - 1
    for place in (0, len(found) // 2, len(found)):
        assert place in survivors([*found[:place], Standing(time, memory, drop), *found[place:]], most, count)


@checked
@given(standings, budgets, st.integers(0, 14), st.randoms(use_true_random=False))
def test_the_order_of_candidates_makes_no_difference(
    found: list[Standing], most: float | None, count: int, rng: object
) -> None:
    turned = list(found)
    rng.shuffle(turned)  # type: ignore[attr-defined]
    one, two = ([those[i] for i in survivors(those, most, count)] for those in (found, turned))
    assert sorted(one, key=repr) == sorted(two, key=repr)


@checked
@given(standings, budgets, st.integers(0, 14))
def test_nothing_goes_on_before_what_is_better_in_everything(
    found: list[Standing], most: float | None, count: int
) -> None:
    on = set(survivors(found, most, count))
    out = [s.point for i, s in enumerate(found) if i not in on]
    assert not any(dominates(o, found[i].point) for o in out for i in on)


@checked
@given(standings, budgets, st.integers(1, 14))
def test_three_of_four_would_win_as_things_stand(found: list[Standing], most: float | None, count: int) -> None:
    able = sorted((s.time if most is not None else s.drop) for s in found if within(s, most))
    on = [found[i] for i in survivors(found, most, count)]
    best = sorted((s.time if most is not None else s.drop) for s in on if within(s, most))
    first = min(max(1, 3 * count // 4), len(able))
    assert best[:first] == able[:first]
