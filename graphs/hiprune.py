"""Keep what a middle block attends to, the patches around it, and what the last block attends to.

tokens [batch, frames · keep, dim] in raster order; index int64 [batch, frames · keep].

Both scores are the attention a patch receives from all tokens (column mean over heads and queries), not from CLS.

1. *Anchors*: the round(alpha · keep / 5) patches with the highest score in a middle block, which looks at objects.
2. *Buffers*: the left, right, upper and lower neighbour of every anchor.
3. *Register*: the patches with the highest score at the feature block, of those not yet chosen, until there are
   `keep`.

Source: Liu et al. 2025, "HiPrune: Training-Free Visual Token Pruning via Hierarchical Attention in
Vision-Language Models", arXiv:2508.00553.
Knobs:
    keep / keep_ratio: tokens per frame (per tile in multi-tile models).
    alpha: the share of `keep` meant for anchors and buffers.
    object_block: the middle block, 0-based. By default the one nearest to 8/22 of the way to the feature block: the
        paper's "layer 9" of a tower with 23 used, and its layer 16 where only some of 32 blocks attend to all.
    rows: rows of the raster, by default the site's.
Differs: as in the official code a neighbour is ±1 and ±one row in the raster *index*, clamped to its range, so the
right neighbour of a row's last patch is the first of the next row, and below the last row it is the last patch.
Anchors are at most ⌊keep / 5⌋, so that all neighbours fit (the official code fails where they do not: alpha near 1).
The official code for t/h/w grids may choose a patch twice and so keep a few less; here there are always `keep`.
Equal scores go to the earlier token.
Position: *compact*, as the paper's tokens are simply what the language model gets; *keep* on t/h/w grids.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from graphs._blocks import force, one_hot, rank, select, snap, take
from graphs._contract import PerFrame, Reduced, ReductionError, Signals, Site, Tier, block_of
from graphs._groups import rows_of
from graphs._torch import torch

EXAMPLES = ("hiprune:keep=64", "hiprune:keep_ratio=0.25,alpha=0.5", "hiprune:keep=192,object_block=12")


@dataclass(frozen=True)
class HiPrune(PerFrame):
    """Keep anchors of a middle block, their neighbours, and the best of the feature block."""

    paper: ClassVar[str] = "Liu et al. 2025, arXiv:2508.00553"
    tier: ClassVar[Tier] = "exact"
    paper_position: ClassVar[Literal["keep", "compact"]] = "compact"

    alpha: float = 0.1
    object_block: int | None = None
    rows: int | None = None

    @property
    def needs(self) -> tuple[str, ...]:
        middle = () if self.object_block is None else (f"column_attention@{self.object_block}",)
        return ("hidden", "column_attention", *middle)

    def fit(self, site: Site) -> HiPrune:
        self.check()
        if not 0 <= self.alpha <= 1:
            raise ReductionError(f"`alpha` is a share of `keep`, in 0..1; found {self.alpha:g}")
        block = block_of(site, "column_attention", 8 / 22) if self.object_block is None else self.object_block
        rows = rows_of(site, self.rows)
        return PerFrame.fit(replace(self, object_block=block, rows=rows), site)

    def reduce_frame(self, signals: Signals) -> Reduced:
        assert self.keep is not None and self.rows is not None
        hidden = signals["hidden"]
        n = hidden.shape[1]
        score = snap(signals["column_attention"], 1 / n)
        anchors = min(round(self.alpha * self.keep / 5), self.keep // 5)
        if anchors:
            anchor = rank(snap(signals[f"column_attention@{self.object_block}"], 1 / n), anchors)
            around = torch.cat([anchor + step for step in (0, -1, 1, -(n // self.rows), n // self.rows)], 1)
            chosen = one_hot(around.clamp(0, n - 1), n, torch.float32).sum(1) > 0
            score = force(score, chosen)
        index = select(score, self.keep)
        return Reduced(take(hidden, index), index)


METHOD = HiPrune
