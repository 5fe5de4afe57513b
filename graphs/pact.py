"""Prune visual tokens that the others do not ask for, then merge the rest around density peaks, inside the LLM.

hidden [batch, tokens, dim], next_plain_queries, next_plain_keys, next_keys [batch, heads, tokens, head_dim] → tokens
[batch, keep, dim]; index int64 [batch, keep], the centre of each cluster; size float32 [batch, keep].

Queries and keys are those of layer `layer`, as it would project them:
1. *Prune* (EUTI): the mean query of all visual tokens, before RoPE, attends to their keys, before RoPE: softmax over
   the visual tokens, mean over heads. A token's importance is this attention times the length of its hidden state. The
   ⌊share · tokens⌋ most important ones survive, but at least `keep`.
2. *Cluster* the survivors by the cosine distance of their keys with RoPE, all heads as one vector: the density of a
   token is Σ exp(-(distance / 2)²) over the survivors, δ its distance to the nearest denser one (of equally dense ones
   the earlier counts as denser), the largest distance for the densest. The `keep` largest density · δ are centres,
   the earlier among equals. Every survivor joins the nearest centre.
3. *Recover*: a pruned token joins the nearest centre too, if it is no farther than `coef` · `cutoff`; else it is gone.
4. A centre becomes the mean of its cluster, and later layers add log(size) to its attention logits.

Source: Dhouib et al. 2025, "PACT: Pruning and Clustering-Based Token Reduction for Faster Visual Language Models",
CVPR 2025, arXiv:2504.08966.
Knobs:
    layer: before which tokens are reduced, 0-based. By default the paper's 4 of 32, at the same part of the depth.
    share: of the tokens, what survives the pruning.
    keep: clusters, over all frames. keep_ratio: by default 0.29, about what the paper's settings leave.
    cutoff: the paper's distance within which tokens are alike. coef: how much farther pruned ones may be.
    rope: off measures it between keys that are not rotated.
Differs: in the paper a survivor is a centre if no denser centre is within the cutoff, so that the image sets their
number; here it is fixed, images full of detail get too few centres, and members may be farther than the cutoff. The
official mean query and softmax also see the prompt in front of the image. The mean counts the sizes that came in.
Position: *keep*: a cluster keeps the id of its centre, holes stay, as in the official code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from graphs._blocks import SNAP, TINY, first, normalize, one_hot, select, snap, take
from graphs._contract import Reduced, ReductionError, Signals, Site, Tier
from graphs._layers import AtLayer
from graphs._merge import mean, members
from graphs._torch import torch

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLES = ("pact", "pact:keep=64,layer=3,share=0.4", "pact:keep_ratio=0.5,cutoff=0.5,coef=1")


@dataclass(frozen=True)
class PACT(AtLayer):
    """Prune by the mean query, then cluster by keys."""

    paper: ClassVar[str] = "Dhouib et al. 2025, arXiv:2504.08966"
    tier: ClassVar[Tier] = "fixed budget"
    paper_layer: ClassVar[int] = 4
    paper_ratio: ClassVar[float] = 0.29

    share: float = 0.55
    cutoff: float = 0.21
    coef: float = 1.5
    rope: bool = True

    @property
    def needs(self) -> tuple[str, ...]:
        return ("next_plain_queries", "next_plain_keys", *(("next_keys",) if self.rope else ()))

    @property
    def merges(self) -> bool:
        return True

    @property
    def sized(self) -> bool:
        return True

    def fit(self, site: Site) -> PACT:
        known = AtLayer.fit(self, site)
        if not 0 < self.share <= 1:
            raise ReductionError(f"`share` is what survives the pruning, in (0, 1]; found {self.share:g}")
        if min(self.cutoff, self.coef) < 0:
            raise ReductionError(f"`cutoff` and `coef` are at least 0; found {self.cutoff:g} and {self.coef:g}")
        return known

    def forward(self, layer: int, signals: Signals) -> Reduced:
        hidden, keep = signals["hidden"], self.kept(layer)
        n = hidden.shape[1]
        score = importance(hidden, signals["next_plain_queries"], signals["next_plain_keys"])
        survivors = select(score, max(keep, int(self.share * n)))
        unit = normalize(signals["next_keys" if self.rope else "next_plain_keys"].transpose(1, 2).flatten(2))
        index = take(survivors, centres(take(unit, survivors), keep))
        distance = SNAP - snap(unit @ take(unit, index).transpose(1, 2))  # [batch, n, keep]
        survives = one_hot(survivors, n, torch.float32).sum(1) > 0
        joins = survives | (distance.amin(-1) <= self.coef * self.cutoff * SNAP)
        own = one_hot(index, n, torch.float32)
        member = torch.where(own.sum(1, keepdim=True) > 0, own, members(first(distance, largest=False), keep))
        tokens, size = mean(member * joins.unsqueeze(1).float(), hidden, signals["size"])
        return Reduced(tokens.to(hidden.dtype), index, size)


def importance(hidden: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
    """Snapped [batch, n]. queries: [batch, heads, n, head_dim]; keys: [batch, kv_heads, n, head_dim]; before RoPE."""
    heads, kv_heads, n = queries.shape[1], keys.shape[1], hidden.shape[1]
    query = queries.float().mean(2).unflatten(1, (kv_heads, heads // kv_heads)) * queries.shape[-1] ** -0.5
    attention = torch.softmax(query @ keys.float().transpose(-1, -2), -1).mean((1, 2))
    length = hidden.float().pow(2).sum(-1).sqrt()
    return snap(attention * (length / length.amax(-1, keepdim=True).clamp(min=TINY)), 1 / n)


def centres(unit: Tensor, count: int) -> Tensor:
    """int64 [batch, count], ascending. unit: float32 [batch, n, dim], compared by cosine."""
    n = unit.shape[1]
    distance = SNAP - snap(unit @ unit.transpose(1, 2))
    density = snap(torch.exp(-(distance / (2 * SNAP)).pow(2)).sum(-1), n)
    a, b = density.unsqueeze(-1), density.unsqueeze(-2)
    place = torch.arange(n)
    denser = (b > a) | ((b == a) & (place < place[:, None]))  # [batch, i, j]: j is denser than i
    delta = torch.where(denser, distance, distance.amax((1, 2), keepdim=True)).amin(-1)
    return select(density * delta, count)


METHOD = PACT
