"""Layer by layer, let redundant visual tokens flow into the few they correlate with, inside the language model.

hidden [batch, tokens, dim], visual_attention [batch, tokens, tokens], text_attention [batch, text, tokens],
instruction_mask [batch, text] → tokens [batch, tokens - r, dim] in raster order; index int64 and size float32
accordingly.

Before each of the layers from `layer` on, with the attention of the layer before (mean over heads):
1. *Filter*: a token is redundant by β · (the mean attention visual tokens pay it) - (1 - β) · (the mean attention the
   text behind the image pays it). The r most redundant go, the earlier among equals.
2. *Correlate*: two tokens correlate by γ · (the attention between them, in the direction that causality allows)
   + (1 - γ) · Σ over the text behind the image of (attention to one · attention to the other).
   Targets of a token that goes are the t tokens that stay and that it correlates with most, the earlier among equals; t
   is the part of all visual tokens above the quantile.
3. *Compress*: as `ficoco` does: its weights w on its targets are a softmax of the correlations, to 1/256; the first
   target takes the rest to 1. A target becomes (x + Σ w · x of those that go) / (1 + Σ w). Sizes move with the weights,
   so they are no whole numbers.

Source: Han et al. 2024, "Filter, Correlate, Compress: Training-Free Token Reduction for MLLM Acceleration",
arXiv:2411.17686 (its L variant, inside the language model).
Knobs:
    layer: the first before which tokens go, 0-based. By default the authors' 4 of 32, at the same part of the depth.
    keep: visual tokens left behind the last layer, over all frames; in each layer equally many go, what does not divide
        in the first ones. keep_ratio: 0.25 if neither is given.
    schedule: instead of these three, how many go before every decoder layer, joined by +; the first is 0.
    beta, gamma: as above. quantile: how much of the correlations is below the targets.
    rope: off takes all attention from queries and keys that are not rotated.
Differs: the official number of targets depends on the image, and they may be tokens that go; here t is fixed and
targets stay. Its filter takes the sum over visual tokens and the mean over text, which leaves text no say; here both
are means. It does not say which of two tokens pays the attention, and under causality one never sees
the other; here both directions are added up. It adds what flows into a target without dividing; here it is the weighted
mean. The default of `keep` is ours. Every layer that removes tokens has its own cache length.
Position: *keep*: a merged token keeps the id of its target, holes stay.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from graphs._blocks import ascending, rank, snap
from graphs._contract import InLLM, Reduced, ReductionError, Signals, Site, Tier, keep_count
from graphs._layers import WHAT, layers_of
from graphs._recycle import recycled, target_count
from graphs._tower import plan

EXAMPLES = (
    "ficoco_l",
    "ficoco_l:keep=144,layer=3,beta=0.5,quantile=0.99",
    "ficoco_l:schedule=0+0+0+300+0+7+0+1,gamma=1",
)

RATIO = 0.25


@dataclass(frozen=True)
class FiCoCoL(InLLM):
    """Filter and correlate by attention among visual tokens and from the text, compress by weighted means."""

    paper: ClassVar[str] = "Han et al. 2024, arXiv:2411.17686"
    tier: ClassVar[Tier] = "fixed budget"

    layer: int | None = None
    keep: int | None = None
    keep_ratio: float | None = None
    schedule: tuple[int, ...] | None = None
    beta: float = 0.6
    gamma: float = 0.6
    quantile: float = 0.998
    rope: bool = True

    @property
    def needs(self) -> tuple[str, ...]:
        kind = "" if self.rope else "plain_"
        return (f"{kind}visual_attention", f"{kind}text_attention", "instruction_mask")

    @property
    def merges(self) -> bool:
        return True

    @property
    def layers(self) -> tuple[int, ...]:
        assert self.schedule is not None
        return tuple(layer for layer, r in enumerate(self.schedule) if r)

    def fit(self, site: Site) -> FiCoCoL:
        self.check()
        if not all(0 <= x <= 1 for x in (self.beta, self.gamma, self.quantile)):
            raise ReductionError(
                f"`beta`, `gamma` and `quantile` are in 0..1; found {self.beta:g}, {self.gamma:g} and {self.quantile:g}"
            )
        n = site.total
        if self.schedule is None:
            (start,) = layers_of(site, "layer", None if self.layer is None else (self.layer,), (4,))
            ratio = RATIO if self.keep is None and self.keep_ratio is None else self.keep_ratio
            keep = keep_count(self.keep, ratio, n, what=WHAT)
            schedule = plan(n, keep, range(start, site.depth), site.depth, halves=False)
        else:
            schedule, keep = self.schedule, n - sum(self.schedule)
            if len(schedule) != site.depth or schedule[0] or min(schedule) < 0 or keep < 1:
                raise ReductionError(
                    f"`schedule` takes one number for each of the {site.depth} decoder layers, the first one 0, "
                    f"together less than the {n} {WHAT}; found {'+'.join(map(str, schedule))}"
                )
            if self.keep_ratio is not None or self.keep not in (None, keep):
                given = f"`keep` = {self.keep}" if self.keep_ratio is None else f"`keep_ratio` = {self.keep_ratio:g}"
                raise ReductionError(f"this `schedule` keeps {keep} of {n} tokens; leave out {given}")
            first = next((layer for layer, r in enumerate(schedule) if r), site.depth)
            start = first if self.layer is None else self.layer
            if start > first:
                raise ReductionError(f"this `schedule` begins before layer {first}; leave out `layer` = {start}")
        position = self.resolved_position(site)
        fitted = replace(self, layer=start, keep=keep, keep_ratio=None, schedule=schedule, position=position)
        fitted.require(site)
        return fitted

    def after(self, site: Site) -> Site:
        assert self.keep is not None
        return replace(site, tokens=self.keep, frames=1, grid=None)

    def kept(self, layer: int) -> int:
        assert self.keep is not None and self.schedule is not None
        return self.keep + sum(self.schedule[layer + 1 :])

    def forward(self, layer: int, signals: Signals) -> Reduced:
        assert self.schedule is not None
        hidden = signals["hidden"]
        among, from_all, mask = (signals[name].float() for name in self.needs)
        asks = mask.unsqueeze(-1)
        asked = from_all * asks
        n = hidden.shape[1]
        from_text = asked.sum(1) / asks.sum(1).clamp(min=1)
        redundant = snap(self.beta * among.mean(1) - (1 - self.beta) * from_text, 1 / n)
        goes = ascending(rank(redundant, self.schedule[layer]))
        direct, shared = among + among.transpose(1, 2), asked.transpose(1, 2) @ asked
        correlation = self.gamma * direct + (1 - self.gamma) * shared
        return recycled(hidden, signals["size"], correlation, goes, target_count(self.quantile, n))


METHOD = FiCoCoL
