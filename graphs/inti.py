"""Blend neighbouring frames place by place, so that their number halves.

hidden [batch, frames, P, dim] → tokens [batch, slots · P, dim], slot by slot, each in raster order; index int64
[batch, slots · P] of the slot's first frame; size float32 [batch, slots · P], the frames it stands for.

In each of `stages` stages, frames 1 and 2, 3 and 4, … become one; a last frame without a partner passes on as it is:
1. A small trained network gives every token a score from what it sees at three scales: the token, the mean of its 3 ×
   3 neighbourhood (inside the frame), and the mean of the frame, each times a column of `score_<stage>` [dim, 3],
   summed.
2. At every place the softmax over the two scores weighs the two tokens; their weighted sum is the new token.

Source: Zhang et al. 2024, "Dynamic and Compressive Adaptation of Transformers From Images to Videos" (InTI), ECCV
2024, arXiv:2408.06840.
Knobs:
    stages: how often the frames halve; 1 if nothing is given.
    keep / keep_ratio: tokens over the whole clip instead; whole frames only.
    weights: safetensors file with the trained `score_0` … ; without it all scores are equal, and a slot is the plain
        mean of its two frames.
    rows: rows of the grid, by default the site's; read where there are weights.
Differs: no code was published, and this follows the paper's summary of itself. The paper halves between blocks of an
image tower that is being adapted to video, here it happens behind the tower; its weight network is described as light
and multi-scale without all sizes, here it is one linear map. An odd number of frames is allowed. Blending is
accumulated in float32, then cast back.
Position: *compact*, as a slot mixes frames; *keep* on t/h/w grids.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from graphs._blocks import spread
from graphs._clip import rate, require_frames
from graphs._contract import OF_PROMPT, PerClip, Reduced, ReductionError, Signals, Site, Tier
from graphs._groups import rows_of
from graphs._torch import torch

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLES = ("inti", "inti:keep_ratio=0.25")


@dataclass(frozen=True)
class InTI(PerClip):
    """Halve the number of frames by blending neighbours."""

    paper: ClassVar[str] = "Zhang et al. 2024, arXiv:2408.06840"
    tier: ClassVar[Tier] = "trained"
    paper_position: ClassVar[Literal["keep", "compact"]] = "compact"

    stages: int | None = None
    weights: str | None = None
    rows: int | None = None

    @property
    def needs(self) -> tuple[str, ...]:
        return ("hidden",)

    @property
    def merges(self) -> bool:
        return True

    def fit(self, site: Site) -> InTI:
        self.check()
        require_frames(site)
        most = (site.frames - 1).bit_length()
        counts = {n: -(-site.frames // 2**n) * site.tokens for n in range(most + 1)}
        stages = rate("stages", self.stages, self.keep, self.keep_ratio, counts, site.total, default=1)
        rows = self.rows
        if self.weights is not None:
            rows = rows_of(site, rows)
            if not site.dim:
                raise ReductionError("`weights` need the width of the tokens, which this model does not tell")
        return PerClip.fit(replace(self, stages=stages, rows=rows, keep=counts[stages], keep_ratio=None), site)

    def trained(self, site: Site) -> dict[str, tuple[int, ...]]:
        assert self.stages is not None
        return {} if self.weights is None else {f"score_{i}": (site.dim, 3) for i in range(self.stages)}

    def after(self, site: Site) -> Site:
        assert self.stages is not None
        frames = -(-site.frames // 2**self.stages)
        return replace(site, frames=frames, signals=site.signals & {"hidden", *OF_PROMPT})

    def forward(self, signals: Signals) -> Reduced:
        assert self.stages is not None
        hidden = signals["hidden"]
        frames, patches = hidden.shape[1:3]
        x = hidden.float()
        for stage in range(self.stages):
            weight = signals[f"score_{stage}"] if self.weights is not None else None
            x = self._halve(x, weight)
        step = 2**self.stages
        heads = list(range(0, frames, step))
        index = [f * patches + p for f in heads for p in range(patches)]
        size = torch.tensor([min(step, frames - f) for f in heads for _ in range(patches)], dtype=torch.float32)
        tokens = x.flatten(1, 2).to(hidden.dtype)
        return Reduced(tokens, spread(index, hidden), size.expand(hidden.shape[0], -1))

    def _halve(self, x: Tensor, weight: Tensor | None) -> Tensor:
        """float32 [batch, frames, P, dim] → [batch, ⌈frames / 2⌉, P, dim]."""
        pairs = x.shape[1] // 2
        first, second = x[:, : 2 * pairs : 2], x[:, 1::2]
        if weight is None:
            blended = (first + second) / 2
        else:
            score = self._score(x, weight)
            share = torch.sigmoid(score[:, : 2 * pairs : 2] - score[:, 1::2])
            blended = share * first + (1 - share) * second
        return torch.cat([blended, x[:, 2 * pairs :]], 1)

    def _score(self, x: Tensor, weight: Tensor) -> Tensor:
        """float32 [batch, frames, P, 1]. Means and products are linear: the products come first, as they are small."""
        assert self.rows is not None
        own, near, far = (x @ weight.float()).split(1, -1)
        columns = x.shape[2] // self.rows
        near = near.unflatten(2, (self.rows, columns)).squeeze(-1)
        near = _window(self.rows) @ near @ _window(columns).T
        score: Tensor = own + near.flatten(2).unsqueeze(-1) + far.mean(2, keepdim=True)
        return score


def _window(n: int) -> Tensor:
    """float32 [n, n]: row i averages i - 1, i and i + 1, as far as they exist."""
    rows = [[float(abs(i - j) <= 1) for j in range(n)] for i in range(n)]
    return torch.tensor([[v / sum(row) for v in row] for row in rows], dtype=torch.float32)


METHOD = InTI
