"""Drop visual tokens at three layers by what the words that belong to the image look at, and recycle some.

hidden [batch, tokens, dim], all_embeds [batch, entered, dim], text_embeds [batch, text, dim], text_attention [batch, text,
tokens] (version 2: head_attention [batch, heads, text, tokens], rope_response [batch, text, tokens]), instruction_mask [batch,
text] → tokens [batch, kept, dim]; index int64 [batch, kept]; size float32 [batch, kept] (version 1), else None.

1. *Raters*: among the T text tokens behind the image those that the visual tokens resemble most, in the embeddings that
   enter the language model: softmax over these T of visual · text, mean over all visual tokens, above the average 1/T. If
   none is above, all rate.
2. *Scores*: behind each of three layers, the attention that the raters pay a visual token in it, mean over heads and
   raters. The best stay. Version 2 divides the attention by what RoPE alone would give at that distance, and hears only the
   `heads` heads in which the raters then look at the visual tokens most.
3. *Recycling* (version 1): of the D dropped tokens the best R = ⌊0.3 · D⌋ + 1 are clustered by density peaks
   (`_cluster`) into ⌊R / 10⌋ + 1, and the plain mean of each cluster stays too, at the place of its centre.

Source: Zhang et al. 2024, "SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference",
arXiv:2410.04417.
Knobs:
    version: 1, as published, or 2 (its authors' SparseVLM+): no recycling, other counts, scores and position ids.
    layer_list: layers (0-based) before which tokens are dropped. By default 3, 7 and 16 of 32, at the same parts of the
        depth: the paper prunes what comes out of layers 2, 6 and 15.
    keep_list: visual tokens left after each of them, over all frames, recycled ones included.
    keep / keep_ratio: tokens left after the last one; the earlier counts follow in the proportions of the official list
        that ends nearest. Of 576 tokens, with the official nominal counts (a mean over the layers):

        nominal   version 1        version 2
        192       309, 204, 113    300, 200, 118    if nothing is given
        128       312, 117, 39     238, 108, 60
        96        249, 55, 27      246, 54, 28
        64        82, 32, 18       66, 34, 20

        In the official lists of version 1 recycled tokens come on top: 300, 200, 110 is its first.
    heads: of version 2; by default its 14 of 32, in proportion.
    rope: off scores without position, and then version 2 divides by nothing.
Differs: a recycled token stands at its centre's place, where the official code appends it behind the kept ones. Of two
tokens of equal density the earlier is the denser, where that code adds noise. Where a count is too small for both, one
token is kept and fewer clusters are. What version 2 divides by is at least 1/20 of its value at distance 0, as far away it
may come to nothing. Equal scores go to the earlier token; the mean is accumulated in float32, then cast back; later layers
do not count sizes.
Position: *compact*: later layers renumber everything without gaps, as in the official code; *keep* in version 2, as
there, and on t/h/w grids.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from graphs._blocks import SNAP, ascending, complement, rank, select, snap, take
from graphs._cluster import density_peaks
from graphs._contract import Reduced, ReductionError, Signals, Site, Tier
from graphs._layers import Staged, counts_of, layers_of
from graphs._merge import mean, members
from graphs._torch import torch

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLES = ("sparsevlm", "sparsevlm:keep_ratio=0.2,version=2", "sparsevlm:keep=39,rope=off")

PAPERS = {
    1: ((309, 204, 113), (312, 117, 39), (249, 55, 27), (82, 32, 18)),
    2: ((300, 200, 118), (238, 108, 60), (246, 54, 28), (66, 34, 20)),
}
"""Version → visual tokens after every stage, of 576."""

HEADS = 14 / 32
"""Of version 2."""

LEAST = 1 / 20
MASKED = -1e30


@dataclass(frozen=True)
class SparseVlm(Staged):
    """Keep what the raters look at, and the means of what comes next."""

    paper: ClassVar[str] = "Zhang et al. 2024, arXiv:2410.04417"
    tier: ClassVar[Tier] = "exact"
    paper_position: ClassVar[Literal["keep", "compact"]] = "compact"

    version: Literal[1, 2] = 1
    heads: int | None = None
    rope: bool = True

    @property
    def needs(self) -> tuple[str, ...]:
        seen = "" if self.rope else "plain_"
        alike = ("all_embeds", "text_embeds", "instruction_mask")
        if self.version == 1:
            return (*alike, f"{seen}text_attention")
        return (*alike, f"{seen}head_attention", *(("rope_response",) if self.rope else ()))

    @property
    def merges(self) -> bool:
        return self.version == 1

    def resolved_position(self, site: Site) -> Literal["keep", "compact"]:
        if self.position == "auto" and self.version == 2:
            return "keep"
        return Staged.resolved_position(self, site)

    def fit(self, site: Site) -> SparseVlm:
        self.check()
        layers = layers_of(site, "layer_list", self.layer_list, (3, 7, 16))
        if len(layers) != 3:
            raise ReductionError(f"`layer_list` needs three layers; found {'+'.join(map(str, layers))}")
        if self.heads is not None and (self.version == 1 or not 1 <= self.heads <= site.heads):
            raise ReductionError(f"`heads` belongs to version 2, in 1..{site.heads}; found {self.heads}")
        papers = [tuple(max(1, math.floor(c * site.total / 576 + 0.5)) for c in p) for p in PAPERS[self.version]]
        last = self.last(site)
        known = self
        if self.version == 2 and self.heads is None:
            known = replace(self, heads=max(1, math.floor(HEADS * site.heads + 0.5)))
        return known.resolve(site, layers, papers[0] if last is None else counts_of(site, last, papers))

    def forward(self, layer: int, signals: Signals) -> Reduced:
        hidden, size = signals["hidden"], signals["size"]
        n, left = hidden.shape[1], self.kept(layer)
        score = self._score(signals)
        best = left if self.version == 2 else picks(n, left)
        index = select(score, best)
        tokens, weight = take(hidden, index), take(size, index)
        if best < left:
            dropped = complement(index, n)
            again = take(dropped, select(take(score, dropped), recycled(n - best)))
            x, clusters = take(hidden, again), left - best
            centres, owner = density_peaks(x, clusters, clusters)
            member = members(owner, clusters)
            merged, _ = mean(member, x)
            tokens = torch.cat([tokens, merged.to(hidden.dtype)], 1)
            weight = torch.cat([weight, (member @ take(size, again).unsqueeze(-1)).squeeze(-1)], 1)
            index = torch.cat([index, take(again, centres)], 1)
            order = rank(index, left, largest=False)
            tokens, weight, index = take(tokens, order), take(weight, order), ascending(index)
        return Reduced(tokens, index, weight if self.version == 1 else None)

    def _score(self, signals: Signals) -> Tensor:
        """Snapped [batch, tokens]."""
        *alike, seen = (signals[name] for name in self.needs[:4])
        rates = raters(*alike).unsqueeze(1)
        if self.version == 2:
            if self.rope:
                seen = seen / signals["rope_response"].clamp(min=LEAST).unsqueeze(1)
            assert self.heads is not None
            by_head = (rates.unsqueeze(1) @ seen).squeeze(2)  # [batch, heads, tokens]
            loudest = rank(snap(by_head.sum(-1)), self.heads)
            return snap(take(by_head, loudest).mean(1) / rates.sum(-1).clamp(min=1), 1 / seen.shape[-1])
        return snap((rates @ seen).squeeze(1) / rates.sum(-1).clamp(min=1), 1 / seen.shape[-1])


def raters(embeds: Tensor, text: Tensor, mask: Tensor) -> Tensor:
    """float32 [batch, text]: 1 for those that rate.

    Args:
        embeds: [batch, visual, dim]. text: [batch, text, dim]. mask: [batch, text], 1 behind the image.
    """
    alike = embeds.float() @ text.float().transpose(1, 2)
    share = torch.softmax(torch.where(mask.unsqueeze(1) > 0, alike, MASKED), -1).mean(1)
    above = (snap(share * mask.sum(-1, keepdim=True)) > SNAP).to(torch.float32)
    return torch.where(above.amax(-1, keepdim=True) > 0, above, mask)


def recycled(dropped: int) -> int:
    """How many of the dropped tokens are clustered: the official ⌊0.3 · D⌋ + 1, in whole numbers."""
    return 3 * dropped // 10 + 1


def picks(n: int, left: int) -> int:
    """How many of n tokens are kept so that they and the clusters of the others make `left`; at least one.

    >>> picks(576, 309), picks(309, 204), picks(204, 113)
    (300, 200, 110)
    """
    if left == n:
        return n
    return max([1, *(k for k in range(1, left) if k + recycled(n - k) // 10 + 1 <= left)])


METHOD = SparseVlm
