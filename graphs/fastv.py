"""Drop the visual tokens the last prompt token does not look at, inside the language model.

hidden [batch, tokens, dim], attention_row [batch, tokens] → tokens [batch, keep, dim]; index int64 [batch, keep].

Before decoder layer `layer` (0-based) the visual tokens are ranked by the attention that the last prompt
token pays them in layer `layer - 1`, averaged over heads; the best stay, in raster order, with their position
ids. All earlier layers, and their part of the cache, hold every token. Happens once, in prefill.

Source: Chen et al. 2024, "An Image is Worth 1/2 Tokens After Layer 2", arXiv:2403.06764.
Knobs:
    layer: the paper's K (2 or 3), at least 1, below the number of layers.
    keep: visual tokens that stay, over all frames. keep_ratio: the paper's 1 - R, rounded half up; 0.5 if
        neither is given.
    rope: off scores without position (arXiv:2412.13180: RoPE's decay favours the bottom of the image).
Differs: K = 0 (random choice; use `random`) is refused; equal scores go to the earlier token; the official
code first recomputed the choice in every decode step, its cached variant, which is ours, chooses once.
Position: *keep*: kept tokens keep their ids, holes stay, as in the paper.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graphs._blocks import select, snap, take
from graphs._contract import Reduced, Signals, Tier
from graphs._layers import AtLayer

EXAMPLES = ("fastv", "fastv:layer=3,keep=64")


@dataclass(frozen=True)
class FastV(AtLayer):
    """Keep the visual tokens with the most attention from the last prompt token."""

    paper: ClassVar[str] = "Chen et al. 2024, arXiv:2403.06764"
    tier: ClassVar[Tier] = "exact"

    paper_layer: ClassVar[int] = 2
    paper_ratio: ClassVar[float] = 0.5

    layer: int = paper_layer  # at any depth
    rope: bool = True

    @property
    def needs(self) -> tuple[str, ...]:
        return ("attention_row" if self.rope else "plain_row",)

    def forward(self, layer: int, signals: Signals) -> Reduced:
        assert self.keep is not None
        (row,) = (signals[name] for name in self.needs)
        index = select(snap(row, 1 / row.shape[-1]), self.keep)
        return Reduced(take(signals["hidden"], index), index)


METHOD = FastV
