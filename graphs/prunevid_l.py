"""Keep the visual tokens that some token of the question looks at, inside the language model.

hidden [batch, tokens, dim], plain_head_attention [batch, heads, text, tokens], instruction_mask [batch, text] → tokens
[batch, keep, dim]; index int64 [batch, keep].

A visual token's score is the most attention that any token behind the image pays it in any head of the layer before `layer`,
as it would be without RoPE. The best stay, in raster order; the others leave the cache of the layers before as well.

Source: Huang et al. 2024, "PruneVid: Visual Token Pruning for Efficient Video Large Language Models",
arXiv:2412.16117: its second part. The first one is `prunevid`.
Knobs:
    layer: before which tokens are dropped, 0-based. By default 11 of 32, at the same part of the depth: the paper looks
        at the attention in layer 10 and drops behind it.
    keep: visual tokens left, over all frames. keep_ratio: the paper's α; 0.4 if neither is given.
    rope: on scores with position; off as in the official code.
Differs: the paper keeps α of every segment's static tokens and of every frame's moving ones, here of all. The softmax of the
official score also runs over what stands behind the token that asks. Equal scores go to the earlier token.
Position: *keep*: kept tokens keep their ids, holes stay, as in the official code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graphs._blocks import select, snap, take
from graphs._contract import Reduced, Signals, Tier
from graphs._layers import AtLayer
from graphs._torch import torch

EXAMPLES = ("prunevid_l", "prunevid_l:layer=3,keep=100")


@dataclass(frozen=True)
class PruneVidL(AtLayer):
    """Keep the tokens with the most attention from any token of the question."""

    paper: ClassVar[str] = "Huang et al. 2024, arXiv:2412.16117"
    tier: ClassVar[Tier] = "fixed budget"
    paper_layer: ClassVar[int] = 11
    paper_ratio: ClassVar[float] = 0.4
    everywhere: ClassVar[bool] = True

    rope: bool = False

    @property
    def needs(self) -> tuple[str, ...]:
        return ("head_attention" if self.rope else "plain_head_attention", "instruction_mask")

    def forward(self, layer: int, signals: Signals) -> Reduced:
        asks = signals["instruction_mask"][:, None, :, None] > 0
        score = torch.where(asks, signals[self.needs[0]], 0.0).amax((1, 2))
        index = select(snap(score, 1 / score.shape[-1]), self.kept(layer))
        return Reduced(take(signals["hidden"], index), index)


METHOD = PruneVidL
