"""Keep the tokens CLS looks at most, add their neighbours to them, and sum the rest into one more.

tokens [batch, frames · keep, dim]; index int64 [batch, frames · keep], -1 for the extra token; size float32
[batch, frames · keep], 1 for a centre, the number of tokens that are no centre for the extra one.

All by the block *behind* the features: its keys with all heads side by side, and the attention a_j of CLS to each
patch with all heads as one vector.

1. *Centres*: the keep - 1 patches with the largest a_j.
2. Every centre x_i becomes x_i + Σ a_j · x_j over its `neighbours` nearest patches, centres or not (cosine of the
   keys, the earlier among equals, itself left out): a plain weighted sum, not divided by anything.
3. One *extra token* behind them: Σ a_j · x_j over all patches that are no centre.

Source: Shang et al. 2024, "PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models",
arXiv:2403.15388.
Knobs (per frame):
    keep / keep_ratio: tokens that leave: the paper's K centres and the extra one.
    neighbours: how many tokens a centre takes in; at most all others.
    block: the tower block of keys and attention; by default the one right behind the features, or the
        features' own where there is none.
    score: where a_j comes from: "cls", "column" (attention a patch receives from all, mean over heads, for towers
        without CLS), or "auto": cls where there is one.
    order: "paper" (centres most attended first, then the extra token) or "raster" (centres by index, then it).
Differs: the paper's K follows from the image, as the number of outliers among the a_j (above Q3 + 1.5 · IQR, about
32 of 576), which a static graph cannot have: easy images get more tokens than the paper's, dense ones fewer. The
"column" score is ours. Sums are accumulated in float32, then cast back; equal scores go to the earlier token.
Position: *compact*, as the paper's tokens are simply what the language model gets; *keep* on t/h/w grids.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from graphs._attention import Score, resolved
from graphs._blocks import ascending, normalize, one_hot, rank, snap, take
from graphs._contract import PerFrame, Reduced, ReductionError, Signals, Site, Tier, keep_count
from graphs._torch import torch

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLES = ("prumerge:keep=33", "prumerge:keep_ratio=0.25,order=raster", "prumerge:keep=65,block=22,score=column")

SELF = -1e9
"""Below every snapped cosine: a token is no neighbour of its own."""


@dataclass(frozen=True)
class PruMerge(PerFrame):
    """Keep the most attended tokens, add their neighbours to them, and sum the rest."""

    paper: ClassVar[str] = "Shang et al. 2024, arXiv:2403.15388"
    tier: ClassVar[Tier] = "fixed budget"
    paper_position: ClassVar[Literal["keep", "compact"]] = "compact"

    neighbours: int = 32
    block: int | None = None
    score: Score = "auto"
    order: Literal["paper", "raster"] = "paper"

    @property
    def merges(self) -> bool:
        return True

    @property
    def needs(self) -> tuple[str, ...]:
        attention = "column_attention" if self.score == "column" else "joint_cls_attention"
        at = "" if self.block is None else f"@{self.block}"
        return ("hidden", f"joint_keys{at}", f"{attention}{at}")

    def fit(self, site: Site) -> PruMerge:
        self.check()
        keep = keep_count(self.keep, self.keep_ratio, site.tokens)
        if keep < 2:
            raise ReductionError("`keep` counts the centres and the extra token, so it must be at least 2; found 1")
        if self.neighbours < 1:
            raise ReductionError(f"`neighbours` must be at least 1; found {self.neighbours}")
        known = replace(self, score=resolved(self.score, site), neighbours=min(self.neighbours, site.tokens - 1))
        if self.block is None:
            behind = replace(known, block=site.depth)
            known = behind if set(behind.needs) <= site.signals else replace(known, block=site.depth - 1)
        return PerFrame.fit(known, site)

    def reduce_frame(self, signals: Signals) -> Reduced:
        hidden, keys, attention = (signals[name] for name in self.needs)
        n = hidden.shape[1]
        centres = self._centres(snap(attention, 1 / n))
        count = centres.shape[1]
        unit, place, own = normalize(keys), torch.arange(n), centres.unsqueeze(-1)
        similarity = snap(take(unit, centres) @ unit.transpose(1, 2))
        near = _largest(torch.where(place == own, SELF, similarity), self.neighbours)
        rest = 1 - one_hot(centres, n, torch.float32).sum(1, keepdim=True)
        weights = torch.cat([near, rest], 1) * attention.float().unsqueeze(1)
        added = weights @ hidden.float()
        kept = torch.cat([take(hidden, centres), torch.zeros_like(hidden[:, :1])], 1)
        tokens = (kept.float() + added).to(hidden.dtype)
        one = torch.ones_like(attention[:, :1], dtype=torch.float32)
        index = torch.cat([centres, -one.to(torch.int64)], 1)
        return Reduced(tokens, index, torch.cat([one.expand(-1, count), (n - count) * one], 1))

    def _centres(self, score: Tensor) -> Tensor:
        """int64 [batch, keep - 1], from the snapped attention [batch, n]."""
        assert self.keep is not None
        centres = rank(score, self.keep - 1)
        return centres if self.order == "paper" else ascending(centres)


def _largest(score: Tensor, k: int) -> Tensor:
    """float32 [..., n], 1 for the k largest along the last axis, the earlier among equals."""
    place = torch.arange(score.shape[-1])
    last = rank(score, k)[..., -1:]
    least = torch.where(place == last, score, 0.0).sum(-1, keepdim=True)
    return ((score > least) | ((score == least) & (place <= last))).to(torch.float32)


METHOD = PruMerge
