"""Project with Qwen-VL's resampler: learned queries, each with a place on the image, attend once to all tokens.

hidden [batch, frames, tokens, dim] → tokens [batch, frames, queries, llm_dim].

1. A linear layer to the language model's width, where the tower has another one, and a layer norm: x.
2. One multi-head attention: queries LN(query) + position, keys x + position, values x. The positions are those of the
   queries' square grid, resized to the raster of tokens (bicubic) for the keys.
3. Layer norm and a matrix.

Source: Bai et al. 2023, "Qwen-VL: A Versatile Vision-Language Model for Understanding, Localization, Text Reading, and
Beyond", arXiv:2308.12966.
Knobs:
    queries: tokens that leave a frame, a square number.
    heads: of the attention, by default one per 128 of the language model's width.
    weights: the published checkpoint, or its tensors `transformer.visual.…` alone.
Differs: the raster may be any rectangle, where the official code takes squares.
Position: one each, as if the tower had given so many; the tokens lie in no raster.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from graphs._compressor import (
    PerFrameCompressor,
    Shapes,
    heads_of,
    layer_norm,
    linear,
    linear_shapes,
    multihead,
    multihead_shapes,
    norm_shapes,
    raster,
)
from graphs._contract import ReductionError, Signals, Site
from graphs._pool import bicubic, pool

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLES = ("qwen_resampler", "qwen_resampler:queries=16")
SWEEP = "qwen_resampler:queries=16"
POOL = "attn_pool"
EPS = 1e-6


@dataclass(frozen=True)
class QwenResampler(PerFrameCompressor):
    """Qwen-VL's projector."""

    paper: ClassVar[str] = "Bai et al. 2023, arXiv:2308.12966"
    prefixes: ClassVar[tuple[str, ...]] = ("", "transformer.visual.")

    queries: int = 256
    heads: int | None = None

    @property
    def side(self) -> int:
        return math.isqrt(self.queries)

    def fitted(self, site: Site) -> QwenResampler:
        if self.queries < 1 or self.side**2 != self.queries:
            raise ReductionError(f"`queries` must be a square number, as they lie on a grid; found {self.queries}")
        raster(site)
        return replace(self, heads=heads_of(self.heads, site.llm_dim, 128))

    def shape(self, site: Site) -> int:
        return self.queries

    def trained(self, site: Site) -> Shapes:
        narrow = site.dim == site.llm_dim
        return {
            f"{POOL}.query": (self.queries, site.llm_dim),
            f"{POOL}.pos_embed": (self.queries, site.llm_dim),
            **({} if narrow else linear_shapes(f"{POOL}.kv_proj", site.dim, site.llm_dim, bias=False)),
            **multihead_shapes(f"{POOL}.attn", site.llm_dim),
            **norm_shapes(f"{POOL}.ln_q", site.llm_dim),
            **norm_shapes(f"{POOL}.ln_kv", site.llm_dim),
            **norm_shapes("ln_post", site.llm_dim),
            "proj": (site.llm_dim, site.llm_dim),
        }

    def compress(self, signals: Signals, site: Site) -> Tensor:
        assert self.heads is not None
        x, at = signals["hidden"], signals[f"{POOL}.pos_embed"]
        if f"{POOL}.kv_proj.weight" in signals:
            x = linear(signals, f"{POOL}.kv_proj", x)
        x = layer_norm(signals, f"{POOL}.ln_kv", x, EPS)
        query = layer_norm(signals, f"{POOL}.ln_q", signals[f"{POOL}.query"], EPS) + at
        key = x + pool(bicubic((self.side, self.side), raster(site)), at)
        out = multihead(signals, f"{POOL}.attn", query.unsqueeze(0), key, x, self.heads)
        return layer_norm(signals, "ln_post", out, EPS) @ signals["proj"]


METHOD = QwenResampler
