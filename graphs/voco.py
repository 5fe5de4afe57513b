"""Let a few trained tokens behind the image read it for all others, and keep only these in the cache.

keys, values of the visual tokens [batch, kv_heads, tokens, head_dim] → none of them.

1. The prompt has `m` special tokens right behind the image. They see the image; no other text does.
2. Behind prefill no layer's cache holds a visual token any more: what the image says is in the keys and values of these m
   tokens.

So the image is compressed to m pairs of keys and values per layer, by the language model itself.

Source: Ye et al. 2024, "VoCo-LLaMA: Towards Vision Compression with Large Language Models", arXiv:2406.12275.
Knobs:
    token: id of the special token in the checkpoint's vocabulary; the runtime puts it behind the image. Needs a checkpoint
        that is trained with it: others answer as if they saw nothing.
    m: how many of them.
Differs: one pass of prefill with a mask, where the paper first runs the image and these tokens, then the text: the same
numbers. With several images the tokens stand behind the last one.
Position: *keep*: what follows the image keeps its ids.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from graphs._blocks import spread
from graphs._contract import InCache, ReductionError, Signals, Site, Tier

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLES = ("voco:token=7", "voco:token=7,m=3")
SWEEP = "voco:token=7"


@dataclass(frozen=True)
class VoCo(InCache):
    """Keep m trained tokens instead of the image."""

    paper: ClassVar[str] = "Ye et al. 2024, arXiv:2406.12275"
    tier: ClassVar[Tier] = "trained"
    shared: ClassVar[bool] = True

    token: int
    m: int = 1

    @property
    def needs(self) -> tuple[str, ...]:
        return ("text_mask",)

    @property
    def start(self) -> int:
        return 0

    @property
    def readers(self) -> tuple[int, ...]:
        return (self.token,) * self.m

    def fit(self, site: Site) -> VoCo:
        self.check()
        if self.m < 1 or self.token < 0:
            raise ReductionError(f"`m` must be 1 or more and `token` an id; found {self.m} and {self.token}")
        self.require(site)
        return self

    def after(self, site: Site) -> Site:
        return replace(site, tokens=self.m, frames=1, grid=None)

    def kept(self, layer: int) -> int:
        return 0

    def choose(self, layer: int, signals: Signals) -> Tensor:
        return spread([], signals["text_mask"]).long()

    def merge(self, keys: Tensor, values: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        return keys[:, :, :0], values[:, :, :0]


METHOD = VoCo
