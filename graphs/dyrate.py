"""Drop visual tokens inside the language model, and more of them the longer the answer gets.

hidden [batch, tokens, dim], attention_row [batch, tokens] → tokens [batch, keep, dim]; index int64 [batch, keep].

1. Prefill: before decoder layer `layer` the visual tokens are ranked by the attention that the last prompt token pays them
   in the layer before, averaged over heads; the best `keep` stay, in raster order.
2. Decode: after as many answer tokens as `step_list` says, the cache of `layer` and of all layers behind it is cut down to
   the count in `keep_list`, by the attention of the newest token in layer `layer - 1`, which still holds all of them.
3. With `weights` a classifier decides instead when: from the shares of the newest token's attention that go to system text,
   image, instruction and answer it chooses one of K rates {0, 1/K, …, (K - 1)/K} of the image to drop; as soon as every
   sample of a batch wants no more than the next count of `keep_list`, that cut is made. What is gone stays gone.

Attention moves from the image to the answer while it is written: so the image grows redundant.

Source: Liang et al. 2025, "Dynamic Token Reduction during Generation for Vision Language Models", arXiv:2501.14204.
Knobs:
    layer: the paper's 3, at least 1, below the number of layers.
    keep / keep_ratio: visual tokens behind prefill; half of them if neither is given, as in its FastV baselines.
    step_list: answer tokens run before each further cut. keep_list: visual tokens left by each; by default they halve.
        `edgetrim calibrate dyrate` finds both on questions of yours, and trains the weights.
    weights: safetensors file with the classifier: `weight` [4, K], `bias` [K] (K is `rates`); with `state`, a GRU cell in
        front of it: `reset`, `update`, `candidate` [4 + state, state] and their `_bias` [state], `weight` [state, K].
    rates: K. state: width of the GRU, 0 for the paper's linear classifier, which sees the newest token only.
    rope: off lets prefill choose without position; later cuts still see it, as the keys in the cache are rotated.
Differs: the paper ranks the whole image anew in every step, so a dropped token may come back, and any rate is possible at
any step; an engine has one cache length at a time, so ours falls in buckets and never rises. Its list of masks has one
too many for K rates. Shares come from the layer before the cut, whose cache is whole, so that they do not depend on what was
dropped. The GRU is ours: it sees all tokens of the answer so far. No official code or weights exist.
Position: *keep*: kept tokens keep their ids, holes stay.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from graphs._blocks import first, select, snap, take
from graphs._contract import Reduced, ReductionError, Signals, Site, Tier, WhileDecoding, keep_count
from graphs._torch import torch

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLES = ("dyrate", "dyrate:layer=1,keep=16,step_list=2+5,keep_list=9+4")
GROUPS = 4
"""System text, image, instruction, answer."""


@dataclass(frozen=True)
class DyRate(WhileDecoding):
    """Keep what the newest token looks at, less and less."""

    paper: ClassVar[str] = "Liang et al. 2025, arXiv:2501.14204"
    tier: ClassVar[Tier] = "fixed budget"

    layer: int = 3
    keep: int | None = None
    keep_ratio: float | None = None
    step_list: tuple[int, ...] = (8, 32)
    keep_list: tuple[int, ...] | None = None
    weights: str | None = None
    rates: int = 10
    state: int = 0
    rope: bool = True

    @property
    def needs(self) -> tuple[str, ...]:
        return ("attention_row" if self.rope else "plain_row",)

    @property
    def layers(self) -> tuple[int, ...]:
        return (self.layer,)

    @property
    def buckets(self) -> tuple[tuple[int, int], ...]:
        assert self.keep_list is not None
        return tuple(zip(self.step_list, self.keep_list, strict=True))

    @property
    def predicts(self) -> bool:
        return self.weights is not None

    def fit(self, site: Site) -> DyRate:
        self.check()
        if not 1 <= self.layer < site.depth:
            raise ReductionError(
                f"`layer` must be in 1..{site.depth - 1}, as the model has {site.depth} decoder layers and the attention comes "
                f"from the layer before; found {self.layer}"
            )
        ratio = 0.5 if self.keep is None and self.keep_ratio is None else self.keep_ratio
        keep = keep_count(self.keep, ratio, site.total, what="visual tokens in the language model")
        steps, counts = self.step_list, self.keep_list
        if counts is None:
            counts = tuple(max(1, keep >> (i + 1)) for i in range(len(steps)))
        if len(steps) != len(counts) or list(steps) != sorted({*steps}) or (steps and steps[0] < 1):
            raise ReductionError(
                f"`step_list` must ascend from 1 on, one step for each of {len(counts)} counts; found {'+'.join(map(str, steps))}"
            )
        if list(counts) != sorted(counts, reverse=True) or not all(1 <= count <= keep for count in counts):
            raise ReductionError(f"`keep_list` must descend within 1..{keep}; found {'+'.join(map(str, counts))}")
        if self.rates < 2 or self.state < 0:
            raise ReductionError(f"`rates` must be 2 or more, `state` 0 or more; found {self.rates} and {self.state}")
        if self.state and self.weights is None:
            raise ReductionError("`state` is the width of a trained GRU: it needs `weights`")
        fitted = replace(self, keep=keep, keep_ratio=None, keep_list=counts, position=self.resolved_position(site))
        fitted.require(site)
        return fitted

    def after(self, site: Site) -> Site:
        assert self.keep is not None
        return replace(site, tokens=self.keep, frames=1, grid=None)

    def kept(self, layer: int) -> int:
        assert self.keep is not None
        return self.keep

    def trained(self, site: Site) -> dict[str, tuple[int, ...]]:
        if self.weights is None:
            return {}
        if not self.state:
            return {"weight": (GROUPS, self.rates), "bias": (self.rates,)}
        gates = dict.fromkeys(("reset", "update", "candidate"), (GROUPS + self.state, self.state))
        biases = {f"{name}_bias": (self.state,) for name in gates}
        return {**gates, **biases, "weight": (self.state, self.rates), "bias": (self.rates,)}

    def forward(self, layer: int, signals: Signals) -> Reduced:
        assert self.keep is not None
        index = self.shorten(signals[self.needs[0]], self.keep)
        return Reduced(take(signals["hidden"], index), index)

    def shorten(self, attention_row: Tensor, keep: int) -> Tensor:
        return select(snap(attention_row, 1 / attention_row.shape[-1]), keep)

    def wanted(self, signals: Signals, visual: int) -> tuple[Tensor, Tensor | None]:
        logits, state = self.predict(signals)
        counts = torch.tensor([visual - rate * visual // self.rates for rate in range(self.rates)])
        return torch.index_select(counts, 0, first(snap(logits))), state

    def predict(self, signals: Signals) -> tuple[Tensor, Tensor | None]:
        """Logits of the rates [batch, K], and the GRU's new state [batch, state]."""
        seen, state = signals["shares"], None
        if self.state:
            before = signals["state"]
            both = torch.cat([seen, before], -1)
            reset, update = (
                torch.sigmoid(both @ signals[gate] + signals[f"{gate}_bias"]) for gate in ("reset", "update")
            )
            fresh = torch.cat([seen, reset * before], -1) @ signals["candidate"] + signals["candidate_bias"]
            seen = state = update * before + (1 - update) * torch.tanh(fresh)
        return seen @ signals["weight"] + signals["bias"], state


METHOD = DyRate
