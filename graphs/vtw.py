"""Withdraw all visual tokens in the middle of the language model.

hidden [batch, tokens, dim] → tokens [batch, 0, dim]; index int64 [batch, 0].

Before decoder layer `k` (0-based) every visual token leaves the sequence: by then the text has taken up what it needs
of the image. All earlier layers, and their part of the cache, hold every token; later ones hold text only.

Source: Lin et al. 2024, "Boosting Multimodal Large Language Models with Visual Tokens Withdrawal for Rapid
Inference", arXiv:2405.05803.
Knobs:
    k: the paper's K. By default half of the layers: its 16 of 32. `edgetrim calibrate vtw` looks for it as the authors do: the
        smallest K whose next token on a few questions hardly differs from the full model's (KL divergence), task by task.
There is no count to choose: nothing stays.
Position: *keep*: what follows the image keeps its ids, as in the official code's default.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from graphs._contract import InLLM, Reduced, Signals, Site, Tier
from graphs._layers import layers_of
from graphs._torch import torch

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLES = ("vtw", "vtw:k=3,position=compact")

SWEEP = "vtw"


@dataclass(frozen=True)
class Vtw(InLLM):
    """Drop every visual token at one layer."""

    paper: ClassVar[str] = "Lin et al. 2024, arXiv:2405.05803"
    tier: ClassVar[Tier] = "exact"

    k: int | None = None

    @property
    def needs(self) -> tuple[str, ...]:
        return ("hidden",)

    @property
    def layers(self) -> tuple[int, ...]:
        assert self.k is not None
        return (self.k,)

    def fit(self, site: Site) -> Vtw:
        self.check()
        (k,) = layers_of(site, "k", None if self.k is None else (self.k,), (16,))
        fitted = replace(self, k=k, position=self.resolved_position(site))
        fitted.require(site)
        return fitted

    def after(self, site: Site) -> Site:
        return replace(site, tokens=0, frames=1, grid=None)

    def kept(self, layer: int) -> int:
        return 0

    def forward(self, layer: int, signals: Signals) -> Reduced:
        none: Tensor = signals["hidden"][:, :0]
        return Reduced(none, none[..., 0].to(torch.int64))


METHOD = Vtw
