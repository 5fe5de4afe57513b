"""Leave out of the cache the visual tokens that the instruction does not look at; prefill sees them all.

text_attention [batch, text, tokens], instruction_mask [batch, text] → int64 [batch, keep], the same tokens in the cache of
`layer` and of all layers behind it.

A token's score is the attention that the text behind the image pays it in layer `layer` (0-based), averaged over heads and
summed over that text; the best stay in the cache, in raster order, with their positions. The caches of earlier layers keep all.

This is what the last of the paper's three stages, decoding, makes of the second; the first, `mustdrop`, acts in the tower.

Source: Liu et al. 2024, "Multi-Stage Vision Token Dropping: Towards Efficient Multimodal Large Language Model",
arXiv:2411.10803.
Knobs:
    layer: the first layer whose cache is shortened, by default the paper's 2, or the last one of a shallower model.
    keep / keep_ratio: visual tokens that stay. By default a ninth, the paper's 64 of 576.
Differs: the paper drops tokens whose summed attention and largest attention are both below a threshold, behind layers 2, 6, 10
and 14 in turn and during prefill, and the caches of the layers in between end up with what is left behind layer 14. Here one
choice is made, by rank of the sum, and prefill drops nothing. The key tokens that the paper takes from the tower and never
drops are not known here. Equal scores go to the earlier token.
Position: *keep*, keys are rotated already.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from graphs._blocks import select, snap
from graphs._contract import Signals, Tier
from graphs._kv import FromLayer

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

    @property
    def needs(self) -> tuple[str, ...]:
        return ("text_attention", "instruction_mask")

    def choose(self, layer: int, signals: Signals) -> Tensor:
        assert self.keep is not None
        rows, mask = signals["text_attention"].float(), signals["instruction_mask"].float()
        mean = (mask.unsqueeze(1) @ rows).squeeze(1) / mask.sum(1, keepdim=True).clamp(min=1)
        return select(snap(mean, 1 / rows.shape[-1]), self.keep)


METHOD = MustDropKV
