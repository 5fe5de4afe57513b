"""Average neighbouring tokens in square cells: the control that keeps the raster.

tokens [batch, frames · keep, dim], a smaller raster; index int64 [batch, frames · keep], the token at the middle of a
cell, the upper left of the nearest; size float32 [batch, frames · keep].

The h × w raster becomes ⌈h/k⌉ × ⌈w/k⌉ cells of k × k, each of which becomes its mean.

Source: a control without a paper, strong when trained with (DeCo, arXiv:2405.20985; M3, arXiv:2405.17430); training-free
here.
Knobs (per frame), one of the first three:
    kernel: k. keep: the number of cells, which some k must yield. keep_ratio: the k whose number of cells is nearest to
        it, the smaller of equally near ones.
    rows: h, by default the site's.
    space: "tower", so that fewer tokens are projected, or "llm", behind the projector.
Differs: where k does not divide a side, cells are spread evenly and overlap by a row, as in adaptive pooling, instead
of dropping what is over; `size` is then the mean number of tokens per cell.
Position: *compact*; on t/h/w grids *keep*, the position of the middle.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from graphs._contract import PerFrame, Reduced, ReductionError, Signals, Site, Space, Tier, keep_count
from graphs._groups import rows_of
from graphs._pool import Grid, average, pooled

EXAMPLES = ("avgpool:kernel=2", "avgpool:keep=64", "avgpool:keep_ratio=0.3,space=llm")


@dataclass(frozen=True)
class AvgPool(PerFrame):
    """Average square cells of the raster."""

    tier: ClassVar[Tier] = "control"
    paper: ClassVar[str] = "control (average pooling)"
    paper_position: ClassVar[Literal["keep", "compact"]] = "compact"

    kernel: int | None = None
    rows: int | None = None
    space: Space = "tower"

    @property
    def needs(self) -> tuple[str, ...]:
        return ("hidden",)

    @property
    def merges(self) -> bool:
        return True

    def fit(self, site: Site) -> AvgPool:
        self.check()
        rows = rows_of(site, self.rows)
        grid = (rows, site.tokens // rows)
        counts = {k: _cells(grid, k)[0] * _cells(grid, k)[1] for k in range(1, max(grid) + 1)}
        kernel = self.kernel
        if kernel is None:
            if self.keep is None and self.keep_ratio is None:
                raise ReductionError("give one of `kernel`, `keep` and `keep_ratio`; found none")
            wanted = keep_count(self.keep, self.keep_ratio, site.tokens)
            kernel = min(counts, key=lambda k: (abs(counts[k] - wanted), k))
            if self.keep is not None and counts[kernel] != wanted:
                listed = ", ".join(map(str, sorted(set(counts.values()))))
                raise ReductionError(
                    f"`keep` must be what a kernel makes of {grid[0]} × {grid[1]}: {listed}; found {wanted}"
                )
        elif kernel not in counts:
            raise ReductionError(f"`kernel` must be in 1..{max(grid)} on {grid[0]} × {grid[1]} tokens; found {kernel}")
        elif self.keep_ratio is not None or self.keep not in (None, counts[kernel]):
            given = f"`keep` = {self.keep}" if self.keep_ratio is None else f"`keep_ratio` = {self.keep_ratio:g}"
            raise ReductionError(f"`kernel` = {kernel} keeps {counts[kernel]} tokens; leave out {given}")
        known = replace(self, kernel=kernel, rows=rows, keep=counts[kernel], keep_ratio=None)
        return PerFrame.fit(known, site)

    def after(self, site: Site) -> Site:
        assert self.kernel is not None and self.rows is not None
        grid = _cells((self.rows, site.tokens // self.rows), self.kernel)
        return replace(PerFrame.after(self, site), grid=grid)

    def reduce_frame(self, signals: Signals) -> Reduced:
        assert self.kernel is not None and self.rows is not None
        hidden = signals["hidden"]
        grid = (self.rows, hidden.shape[1] // self.rows)
        cells = _cells(grid, self.kernel)
        return pooled(average(grid, cells), hidden, grid, cells)


def _cells(grid: Grid, kernel: int) -> Grid:
    return -(-grid[0] // kernel), -(-grid[1] // kernel)


METHOD = AvgPool
