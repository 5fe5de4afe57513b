"""Pooling and resizing on a static grid as constant matrices [out, in], so that no runtime's Resize is involved."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, TypeVar

from graphs._blocks import spread
from graphs._contract import PerFrame, Reduced, ReductionError, Signals, Site, keep_count
from graphs._groups import raster_of
from graphs._torch import torch

if TYPE_CHECKING:
    from torch import Tensor

Grid = tuple[int, int]
Rows = list[list[float]]
A = TypeVar("A", bound="Averaged")


@dataclass(frozen=True)
class Averaged(PerFrame):
    """The raster averaged to one of a few coarser ones, which models were trained for. `published`: tokens of a frame, if
    nothing is said about them."""

    paper_position: ClassVar[Literal["keep", "compact"]] = "compact"
    published: ClassVar[int | None] = None

    raster: tuple[int, ...] | None = None

    @property
    def needs(self) -> tuple[str, ...]:
        return ("hidden",)

    @property
    def merges(self) -> bool:
        return True

    @abstractmethod
    def coarser(self, grid: Grid) -> Sequence[Grid]:
        """Rows and columns of the rasters that it makes of one, of different counts."""

    def fit(self: A, site: Site) -> A:
        self.check()
        grid = raster_of(site, self.raster)
        keep = self.published if self.keep is None and self.keep_ratio is None else self.keep
        wanted = keep_count(keep, self.keep_ratio, site.tokens)
        counts = sorted(rows * cols for rows, cols in self.coarser(grid))
        nearest = min(counts, key=lambda count: abs(count - wanted))
        if keep is not None and nearest != wanted:
            listed = ", ".join(map(str, counts))
            raise ReductionError(f"`keep` must be one of {listed} on {grid[0]} × {grid[1]} tokens; found {wanted}")
        return PerFrame.fit(replace(self, raster=grid, keep=nearest, keep_ratio=None), site)

    @property
    def grids(self) -> tuple[Grid, Grid]:
        """The rasters before and after."""
        assert self.raster is not None
        grid = self.raster[0], self.raster[1]
        return grid, next(out for out in self.coarser(grid) if out[0] * out[1] == self.keep)

    def after(self, site: Site) -> Site:
        return replace(PerFrame.after(self, site), grid=self.grids[1])

    def reduce_frame(self, signals: Signals) -> Reduced:
        return pooled(average(*self.grids), signals["hidden"], *self.grids)


def average(grid: Grid, out: Grid) -> Tensor:
    """Adaptive average pooling (PyTorch's cell borders): float32 [out tokens, in tokens], raster order."""
    return _separable(_average(grid[0], out[0]), _average(grid[1], out[1]))


def bilinear(grid: Grid, out: Grid) -> Tensor:
    """Bilinear resize, half-pixel centres (align_corners=False), no antialias: float32 [out tokens, in tokens]."""
    return _separable(_bilinear(grid[0], out[0]), _bilinear(grid[1], out[1]))


def bicubic(grid: Grid, out: Grid) -> Tensor:
    """Bicubic resize as PyTorch's (a = -0.75, half-pixel centres, no antialias): float32 [out tokens, in tokens]."""
    return _separable(_bicubic(grid[0], out[0]), _bicubic(grid[1], out[1]))


def pool(matrix: Tensor, x: Tensor) -> Tensor:
    """[..., in, dim] → [..., out, dim], in float32, then cast back."""
    return (matrix @ x.float()).to(x.dtype)


def pooled(matrix: Tensor, hidden: Tensor, grid: Grid, out: Grid) -> Reduced:
    """hidden [batch, tokens, dim] on `grid`, pooled to `out`: anchored at the middles, all of the same size, which is the
    number of tokens that come in per token that leaves."""
    index = spread(middles(grid, out), hidden)
    share = grid[0] * grid[1] / (out[0] * out[1])
    return Reduced(pool(matrix, hidden), index, torch.full_like(index, share, dtype=torch.float32))


def middles(grid: Grid, cells: Grid) -> list[int]:
    """The place nearest to the middle of every cell, the upper left of equally near ones.

    The middle of the i-th of m equal shares of n is (i + 1/2) · n / m - 1/2.

    >>> middles((4, 4), (2, 2))
    [0, 2, 8, 10]
    """
    rows, cols = ([-((2 * m - (2 * i + 1) * n) // (2 * m)) for i in range(m)] for n, m in zip(grid, cells, strict=True))
    return [row * grid[1] + col for row in rows for col in cols]


def _average(n: int, m: int) -> Rows:
    rows = []
    for i in range(m):
        start, end = i * n // m, -(-(i + 1) * n // m)
        rows.append([1 / (end - start) if start <= j < end else 0.0 for j in range(n)])
    return rows


def _bilinear(n: int, m: int) -> Rows:
    rows = []
    for i in range(m):
        at = max(0.0, (i + 0.5) * n / m - 0.5)
        low = min(math.floor(at), n - 1)
        high, part = min(low + 1, n - 1), at - low
        row = [0.0] * n
        row[low] += 1 - part
        row[high] += part
        rows.append(row)
    return rows


def _bicubic(n: int, m: int) -> Rows:
    rows = []
    for i in range(m):
        at = (i + 0.5) * n / m - 0.5
        low = math.floor(at)
        row = [0.0] * n
        for tap in range(low - 1, low + 3):
            row[min(max(tap, 0), n - 1)] += _cubic(abs(at - tap))
        rows.append(row)
    return rows


def _cubic(x: float, a: float = -0.75) -> float:
    """Keys's kernel at a distance of at most 2."""
    if x <= 1:
        return ((a + 2) * x - (a + 3)) * x * x + 1
    return ((x - 5) * x + 8) * x * a - 4 * a


def _separable(rows: Rows, cols: Rows) -> Tensor:
    return torch.tensor([[a * b for a in row for b in col] for row in rows for col in cols], dtype=torch.float32)
