"""Keep an evenly spaced grid of tokens: the control that looks at nothing and covers everything.

tokens [batch, frames · keep, dim] in raster order; index int64 [batch, frames · keep].

`keep` tokens are spread over about √(keep · height / width) evenly spaced rows, evenly within each row,
always at the middle of their share: i-th of k among n is floor((i + 1/2) · n / k). Over the plain raster
(`rows=1`, or a site without a grid) the same formula is a stride, which at unlucky rates picks a single
column (24 of 24 × 24).

Knobs: `keep` / `keep_ratio` per frame; `rows`: rows of the grid, by default the site's; 1 is the plain raster;
`space`: "tower", or "llm", behind a projector that takes whole rasters only.
Source: a control without a paper; strong in Feather (arXiv:2412.13180) and SeqCompression (arXiv:2504.17892).
Position: *keep*, the dropped tokens leave holes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

from graphs._blocks import pick, spread
from graphs._contract import PerFrame, Reduced, ReductionError, Signals, Site, Space

EXAMPLES = ("uniform:keep=64", "uniform:keep_ratio=0.25,rows=1")


@dataclass(frozen=True)
class Uniform(PerFrame):
    """Keep an evenly spaced grid of the tokens of every frame."""

    paper: ClassVar[str] = "control (even spacing)"

    rows: int | None = None
    space: Space = "tower"

    @property
    def needs(self) -> tuple[str, ...]:
        return ("hidden",)

    def fit(self, site: Site) -> Uniform:
        self.check()
        rows = self.rows if self.rows is not None else site.grid[0] if site.grid else 1
        if rows < 1 or site.tokens % rows:
            raise ReductionError(f"`rows` must divide the {site.tokens} tokens of a frame; found {rows}")
        return PerFrame.fit(replace(self, rows=rows), site)

    def reduce_frame(self, signals: Signals) -> Reduced:
        assert self.keep is not None and self.rows is not None
        hidden = signals["hidden"]
        index = grid(self.rows, hidden.shape[1] // self.rows, self.keep)
        return Reduced(pick(hidden, index), spread(index, hidden))


def grid(height: int, width: int, keep: int) -> list[int]:
    """`keep` evenly spaced places of a height × width raster, ascending.

    >>> grid(4, 4, 4)
    [5, 7, 13, 15]
    """
    used = min(max(round(math.sqrt(keep * height / width)), -(-keep // width), 1), height, keep)
    ends = [keep * (i + 1) // used for i in range(used)]
    counts = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    rows = evenly(height, used)
    return [row * width + col for row, count in zip(rows, counts, strict=True) for col in evenly(width, count)]


def evenly(n: int, k: int) -> list[int]:
    """The middles of k equal shares of 0..n-1: floor((i + 1/2) · n / k)."""
    return [(2 * i + 1) * n // (2 * k) for i in range(k)]


METHOD = Uniform
