"""Wrap a selector: merge what it drops, keep the positions, and let attention count what was merged.

Written `restore:keep=64+SELECTOR`: the selector, given without a count, chooses `share` of the tokens of every frame;
the others become anchors into which everything dropped is merged. tokens [batch, frames · keep, dim], frame by frame in
raster order; index int64 [batch, frames · keep], of a merged token its middle member; size float32.

1. The selector keeps round(share · keep) tokens, unchanged.
2. *Distinctive anchors* among the n dropped ones: density ρ_i = Σ_j cos(x_i, x_j); distinctness
   δ_i = 1 - max{cos(x_i, x_j) : ρ_j > ρ_i}, 1 for the densest; the largest ρ_i · δ_i are anchors.
3. Every other dropped token joins the anchor it resembles most (cosine); an anchor becomes the mean of its group. With
   share = 1 there are no anchors, and what is dropped joins the kept tokens.
4. A merged token stands where the middle of its members (the lower one of two) stood.
5. In all layers of the language model, log(size) is added to a visual token's attention logits, so that a merged token
   draws the attention of all its parts; in the steps of generation too.

Source: Cho et al. 2026, "Improving Visual Token Reduction via Rectifying Distortions for Efficient Multimodal LLM
Inference" (RESTORE), ICML 2026, arXiv:2606.01711.
Knobs:
    selector: the method behind the +, one that treats frames alone and only selects.
    keep / keep_ratio: tokens per frame, selected and merged together.
    share: of them, what the selector chooses; the official code's 0.5.
    attention: whether attention counts sizes (5). Off leaves a merge like any other, with plain attention.
Differs: the official code also adds a bias log(2 - mean_f cos(f · distance)) to all pairs of the prompt, and gives
visual tokens their mean size in the first layer; both are left out: one mask then serves prefill, cached decoding and
chunks alike. It compares tokens behind the projector; we do where the selector works. Equal densities and equal scores
go to the earlier token.
Position: *keep*, it is half of the method.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, ClassVar

from graphs._blocks import ascending, complement, first, normalize, one_hot, rank, select, snap, take
from graphs._contract import BeforeLLM, PerFrame, Reduced, ReductionError, Signals, Site, Space, Tier
from graphs._merge import around, mean
from graphs._torch import torch

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLES = ("restore:keep=64+divprune", "restore:keep_ratio=0.25,share=1+visionzip:contextual=0,cls=off")

SWEEP = "restore:keep_ratio={ratio}+divprune"


@dataclass(frozen=True)
class Restore(PerFrame):
    """Merge what a selector drops, and let attention count it."""

    paper: ClassVar[str] = "Cho et al. 2026, arXiv:2606.01711"
    tier: ClassVar[Tier] = "exact"

    share: float = 0.5
    attention: bool = True
    selector: BeforeLLM = field(kw_only=True)

    @property
    def needs(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(("hidden", *self.selector.needs)))

    @property
    def space(self) -> Space:
        return self.selector.space

    @property
    def merges(self) -> bool:
        return True

    @property
    def sized(self) -> bool:
        return self.attention

    def fit(self, site: Site) -> Restore:
        known = super().fit(site)
        assert known.keep is not None
        if not 0 < self.share <= 1:
            raise ReductionError(f"`share` is what the selector chooses, in (0, 1]; found {self.share:g}")
        if not isinstance(self.selector, PerFrame):
            raise ReductionError("`selector` has to be a method that treats every frame alone, such as divprune")
        chosen = max(1, min(known.keep, int(self.share * known.keep + 0.5)))
        if {"keep", "keep_ratio"} - {f.name for f in fields(self.selector)}:
            raise ReductionError("`selector` has to be a method that takes `keep`")
        given = self.selector.keep
        if self.selector.keep_ratio is not None or given not in (None, chosen):
            raise ReductionError(f"give the count to restore, not to its selector: restore:keep={known.keep}+…")
        try:
            selector = replace(self.selector, keep=chosen).fit(site)
        except ReductionError as e:
            raise ReductionError(f"its selector does not fit: {e}") from e
        if selector.merges or selector.passes_cls:
            raise ReductionError("`selector` may only select patches; as given it merges tokens or passes CLS on")
        return replace(known, selector=selector)

    def reduce_frame(self, signals: Signals) -> Reduced:
        assert isinstance(self.selector, PerFrame) and self.keep is not None and self.selector.keep is not None
        hidden, anchors = signals["hidden"], self.keep - self.selector.keep
        n = hidden.shape[1]
        chosen = ascending(self.selector.reduce_frame({name: signals[name] for name in self.selector.needs}).index)
        if anchors:
            dropped = complement(chosen, n)
            rest = take(hidden, dropped)
            merged = around(rest, select(_distinctive(rest), anchors)) @ one_hot(dropped, n, torch.float32)
            member = torch.cat([one_hot(chosen, n, torch.float32), merged], 1)
        else:
            member = around(hidden, chosen)
        middle = _middle(member)
        order = rank(middle, self.keep, largest=False)
        tokens, size = mean(take(member, order), hidden)
        return Reduced(tokens.to(hidden.dtype), take(middle, order), size)


def _distinctive(x: Tensor) -> Tensor:
    """Snapped [batch, n]: density times distinctness. x: [batch, n, dim]."""
    unit, n = normalize(x), x.shape[1]
    cosine = unit @ unit.transpose(-1, -2)
    density = snap(cosine.sum(-1), n)
    denser = density.unsqueeze(-2) > density.unsqueeze(-1)  # [batch, i, j]: j is denser than i
    closest = torch.where(denser, snap(cosine), -4096.0).amax(-1)
    distinct = torch.where(denser.to(torch.float32).sum(-1) > 0, 4096.0 - closest, 4096.0)
    return snap(density * distinct, 4096.0**2)


def _middle(member: Tensor) -> Tensor:
    """int64 [batch, groups]: the middle member of every group, the lower one of two. member: 0/1 [batch, groups, n]."""
    n = member.shape[-1]
    upto = (torch.arange(n)[:, None] <= torch.arange(n)).to(torch.float32)
    count = member @ upto
    half = torch.floor((member.sum(-1, keepdim=True) + 1) / 2)
    return first(member * (count == half).to(torch.float32))


METHOD = Restore
