"""Which candidates are not beaten, and which of many to go on with. Every objective is to be small."""

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


def chosen(points: Sequence[Point], count: int) -> list[int]:
    """Places of `count` points to go on with, in order: layer by layer, and of the layer that does not go in whole those that are
    spread over it.

    Source: Schmucker et al. 2021, arXiv:2106.12639 (MO-ASHA, its epsilon-net). Differs: the spread begins at the best of the last
    objective instead of anywhere, so that the same points give the same choice.
    """
    found: list[int] = []
    for layer in layers(points):
        room = count - len(found)
        found += layer if len(layer) <= room else [layer[i] for i in spread([points[i] for i in layer], room)]
    return sorted(found)


def spread(points: Sequence[Point], count: int) -> list[int]:
    """Places of `count` points, each the farthest from those before it when every objective is scaled to 0..1."""
    if count <= 0 or not points:
        return []
    low, high = ([pick(axis) for axis in zip(*points, strict=True)] for pick in (min, max))
    scaled = [[(x - a) / ((b - a) or 1.0) for x, a, b in zip(p, low, high, strict=True)] for p in points]
    found = [min(range(len(points)), key=lambda i: (tuple(reversed(points[i])), i))]
    while len(found) < min(count, len(points)):
        rest = [i for i in range(len(points)) if i not in found]
        found.append(max(rest, key=lambda i: (min(dist(scaled[i], scaled[k]) for k in found), -i)))
    return found
