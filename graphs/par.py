"""Cluster the tokens, retrieve the clusters the question asks for, and keep the best tokens of each.

tokens [batch, frames · keep, dim] in raster order; index int64 [batch, frames · keep].

1. The tokens are clustered by density peaks (DPC-kNN).
2. *External redundancy*: clusters are ranked by the cosine of their mean to the mean of the prompt's text tokens,
   padding left out; of equals the one with the earlier centre comes first.
3. *Internal redundancy*: inside a cluster tokens are ranked by their own cosine to the text, of equals the earlier
   first. In the order of the clusters each gives its best `per_cluster` tokens; if that is not yet `keep`, each its
   next best in the same order, and so on.

Source: Liu et al. 2024, "PAR: Prompt-Aware Token Reduction Method for Efficient Large Multimodal Models",
arXiv:2410.07278; there is no official code.
Knobs (per frame):
    keep / keep_ratio: tokens that stay.
    clusters: by default half of `keep`, so that with 4 tokens of each the better half of the clusters is retrieved.
    per_cluster: tokens a cluster gives before the next one's turn.
    neighbours: k of the density.
Differs: this is the part of the paper that is a graph. Rewriting the question into entities and actions stays outside
(put the rewritten question into the prompt); its router, which picks the rate per question, is a fixed `keep`; the
paper clusters a graph of semantic neighbours, here it is density peaks with a fixed number of clusters.
Position: *keep*, the dropped tokens leave holes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from graphs._blocks import normalize, placement, select, snap, take
from graphs._cluster import density_peaks
from graphs._contract import PerFrame, Reduced, ReductionError, Signals, Site, Space, Tier
from graphs._merge import mean, members
from graphs._text import mean_text
from graphs._torch import torch

EXAMPLES = ("par:keep=64", "par:keep_ratio=0.25,clusters=12,per_cluster=8")


@dataclass(frozen=True)
class Par(PerFrame):
    """Keep the best tokens of the clusters that the question asks for."""

    tier: ClassVar[Tier] = "fixed budget"
    paper: ClassVar[str] = "Liu et al. 2024, arXiv:2410.07278"

    clusters: int | None = None
    per_cluster: int = 4
    neighbours: int = 5

    @property
    def space(self) -> Space:
        return "llm"

    @property
    def needs(self) -> tuple[str, ...]:
        return ("hidden", "text", "text_mask")

    def fit(self, site: Site) -> Par:
        known = PerFrame.fit(self, site)
        assert known.keep is not None
        clusters = max(1, known.keep // 2) if known.clusters is None else known.clusters
        if not 1 <= clusters <= site.tokens:
            raise ReductionError(
                f"`clusters` must be in 1..{site.tokens}, as there are that many tokens; found {clusters}"
            )
        for knob in ("per_cluster", "neighbours"):
            if getattr(known, knob) < 1:
                raise ReductionError(f"`{knob}` must be at least 1; found {getattr(known, knob)}")
        return replace(known, clusters=clusters)

    def reduce_frame(self, signals: Signals) -> Reduced:
        assert self.keep is not None and self.clusters is not None
        hidden, text = signals["hidden"], normalize(mean_text(signals)).unsqueeze(-1)
        n = hidden.shape[1]
        _, owner = density_peaks(hidden, self.clusters, self.neighbours)
        asked = snap((normalize(mean(members(owner, self.clusters), hidden)[0]) @ text).squeeze(-1))
        turn = take(placement(asked), owner)  # of a token's cluster
        own = snap((normalize(hidden) @ text).squeeze(-1))
        one, other, place = own.unsqueeze(-1), own.unsqueeze(-2), torch.arange(n)
        ahead = (other > one) | ((other == one) & (place[None, :] < place[:, None]))
        ahead = ahead & (owner.unsqueeze(-1) == owner.unsqueeze(-2))
        within = ahead.to(torch.float32).sum(-1)
        share = min(self.per_cluster, n)
        served = torch.floor((within + 0.5) / share)  # half a step from where rounding could matter
        order = (served * self.clusters + turn.float()) * share + within - served * share
        index = select(-order, self.keep)
        return Reduced(take(hidden, index), index)


METHOD = Par
