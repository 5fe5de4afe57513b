"""Keep the tokens CLS looks at, and from the rest those that resemble each other least.

tokens [batch, frames · keep, dim] in raster order; index int64 [batch, frames · keep].

1. *Important*: the ⌊important_ratio · keep⌋ patches with the most attention from CLS at the feature block.
2. *Diverse*: the other patches form a list, most attended first, that is thinned out until keep - important are
   left. In every round a token at an even place of the list looks for the most similar one at an odd place
   (cosine of the features). The min(per_round, surplus) even tokens with the highest such similarity, the
   earlier among equals, go; those that stay move to the front of the list, most similar first, before the
   odd ones in their order.

Source: Zhang et al. 2024, "Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token Pruning in
VLMs", arXiv:2412.01818.
Knobs:
    keep / keep_ratio: tokens per frame (per tile in multi-tile models).
    important_ratio: the share of `keep` that is chosen by attention.
    per_round: tokens that a round drops. The official code's 8 needs ⌈surplus / 8⌉ rounds, 64 from 576 to 64
        tokens; a larger number makes a smaller graph and a slightly different set.
    score: where attention comes from: "cls", "column" (what a token receives from all, for towers without CLS),
        or "auto": cls where there is one.
Differs: the official "column" score, for towers without CLS, is that of the last block, here of the feature
block; a round drops at most all even tokens of the list, where the official code fails for lists of odd length
and for rounds larger than half the list. Cosines count as equal below 1/4096, then the earlier token counts as more
similar. As each round's order makes the next one's pairs, near-ties lead to another diverse part of the set than
the official code's, as they do there between float16 and float32.
Position: *compact*, as the paper's tokens are simply what the language model gets; *keep* on t/h/w grids.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from graphs._attention import Score, resolved, signal
from graphs._blocks import ascending, normalize, rank, snap, take
from graphs._contract import PerFrame, Reduced, ReductionError, Signals, Site, Tier
from graphs._torch import torch

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLES = (
    "vispruner:keep=64,per_round=64",
    "vispruner:keep_ratio=0.75",
    "vispruner:keep=128,important_ratio=0.25,score=column,per_round=128",
)


@dataclass(frozen=True)
class VisPruner(PerFrame):
    """Keep important tokens by attention, and diverse ones by thinning out the rest."""

    paper: ClassVar[str] = "Zhang et al. 2024, arXiv:2412.01818"
    tier: ClassVar[Tier] = "exact"
    paper_position: ClassVar[Literal["keep", "compact"]] = "compact"

    important_ratio: float = 0.5
    per_round: int = 8
    score: Score = "auto"

    @property
    def needs(self) -> tuple[str, ...]:
        return ("hidden", signal(self.score))

    def fit(self, site: Site) -> VisPruner:
        self.check()
        if not 0 <= self.important_ratio <= 1:
            raise ReductionError(f"`important_ratio` is a share of `keep`, in 0..1; found {self.important_ratio:g}")
        if self.per_round < 1:
            raise ReductionError(f"`per_round` must be at least 1, or no round drops anything; found {self.per_round}")
        return PerFrame.fit(replace(self, score=resolved(self.score, site)), site)

    def reduce_frame(self, signals: Signals) -> Reduced:
        assert self.keep is not None
        hidden = signals["hidden"]
        n = hidden.shape[1]
        if self.keep == n:
            index = torch.arange(n).expand(hidden.shape[0], -1)
            return Reduced(hidden, index)
        important = int(self.important_ratio * self.keep)
        listed = rank(snap(signals[signal(self.score)], 1 / n), n)
        index, rest = listed[:, :important], listed[:, important:]
        if important < self.keep:
            index = torch.cat([index, _thinned(hidden, rest, self.keep - important, self.per_round)], 1)
        index = ascending(index)
        return Reduced(take(hidden, index), index)


def _thinned(hidden: Tensor, rest: Tensor, left: int, per_round: int) -> Tensor:
    """The `left` members of the list `rest` [batch, R] that survive the rounds."""
    unit = normalize(hidden)
    similarity = snap(unit @ unit.transpose(1, 2))
    while (surplus := rest.shape[1] - left) > 0:
        even, odd = rest[:, ::2], rest[:, 1::2]
        drop = min(per_round, surplus, even.shape[1])
        close = take(take(similarity, even).transpose(1, 2), odd).amax(1)
        order = rank(close, even.shape[1])
        rest = torch.cat([take(even, order[:, drop:]), odd], 1) if drop < even.shape[1] else odd
    return rest


METHOD = VisPruner
