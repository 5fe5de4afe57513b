"""Leave out of the cache the visual tokens that the last prompt token does not look at; prefill sees them all.

attention_row [batch, tokens] → int64 [batch, keep], the same tokens in the cache of `layer` and of all layers behind it.

In layer `layer` (0-based) the visual tokens are ranked by the attention that the last prompt token pays them, averaged
over heads; the best stay in the cache, in raster order, with their positions.

This is the second of the paper's two stages; the first, `dycoke`, acts before the language model.

Source: Tao et al. 2024, "DyCoke: Dynamic Compression of Tokens for Fast Video Large Language Models",
arXiv:2411.15024.
Knobs:
    layer: the paper's 3, or the last one of a shallower model.
    keep / keep_ratio: visual tokens that stay. By default 1 - P with the paper's P = 0.7.
Differs: the choice is made once, behind prefill, for the whole answer. The paper asks the token being decoded instead of
the last one of the prompt, keeps what was left out in a second cache and chooses again in a step whose attention no longer
looks like the one before (cosine below 0.9). The official code ranks by the layer before `layer`, and attends to everything
again in the steps in which it does not choose. Equal scores go to the earlier token.
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

EXAMPLES = ("dycoke_kv", "dycoke_kv:layer=1,keep=48", "dycoke_kv:keep_ratio=0.25")


@dataclass(frozen=True)
class DyCokeKV(FromLayer):
    """Keep in the cache what the last prompt token looks at."""

    paper: ClassVar[str] = "Tao et al. 2024, arXiv:2411.15024"
    tier: ClassVar[Tier] = "fixed budget"
    paper_layer: ClassVar[int] = 3
    paper_ratio: ClassVar[float] = 0.3
    shared: ClassVar[bool] = True

    @property
    def needs(self) -> tuple[str, ...]:
        return ("attention_row",)

    def choose(self, layer: int, signals: Signals) -> Tensor:
        assert self.keep is not None
        row = signals["attention_row"]
        return select(snap(row, 1 / row.shape[-1]), self.keep)


METHOD = DyCokeKV
