"""Which candidates are not beaten, and which are far from one another. Every objective is to be small."""

from __future__ import annotations

from collections.abc import Sequence
from math import dist

Point = Sequence[float]


def dominates(a: Point, b: Point) -> bool:
    """Whether `a` is nowhere worse than `b`, and somewhere better: equal points do not beat one another."""
    return all(x <= y for x, y in zip(a, b, strict=True)) and any(x < y for x, y in zip(a, b, strict=True))


def front(points: Sequence[Point]) -> list[int]:
    """Places of the points that no other one dominates, in order."""
    return [i for i, p in enumerate(points) if not any(dominates(q, p) for q in points)]


def layers(points: Sequence[Point]) -> list[list[int]]:
    """Non-dominated sorting: the front, then that of what is left, and so on."""
    left, found = list(range(len(points))), []
    while left:
        layer = [left[i] for i in front([points[i] for i in left])]
        found.append(layer)
        left = [i for i in left if i not in layer]
    return found


def spread(points: Sequence[Point], count: int, beside: Sequence[int] = ()) -> list[int]:
    """Places of `count` further points, each the farthest from those before it and those at `beside` when every objective is scaled to
    0..1; without any it begins at the best of the last objective. Only equal points are told apart by their place."""
    if not points:
        return []
    low, high = ([pick(axis) for axis in zip(*points, strict=True)] for pick in (min, max))
    scaled = [[(x - a) / ((b - a) or 1.0) for x, a, b in zip(p, low, high, strict=True)] for p in points]
    found = list(beside)
    for _ in range(min(count, len(points) - len(found))):
        rest = sorted((i for i in range(len(points)) if i not in found), key=lambda i: (tuple(reversed(points[i])), i))
        found.append(max(rest, key=lambda i: min((dist(scaled[i], scaled[k]) for k in found), default=0.0)))
    return found[len(beside) :]
