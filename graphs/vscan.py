"""Keep what CLS looks at, locally in an early block and globally in the last one, and merge the rest into it.

hidden at the language model's width; tokens [batch, frames · keep, dim] in raster order; index int64
[batch, frames · keep]; size float32 [batch, frames · keep], the tokens in each mean.

1. *Local scan*: the raster is cut into windows of `window` × `window`; what remains at the right and the lower edge
   belongs to the last ones. Of ⌊local_ratio · keep⌋ = L patches each window gives at most ⌈L / windows⌉: the L with
   the most attention from CLS at an early block under that limit.
2. *Global scan*: the most attended patches at the feature block, of those not yet chosen, until there are `keep`.
3. *Merging*: every other token joins the kept one it resembles most (cosine behind the projector, the earlier among
   equals); a kept token becomes the mean of its group, itself included.

Source: Zhang et al. 2025, "VScan: Rethinking Visual Token Reduction for Efficient Large Vision-Language Models",
arXiv:2505.22654: its first stage. The second one prunes in the middle of the language model.
Knobs:
    keep / keep_ratio: tokens per frame.
    local_ratio: the share of `keep` that the local scan chooses.
    local_block: the early block, 0-based. By default the one nearest to 5/22 of the way to the feature block: the
        paper's block 5 of 23, and its block 7 where only some of 32 attend to all tokens.
    window: side of a window in tokens. By default the paper's 6, or its 4 on t/h/w grids.
    rows: rows of the raster, by default the site's.
    score: where attention comes from: "cls", "column" (what a token receives from all, for towers without CLS),
        or "auto": cls where there is one.
Differs: the official code for towers with CLS gives every window ⌊L / windows⌋, so where that leaves a remainder it
keeps fewer than `keep`; the rule above is its other variant, and the same where nothing remains. Sums are accumulated
in float32, then cast back; equal scores go to the earlier token.
Position: *compact*, as the paper's tokens are simply what the language model gets; *keep* on t/h/w grids.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from graphs._attention import Score, resolved, signal
from graphs._blocks import force, one_hot, rank, select, snap
from graphs._contract import PerFrame, Reduced, ReductionError, Signals, Site, Space, Tier, block_of
from graphs._groups import place_in_group, rows_of
from graphs._merge import absorb
from graphs._torch import torch

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLES = (
    "vscan:keep=96",
    "vscan:keep_ratio=0.25,window=5,score=column",
    "vscan:keep=64,local_ratio=0.25,local_block=8",
)


@dataclass(frozen=True)
class VScan(PerFrame):
    """Keep tokens by local and global attention, and merge the others into them."""

    paper: ClassVar[str] = "Zhang et al. 2025, arXiv:2505.22654"
    tier: ClassVar[Tier] = "exact"
    paper_position: ClassVar[Literal["keep", "compact"]] = "compact"

    local_ratio: float = 0.5
    local_block: int | None = None
    window: int | None = None
    rows: int | None = None
    score: Score = "auto"

    @property
    def space(self) -> Space:
        return "llm"

    @property
    def merges(self) -> bool:
        return True

    @property
    def needs(self) -> tuple[str, ...]:
        local = () if self.local_block is None else (signal(self.score, self.local_block),)
        return ("hidden", signal(self.score), *local)

    def fit(self, site: Site) -> VScan:
        self.check()
        if not 0 <= self.local_ratio <= 1:
            raise ReductionError(f"`local_ratio` is a share of `keep`, in 0..1; found {self.local_ratio:g}")
        window = self.window if self.window is not None else 4 if site.grid_positions else 6
        if window < 1:
            raise ReductionError(f"`window` is the side of a window in tokens, at least 1; found {window}")
        score = resolved(self.score, site)
        block = block_of(site, signal(score), 5 / 22) if self.local_block is None else self.local_block
        rows = rows_of(site, self.rows)
        return PerFrame.fit(replace(self, local_block=block, window=window, rows=rows, score=score), site)

    def reduce_frame(self, signals: Signals) -> Reduced:
        assert self.keep is not None and self.rows is not None and self.window is not None
        hidden = signals["hidden"]
        n = hidden.shape[1]
        score = snap(signals[signal(self.score)], 1 / n)
        local = int(self.local_ratio * self.keep)
        if local:
            groups = windows(self.rows, n // self.rows, self.window)
            early = snap(signals[signal(self.score, self.local_block)], 1 / n)
            score = force(score, _local(early, groups, local))
        return absorb(hidden, select(score, self.keep), hidden)


def windows(rows: int, cols: int, side: int) -> list[list[int]]:
    """The places of every window of a raster; the last ones of each axis take what remains.

    >>> windows(2, 5, 2)
    [[0, 1, 5, 6], [2, 3, 4, 7, 8, 9]]
    """
    down, across = max(1, rows // side), max(1, cols // side)
    found: list[list[int]] = [[] for _ in range(down * across)]
    for place in range(rows * cols):
        row, col = divmod(place, cols)
        found[min(row // side, down - 1) * across + min(col // side, across - 1)].append(place)
    return found


def _local(score: Tensor, groups: list[list[int]], count: int) -> Tensor:
    """bool [batch, n]: the `count` best tokens, from each group at most an equal part of them, rounded up."""
    allowed = place_in_group(score, groups) < -(-count // len(groups))
    best = rank(torch.where(allowed, score, -1.0), count)
    return allowed & (one_hot(best, score.shape[1], torch.float32).sum(1) > 0)


METHOD = VScan
