"""The front against brute force, and what is spread over it by hand."""

from __future__ import annotations

import random

import pytest

from exporter.tune.front import dominates, front, layers, spread


def brute(points: list[tuple[int, ...]]) -> list[int]:
    """Points for which no other one is at least as good everywhere and better somewhere, written with sums."""
    found = []
    for i, p in enumerate(points):
        beaten = False
        for q in points:
            no_worse = sum(b > a for a, b in zip(p, q, strict=True)) == 0
            beaten |= no_worse and sum(q) < sum(p)
        if not beaten:
            found.append(i)
    return found


@pytest.mark.parametrize("seed", range(40))
def test_front_is_that_of_brute_force(seed: int) -> None:
    rng = random.Random(seed)
    points = [tuple(rng.randrange(6) for _ in range(3)) for _ in range(rng.randrange(1, 25))]
    assert front(points) == brute(points)


def test_equal_points_are_all_on_the_front() -> None:
    assert front([(1, 2), (1, 2), (2, 2)]) == [0, 1]
    assert not dominates((1, 2), (1, 2))
    assert dominates((1, 2), (1, 3))


def test_layers_peel_one_front_after_another() -> None:
    assert layers([(2, 2), (1, 1), (3, 3), (0, 4), (2, 2)]) == [[1, 3], [0, 4], [2]]
    assert layers([]) == []


def test_spread_takes_the_ends_and_then_the_widest_gap() -> None:
    line = [(0.0, 10.0), (1.0, 9.0), (2.0, 8.0), (5.0, 5.0), (10.0, 0.0)]
    assert spread(line, 1) == [4]  # the best of the last objective
    assert spread(line, 2) == [4, 0]
    assert spread(line, 3) == [4, 0, 3]
    assert spread([(1.0, 1.0)] * 3, 2) == [0, 1]  # equal points: the first ones


def test_spread_beside_points_that_are_in_takes_what_is_far_from_them() -> None:
    line = [(0.0, 10.0), (1.0, 9.0), (2.0, 8.0), (5.0, 5.0), (10.0, 0.0)]
    assert spread(line, 1, [4]) == [0]
    assert spread(line, 2, [0, 4]) == [3, 2]
    assert spread(line, 9, [0, 4]) == [3, 2, 1]  # no more than there are
    assert spread([], 2) == [] and spread(line, 0, [1]) == []
