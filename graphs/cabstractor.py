"""Project with Honeybee's C-Abstractor: convolutions, a mean over a square raster of fixed size, convolutions.

hidden [batch, frames, tokens, dim] → tokens [batch, frames, queries + eos, llm_dim].

1. Learned positions are added.
2. A stage of RegNet blocks (1 × 1, depthwise 3 × 3, squeeze and excitation, 1 × 1; SiLU; norms over the channels).
3. The mean over √queries × √queries cells, spread evenly, and overlapping where a side is not divided.
4. A second stage, then Linear, SiLU, Linear.
5. Learned vectors behind, where there are any.

Source: Cha et al. 2023, "Honeybee: Locality-enhanced Projector for Multimodal LLM", arXiv:2312.06742.
Knobs:
    queries: num_query_tokens, a square number (published: 144 for 7B, 256 for 13B).
    depth: blocks of a stage; width: hidden_size of the blocks.
    eos: num_eos_tokens, learned vectors behind.
    cls_position: the published checkpoints have a position for CLS in front, which is not used; those trained with the
        authors' later code have none: cls_position=false.
    weights: the published checkpoint, or its tensors `abstractor.…` alone.
Differs: which block of the tower is read is the model's; the paper's is the last.
Position: one each, as if the tower had given so many; with `eos` the tokens lie in no raster.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from graphs._compressor import (
    PerFrameCompressor,
    Shapes,
    linear,
    linear_shapes,
    raster,
    regnet,
    regnet_shapes,
)
from graphs._contract import ReductionError, Signals, Site
from graphs._pool import average, pool
from graphs._torch import torch

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLES = ("cabstractor:width=16,depth=1", "cabstractor:width=16,depth=2,queries=16,eos=2")
SWEEP = "cabstractor:width=64,depth=2,queries=16"


@dataclass(frozen=True)
class CAbstractor(PerFrameCompressor):
    """Honeybee's projector."""

    paper: ClassVar[str] = "Cha et al. 2023, arXiv:2312.06742"
    prefixes: ClassVar[tuple[str, ...]] = ("", "abstractor.")

    queries: int = 144
    depth: int = 3
    width: int = 1024
    eos: int = 0
    cls_position: bool = True

    @property
    def side(self) -> int:
        return math.isqrt(self.queries)

    def fitted(self, site: Site) -> CAbstractor:
        if self.queries < 1 or self.side**2 != self.queries:
            raise ReductionError(f"`queries` must be a square number; found {self.queries}")
        for knob, least in (("depth", 1), ("width", 4), ("eos", 0)):
            if getattr(self, knob) < least:
                raise ReductionError(f"`{knob}` must be at least {least}; found {getattr(self, knob)}")
        if min(raster(site)) < self.side:
            rows, cols = raster(site)
            raise ReductionError(f"`queries` = {self.queries} need {self.side} rows and columns; found {rows} × {cols}")
        return self

    def shape(self, site: Site) -> tuple[int, int] | int:
        return self.queries + self.eos if self.eos else (self.side, self.side)

    def trained(self, site: Site) -> Shapes:
        return {
            **({"eos_tokens": (1, self.eos, site.llm_dim)} if self.eos else {}),
            "pos_emb": (1, site.tokens + self.cls_position, site.dim),
            **regnet_shapes("net.0", site.dim, self.width, self.depth),
            **regnet_shapes("net.2", self.width, self.width, self.depth),
            **linear_shapes("readout.0", self.width, site.llm_dim),
            **linear_shapes("readout.2", site.llm_dim, site.llm_dim),
        }

    def compress(self, signals: Signals, site: Site) -> Tensor:
        grid, coarse = raster(site), (self.side, self.side)
        x = signals["hidden"] + signals["pos_emb"][:, int(self.cls_position) :]
        x = regnet(signals, "net.0", self.depth, x, grid)
        x = regnet(signals, "net.2", self.depth, pool(average(grid, coarse), x), coarse)
        x = linear(signals, "readout.2", torch.nn.functional.silu(linear(signals, "readout.0", x)))
        if self.eos:
            x = torch.cat([x, signals["eos_tokens"].expand(x.shape[0], -1, -1)], 1)
        return x


METHOD = CAbstractor
