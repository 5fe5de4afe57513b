"""Leave out of the cache the visual tokens that the instruction does not look at; prefill sees them all.

text_attention [batch, text, tokens], instruction_mask [batch, text] → int64 [batch, keep], the same tokens in the cache of
`layer` and of all layers behind it.

By the attention that the text behind the image pays the visual tokens in layer `layer` (0-based), averaged over heads:
1. *Global*: a token's share of all that text pays the image, summed over the text, beyond a threshold.
2. *Individual*: the most attention that one text token pays it, beyond a threshold.
The tokens that are ahead in either, each in units of its threshold, stay in the cache, in raster order, with their positions.
The caches of earlier layers keep all.

This is what the last of the paper's three stages, decoding, makes of the second; the first, `mustdrop`, acts in the tower.

Source: Liu et al. 2024, "Multi-Stage Vision Token Dropping: Towards Efficient Multimodal Large Language Model",
arXiv:2411.10803.
Knobs:
    layer: the first layer whose cache is shortened, by default the paper's 2, or the last one of a shallower model.
    keep / keep_ratio: visual tokens that stay. By default a ninth, the paper's 64 of 576.
    ratio: of the global threshold to the individual one. The paper's are 0.011 and 0.01 for 64 tokens, 0.0012 and 0.001 for 128,
        0.001 for both for 192.
Differs: the paper drops tokens that are below both thresholds, however many that are; here the thresholds move together until
`keep` are left. It does so behind layers 2, 6, 10 and 14 in turn and during prefill, and the caches of the layers in between end
up with what is left behind layer 14; here one choice is made, and prefill drops nothing. The key tokens that the paper takes
from the tower and never drops are not known here. Equal scores go to the earlier token.
Position: *keep*, keys are rotated already.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from graphs._blocks import TINY, select, snap
from graphs._contract import ReductionError, Signals, Site, Tier
from graphs._kv import FromLayer
from graphs._torch import torch

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLES = ("mustdrop_kv", "mustdrop_kv:layer=1,keep=48", "mustdrop_kv:keep_ratio=0.25")


@dataclass(frozen=True)
class MustDropKV(FromLayer):
    """Keep in the cache what the instruction looks at."""

    paper: ClassVar[str] = "Liu et al. 2024, arXiv:2411.10803"
    tier: ClassVar[Tier] = "fixed budget"
    paper_layer: ClassVar[int] = 2
    paper_ratio: ClassVar[float] = 1 / 9
    shared: ClassVar[bool] = True

    ratio: float = 1.1

    @property
    def needs(self) -> tuple[str, ...]:
        return ("text_attention", "instruction_mask")

    def choose(self, layer: int, signals: Signals) -> Tensor:
        assert self.keep is not None
        rows, mask = signals["text_attention"].float(), signals["instruction_mask"].float()
        asked = rows * mask.unsqueeze(-1)
        total = asked.sum(1)
        share = total / total.sum(-1, keepdim=True).clamp(min=TINY)
        return select(snap(torch.maximum(share, self.ratio * asked.amax(1)), 1 / rows.shape[-1]), self.keep)

    def fit(self, site: Site) -> MustDropKV:
        fitted = FromLayer.fit(self, site)
        if not 0 <= self.ratio < math.inf:
            raise ReductionError(f"`ratio` is at least 0; found {self.ratio:g}")
        return fitted


METHOD = MustDropKV
