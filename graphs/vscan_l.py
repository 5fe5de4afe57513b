"""Keep a third of the visual tokens in the middle of the language model, by the last prompt token's attention.

hidden [batch, tokens, dim], next_row [batch, tokens] → tokens [batch, keep, dim]; index int64 [batch, keep].

Before the middle decoder layer the visual tokens are ranked by the attention that the last prompt token would pay them
in that very layer (its own norm and projections, softmax over the whole sequence, averaged over heads); the best stay,
in raster order.

Source: Zhang et al. 2025, "VScan: Rethinking Visual Token Reduction for Efficient Large Vision-Language Models",
arXiv:2505.22654: its second stage. The first one is `vscan`.
Knobs:
    layer: 0-based, by default half of the layers: the paper's 16 of 32 and 14 of 28.
    keep: visual tokens left, over all frames. keep_ratio: share of those that come in; by default a third: the paper's
        32 of 96.
    rope: off scores without position: the same attention from queries and keys that are not rotated. By default on, and off on
        t/h/w grids, both as in the official code.
Differs: equal scores go to the earlier token.
Position: *compact*: later layers renumber everything without gaps, as in the official code; *keep* on t/h/w grids, as
there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from graphs._blocks import select, snap, take
from graphs._contract import Reduced, Signals, Site, Tier
from graphs._layers import AtLayer

EXAMPLES = ("vscan_l", "vscan_l:layer=3,keep=96", "vscan_l:keep_ratio=0.5,rope=off")


@dataclass(frozen=True)
class VScanL(AtLayer):
    """Keep the tokens with the most attention from the last prompt token, in the middle layer."""

    paper: ClassVar[str] = "Zhang et al. 2025, arXiv:2505.22654"
    tier: ClassVar[Tier] = "exact"
    paper_position: ClassVar[Literal["keep", "compact"]] = "compact"
    paper_layer: ClassVar[int] = 16
    paper_ratio: ClassVar[float] = 1 / 3

    rope: bool | None = None

    @property
    def needs(self) -> tuple[str, ...]:
        return ("next_plain_row" if self.rope is False else "next_row",)

    def fit(self, site: Site) -> VScanL:
        return AtLayer.fit(replace(self, rope=not site.grid_positions if self.rope is None else self.rope), site)

    def forward(self, layer: int, signals: Signals) -> Reduced:
        (row,) = (signals[name] for name in self.needs)
        index = select(snap(row, 1 / row.shape[-1]), self.kept(layer))
        return Reduced(take(signals["hidden"], index), index)


METHOD = VScanL
