"""Keep in the cache the visual tokens that got most attention, and merge all others into them, per KV head.

keys, values [batch, kv_heads, tokens, head_dim], received [batch, kv_heads, tokens] → int64 [batch, kv_heads, keep], and
keys and values [batch, kv_heads, keep, head_dim].

In every layer, for every KV head:
1. A token's score is the attention it received from all tokens of the prompt, summed; text always stays.
2. The tokens with the highest scores stay, in raster order.
3. Every other token goes to the kept one whose key is most like its own (cosine; the earlier among equals). A kept key
   becomes the mean of itself and, for every token that came, of the pivot half way between the two; values likewise,
   by the same assignment.

Source: Wan et al. 2024, "LOOK-M: Look-Once Optimization in KV Cache for Efficient Multimodal Long-Context Inference",
arXiv:2406.18139.
Knobs:
    keep / keep_ratio: visual tokens that stay in every layer. By default the paper's 20 % (10 % by attention and 10 % the
        most recent, which are text here).
    mode: "pivot" (the paper's best), "average" (mean of itself and all that came), "none" (they are dropped).
    layer: the first layer whose cache is shortened.
Differs: the paper's budget counts all tokens and pushes images below all text; here text is outside of it, and nothing is
merged into text, as the official code does where a text key is nearer. Heads that share keys choose together, by their mean.
What is decoded later is not evicted. The paper's third way to merge, weighted by similarity, is left out.
Position: *keep*, keys are rotated already.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from graphs._blocks import first, normalize, one_hot, select, snap
from graphs._contract import Signals, Tier, take_per_head
from graphs._kv import FromLayer
from graphs._torch import torch

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLES = ("lookm", "lookm:keep=48,mode=average", "lookm:keep_ratio=0.5,mode=none,layer=1")


@dataclass(frozen=True)
class LookM(FromLayer):
    """Keep what was looked at, merge the rest into it."""

    paper: ClassVar[str] = "Wan et al. 2024, arXiv:2406.18139"
    tier: ClassVar[Tier] = "fixed budget"
    paper_ratio: ClassVar[float] = 0.2
    per_head: ClassVar[bool] = True

    mode: Literal["pivot", "average", "none"] = "pivot"

    @property
    def needs(self) -> tuple[str, ...]:
        return ("received",)

    @property
    def merges(self) -> bool:
        return self.mode != "none"

    def choose(self, layer: int, signals: Signals) -> Tensor:
        assert self.keep is not None
        return select(snap(signals["received"]), self.keep)

    def merge(self, keys: Tensor, values: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        kept = take_per_head(keys, index), take_per_head(values, index)
        n, k = keys.shape[2], index.shape[2]
        if self.mode == "none" or k == n:
            return kept
        unit = normalize(keys)
        nearest = first(snap(unit @ take_per_head(unit, index).transpose(-1, -2)))  # [batch, kv_heads, tokens]
        stays = (index.unsqueeze(-1) == torch.arange(n)).to(torch.float32).sum(2)
        goes = one_hot(nearest, k, torch.float32) * (1 - stays).unsqueeze(-1)  # [batch, kv_heads, tokens, keep]
        count = goes.sum(2).unsqueeze(-1)
        share = goes.transpose(-1, -2) / (1 + count)  # divided first: many tokens may come to one

        def merged(whole: Tensor, own: Tensor) -> Tensor:
            own, came = own.float(), share @ whole.float()
            if self.mode == "average":
                return (own / (1 + count) + came).to(whole.dtype)
            return (own * (1 + count / 2) / (1 + count) + came / 2).to(whole.dtype)

        return merged(keys, kept[0]), merged(values, kept[1])


METHOD = LookM
