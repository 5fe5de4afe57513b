"""Keep the tokens that are as different from one another as can be.

tokens [batch, frames · keep, dim] in raster order; index int64 [batch, frames · keep].

Greedy solution of the max-min diversity problem; the distance of two tokens is 1 - cosine:
1. The first token is the one whose nearest other token is farthest.
2. Each further one is the token whose nearest chosen token is farthest, until `keep` are chosen.
Of equal distances the earlier token wins.

Source: Alvar et al. 2025, "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models", CVPR 2025,
arXiv:2503.02175.
Knobs (per frame; per tile in multi-tile models):
    keep / keep_ratio: tokens that stay.
    space: whose features are compared: "llm", projected as in the paper, or "tower", which has fewer tokens projected.
    per_step: how many are chosen at a time after the first. Each step is a few nodes of the graph, so 1, the exact
        method, costs about seven nodes per kept token. Tokens chosen together do not see one another, so with more
        two alike may stay.
Differs: `per_step` and "tower" are ours; images of several tiles are pruned tile by tile, where the official code
takes all tiles as one set; near-ties (1/4096) go to the earlier token.
Position: *compact*: the official code shortens the sequence of embeddings; *keep* on t/h/w grids.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from graphs._blocks import FORCED, ascending, first, normalize, rank, snap, spread, take
from graphs._contract import PerFrame, Reduced, ReductionError, Signals, Site, Space, Tier
from graphs._torch import torch

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLES = ("divprune:keep=64", "divprune:keep_ratio=0.25,space=tower,per_step=8")


@dataclass(frozen=True)
class DivPrune(PerFrame):
    """Keep a subset of largest minimum distance."""

    tier: ClassVar[Tier] = "exact"
    paper: ClassVar[str] = "Alvar et al. 2025, arXiv:2503.02175"
    paper_position: ClassVar[Literal["keep", "compact"]] = "compact"

    space: Space = "llm"
    per_step: int = 1

    @property
    def needs(self) -> tuple[str, ...]:
        return ("hidden",)

    def fit(self, site: Site) -> DivPrune:
        known = PerFrame.fit(self, site)
        if known.per_step < 1:
            raise ReductionError(f"`per_step` is how many tokens one step chooses, at least 1; found {known.per_step}")
        return known

    def reduce_frame(self, signals: Signals) -> Reduced:
        assert self.keep is not None
        hidden = signals["hidden"]
        n = hidden.shape[1]
        if self.keep == n:
            return Reduced(hidden, spread(list(range(n)), hidden))
        index = ascending(farthest(hidden, self.keep, self.per_step))
        return Reduced(take(hidden, index), index)


def farthest(x: Tensor, keep: int, per_step: int = 1) -> Tensor:
    """int64 [batch, keep]: a diverse subset of x [batch, n, dim], in the order in which it was chosen."""
    unit, itself = normalize(x), torch.eye(x.shape[1], dtype=torch.bool)
    similarity = snap(unit @ unit.transpose(1, 2))
    nearest = torch.where(itself, -FORCED, similarity).amax(-1)
    similarity = torch.where(itself, FORCED, similarity)  # so that a chosen token is nearest to a chosen one: itself
    chosen = [first(nearest, largest=False).unsqueeze(-1)]
    nearest = take(similarity, chosen[0]).squeeze(1)
    while (count := min(per_step, keep - 1 - per_step * (len(chosen) - 1))) > 0:
        best = first(nearest, largest=False).unsqueeze(-1) if count == 1 else rank(nearest, count, largest=False)
        chosen.append(best)
        nearest = torch.maximum(nearest, take(similarity, best).amax(1))
    return torch.cat(chosen, 1)


METHOD = DivPrune
