"""From the middle of the tower on, let redundant patches flow into the few they attend to most.

hidden [batch, frames, tokens, dim], attention [batch, frames, tokens, tokens] (mean over heads), cls_attention and
size [batch, frames, tokens] → tokens [batch, frames, tokens - r, dim] in raster order, CLS in front; index int64 and
size accordingly.

Between attention and MLP of block l, on the patches:
1. *Filter*: a patch scores β · its attention from CLS - (1 - β) · its mean attention to the patches, both divided by
   their length over all patches. In every run of four patches the lowest one (the earlier among equals) is pushed
   down further: halved if positive, else doubled; so what goes is spread out. The r_l lowest scores go, the
   earlier among equals.
2. *Correlate*: each of them has as targets the t patches that stay and that it attends to most, the earlier among
   equals; t is the part of all tokens above the quantile.
3. *Compress*: its weights w on its targets are a softmax of its attention to them, to 1/256; the first target
   takes the rest to 1. A target becomes (x + Σ w · x of those that go) / (1 + Σ w). Sizes move with the weights, so
   they are no whole numbers.

Source: Han et al. 2024, "Filter, Correlate, Compress: Training-Free Token Reduction for MLLM Acceleration",
arXiv:2411.17686 (its V variant, inside the vision tower).
Knobs:
    keep / keep_ratio: patches per frame that leave the tower (CLS not counted).
    schedule: the paper's r (42 in its example), one number per tower block joined by + (then `keep` follows). By
        default equal from the authors' block 12 of 0..22 on, or its counterpart in a tower of another depth.
    beta: the weight of CLS in the filter. quantile: how much of the attention is below the targets.
Differs: the official number of targets depends on the image, and they may be patches that go, or CLS; here t is
fixed and targets are patches that stay. Its 2×2 windows are tracked in a buffer that outlives the image and no
longer knows the places after the first block; here windows are runs of four of the patches present. It returns
tokens by ascending score with CLS among them, and shifts the indices of some targets; here tokens stay in raster
order. As there, sizes count neither in the mean nor in the attention of later blocks. The mean is accumulated in
float32.
Position: *compact*, because merged tokens have no one place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from graphs._blocks import ascending, first, normalize, rank, snap
from graphs._contract import Reduced, ReductionError, Signals, Site, Tier
from graphs._recycle import recycled, target_count
from graphs._torch import torch
from graphs._tower import Scheduled, at, with_cls

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLES = ("ficoco:keep=144", "ficoco:keep_ratio=0.25,quantile=0.9,beta=0.5", "ficoco:schedule=0+0+30+0+7+1")

WINDOW = 4


@dataclass(frozen=True)
class FiCoCo(Scheduled):
    """Filter by attention, correlate by attention, compress by weighted means."""

    paper: ClassVar[str] = "Han et al. 2024, arXiv:2411.17686"
    tier: ClassVar[Tier] = "fixed budget"

    beta: float = 0.35
    quantile: float = 0.998

    @property
    def needs(self) -> tuple[str, ...]:
        return ("hidden", "attention", "cls_attention")

    def places(self, site: Site) -> range:
        return range(at(site, 12 / 22), site.depth)

    def fit(self, site: Site) -> FiCoCo:
        known = Scheduled.fit(self, site)
        if not (0 <= self.beta <= 1 and 0 <= self.quantile <= 1):
            raise ReductionError(f"`beta` and `quantile` are in 0..1; found {self.beta:g} and {self.quantile:g}")
        return known

    @property
    def merges(self) -> bool:
        return True

    @property
    def proportional(self) -> bool:
        return False

    def reduce_frame(self, block: int, signals: Signals, cls_tokens: int) -> Reduced:
        hidden, size = signals["hidden"][:, cls_tokens:], signals["size"][:, cls_tokens:]
        attention = signals["attention"][:, cls_tokens:, cls_tokens:].float()
        n, r = hidden.shape[1], self.removes(block)
        seen, sees = normalize(signals["cls_attention"][:, cls_tokens:]), normalize(attention.mean(-1))
        score = penalized(snap(self.beta * seen - (1 - self.beta) * sees, n**-0.5))
        goes = ascending(rank(score, r, largest=False))
        out = recycled(hidden, size, attention, goes, target_count(self.quantile, n + cls_tokens))
        assert out.size is not None
        tokens = torch.cat([signals["hidden"][:, :cls_tokens], out.tokens], 1)
        grown = torch.cat([signals["size"][:, :cls_tokens], out.size], 1)
        return Reduced(tokens, with_cls(out.index, cls_tokens), grown)


def penalized(score: Tensor) -> Tensor:
    """Whole-number scores [batch, n] with the lowest of every run of four pushed down; a shorter last run is not."""
    whole = score.shape[1] // WINDOW * WINDOW
    if not whole:
        return score
    runs = score[:, :whole].unflatten(1, (-1, WINDOW))
    lowest = first(runs, largest=False).unsqueeze(-1) == torch.arange(WINDOW)
    pushed = torch.where(runs > 0, runs / 2, runs * 2)
    return torch.cat([torch.where(lowest, pushed, runs).flatten(1), score[:, whole:]], 1)


METHOD = FiCoCo
