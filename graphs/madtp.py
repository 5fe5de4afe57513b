"""In every tower block, keep what patches and CLS look at, and blend the rest into one token.

hidden [batch, frames, tokens, dim], attention [batch, frames, tokens, tokens] (mean over heads), cls_attention and
size [batch, frames, tokens] → tokens [batch, frames, tokens - r, dim]; index int64 and size accordingly.

Between attention and MLP of block l, on the N patches:
1. Importance is the mean of two scores: the attention a patch receives from all patches, divided by the sum of
   this over patches, and the attention of CLS to it.
2. The N - r_l - 1 most important stay, the earlier among equals.
3. All others become one token, their mean weighted by importance. `index` names the most important of them.
4. Out come CLS, what stays in raster order, then the blended token, which is a patch like any other from then on.

Source: Cao et al. 2024, "MADTP: Multimodal Alignment-Guided Dynamic Token Pruning for Accelerating Vision-Language
Transformer", CVPR 2024, arXiv:2403.02991.
Knobs:
    keep / keep_ratio: patches per frame that leave the tower, the blended one among them (CLS not counted).
    schedule: r, one number per tower block joined by + (then `keep` follows). By default equal in all blocks; what
        does not divide goes first.
Differs: this is what of the method needs no training. The paper has a third score, the attention of trained
alignment tokens that text and image share, and a threshold from it, so that counts depend on the image (and on
its neighbours in the batch); here they are fixed. It takes the largest attention over heads, and weights heads by
the length of their output; here heads are averaged. Equal scores go to the earlier patch; the official order is
undefined, here it is the raster; the mean is accumulated in float32.
Position: *compact*, because the blended token has no one place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graphs._blocks import ascending, complement, rank, snap, take
from graphs._contract import Reduced, Signals, Site, Tier
from graphs._torch import torch
from graphs._tower import Scheduled, with_cls

EXAMPLES = ("madtp:keep=144", "madtp:keep_ratio=0.5", "madtp:schedule=0+30+0+20+0+10")

TINY = 1e-12


@dataclass(frozen=True)
class Madtp(Scheduled):
    """Keep the most important patches, blend the rest into one."""

    paper: ClassVar[str] = "Cao et al. 2024, arXiv:2403.02991"
    tier: ClassVar[Tier] = "trained"
    fewest: ClassVar[int] = 2

    @property
    def needs(self) -> tuple[str, ...]:
        return ("hidden", "attention", "cls_attention")

    def places(self, site: Site) -> range:
        return range(site.depth)

    @property
    def merges(self) -> bool:
        return True

    @property
    def proportional(self) -> bool:
        return False

    def reduce_frame(self, block: int, signals: Signals, cls_tokens: int) -> Reduced:
        hidden = signals["hidden"][:, cls_tokens:]
        n = hidden.shape[1]
        received = signals["attention"][:, cls_tokens:, cls_tokens:].float().sum(1)
        received = received / (received.sum(-1, keepdim=True) + TINY)
        importance = (received + signals["cls_attention"][:, cls_tokens:].float()) / 2
        stays = n - self.removes(block) - 1
        ranked = rank(snap(importance, 1 / n), stays + 1)
        kept, anchor = ascending(ranked[:, :stays]), ranked[:, stays:]
        rest = complement(kept, n)
        weight = take(importance, rest).unsqueeze(1)
        blend = (weight @ take(hidden, rest).float()) / (weight.sum(-1, keepdim=True) + TINY)
        tokens = [signals["hidden"][:, :cls_tokens], take(hidden, kept), blend.to(hidden.dtype)]
        size = signals["size"][:, cls_tokens:]
        sizes = [signals["size"][:, :cls_tokens], take(size, kept), take(size, rest).sum(-1, keepdim=True)]
        return Reduced(torch.cat(tokens, 1), with_cls(torch.cat([kept, anchor], 1), cls_tokens), torch.cat(sizes, 1))


METHOD = Madtp
