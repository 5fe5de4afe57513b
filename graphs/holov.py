"""Spread the budget over strips of the image, in each of which the most attended tokens stay.

tokens [batch, frames · keep, dim]; index int64 [batch, frames · keep].

1. The tokens are cut, in raster order, into `num_patches` crops of equal length; what does not divide makes the first
   crops one longer.
2. A crop's weight is its mean attention from CLS at the feature block. Its quota is its share of all weights times
   `keep`, rounded down; the crops of the largest weight, the earlier among equals, get one more each until `keep`
   are given out.
3. In each crop the `quota` most attended tokens stay. What a crop has no tokens for goes to the most attended tokens
   that are left anywhere.

Source: Zou et al. 2025, "Don't Just Chase 'Highlighted Tokens' in MLLMs: Revisiting Visual Holistic Context
Retention", arXiv:2510.02912.
Knobs:
    keep / keep_ratio: tokens per frame.
    num_patches: crops; by default ⌊1024 / 576 · tokens / keep⌋, the official 16 at 64 of 576 tokens.
    score: where attention comes from: "cls", "column" (what a token receives from all, for towers without CLS),
        or "auto": cls where there is one.
    order: "paper" (crop by crop, inside a crop most attended first, or by index if its quota covers it whole) or
        "raster".
Differs: the official code weighs a crop by the mean of A + 0.09 · V · mean(A) / mean(V), with A the attention and V
each token's variance of cosines in the crop. That is 1.09 · mean(A) whatever the features are, up to the 1e-6 that
guards the division, so V drops out of every share and is not computed here. (The paper speaks of spatial crops and
diversity; its code cuts strips.) Where a quota exceeds its crop the official code fills up with zeros instead
of tokens. Shares are rounded to 1/4096; equal scores go to the earlier token.
Position: *compact*, as the paper's tokens are simply what the language model gets; *keep* on t/h/w grids.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar, Literal

from graphs._attention import Score, resolved, signal
from graphs._blocks import force, pick, placement, rank, select, snap, take
from graphs._contract import PerFrame, Reduced, ReductionError, Signals, Site, Tier, keep_count
from graphs._groups import group_of, place_in_group
from graphs._quota import units
from graphs._torch import torch

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLES = ("holov:keep=64", "holov:keep_ratio=0.25,order=raster", "holov:keep=100,num_patches=7,score=column")


@dataclass(frozen=True)
class HoloV(PerFrame):
    """Give every strip of the image its share of the budget, and keep its most attended tokens."""

    paper: ClassVar[str] = "Zou et al. 2025, arXiv:2510.02912"
    tier: ClassVar[Tier] = "exact"
    paper_position: ClassVar[Literal["keep", "compact"]] = "compact"

    num_patches: int | None = None
    score: Score = "auto"
    order: Literal["paper", "raster"] = "paper"

    @property
    def needs(self) -> tuple[str, ...]:
        return ("hidden", signal(self.score))

    def fit(self, site: Site) -> HoloV:
        self.check()
        most = max(1, site.tokens // 2)
        crops = self.num_patches
        if crops is None:
            keep = keep_count(self.keep, self.keep_ratio, site.tokens)
            crops = min(max(1, 16 * site.tokens // (9 * keep)), most)
        if not 1 <= crops <= most:
            raise ReductionError(
                f"`num_patches` must be in 1..{most}, as each holds at least two of {site.tokens} tokens; found {crops}"
            )
        return PerFrame.fit(replace(self, num_patches=crops, score=resolved(self.score, site)), site)

    def reduce_frame(self, signals: Signals) -> Reduced:
        assert self.keep is not None and self.num_patches is not None
        hidden = signals["hidden"]
        n = hidden.shape[1]
        score = snap(signals[signal(self.score)], 1 / n)
        crops = strips(n, self.num_patches)
        quota = pick(_quotas(score, crops, self.keep), group_of(crops))
        place = place_in_group(score, crops)
        index = select(force(score, place < quota), self.keep)
        if self.order == "paper":
            own = [crops[g] for g in group_of(crops)]
            whole = quota >= torch.tensor([len(crop) for crop in own])
            sequence = torch.where(whole, torch.arange(n), place + torch.tensor([crop[0] for crop in own]))
            index = take(index, rank(take(sequence, index), self.keep, largest=False))
        return Reduced(take(hidden, index), index)


def strips(n: int, count: int) -> list[list[int]]:
    """0..n-1 in `count` runs; the first n % count are one longer than the others.

    >>> strips(5, 2)
    [[0, 1, 2], [3, 4]]
    """
    size, longer = divmod(n, count)
    starts = [g * size + min(g, longer) for g in range(count + 1)]
    return [list(range(start, end)) for start, end in pairwise(starts)]


def _quotas(score: Tensor, crops: list[list[int]], keep: int) -> Tensor:
    """int64 [batch, crops] that sum to `keep`. Scores are whole numbers: their sums are exact in any order."""
    member = torch.tensor([[float(i in crop) for crop in crops] for i in range(score.shape[1])])
    weight = units((score @ member) / member.sum(0))
    exact = weight * keep / weight.sum(-1, keepdim=True)
    base = torch.floor(snap(exact) / 4096)
    short = (keep - base.sum(-1, keepdim=True)).to(torch.int64)
    return base.to(torch.int64) + (placement(weight) < short).to(torch.int64)


METHOD = HoloV
