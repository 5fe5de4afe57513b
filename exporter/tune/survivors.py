"""Which candidates a rung goes on with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from exporter.tune.front import layers, spread


@dataclass(frozen=True)
class Standing:
    """What is known of a candidate that no budget rules out. time: in one unit for all; drop: points lost, so far."""

    time: float
    memory_mib: float
    drop: float

    @property
    def point(self) -> tuple[float, float, float]:
        return self.time, self.memory_mib, self.drop


SHARE = 0.75
"""Of the places, for those that would win as things stand: `python -m benchmarks.survivors`."""


def survivors(found: Sequence[Standing], most: float | None, count: int, share: float = SHARE) -> list[int]:
    """Places of `count` candidates to go on with, in order.

    The first are those that would win as things stand: with a budget of points the fastest within it, then those nearest to it;
    without one those that answer best. Answers are few and rooflines bounds, so the others are spread over what is left, front after
    front, each as far as possible from those that are in.

    Args:
        most: points that may be lost; None: there is no such budget.
        share: of the places for the first, rounded down, but one.
    Source: of the spread Schmucker et al. 2021, arXiv:2106.12639 (MO-ASHA, its epsilon-net). Differs: it begins beside the likely
        winners, so that the same candidates give the same choice.
    """
    points = [s.point for s in found]
    order = sorted(range(len(found)), key=lambda i: (*_rank(found[i], most), i))
    taken = order[: max(min(1, count), int(count * share))]
    for layer in layers(points):
        left = [i for i in layer if i not in taken]
        room = count - len(taken)
        if len(left) > room:
            here = [*taken, *left]
            left = [here[k] for k in spread([points[i] for i in here], room, range(len(taken)))]
        taken += left
    return sorted(taken)


def _rank(standing: Standing, most: float | None) -> tuple[float, ...]:
    """As the winner is chosen, see `Search`. What is nowhere worse than another one ranks no lower."""
    time, memory, drop = standing.point
    if most is None:
        return drop, time, memory
    return (0, time, drop, memory) if drop <= most else (1, drop, time, memory)
