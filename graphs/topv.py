"""Keep the visual tokens that an optimal transport through a layer moves most mass to, and an even part of the rest.

hidden, previous [batch, tokens, dim] → tokens [batch, keep, dim] in raster order; index int64 [batch, keep].

1. *Cost* of moving visual token i, as it entered layer `layer - 1` (source), to visual token j, as it left it (target):
   α · ‖x_i - y_j‖ + β · (1 - exp(-d² / 2σ²)) + γ · c, where x and y have unit length, d is how far the two are
   apart in the raster of a frame, and c how far j is from its centre, in tokens.
2. *Transport plan* by three Sinkhorn iterations with regularization ε: every source has the same mass to give and every
   target the same to take. In turn the rows of exp(-cost / ε) are scaled to what sources give and the columns to what
   targets take; the third iteration ends with the rows.
3. A token's *importance* is what it takes as a target then: the sum of its column. The most important ones stay, of
   equal ones the earlier.
4. *Recovery*: every `recovery`-th of the others, in raster order from the first, stays too.

Source: Yang et al. 2025, "TopV: Compatible Token Pruning with Inference Time Optimization for Fast and Low-Memory
Multimodal Vision Language Model", CVPR 2025, arXiv:2503.18278.
Knobs:
    layer: before which tokens are dropped, 0-based. By default 2 of 32, at the same part of the depth.
    keep: visual tokens left, recovered ones among them, over all frames. keep_ratio: 0.5 if neither is given.
    alpha, beta, gamma, sigma, epsilon: as above.
    recovery: 0 brings none back. By default 4, or the least number above it that leaves importance at least half of
        `keep`.
    raster: rows and columns of a frame, as 24+24; by default the site's.
Differs: no code was published; the five constants and 4 are those of a reimplementation. Its targets are what the norm
behind a layer's attention gives out; here they are what the layer gives out. Unit lengths are ours: they let one ε do
for any model. The rows and the columns of a finished plan have the sums they were given, whatever the cost, so its sums
tell nothing; what we read is the demand that is left unbalanced when only the last scaling, of the columns, is still
missing. Tokens of different frames are as far apart as their places in the raster.
Position: *keep*: kept tokens keep their ids, holes stay.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from graphs._blocks import SNAP, TINY, ascending, complement, normalize, pick, select, snap, take
from graphs._contract import Reduced, ReductionError, Signals, Site, Tier
from graphs._groups import raster_of
from graphs._layers import AtLayer
from graphs._torch import torch

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLES = ("topv", "topv:keep=64,layer=3", "topv:keep_ratio=0.6,recovery=2,sigma=3,epsilon=0.2,gamma=0.05")

ITERATIONS = 3
SPREAD = 1 / 8
"""The scale on which demands differ from 1."""


@dataclass(frozen=True)
class TopV(AtLayer):
    """Keep what an optimal transport through a layer asks for."""

    paper: ClassVar[str] = "Yang et al. 2025, arXiv:2503.18278"
    tier: ClassVar[Tier] = "fixed budget"
    paper_layer: ClassVar[int] = 2
    paper_ratio: ClassVar[float] = 0.5

    alpha: float = 1.0
    beta: float = 1.0
    gamma: float = 0.01
    sigma: float = 10.0
    epsilon: float = 0.1
    recovery: int | None = None
    raster: tuple[int, ...] | None = None

    @property
    def needs(self) -> tuple[str, ...]:
        return ("previous",)

    def fit(self, site: Site) -> TopV:
        known = AtLayer.fit(self, site)
        assert known.keep is not None
        if min(self.alpha, self.beta, self.gamma) < 0 or min(self.sigma, self.epsilon) <= 0:
            raise ReductionError(
                f"`alpha`, `beta` and `gamma` are at least 0, `sigma` and `epsilon` above; found "
                f"{self.alpha:g}, {self.beta:g}, {self.gamma:g}, {self.sigma:g} and {self.epsilon:g}"
            )
        recovery = self.recovery
        if recovery is None:
            enough = (i for i in range(4, site.total) if 2 * important(site.total, known.keep, i) >= known.keep)
            recovery = next(enough, 0)
        if recovery < 0 or important(site.total, known.keep, recovery) < 1:
            raise ReductionError(
                f"`recovery` must be 0, or so large that every so-manieth of {site.total} tokens are fewer than "
                f"`keep` = {known.keep}; found {recovery}"
            )
        return replace(known, recovery=recovery, raster=raster_of(site, self.raster))

    def forward(self, layer: int, signals: Signals) -> Reduced:
        assert self.keep is not None and self.recovery is not None
        hidden = signals["hidden"]
        n = hidden.shape[1]
        chosen = important(n, self.keep, self.recovery)
        index = select(snap(demand(self._cost(signals["previous"], hidden) / self.epsilon), SPREAD), chosen)
        if chosen < self.keep:
            back = pick(complement(index, n), list(range(0, n - chosen, self.recovery)))
            index = ascending(torch.cat([index, back], 1))
        return Reduced(take(hidden, index), index)

    def _cost(self, source: Tensor, target: Tensor) -> Tensor:
        """float32 [batch, tokens, tokens], rows are sources."""
        assert self.raster is not None
        rows, cols = self.raster
        n = source.shape[1]
        near = snap(normalize(source) @ normalize(target).transpose(1, 2)) / SNAP
        apart = (2 - 2 * near).clamp(min=0).sqrt()
        place = torch.arange(n)
        y, x = ((place // cols) % rows).float(), (place % cols).float()
        away = (y[:, None] - y).pow(2) + (x[:, None] - x).pow(2)
        centre = ((y - (rows - 1) / 2).pow(2) + (x - (cols - 1) / 2).pow(2)).sqrt()
        fixed = self.beta * (1 - torch.exp(-away / (2 * self.sigma**2))) + self.gamma * centre
        return self.alpha * apart + fixed


def demand(cost: Tensor) -> Tensor:
    """float32 [batch, n]: what every target takes from sources of mass 1, before the columns are scaled for the third
    time. cost: [batch, n, n], in units of the regularization."""
    kernel = torch.exp(cost.amin(-1, keepdim=True) - cost)  # rows are scaled anyway
    column = torch.ones_like(cost[:, :1])
    for _ in range(ITERATIONS):
        plan = kernel * column
        plan = plan / plan.sum(-1, keepdim=True).clamp(min=TINY)
        taken = plan.sum(1, keepdim=True)
        column = column / taken.clamp(min=TINY)
    return taken.squeeze(1)


def important(n: int, keep: int, recovery: int) -> int:
    """How many tokens importance chooses, so that with every `recovery`-th of the others `keep` stay.

    >>> important(576, 288, 4), important(576, 288, 0), important(576, 144, 4)
    (192, 288, 0)
    """
    if not recovery:
        return keep
    return max((t for t in range(keep + 1) if t + math.ceil((n - t) / recovery) <= keep), default=-1)


METHOD = TopV
