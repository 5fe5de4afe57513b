"""Average runs of neighbouring visual tokens inside the language model.

hidden [batch, tokens, dim] → tokens [batch, keep, dim]; index int64 [batch, keep]; size float32 [batch, keep].

Before decoder layer `layer` the visual tokens, in raster order, are cut into `keep` runs of equal length, or nearly so
where they do not divide: run i begins at ⌊i · tokens / keep⌋. Each run becomes its plain mean, at the place of its
middle token (of two, the first).

Source: Chen et al. 2024, "Efficient Large Multi-modal Models via Visual Context Compression", arXiv:2406.20092.
Knobs:
    layer: 0-based. By default the 2 of 32 of its heavy compression, at the same part of the depth; 16 in the light one.
    stride: tokens in a run, the paper's way to say what `keep` says; 8 if nothing is given.
    keep: visual tokens left, over all frames. keep_ratio: their share.
Differs: the paper compresses while the model is trained, less and less; its released four-stage model runs without. It
works best on models trained with it. Where the stride does not divide the tokens the paper drops the last ones, here
they lengthen some runs. The mean is accumulated in float32, then cast back; later layers do not count sizes.
Position: *keep*: a run has its middle token's id, which is the paper's mean of its ids, rounded down.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar

from graphs._blocks import spread
from graphs._contract import Reduced, ReductionError, Signals, Site, Tier
from graphs._layers import WHAT, AtLayer
from graphs._merge import mean
from graphs._torch import torch

EXAMPLES = ("llavolta", "llavolta:layer=3,keep=100", "llavolta:stride=4")


@dataclass(frozen=True)
class Llavolta(AtLayer):
    """Average pooling along the sequence of visual tokens."""

    paper: ClassVar[str] = "Chen et al. 2024, arXiv:2406.20092"
    tier: ClassVar[Tier] = "exact"
    paper_layer: ClassVar[int] = 2

    stride: int | None = None

    @property
    def needs(self) -> tuple[str, ...]:
        return ("hidden",)

    @property
    def merges(self) -> bool:
        return True

    def fit(self, site: Site) -> Llavolta:
        self.check()
        if self.keep is not None or self.keep_ratio is not None:
            if self.stride is not None:
                raise ReductionError(f"`stride` = {self.stride} says how many tokens stay; leave out `keep`")
            return AtLayer.fit(self, site)
        stride = 8 if self.stride is None else self.stride
        if not 1 <= stride <= site.total:
            raise ReductionError(
                f"`stride` must be in 1..{site.total}, as there are {site.total} {WHAT}; found {stride}"
            )
        return AtLayer.fit(replace(self, keep=site.total // stride, stride=None), site)

    def forward(self, layer: int, signals: Signals) -> Reduced:
        hidden, n, runs = signals["hidden"], signals["hidden"].shape[1], self.kept(layer)
        starts = [i * n // runs for i in range(runs + 1)]
        place = torch.arange(n)
        first, end = torch.tensor(starts[:-1]).unsqueeze(-1), torch.tensor(starts[1:]).unsqueeze(-1)
        member = ((place >= first) & (place < end)).to(torch.float32)
        tokens, _ = mean(member, hidden)
        index = spread([(a + b - 1) // 2 for a, b in pairwise(starts)], hidden)
        return Reduced(tokens.to(hidden.dtype), index, (member @ signals["size"].unsqueeze(-1)).squeeze(-1))


METHOD = Llavolta
