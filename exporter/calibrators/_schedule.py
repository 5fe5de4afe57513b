"""From what a predictor asks for to the buckets of a static engine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

from graphs._spec import format as spec_of
from graphs.dyrate import DyRate
from graphs.fastv import FastV


def schedule(kept: Sequence[float], buckets: int) -> tuple[list[int], list[int]]:
    """Steps at which a bucket begins (the first is 0, prefill's) and the visual tokens that each holds.

    The counts never rise, hold at every step as many tokens as are asked for from then on, and are in sum the fewest that
    `buckets` of them can be.

    Args:
        kept: visual tokens asked for at every step. buckets: at most so many.

    >>> schedule([32, 30, 7, 8, 2, 2], 3)
    ([0, 2, 4], [32, 8, 2])
    """
    need = [math.ceil(max(kept[step:]) - 1e-9) for step in range(len(kept))]

    @cache
    def best(first: int, left: int) -> tuple[int, tuple[int, ...]]:
        """Least sum from step `first` on, and where the buckets begin."""
        if first == len(need):
            return 0, ()
        if left == 0:
            return 10**12, ()
        found = (
            (need[first] * (end - first) + best(end, left - 1)[0], (first, *best(end, left - 1)[1]))
            for end in range(len(need), first, -1)
        )
        return min(found, key=lambda item: item[0])

    starts = list(best(0, buckets)[1])
    return starts, [max(1, need[start]) for start in starts]


def written(layer: int, starts: Sequence[int], counts: Sequence[int], **more: object) -> str:
    """The reduction spec of a schedule; more: further knobs. One bucket for the whole answer is FastV.

    >>> written(3, [0, 2, 4], [32, 8, 2])
    'dyrate:keep=32,step_list=2+4,keep_list=8+2'
    """
    if len(starts) == 1:
        return spec_of(FastV(layer=layer, keep=counts[0]))
    return spec_of(
        DyRate(layer=layer, keep=counts[0], step_list=tuple(starts[1:]), keep_list=tuple(counts[1:]), **more)  # type: ignore[arg-type]
    )
