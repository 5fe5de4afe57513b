"""Resize the raster of tokens bilinearly.

tokens [batch, frames · keep, dim], a smaller raster; index int64 [batch, frames · keep], the token nearest to where a
new one is sampled, the upper left of equally near ones; size float32 [batch, frames · keep].

Every new token is sampled at the middle of its share of the raster, between the (up to) four tokens around it
(half-pixel centres, align_corners=False, no antialias).

Source: Li et al. 2024, "Easy Visual Task Transfer" (OneVision), arXiv:2408.03326, which resizes video frames of
27 × 27 tokens to 14 × 14 behind the projector.
Knobs (per frame):
    out: rows and columns that leave, joined by +. By default half of each side, rounded up.
    keep / keep_ratio: instead of `out`, the number of tokens that leave; they are laid out as like the raster as can be.
        A `keep` must be the count of such a layout; of `keep_ratio` the nearest is taken, the smaller of equally near
        ones.
    rows: rows of the raster, by default the site's.
    space: "llm", behind the projector as published, or "tower", so that fewer tokens are projected.
Differs: `size` is the same for all tokens, the number of tokens that come in per token that leaves.
Position: *compact*; on t/h/w grids *keep*, the position of the nearest token.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from graphs._contract import PerFrame, Reduced, ReductionError, Signals, Site, Space, Tier, keep_count
from graphs._groups import rows_of
from graphs._pool import Grid, bilinear, pooled

EXAMPLES = ("bilinear:out=12+12", "bilinear:keep=64,space=tower", "bilinear:keep_ratio=0.3")


@dataclass(frozen=True)
class Bilinear(PerFrame):
    """Resize the raster bilinearly."""

    tier: ClassVar[Tier] = "exact"
    paper: ClassVar[str] = "Li et al. 2024, arXiv:2408.03326"
    paper_position: ClassVar[Literal["keep", "compact"]] = "compact"

    out: tuple[int, ...] | None = None
    rows: int | None = None
    space: Space = "llm"

    @property
    def needs(self) -> tuple[str, ...]:
        return ("hidden",)

    @property
    def merges(self) -> bool:
        return True

    def fit(self, site: Site) -> Bilinear:
        self.check()
        rows = rows_of(site, self.rows)
        grid = (rows, site.tokens // rows)
        if self.out is not None:
            height, width = _explicit(self.out, grid)
            keep = height * width
            if self.keep_ratio is not None or self.keep not in (None, keep):
                given = f"`keep` = {self.keep}" if self.keep_ratio is None else f"`keep_ratio` = {self.keep_ratio:g}"
                raise ReductionError(f"`out` = {height}+{width} keeps {keep} tokens; leave out {given}")
        elif self.keep is None and self.keep_ratio is None:
            height, width = -(-grid[0] // 2), -(-grid[1] // 2)
        else:
            height, width = self._nearest(grid)
        known = replace(self, out=(height, width), rows=rows, keep=height * width, keep_ratio=None)
        return PerFrame.fit(known, site)

    def _nearest(self, grid: Grid) -> Grid:
        """The layout of the raster's shape whose count is nearest to what is asked for."""
        wanted = keep_count(self.keep, self.keep_ratio, grid[0] * grid[1])
        h, w = grid
        shapes = {(r, c) for r in range(1, h + 1) for c in (max(1, r * w // h), -(-r * w // h))}
        found = min(shapes, key=lambda s: (abs(s[0] * s[1] - wanted), s[0] * s[1], abs(s[0] * w - s[1] * h), s))
        if self.keep is not None and found[0] * found[1] != wanted:
            counts = sorted({r * c for r, c in shapes})
            near = [max((n for n in counts if n < wanted), default=0), min(n for n in counts if n > wanted)]
            raise ReductionError(
                f"no raster like {h} × {w} has {wanted} tokens; the nearest `keep` would be "
                f"{' or '.join(str(n) for n in near if n)}, or give `out`"
            )
        return found

    def after(self, site: Site) -> Site:
        assert self.out is not None
        return replace(PerFrame.after(self, site), grid=(self.out[0], self.out[1]))

    def reduce_frame(self, signals: Signals) -> Reduced:
        assert self.out is not None and self.rows is not None
        hidden = signals["hidden"]
        grid, out = (self.rows, hidden.shape[1] // self.rows), (self.out[0], self.out[1])
        return pooled(bilinear(grid, out), hidden, grid, out)


def _explicit(out: tuple[int, ...], grid: Grid) -> Grid:
    if len(out) != 2 or not (1 <= out[0] <= grid[0] and 1 <= out[1] <= grid[1]):
        found = "+".join(map(str, out))
        raise ReductionError(f"`out` takes rows+columns, at most {grid[0]}+{grid[1]} here; found {found}")
    return out[0], out[1]


METHOD = Bilinear
