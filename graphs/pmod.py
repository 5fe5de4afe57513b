"""Let a trained router say which visual tokens take part in a layer, fewer the deeper it is; the others skip it.

hidden [batch, tokens, dim] → tokens [batch, kept, dim] of a layer; index int64 [batch, kept]; weight [batch, tokens].

1. Layer l (0-based) of L keeps the share R = max(0.15, `ratio` + ½ · cos(π · l / (L - 1))) of the visual tokens; layers where
   R without the maximum is above 0.85 are dense.
2. A token's score is a linear router on what enters the layer. The best ⌊R · tokens⌋ take part, in raster order.
3. With w = 1 + 0.2 · tanh(score), those leave the layer as h + w · MLP(h), h being the sum behind attention; those that
   skipped it as w · x. All text takes part, without a weight.

A layer's cache holds the tokens that took part in it.

Source: Zhang et al. 2024, "p-MoD: Building Mixture-of-Depths MLLMs via Progressive Ratio Decay", arXiv:2412.04449.
Knobs:
    weights: safetensors file with `weight` [routed layers, dim] and `bias` [routed layers]: the published checkpoint's
        `model.layers.N.router.router.weight` and `.bias` stacked, in the order of the layers.
    ratio: mean share; the paper's 0.5. highest, lowest: its 0.85 and 0.15. They set layer_list, the layers that are routed, and
        keep_list, the tokens that take part in each.
Differs: the cosine spans the model's own depth; the official code's constant 31 is that of 32 layers. As there, a skipped token
is multiplied by w as well, and w scales the MLP only, not attention. Equal scores go to the earlier token. Text-only
prompts do not occur.
Position: *keep*: every token keeps its id.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from graphs._blocks import select, snap, take
from graphs._contract import Reduced, ReductionError, Signals, Site, Skipping, Tier
from graphs._torch import torch

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLES = ("pmod:weights=router.safetensors",)
SWEEP = "pmod:weights=router.safetensors"


@dataclass(frozen=True)
class PMoD(Skipping):
    """Route visual tokens through layers or around them."""

    paper: ClassVar[str] = "Zhang et al. 2024, arXiv:2412.04449"
    tier: ClassVar[Tier] = "trained"

    weights: str
    ratio: float = 0.5
    highest: float = 0.85
    lowest: float = 0.15
    layer_list: tuple[int, ...] | None = None
    keep_list: tuple[int, ...] | None = None

    @property
    def needs(self) -> tuple[str, ...]:
        return ("hidden",)

    @property
    def layers(self) -> tuple[int, ...]:
        assert self.layer_list is not None
        return self.layer_list

    def fit(self, site: Site) -> PMoD:
        self.check()
        if not 0 < self.lowest <= self.ratio <= self.highest <= 1:
            raise ReductionError(
                f"`lowest` ≤ `ratio` ≤ `highest` must lie in (0, 1]; found {self.lowest:g}, {self.ratio:g}, {self.highest:g}"
            )
        if site.depth < 2:
            raise ReductionError(f"it needs at least 2 decoder layers; found {site.depth}")
        shares = {i: self.ratio + math.cos(math.pi * i / (site.depth - 1)) / 2 for i in range(site.depth)}
        routed = {i: max(share, self.lowest) for i, share in shares.items() if share <= self.highest}
        layers, counts = tuple(routed), tuple(max(1, int(share * site.total)) for share in routed.values())
        if not layers:
            raise ReductionError(f"no layer's share is below `highest`; found {self.highest:g}")
        fitted = replace(self, layer_list=layers, keep_list=counts, position=self.resolved_position(site))
        if fitted.position != "keep":
            raise ReductionError("`position` must be keep: tokens that skip a layer come back")
        fitted.require(site)
        return fitted

    def after(self, site: Site) -> Site:
        """On average over all layers."""
        assert self.keep_list is not None
        dense = (site.depth - len(self.layers)) * site.total
        return replace(site, tokens=(dense + sum(self.keep_list)) // site.depth, frames=1, grid=None)

    def kept(self, layer: int) -> int:
        assert self.keep_list is not None
        return self.keep_list[self.layers.index(layer)]

    def trained(self, site: Site) -> dict[str, tuple[int, ...]]:
        return {"weight": (len(self.layers), site.llm_dim), "bias": (len(self.layers),)}

    def forward(self, layer: int, signals: Signals) -> Reduced:
        index = select(snap(self._scores(layer, signals)), self.kept(layer))
        return Reduced(take(signals["hidden"], index), index)

    def weight(self, layer: int, signals: Signals) -> Tensor:
        return 1 + 0.2 * torch.tanh(self._scores(layer, signals))

    def _scores(self, layer: int, signals: Signals) -> Tensor:
        """float32 [batch, tokens]"""
        row = self.layers.index(layer)
        return signals["hidden"].float() @ signals["weight"][row] + signals["bias"][row]


METHOD = PMoD
