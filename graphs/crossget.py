"""Merge similar, unimportant patches in every tower block, any patch with any other.

hidden [batch, frames, tokens, dim], keys [batch, frames, tokens, head_dim] (mean over heads), cls_attention,
column_attention and size [batch, frames, tokens] → tokens [batch, frames, tokens - r, dim] in raster order, CLS in
front; index int64 and size accordingly.

Between attention and MLP of block l, on the patches:
1. Importance is the attention a patch receives, mean over queries, plus the attention of CLS to it (heads averaged).
2. Patches are ranked by their largest similarity to another one (cosine of the keys), largest first, the earlier
   among equals. A patch may only look at those ranked behind it; so not both of a pair want to go.
3. The r_l patches with the smallest importance - largest similarity they may look at are sources, the earlier
   among equals. Each joins the most similar patch that is no source, the earlier among equals.
4. With y = size · x and weights (w_s, w_d) = 2 · softmax(importance of source, of destination):
   y_d + Σ_s [w_s · y_s + (w_d - 1) · y_d], divided by the new size, which is the sum.

The tower adds log(size) of a key to its attention logits in the following blocks.

Source: Shi et al. 2024, "CrossGET: Cross-Guided Ensemble of Tokens for Accelerating Vision-Language Transformers",
ICML 2024, arXiv:2305.17455.
Knobs:
    keep / keep_ratio: patches per frame that leave the tower (CLS not counted).
    schedule: the paper's r (13), one number per tower block joined by + (then `keep` follows). By default equal
        in all blocks; what does not divide goes first. A block can merge at most half; where later ones could not
        reach `keep`, earlier ones merge more.
Differs: the paper trains a cross token that stands for the text, and takes its attention for importance; here that
of CLS stands in, from which the cross token starts, so nothing is trained and the text has no say. Equal scores go
to the earlier patch; what the official code caps silently is refused; tokens and sizes are accumulated in float32.
Position: *compact*, because merged tokens have no one place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graphs._blocks import ascending, complement, first, normalize, one_hot, placement, rank, snap, take
from graphs._contract import Reduced, Signals, Site, Tier
from graphs._torch import torch
from graphs._tower import Scheduled, with_cls

EXAMPLES = ("crossget:keep=144", "crossget:keep_ratio=0.25", "crossget:schedule=13+13+0+7+0+2")

NEVER = 1e9
"""Beyond every snapped cosine and importance."""


@dataclass(frozen=True)
class CrossGet(Scheduled):
    """Merge the least important of similar patches, complete graph."""

    paper: ClassVar[str] = "Shi et al. 2024, arXiv:2305.17455"
    tier: ClassVar[Tier] = "trained"
    halves: ClassVar[bool] = True

    @property
    def needs(self) -> tuple[str, ...]:
        return ("hidden", "keys", "cls_attention", "column_attention")

    def places(self, site: Site) -> range:
        return range(site.depth)

    @property
    def merges(self) -> bool:
        return True

    def reduce_frame(self, block: int, signals: Signals, cls_tokens: int) -> Reduced:
        importance = (signals["cls_attention"].float() + signals["column_attention"].float())[:, cls_tokens:]
        unit = normalize(signals["keys"][:, cls_tokens:])
        n, r = unit.shape[1], self.removes(block)
        itself = torch.arange(n)[:, None] == torch.arange(n)
        similarity = torch.where(itself, -NEVER, snap(unit @ unit.transpose(1, 2)))
        place = placement(similarity.amax(-1))
        allowed = place.unsqueeze(1) > place.unsqueeze(2)
        best = torch.where(allowed, similarity, -NEVER).amax(-1)
        goes = ascending(rank(snap(importance) - best, r, largest=False))
        stays = complement(goes, n)
        to = take(take(similarity, goes).transpose(1, 2), stays).transpose(1, 2)  # [batch, r, n - r]
        into = one_hot(first(to), n - r, torch.float32).transpose(1, 2)

        source, destination = take(importance, goes), take(importance, stays)
        paired = (destination.unsqueeze(1) @ into).squeeze(1)  # of each source's destination
        weight = 2 * torch.sigmoid(source - paired)  # w_s; w_d - 1 is 1 - w_s
        size = signals["size"][:, cls_tokens:]
        y = signals["hidden"][:, cls_tokens:].float() * size.unsqueeze(-1)
        own = 1 + (into @ (1 - weight).unsqueeze(-1))
        new = take(size, stays) + (into @ take(size, goes).unsqueeze(-1)).squeeze(-1)
        merged = (own * take(y, stays) + into @ (weight.unsqueeze(-1) * take(y, goes))) / new.unsqueeze(-1)
        tokens = torch.cat([signals["hidden"][:, :cls_tokens], merged.to(signals["hidden"].dtype)], 1)
        return Reduced(tokens, with_cls(stays, cls_tokens), torch.cat([signals["size"][:, :cls_tokens], new], 1))


METHOD = CrossGet
