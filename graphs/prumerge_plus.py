"""PruMerge with evenly spaced tokens as further centres, so that no part of the image goes missing.

tokens [batch, frames · keep, dim]; index int64 [batch, frames · keep], -1 for the extra token; size float32
[batch, frames · keep], as in prumerge.

1. *Outliers*: the `outliers` patches with the most attention from CLS.
2. *Samples*: keep - 1 - outliers = S patches at places ⌊i · tokens / S⌋ of the raster. Where such a patch is an
   outlier already, the most attended patch not yet chosen takes its place.
3. Both are centres, which take in their neighbours, and one extra token sums up what is no centre: as in prumerge.

Source: Shang et al. 2024, "PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models",
arXiv:2403.15388 (PruMerge+).
Knobs (per frame):
    keep / keep_ratio: tokens that leave: outliers, samples and the extra one. The paper's setting is about a
        quarter of the tokens.
    outliers: by default a quarter of keep - 1, rounded half up, at least one.
    neighbours, block, score: as in prumerge.
    order: "paper" (outliers most attended first, then the others by index, then the extra token) or "raster"
        (centres by index, then it).
Differs: in the paper the number K of outliers follows from the image and the samples lie at 0, s, 2s, … with
s = ⌊⌊tokens / K⌋ / 3⌋, about 3 · K of them, less those that are outliers: more or fewer tokens for every image.
Here both counts are fixed. What else differs is said in prumerge.
Position: *compact*, as the paper's tokens are simply what the language model gets; *keep* on t/h/w grids.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from graphs._blocks import ascending, force, one_hot, rank
from graphs._contract import ReductionError, Site, keep_count
from graphs._torch import torch
from graphs.prumerge import PruMerge

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLES = (
    "prumerge_plus:keep=144",
    "prumerge_plus:keep_ratio=0.25,order=raster",
    "prumerge_plus:keep=65,outliers=32,score=column",
)


@dataclass(frozen=True)
class PruMergePlus(PruMerge):
    """PruMerge whose centres are attention's outliers and evenly spaced tokens."""

    outliers: int | None = None

    def fit(self, site: Site) -> PruMergePlus:
        self.check()
        centres = keep_count(self.keep, self.keep_ratio, site.tokens) - 1
        outliers = max(1, (centres + 2) // 4) if self.outliers is None else self.outliers
        if centres and not 1 <= outliers <= centres:
            raise ReductionError(
                f"`outliers` is a part of the {centres} centres `keep` leaves, so it must be in 1..{centres}; "
                f"found {outliers}"
            )
        fitted = PruMerge.fit(replace(self, outliers=outliers), site)
        assert isinstance(fitted, PruMergePlus)
        return fitted

    def _centres(self, score: Tensor) -> Tensor:
        assert self.keep is not None and self.outliers is not None
        n, samples = score.shape[1], self.keep - 1 - self.outliers
        centres = rank(score, self.outliers)
        if samples:
            places = {i * n // samples for i in range(samples)}
            wanted = force(score, torch.tensor([i in places for i in range(n)]))
            taken = one_hot(centres, n, torch.float32).sum(1) > 0
            others = rank(torch.where(taken, -1.0, wanted), samples)
            centres = torch.cat([centres, ascending(others)], 1)
        return centres if self.order == "paper" else ascending(centres)


METHOD = PruMergePlus
