"""Divide one budget between a whole image and its tiles by where the whole image is attended, then keep each one's best.

hidden [batch, 1 + tiles, tokens, dim], the whole image first, then its tiles in raster order; tokens
[batch, keep, dim], frame by frame, each in raster order; index int64 [batch, keep].

1. The whole image gets ⌊alpha · keep⌋ tokens, at most all of its own, and more where the tiles cannot use the rest.
2. Of the whole image's patches, the ⌊(1 - alpha) · tokens⌋ with the most attention from CLS at an early block are
   counted by the tile they lie in. The tiles share the rest of the budget in these proportions.
3. In every frame the patches with the most attention from CLS at the feature block stay, as many as its budget says.
   What a tile has no patches for goes to the most attended ones that are left anywhere.

A single frame has no tiles: its `keep` most attended patches stay. Frames of a clip are no tiles: this is not for them.

Source: Arif et al. 2024, "HiRED: Attention-Guided Token Dropping for Efficient Inference of High-Resolution
Vision-Language Models", arXiv:2408.10945.
Knobs:
    keep / keep_ratio: tokens over all frames: the paper's token budget.
    alpha: the whole image's part of it.
    budget_block: the early block, 0-based; by default the first that offers the score. Unused without tiles.
    tiles: rows + columns of tiles. By default as close to a square as their number allows, no more rows than columns.
    rows: rows of a frame's raster, by default the site's.
    score: where attention comes from: "cls", "column" (what a token receives from all, for towers without CLS),
        or "auto": cls where there is one.
Differs: the official code counts patches in stretches of the raster *index*, which is not where the tiles lie (2 × 2
tiles get what the first, second, third and fourth quarter of the rows hold); here a patch counts for the tile its
centre lies in. Budgets are by largest remainder where the official code rounds down and keeps a few
less, and a budget above a tile's patches is passed on. The official code interleaves the tiles' tokens to the rows of
one large image; here they leave tile by tile. Attention is averaged over heads where the paper sums (same order); equal
scores go to the earlier token.
Position: *compact*, as the paper's tokens are simply what the language model gets; *keep* on t/h/w grids.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from graphs._attention import Score, resolved, signal
from graphs._blocks import force, one_hot, rank, select, snap, take
from graphs._contract import PerClip, Reduced, ReductionError, Signals, Site, Tier, block_of
from graphs._groups import rows_of
from graphs._quota import best_of_groups, quotas
from graphs._torch import torch

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLES = ("hired:keep_ratio=0.2", "hired:keep=230,tiles=1+7", "hired:keep=300,alpha=0.25,tiles=7+1,score=column")


@dataclass(frozen=True)
class HiRED(PerClip):
    """Give every tile a budget by early attention, and keep its best by late attention."""

    paper: ClassVar[str] = "Arif et al. 2024, arXiv:2408.10945"
    tier: ClassVar[Tier] = "exact"
    paper_position: ClassVar[Literal["keep", "compact"]] = "compact"

    alpha: float = 0.5
    budget_block: int | None = None
    tiles: tuple[int, ...] | None = None
    rows: int | None = None
    score: Score = "auto"

    @property
    def needs(self) -> tuple[str, ...]:
        early = () if self.budget_block is None else (signal(self.score, self.budget_block),)
        return ("hidden", signal(self.score), *early)

    def fit(self, site: Site) -> HiRED:
        self.check()
        if not 0 <= self.alpha <= 1:
            raise ReductionError(f"`alpha` is the whole image's part of the budget, in 0..1; found {self.alpha:g}")
        score, count = resolved(self.score, site), site.frames - 1
        tiles = self.tiles or _square(count)
        if len(tiles) != 2 or min(tiles) < 0 or tiles[0] * tiles[1] != count:
            raise ReductionError(
                f"`tiles` are rows + columns of the {count} frames behind the first, as in "
                f"{'+'.join(map(str, _square(count)))}; found {'+'.join(map(str, tiles))}"
            )
        block = self.budget_block
        if count == 0:
            block = None
        elif block is None:
            block = block_of(site, signal(score), 0)
        rows = rows_of(site, self.rows)
        return PerClip.fit(replace(self, budget_block=block, tiles=tiles, rows=rows, score=score), site)

    def forward(self, signals: Signals) -> Reduced:
        assert self.keep is not None
        hidden = signals["hidden"]
        frames, n = hidden.shape[1:3]
        score = snap(signals[signal(self.score)], 1 / n)
        if self.budget_block is not None:
            score = force(score, best_of_groups(score, self._budgets(signals, frames - 1, n)))
        index = select(score.flatten(1), self.keep)
        return Reduced(take(hidden.flatten(1, 2), index), index)

    def _budgets(self, signals: Signals, tiles: int, n: int) -> Tensor:
        """int64 [batch, 1 + tiles] that sum to `keep`."""
        assert self.keep is not None and self.tiles is not None and self.rows is not None
        whole = min(max(int(self.alpha * self.keep), self.keep - tiles * n), n)
        early = snap(signals[signal(self.score, self.budget_block)][:, 0], 1 / n)
        most = int((1 - self.alpha) * n)
        counted = one_hot(rank(early, most), n, torch.float32).sum(1) if most else torch.zeros_like(early)
        area = torch.tensor(areas(self.rows, n // self.rows, self.tiles), dtype=torch.float32)
        rest = quotas(counted @ area, self.keep - whole)
        return torch.cat([torch.full_like(rest[:, :1], whole), rest], 1)


def areas(rows: int, cols: int, tiles: tuple[int, ...]) -> list[list[float]]:
    """[rows · cols, tiles], 1 where a patch of the whole image lies in a tile's area: by its centre."""
    down, across = tiles
    inside = [
        ((2 * r + 1) * down // (2 * rows)) * across + (2 * c + 1) * across // (2 * cols)
        for r in range(rows)
        for c in range(cols)
    ]
    return [[float(i == tile) for tile in range(down * across)] for i in inside]


def _square(count: int) -> tuple[int, int]:
    """Rows and columns of `count` tiles, as close to a square as it can be divided."""
    down = max(d for d in range(1, max(1, count) + 1) if count % d == 0 and d * d <= max(1, count))
    return down, count // down


METHOD = HiRED
